//! Flow tables that fill up: by one of several services, and by a single one.

use std::{net::TcpStream, time::Duration};

use anyhow::{Context as _, Result, ensure};

use crate::{
    lab::{Body, Lab, VIP4, Wiring, service},
    serve,
    talk::{Talk, talk_tcp},
    vip,
};

/// Flows that the tables of these tests are made for.
const RATED: usize = 64;

fn head(lab: &Lab, more: &str) -> String {
    lab.head(&format!(
        "[vips.lab]\naddress = \"{VIP4}\"\n[limits]\nflows4 = {RATED}\nflows6 = {RATED}\n{more}\n"
    ))
}

fn faults(status: &serde_json::Value) -> Vec<&str> {
    let faults = status["faults"].as_array().into_iter().flatten();
    faults.filter_map(serde_json::Value::as_str).collect()
}

#[test]
fn a_service_at_its_share_is_told_of_and_hurts_no_other() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Native, 2)?;
    let servers = serve(&lab, false, false)?;
    let greedy = service("greedy", "80/tcp", "", &servers);
    let modest = service("modest", "81/tcp", "", &servers);
    let config = head(&lab, "flow-share = 25") + &greedy + &modest;
    let mut weir = lab.start(&config)?;
    // Counts that the sweep before has seen: only what is refused from now on is news.
    weir.await_status("swept", |status| {
        status["flow_tables"][0]["rated"].as_u64() == Some(RATED as u64)
    })?;
    let mut talks: Vec<Talk> = (0..RATED / 4)
        .map(|_| lab.client.run(|| Talk::open(vip(false, 80))))
        .collect::<Result<_>>()
        .with_context(|| weir.explain())?;
    let one_more = || {
        let patience = Duration::from_millis(200);
        lab.client
            .run(|| TcpStream::connect_timeout(&vip(false, 80), patience))
    };
    ensure!(one_more().is_err(), "one more than its share: {}", weir.explain());
    talk_tcp(&lab.client, vip(false, 81), 1000).with_context(|| weir.explain())?;
    weir.await_status("told of the service", |status| {
        faults(status).iter().any(|fault| {
            [
                "service greedy",
                "the 16 ",
                "`limits.flow-share`",
                "limits.flows4",
            ]
            .iter()
            .all(|word| fault.contains(word))
        })
    })?;
    ensure!(
        weir.log().matches("service greedy").count() == 1,
        "{}",
        weir.log()
    );
    for talk in &mut talks {
        talk.say(10)?;
    }
    // A single service takes nothing from others.
    weir.configure(&(head(&lab, "flow-share = 25") + &greedy))?;
    weir.await_dump("without a share", |dump| dump.settings.flow_share == [0; 2])?;
    lab.client
        .run(|| Talk::open(vip(false, 80))?.say(10))
        .with_context(|| weir.explain())
}

#[test]
fn a_table_that_fills_up_is_told_of_until_it_has_room_again() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Native, 2)?;
    let servers = serve(&lab, false, false)?;
    let mut weir = lab.start(&(head(&lab, "") + &service("one", "80/tcp", "", &servers)))?;
    let most = RATED * 4 / 5 + 1;
    let talks: Vec<Talk> = (0..most)
        .map(|_| lab.client.run(|| Talk::open(vip(false, 80))))
        .collect::<Result<_>>()
        .with_context(|| weir.explain())?;
    let is_told = |status: &serde_json::Value| {
        let told = |fault: &&str| fault.contains("flow table of IPv4") && fault.contains("limits.flows4");
        faults(status).iter().any(told)
    };
    weir.await_status("told of the table", is_told)?;
    let status = weir.status()?;
    assert_eq!(status["flow_tables"][0]["established"], most, "{status:#}");
    assert_eq!(status["flow_tables"][0]["half_open"], 0, "{status:#}");
    drop(talks);
    weir.await_status("well again", |status| !is_told(status))?;
    ensure!(
        weir.log().matches("flow table of IPv4").count() == 2,
        "once when it comes and once when it goes: {}",
        weir.log()
    );
    Ok(())
}
