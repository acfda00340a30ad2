//! Parts fail; traffic goes on.

use anyhow::Result;
use lb_tests::{
    docker::Engine,
    load::Load,
    site::{LABEL, Site, serving, vip},
    weir::Weir,
};
use nix::sys::signal::Signal;

use super::{await_serving, names, start, who_answers};

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
