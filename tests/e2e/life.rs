//! What happens to a container, and what its clients see of it.

use anyhow::Result;
use lb_tests::{
    docker::Engine,
    load::{Load, Talk},
    site::{LABEL, Site, backends, vip},
};

use super::{await_serving, names, start, who_answers};

#[test]
fn an_unhealthy_container_leaves_the_ring_and_returns() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    let mut weir = start(&site, &engine, 1)?;
    // The image has no shell, which `--health-cmd` would need: a health check of words has to come with the image.
    let check = "HEALTHCHECK --interval=1s --retries=1 CMD [\"/server\", \"tell\", \"health\"]";
    engine.docker(&["commit", "-c", check, "web-1", "weir/checked"])?;
    engine.docker(&["run", "-d", "--name", "web-2", "-e", "NAME=web-2", "weir/checked"])?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    engine.tell("web-2", "sick")?;
    await_serving(&mut weir, &["web-1"])?;
    assert_eq!(who_answers(&site)?, names(&["web-1"]));
    engine.tell("web-2", "well")?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    assert_eq!(who_answers(&site)?, names(&["web-1", "web-2"]));
    Ok(())
}

#[test]
fn a_paused_container_gets_no_new_flows_and_keeps_its_old_ones() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    let mut weir = start(&site, &engine, 1)?;
    let mut old = site.client.run(|| Talk::open(vip(80)))?;
    let first = old.say()?;
    engine.container("web-2", &["--label", LABEL])?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    engine.docker(&["pause", "web-1"])?;
    await_serving(&mut weir, &["web-2"])?;
    assert_eq!(who_answers(&site)?, names(&["web-2"]));
    engine.docker(&["unpause", "web-1"])?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    assert_eq!(old.say()?, first);
    assert_eq!(who_answers(&site)?, names(&["web-1", "web-2"]));
    Ok(())
}

#[test]
fn a_stopping_container_finishes_its_connections_and_gets_no_new_ones() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    let mut weir = start(&site, &engine, 1)?;
    let mut old = site.client.run(|| Talk::open(vip(80)))?;
    let first = old.say()?;
    engine.container("web-2", &["--label", LABEL])?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    let mut stop = engine.command();
    stop.args(["stop", "--time", "60", "web-1"])
        .stdout(std::process::Stdio::null());
    let mut stop = lb_tests::guard::Guard::spawn(&mut stop)?;
    await_serving(&mut weir, &["web-2"])?;
    // It has its signal and waits for its client, who is served on while all others go elsewhere.
    assert_eq!(who_answers(&site)?, names(&["web-2"]));
    assert_eq!(old.say()?, first);
    assert!(
        stop.wait(std::time::Duration::ZERO)?.is_none(),
        "web-1 waits for us"
    );
    let status = weir.status()?;
    let draining = backends(&status)
        .find(|b| b["name"] == "web-1")
        .map(|b| &b["state"]);
    assert_eq!(draining, Some(&"draining".into()), "{status:#}");
    drop(old);
    // Now it ends by itself, long before Docker would kill it.
    let ended = stop.wait(std::time::Duration::from_secs(30))?;
    assert!(ended.is_some_and(|status| status.success()), "{ended:?}");
    Ok(())
}

#[test]
fn a_killed_container_costs_its_open_connections_and_nothing_else() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    let mut weir = start(&site, &engine, 2)?;
    let workers = 4;
    let load = Load::start(&site.client, vip(80), workers, 0);
    load.await_more(100)?;
    engine.docker(&["kill", "web-1"])?;
    await_serving(&mut weir, &["web-2"])?;
    load.await_more(100)?;
    load.await_more(100)?;
    let report = load.stop();
    // A worker has one connection at a time: only that one can have been in the container when it died.
    assert!(report.failures.len() <= workers, "{report:?}");
    assert!(
        !report.failures.iter().any(|f| f.starts_with("connect")),
        "{report:?}"
    );
    assert_eq!(who_answers(&site)?, names(&["web-2"]));
    Ok(())
}

#[test]
fn a_restart_under_load_fails_nothing() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    let mut weir = start(&site, &engine, 2)?;
    let load = Load::start(&site.client, vip(80), 4, 0);
    load.await_more(100)?;
    engine.docker(&["restart", "web-1"])?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    load.await_more(200)?;
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{report:?}");
    assert_eq!(who_answers(&site)?, names(&["web-1", "web-2"]));
    Ok(())
}

#[test]
fn a_renamed_container_is_shown_by_its_new_name() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    let mut weir = start(&site, &engine, 1)?;
    let mut old = site.client.run(|| Talk::open(vip(80)))?;
    let first = old.say()?;
    engine.docker(&["rename", "web-1", "shop"])?;
    await_serving(&mut weir, &["shop"])?;
    assert_eq!(old.say()?, first);
    // The server goes on calling itself what it was called at its start.
    assert_eq!(who_answers(&site)?, names(&["web-1"]));
    Ok(())
}
