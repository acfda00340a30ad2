//! Networks from which replies do not come back by themselves, and those that the node does not reach.

use std::io;

use anyhow::{Result, ensure};
use lb_tests::{
    docker::Engine,
    site::{LABEL, Site, serving, vip},
    weir::Weir,
};
use serde_json::Value;

use super::{FLOWS, await_serving, names, who_answers};

/// A check that the agent makes by TCP.
const CHECK: &str = "weir.service.web.check=tcp";

fn network(engine: &Engine, words: &[&str]) -> Result<()> {
    engine.docker(&[&["network", "create"], words].concat()).map(drop)
}

/// Remedies of all rejections.
fn remedies(status: &Value) -> String {
    let rejections = status["rejections"].as_array().into_iter().flatten();
    let words = rejections.filter_map(|rejection| rejection["remedy"].as_str());
    words.collect::<Vec<_>>().join("\n")
}

/// Since Docker 25 an internal network gives its containers no default route: without a source on that network they
/// would be found fit and answer nobody.
#[test]
fn a_container_on_an_internal_network_answers() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    network(&engine, &["--internal", "inner"])?;
    engine.container(
        "web-1",
        &["--network", "inner", "--label", LABEL, "--label", CHECK],
    )?;
    let mut weir = Weir::start(&site.node, &site.config(&engine))?;
    await_serving(&mut weir, &["web-1"])?;
    assert_eq!(who_answers(&site)?, names(&["web-1"]));
    // What its own network alone would not have told: the way back is the engine's word.
    let format = "{{(index .NetworkSettings.Networks \"inner\").Gateway}}";
    let gateway = engine.docker(&["inspect", "-f", format, "web-1"])?;
    let seen = site.client.talk(vip(80))?.client.ip();
    assert_eq!(
        seen == lb_tests::site::client(),
        !gateway.is_empty(),
        "{gateway:?}: {seen}"
    );
    Ok(())
}

/// Packets of clients come by the second network; a strict container answers by its default route alone, and drops them.
#[test]
fn a_strict_container_on_two_networks_answers() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    network(&engine, &["first"])?;
    network(&engine, &["second"])?;
    for (name, strict) in [("web-1", "1"), ("web-2", "0")] {
        let [all, new] = ["all", "default"].map(|which| format!("net.ipv4.conf.{which}.rp_filter={strict}"));
        let own = format!("NAME={name}");
        let words = [
            "create",
            "--name",
            name,
            "-e",
            &own,
            "--network",
            "second",
            "--sysctl",
            &all,
            "--sysctl",
            &new,
            "--label",
            LABEL,
            "--label",
            CHECK,
            "--label",
            "weir.service.web.network=second",
            lb_tests::docker::IMAGE,
        ];
        engine.docker(&words)?;
        engine.docker(&["network", "connect", "first", name])?;
        engine.docker(&["start", name])?;
    }
    let mut weir = Weir::start(&site.node, &site.config(&engine))?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    let mut answered = std::collections::BTreeSet::new();
    for _ in 0..FLOWS {
        let answer = site.client.talk(vip(80))?;
        // Who is not strict sees the client, as on a network of its own.
        let translated = answer.client.ip() != lb_tests::site::client();
        assert_eq!(translated, answer.server == "web-1", "{answer:?}");
        answered.insert(answer.server);
    }
    assert_eq!(answered, names(&["web-1", "web-2"]));
    Ok(())
}

/// The node has no way to these containers but its default route, which leads elsewhere.
#[test]
fn containers_that_the_node_does_not_reach_are_refused_and_nothing_leaves() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    let address = "10.77.0.1";
    site.node.address("uplink", "192.0.2.7/32")?;
    engine.docker(&["swarm", "init", "--advertise-addr", "192.0.2.7"])?;
    network(&engine, &["-d", "overlay", "--attachable", "wide"])?;
    network(
        &engine,
        &[
            "-d",
            "macvlan",
            "--subnet",
            "10.77.0.0/24",
            "--gateway",
            address,
            "-o",
            "parent=uplink",
            "flat",
        ],
    )?;
    network(&engine, &["near"])?;
    let mut weir = Weir::start(&site.node, &site.config(&engine))?;
    for (name, on, says) in [
        ("web-1", "wide", "connect the container to a bridge network"),
        ("web-2", "flat", "connect the container to a bridge network"),
    ] {
        engine.container(name, &["--network", on, "--label", LABEL, "--label", CHECK])?;
        weir.await_status(&format!("refuses {name}"), |status| {
            remedies(status).contains(says)
        })?;
        assert_eq!(serving(&weir.status()?), names(&[]));
        engine.docker(&["network", "connect", "near", name])?;
        engine.docker(&["rm", "-f", name])?;
        weir.await_status("forgets it", |status| remedies(status).is_empty())?;
    }
    // With the remedy they serve.
    let near = "weir.service.web.network=near";
    let own = "NAME=web-3";
    let words = [
        "create",
        "--name",
        "web-3",
        "-e",
        own,
        "--network",
        "flat",
        "--label",
        LABEL,
        "--label",
        near,
    ];
    engine.docker(&[&words[..], &[lb_tests::docker::IMAGE]].concat())?;
    engine.docker(&["network", "connect", "near", "web-3"])?;
    engine.docker(&["start", "web-3"])?;
    await_serving(&mut weir, &["web-3"])?;
    assert_eq!(who_answers(&site)?, names(&["web-3"]));
    Ok(())
}

/// Clients are refused, not left in silence, when the last container has gone, for the next agent too.
#[test]
fn a_service_without_containers_refuses() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    engine.container(
        "web-1",
        &["--label", LABEL, "--label", "weir.service.web.drain=1s"],
    )?;
    // What XDP sends out of a veth arrives only where there is a program, too: TC answers here.
    let mut weir = Weir::start_with(&site.node, "off", &site.config(&engine))?;
    await_serving(&mut weir, &["web-1"])?;
    engine.docker(&["rm", "-f", "web-1"])?;
    let refuses = |status: &Value| {
        let service = &status["services"][0];
        service["kept_until"].is_object() && service["backends"].as_array().is_some_and(Vec::is_empty)
    };
    weir.await_status("a service without containers", refuses)?;
    for round in 0..2 {
        let fault = site
            .client
            .run(|| std::net::TcpStream::connect(vip(80)).map(drop));
        let kind = fault.map_err(|fault| fault.kind());
        ensure!(
            kind == Err(io::ErrorKind::ConnectionRefused),
            "round {round}: {kind:?}\n{}",
            weir.explain()
        );
        weir.kill();
        weir.run()?;
        weir.await_status("the same of the next agent", refuses)?;
    }
    engine.container("web-2", &["--label", LABEL])?;
    await_serving(&mut weir, &["web-2"])?;
    assert_eq!(who_answers(&site)?, names(&["web-2"]));
    Ok(())
}
