//! Parts fail; traffic goes on.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use bollard::query_parameters::{KillContainerOptions, StartContainerOptions, WaitContainerOptions};
use futures_util::{StreamExt as _, future::try_join_all};
use lb_tests::{
    docker::Engine,
    load::Load,
    site::{LABEL, Site, VIP, backends, serving, vip},
    weir::Weir,
};
use nix::sys::signal::Signal;

use super::{
    await_serving,
    engines::{self, DOCKER_PORT, Machine, PUBLISHED},
    names, start, who_answers,
};

/// `docker.liveness` of an engine that falls silent here, and as the configuration has it.
const LIVENESS: (Duration, &str) = (Duration::from_secs(2), "liveness = \"2s\"");
/// What may pass besides: the ping that nobody answers (5 s), and what a busy machine of two cores takes.
const NOTICED: Duration = Duration::from_secs(9);

/// Whether the agent is in touch with the engine.
fn connected(status: &serde_json::Value) -> bool {
    let sources = status["sources"].as_array().into_iter().flatten();
    sources
        .filter(|source| source["name"] == "docker")
        .any(|source| source["connected"] == true)
}

#[test]
fn a_listener_closed_behind_dockers_back_costs_nobody_a_connection() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    let mut weir = start(&site, &engine, 2)?;
    engine.tell("web-1", "close")?;
    // Docker sees a running container, so it stays in the ring: half of the SYNs go there and are refused.
    let load = Load::start(&site.client, vip(80), 8, 0);
    load.await_more(200)?;
    assert_eq!(serving(&weir.status()?), names(&["web-1", "web-2"]));
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{report:?}");
    assert_eq!(report.served.keys().cloned().collect::<Vec<_>>(), ["web-2"]);
    // Not by luck: SYNs were refused, the refusal was kept from the client, the next SYN went to the other one.
    let node = &weir.counters()?["node"];
    for counter in ["refusals_hidden", "resteered"] {
        assert!(node[counter].as_u64() > Some(0), "{counter}: {node:#}");
    }
    engine.tell("web-1", "open")?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    assert_eq!(who_answers(&site)?, names(&["web-1", "web-2"]));
    Ok(())
}

#[test]
fn without_its_engine_containers_serve_on() -> Result<()> {
    let site = Site::new()?;
    let mut engine = Engine::start(&site.node, &["--live-restore"])?;
    let mut weir = start(&site, &engine, 2)?;
    let load = Load::start(&site.client, vip(80), 2, 2);
    load.await_more(100)?;
    engine.stop(Signal::SIGKILL)?;
    weir.await_status("without Docker", |status| !connected(status))?;
    load.await_more(300)?;
    assert_eq!(serving(&weir.status()?), names(&["web-1", "web-2"]));
    engine.run()?;
    weir.await_status("with Docker again", connected)?;
    load.await_more(300)?;
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{report:?}");
    // What comes after is heard of.
    engine.container("web-3", &["--label", LABEL])?;
    await_serving(&mut weir, &["web-1", "web-2", "web-3"])
}

#[test]
fn containers_that_restart_with_their_engine_are_found_again() -> Result<()> {
    let site = Site::new()?;
    let mut engine = Engine::start(&site.node, &[])?;
    for name in ["web-1", "web-2"] {
        engine.container(name, &["--restart", "always", "--label", LABEL])?;
    }
    let mut weir = Weir::start(&site.node, &site.config(&engine))?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    engine.stop(Signal::SIGTERM)?;
    weir.await_status("without Docker", |status| !connected(status))?;
    engine.run()?;
    weir.await_status("with Docker again", connected)?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    assert_eq!(who_answers(&site)?, names(&["web-1", "web-2"]));
    Ok(())
}

#[test]
fn without_the_agent_traffic_goes_on_and_a_new_one_takes_over() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    let mut weir = start(&site, &engine, 2)?;
    let load = Load::start(&site.client, vip(80), 2, 2);
    load.await_more(100)?;
    weir.kill();
    load.await_more(300)?;
    // One comes and one goes while nobody looks.
    engine.container("web-3", &["--label", LABEL])?;
    load.await_more(100)?;
    weir.run()?;
    await_serving(&mut weir, &["web-1", "web-2", "web-3"])?;
    load.await_more(300)?;
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{report:?}");
    assert_eq!(
        report.served.keys().cloned().collect::<Vec<_>>(),
        ["web-1", "web-2", "web-3"]
    );
    Ok(())
}

#[test]
fn an_engine_that_stops_for_long_is_noticed_and_costs_nobody_a_connection() -> Result<()> {
    // Several times liveness and ping (7 s) and the deadline of any question (10 s) one after the other: every wait of the
    // agent ends in the middle of it, and its tries to connect again come to their longest pause.
    const STOPPED: Duration = Duration::from_secs(60);
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    for name in ["web-1", "web-2"] {
        engine.container(name, &["--label", LABEL])?;
    }
    let config = format!("{}{}\n", site.config(&engine), LIVENESS.1);
    let mut weir = Weir::start(&site.node, &config)?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    let load = Load::start(&site.client, vip(80), 4, 4);
    load.await_more(200)?;
    engine.signal(Signal::SIGSTOP)?;
    let stopped = Instant::now();
    weir.await_status("without Docker", |status| !connected(status))?;
    let noticed = stopped.elapsed();
    ensure!(noticed < LIVENESS.0 + NOTICED, "noticed after {noticed:?}");
    while stopped.elapsed() < STOPPED {
        load.await_more(50)?;
        ensure!(load.report().failures.is_empty(), "{:?}", load.report());
    }
    let status = weir.status()?;
    ensure!(!connected(&status), "nobody answers: {status:#}");
    assert_eq!(serving(&status), names(&["web-1", "web-2"]));
    engine.signal(Signal::SIGCONT)?;
    weir.await_status("with Docker again", connected)?;
    // What comes after is heard of.
    engine.container("web-3", &["--label", LABEL])?;
    await_serving(&mut weir, &["web-1", "web-2", "web-3"])?;
    load.await_more(200)?;
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{report:?}");
    Ok(())
}

#[test]
fn a_connection_to_an_engine_that_is_cut_without_a_word_is_noticed() -> Result<()> {
    let files = tempfile::tempdir()?;
    let files = files.path();
    let site = Site::new()?;
    let authority = engines::authority(files)?;
    let there = Machine::new(&site, 2, &authority, files)?;
    there
        .engine
        .container("web-1", &["--label", LABEL, "-p", PUBLISHED])?;
    let config = format!(
        "interfaces = [\"uplink\", \"m2\"]\n[vips.web]\naddress = \"{VIP}\"\n{}",
        there.section("there", files, "ca.pem", LIVENESS.1)
    );
    let mut weir = Weir::start_with(&site.node, "off", &config)?;
    await_serving(&mut weir, &["web-1"])?;
    let heard = |status: &serde_json::Value| {
        engines::source(status, "there").is_some_and(|source| source["connected"] == true)
    };
    let load = Load::start(&site.client, vip(80), 2, 2);
    load.await_more(100)?;
    // Both directions, by programs on both ends: neither side gets a FIN, a RST or an ICMP error.
    let holes = [
        site.node.black_hole("m2", DOCKER_PORT)?,
        there.namespace.black_hole("eth0", DOCKER_PORT)?,
    ];
    let cut = Instant::now();
    weir.await_status("without Docker", |status| !heard(status))?;
    let noticed = cut.elapsed();
    ensure!(noticed < LIVENESS.0 + NOTICED, "noticed after {noticed:?}");
    // The engine goes on meanwhile, unheard.
    there
        .engine
        .container("web-2", &["--label", LABEL, "-p", "18082:8080"])?;
    load.await_more(200)?;
    assert_eq!(serving(&weir.status()?), names(&["web-1"]));
    drop(holes);
    weir.await_status("with Docker again", heard)?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    load.await_more(100)?;
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{report:?}");
    Ok(())
}

#[test]
fn an_agent_that_starts_without_docker_takes_over_what_serves() -> Result<()> {
    let site = Site::new()?;
    let mut engine = Engine::start(&site.node, &["--live-restore"])?;
    for name in ["web-1", "web-2"] {
        engine.container(name, &["--label", LABEL])?;
    }
    // Nothing is held back for long: what is not given up by then is not given up for this.
    let config = format!("{}[startup]\nwait = \"2s\"\n", site.config(&engine));
    let mut weir = Weir::start(&site.node, &config)?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    let load = Load::start(&site.client, vip(80), 2, 2);
    load.await_more(100)?;
    weir.kill();
    engine.stop(Signal::SIGKILL)?;
    load.await_more(100)?;
    // Ready when the waiting time is over, long before the engine is back.
    weir.run()?;
    let status = weir.status()?;
    ensure!(!connected(&status), "the engine is dead: {status:#}");
    load.await_more(500)?;
    let dump = weir.dump()?;
    ensure!(dump.services.len() == 1, "the service is gone: {dump:#?}");
    assert_eq!(who_answers(&site)?, names(&["web-1", "web-2"]));
    engine.run()?;
    weir.await_status("with Docker again", connected)?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    // And what ends from now on, ends.
    load.await_more(100)?;
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{report:?}");
    engine.docker(&["rm", "-f", "web-2"])?;
    await_serving(&mut weir, &["web-1"])
}

#[test]
fn a_thousand_starts_and_stops_leave_what_docker_has_and_harm_nobody() -> Result<()> {
    const CHANGES: u32 = 1000;
    const HANDS: u32 = 8;
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    let mut weir = start(&site, &engine, 2)?;
    let churn = "weir.service.churn.listen=81/tcp";
    for hand in 0..HANDS {
        engine.container(&format!("churn-{hand}"), &["--label", churn])?;
    }
    let load = Load::start(&site.client, vip(80), 4, 4);
    load.await_more(100)?;
    let (begun, changes) = (Instant::now(), AtomicU32::new(0));
    let next = || changes.fetch_add(1, Ordering::Relaxed) < CHANGES;
    tokio::runtime::Runtime::new()?.block_on(async {
        let api = engine.api()?.negotiate_version().await?;
        let hands = (0..HANDS).map(|hand| {
            let (api, next, name) = (&api, &next, format!("churn-{hand}"));
            async move {
                while next() {
                    api.kill_container(&name, None::<KillContainerOptions>).await?;
                    // A kill is done when the signal is sent; a container starts when it has ended.
                    let mut ended = api.wait_container(&name, None::<WaitContainerOptions>);
                    while ended.next().await.is_some() {}
                    if next() {
                        api.start_container(&name, None::<StartContainerOptions>).await?;
                    }
                }
                anyhow::Ok(())
            }
        });
        try_join_all(hands).await
    })?;
    let took = begun.elapsed();
    // Shown by --nocapture; what a machine reaches is its own affair.
    println!("{CHANGES} starts and stops in {took:.1?}");
    let running = engine.docker(&["ps", "--filter", "name=churn", "--format", "{{.Names}}"])?;
    let mut wanted: BTreeMap<String, String> = BTreeMap::new();
    for name in running.lines().chain(["web-1", "web-2"]) {
        wanted.insert(name.to_owned(), format!("{}:8080", engine.address(name)?));
    }
    weir.await_status(&format!("as Docker has it: {wanted:?}"), |status| {
        let serving = backends(status).filter(|backend| backend["ring_share"].as_u64() > Some(0));
        let found: BTreeMap<String, String> = serving
            .filter_map(|b| Some((b["name"].as_str()?.to_owned(), b["address"].as_str()?.to_owned())))
            .collect();
        found == wanted
    })?;
    load.await_more(100)?;
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{report:?}");
    Ok(())
}
