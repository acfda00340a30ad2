//! The sampled event stream, and an agent with no more rights than the unit file leaves it.

use std::{
    io::{BufRead as _, BufReader},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use lb_tests::weir::Weir;

use crate::{
    lab::{Body, Lab, VIP4, Wiring, service},
    serve,
    talk::{PATIENCE, talk_tcp},
    vip,
};

#[test]
fn new_flows_are_told_to_who_listens() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Native, 1)?;
    let servers = serve(&lab, false, false)?;
    let head = lab.head(&format!(
        "[events]\nsample = 1\n[vips.lab]\naddress = \"{VIP4}\"\n"
    ));
    let weir = lab.start(&(head + &service("web", "80/tcp", "", &servers)))?;
    let mut events = weir.follow(&["events", "--json"])?;
    let (send, lines) = mpsc::channel();
    let output = events.stdout().context("its output")?;
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(std::io::Result::ok) {
            if send.send(line).is_err() {
                break;
            }
        }
    });
    // Nothing tells when the reader is connected: connections are made until one is told of.
    let until = Instant::now() + PATIENCE;
    let line = loop {
        talk_tcp(&lab.client, vip(false, 80), 10).with_context(|| weir.explain())?;
        match lines.recv_timeout(Duration::from_millis(50)) {
            Ok(line) => break line,
            Err(_) if Instant::now() < until => {}
            Err(_) => bail!("no event: {}", weir.explain()),
        }
    };
    let event: serde_json::Value = serde_json::from_str(&line).with_context(|| line.clone())?;
    assert_eq!(event["kind"], "new_flow", "{line}");
    assert_eq!(event["service"], "web", "{line}");
    assert_eq!(event["vip"], format!("{VIP4}:80"), "{line}");
    assert!(
        event["client"]
            .as_str()
            .is_some_and(|client| client.starts_with("192.0.2.10:")),
        "{line}"
    );
    assert!(
        event["backend"]
            .as_str()
            .is_some_and(|backend| backend.contains(&servers[0].to_string())),
        "{line}"
    );
    Ok(())
}

#[test]
fn the_capabilities_of_the_unit_file_are_enough() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Native, 2)?;
    let servers = serve(&lab, false, false)?;
    let vips = format!("[vips.lab]\naddress = \"{VIP4}\"\nannounce = \"address\"\ninterface = \"c0\"\n");
    let config = lab.head(&vips) + &service("web", "80/tcp", "", &servers);
    let unit = include_str!("../../deploy/weir.service");
    let granted = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .context("the unit's capabilities")?;
    let mut weir = Weir::start_confined(&lab.node, Body::Native.xdp_in_status(), &config, granted)?;
    talk_tcp(&lab.client, vip(false, 80), 1000).with_context(|| weir.explain())?;
    // Adoption, the sweep and the VIP's announcement too.
    weir.kill();
    talk_tcp(&lab.client, vip(false, 80), 1000)?;
    weir.run()?;
    talk_tcp(&lab.client, vip(false, 80), 1000).with_context(|| weir.explain())?;
    let status = weir.status()?;
    assert_eq!(status["faults"], serde_json::json!([]), "{}", weir.explain());
    Ok(())
}
