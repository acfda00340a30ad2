//! The ways between nodes, etcd and the balancer fail; connections do not.

use std::time::{Duration, Instant};

use super::*;

/// Time in which every lease of three seconds is over, and then some.
const LONG: Duration = Duration::from_secs(8);

/// Keeps the load going for so long: nobody says that nothing happens.
fn endure(load: &Load, time: Duration) -> Result<()> {
    let until = Instant::now() + time;
    while Instant::now() < until {
        load.await_more(20)?;
    }
    let report = load.report();
    anyhow::ensure!(report.failures.is_empty(), "{report:?}");
    Ok(())
}

#[test]
fn a_node_that_is_cut_off_from_etcd_keeps_its_connections() -> Result<()> {
    let site = site()?;
    let etcd = Etcd::start(&site.node, STORE, 1)?;
    let (one, two) = (Machine::new(&site, 1)?, Machine::new(&site, 2)?);
    let _publishing = [one.publish(&etcd, "")?, two.publish(&etcd, "")?];
    let mut weir = Weir::start_with(&site.node, "off", &config(&etcd, 2, ""))?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    let load = Load::start(&site.client, vip(80), 3, 4);
    let mut old = talks(&site, &["web-1", "web-2"])?;
    two.cut()?;
    await_serving(&mut weir, &["web-1"])?;
    for talk in &mut old {
        talk.say()?;
    }
    two.mend()?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    for talk in &mut old {
        talk.say()?;
    }
    load.await_more(200)?;
    assert_eq!(load.stop().failures, [""; 0]);
    Ok(())
}

#[test]
fn etcd_may_be_down_for_longer_than_every_lease_and_be_wiped() -> Result<()> {
    let site = site()?;
    let mut etcd = Etcd::start(&site.node, STORE, 1)?;
    let (one, two) = (Machine::new(&site, 1)?, Machine::new(&site, 2)?);
    let _publishing = [one.publish(&etcd, "")?, two.publish(&etcd, "")?];
    let mut weir = Weir::start_with(&site.node, "off", &config(&etcd, 2, ""))?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    let load = Load::start(&site.client, vip(80), 3, 4);
    load.await_more(100)?;

    etcd.kill(0);
    weir.await_status("without etcd", |status| {
        source(status, "nodes").is_some_and(|source| source["connected"] == false)
    })?;
    endure(&load, LONG)?;
    // An agent that starts now knows what the last one knew.
    weir.kill();
    weir.run()?;
    assert_eq!(
        lb_tests::site::serving(&weir.status()?),
        names(&["web-1", "web-2"])
    );
    endure(&load, Duration::from_secs(1))?;
    etcd.run_all()?;
    weir.await_status("with etcd", |status| {
        source(status, "nodes").is_some_and(|source| source["connected"] == true)
    })?;
    endure(&load, LONG)?;
    assert_eq!(
        lb_tests::site::serving(&weir.status()?),
        names(&["web-1", "web-2"])
    );

    // Another cluster with nothing in it: nodes publish anew, and nothing changes until they have.
    etcd.wipe()?;
    two.engine
        .container("web-3", &["--label", LABEL, "-p", "18083:8080"])?;
    await_serving(&mut weir, &["web-1", "web-2", "web-3"])?;
    load.await_more(200)?;
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{report:?}");
    Ok(())
}

#[test]
fn nodes_that_lose_etcd_together_stay_for_a_time_and_a_bad_key_harms_only_itself() -> Result<()> {
    let site = site()?;
    let etcd = Etcd::start(&site.node, STORE, 1)?;
    let (one, two) = (Machine::new(&site, 1)?, Machine::new(&site, 2)?);
    let _publishing = [one.publish(&etcd, "")?, two.publish(&etcd, "")?];
    let mut weir = Weir::start_with(&site.node, "off", &config(&etcd, 2, "keep = \"20s\"\n"))?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    etcd.put("/weir/nodes/n9/containers/abc", "nonsense")?;
    etcd.put("/weir/nodes/n9/node", "{\"addresses\": [\"203.0.113.77\"]}")?;
    etcd.put("/weir/nodes/colour", "red")?;
    weir.await_status("told of the bad keys", |status| {
        let refused = status["rejections"].to_string();
        refused.contains("container abc") && refused.contains("/weir/nodes/colour")
    })?;
    etcd.ctl(&["del", "--prefix", "/weir/nodes/n9/"], "")?;

    let load = Load::start(&site.client, vip(80), 3, 2);
    for machine in [&one, &two] {
        machine.cut()?;
    }
    weir.await_status("holding both", |status| {
        let held = source(status, "nodes")
            .is_some_and(|source| source["fault"].to_string().contains("lost together"));
        held && lb_tests::site::serving(status) == names(&["web-1", "web-2"])
    })?;
    for machine in [&one, &two] {
        machine.mend()?;
    }
    weir.await_status("hearing both", |status| {
        source(status, "nodes").is_some_and(|source| source["fault"].is_null())
            && lb_tests::site::serving(status) == names(&["web-1", "web-2"])
    })?;
    load.await_more(100)?;
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{report:?}");
    // Cut for good: they drain when the time is over.
    for machine in [&one, &two] {
        machine.cut()?;
    }
    await_serving(&mut weir, &[])
}
