//! Somebody sets the node's clock.

use anyhow::Result;
use lb_tests::{
    docker::Engine,
    load::Load,
    site::{LABEL, Site, backends, vip},
    weir::Weir,
};
use serde_json::Value;

use super::{await_serving, names};

/// When the maps last changed, in the agent's own time.
fn last_commit(weir: &Weir<'_>) -> Result<i64> {
    let status = weir.status()?;
    Ok(status["last_commit"]["secs_since_epoch"].as_i64().unwrap_or(0))
}

/// Clients that stay, on a backend that drains until long after the jumps, and clients that come all the time: no jump of the
/// clock in either direction costs any of them anything, and what changes is heard and programmed as ever.
#[test]
fn a_clock_that_jumps_costs_nobody_a_connection() -> Result<()> {
    const DAY: i64 = 24 * 3600;
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    for name in ["web-1", "web-2"] {
        engine.container(name, &["--label", LABEL])?;
    }
    let mut weir = Weir::start_by_own_clock(&site.node, &site.config(&engine))?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    let true_time = last_commit(&weir)?;
    let load = Load::start(&site.client, vip(80), 2, 8);
    load.await_more(200)?;
    assert_eq!(
        weir.cli(&["drain", "web-1", "--deadline", "1h"])?.status.code(),
        Some(0)
    );
    await_serving(&mut weir, &["web-2"])?;
    let drains = |status: &Value| {
        backends(status).any(|backend| backend["name"] == "web-1" && !backend["drain_deadline"].is_null())
    };
    assert!(drains(&weir.status()?));

    for (offset, days, name) in [("+400d", 400, "web-3"), ("-400d", -400, "web-4")] {
        weir.set_clock(offset)?;
        load.await_more(300)?;
        engine.container(name, &["--label", LABEL])?;
        let all = ["web-2", "web-3", "web-4"];
        let now = if days > 0 { &all[..2] } else { &all[..] };
        await_serving(&mut weir, now)?;
        let jumped = last_commit(&weir)? - true_time;
        assert!(
            (jumped - days * DAY).abs() < DAY,
            "the clock did not jump: {jumped} s"
        );
        assert!(drains(&weir.status()?), "{name}");
        // The next agent finds another time of day than the one before it left.
        weir.kill();
        weir.set_clock(if days > 0 { "+800d" } else { "+0" })?;
        weir.run()?;
        await_serving(&mut weir, now)?;
        assert!(drains(&weir.status()?), "{name}, after a restart");
        load.await_more(300)?;
    }
    let before = load.report();
    load.await_more(300)?;
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{report:?}");
    // Those that stay are where they were, on the draining one too.
    let served = report.since(&before);
    assert!(served["web-1"] > 0, "{served:?}");
    assert_eq!(
        served.into_keys().collect::<std::collections::BTreeSet<_>>(),
        names(&["web-1", "web-2", "web-3", "web-4"])
    );
    Ok(())
}
