//! Which containers serve, where they are reached, whom they see.

use std::{net::UdpSocket, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{
    docker::Engine,
    site::{self, LABEL, NODE, Site, vip},
    weir::Weir,
};

use super::{FLOWS, await_serving, names, start, who_answers};

#[test]
fn labelled_containers_serve_and_see_the_client() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    engine.container("other", &[])?;
    let _weir = start(&site, &engine, 3)?;
    assert_eq!(who_answers(&site)?, names(&["web-1", "web-2", "web-3"]));
    for _ in 0..FLOWS {
        // Nothing is published and nothing translates the client: address and port are its own.
        assert_eq!(site.client.talk(vip(80))?.client.ip(), site::client());
    }
    Ok(())
}

#[test]
fn udp_is_answered_from_the_vip() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    let labels = [
        "--label",
        "weir.service.dns.listen=53/udp",
        "--label",
        "weir.service.dns.port=8080",
    ];
    engine.container("dns-1", &labels)?;
    let mut weir = Weir::start(&site.node, &site.config(&engine))?;
    await_serving(&mut weir, &["dns-1"])?;
    for i in 0..FLOWS {
        let (local, answer) = site.client.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_read_timeout(Some(Duration::from_secs(10)))?;
            // A connected socket takes answers from the VIP only.
            socket.connect(vip(53))?;
            socket.send(format!("question-{i}").as_bytes())?;
            let mut answer = [0; 200];
            let length = socket.recv(&mut answer).context("no answer")?;
            let text = String::from_utf8_lossy(&answer[..length]).into_owned();
            anyhow::Ok((socket.local_addr()?, text))
        })?;
        assert_eq!(answer, format!("dns-1 {local} question-{i}\n"));
    }
    Ok(())
}

#[test]
fn a_host_network_container_serves() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    engine.container(
        "host-1",
        &[
            "--network",
            "host",
            "--label",
            LABEL,
            "--label",
            "weir.service.web.port=8080",
        ],
    )?;
    let mut weir = Weir::start(&site.node, &site.config(&engine))?;
    await_serving(&mut weir, &["host-1"])?;
    let status = weir.status()?;
    let address = site::backends(&status).next().context("a backend")?["address"].clone();
    assert_eq!(address, format!("{NODE}:8080"));
    for _ in 0..FLOWS {
        assert_eq!(site.client.talk(vip(80))?.client.ip(), site::client());
    }
    Ok(())
}

#[test]
fn containers_are_clients_too() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    engine.container("guest", &[])?;
    let _weir = start(&site, &engine, 2)?;
    // A neighbour on the same bridge, and a backend that may be sent to itself.
    for from in ["guest", "web-1"] {
        let mut answered = std::collections::BTreeSet::new();
        for _ in 0..FLOWS / 2 {
            let answer = engine
                .docker(&["exec", from, "/server", "ask", &vip(80).to_string()])
                .with_context(|| format!("from {from}; so far answered: {answered:?}"))?;
            let server = answer.split_whitespace().next().context("an answer")?;
            answered.insert(server.to_owned());
        }
        assert_eq!(answered, names(&["web-1", "web-2"]), "asked from {from}");
    }
    Ok(())
}

#[test]
fn the_node_itself_is_a_client_too() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    let _weir = start(&site, &engine, 2)?;
    let mut answered = std::collections::BTreeSet::new();
    for _ in 0..FLOWS {
        answered.insert(site.node.talk(vip(80))?.server);
    }
    assert_eq!(answered, names(&["web-1", "web-2"]));
    Ok(())
}

#[test]
fn a_bad_label_harms_only_itself() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    let mut weir = start(&site, &engine, 1)?;
    engine.container(
        "bad",
        &["--label", LABEL, "--label", "weir.service.web.weight=heavy"],
    )?;
    // Heard after the bad one, so both have been judged when it serves.
    engine.container("web-2", &["--label", LABEL])?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    assert_eq!(who_answers(&site)?, names(&["web-1", "web-2"]));
    let output = weir.cli(&["status"])?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "weir status: {}", output.status);
    for word in ["bad", "weir.service.web.weight", "heavy", "1000"] {
        assert!(text.contains(word), "{word:?} is missing in:\n{text}");
    }
    // Put right, it serves: the same name, as one would redo it.
    engine.docker(&["rm", "-f", "bad"])?;
    engine.container("bad", &["--label", LABEL, "--label", "weir.service.web.weight=1"])?;
    await_serving(&mut weir, &["web-1", "web-2", "bad"])?;
    weir.await_status("without rejections", |status| {
        status["rejections"].as_array().is_some_and(Vec::is_empty)
    })
}
