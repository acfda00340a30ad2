//! The reference architecture's voting application: its Compose file, its labels, its scaling, through real Compose. Small
//! programs of our own stand in for the five, under the names of their images.

use std::{collections::BTreeSet, net::SocketAddr};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{docker::Engine, site::Site, weir::Weir};
use serde_json::Value;

const VOTE: &str = "vote.myenterprise.com";
const RESULTS: &str = "results.myenterprise.com";
/// Images of the Compose file, and the ports that the programs in them listen on.
const IMAGES: &[(&str, u16)] = &[
    ("docker/example-voting-app-voting-app", 80),
    ("docker/example-voting-app-result-app", 80),
    ("docker/example-voting-app-worker", 8080),
    ("redis", 6379),
    ("postgres:9.4", 5432),
];

/// The upstreams of a host that are active, as the agent's status tells them.
fn upstreams(status: &Value, host: &str) -> Vec<Value> {
    let routes = status["routes"].as_array().into_iter().flatten();
    routes
        .filter(|route| route["host"] == host && route["path"] == "/")
        .flat_map(|route| route["upstreams"].as_array().into_iter().flatten())
        .filter(|upstream| upstream["state"] == "active")
        .cloned()
        .collect()
}

fn await_upstreams(weir: &mut Weir<'_>, voting: usize) -> Result<()> {
    weir.await_status(&format!("routed to {voting} voting-app containers"), |status| {
        let total = status["routes"].as_array().map_or(0, Vec::len);
        total == 2 && upstreams(status, VOTE).len() == voting && upstreams(status, RESULTS).len() == 1
    })
}

/// Who answers at the upstreams of the vote: every address is tried as the shim would use it.
fn answers(site: &Site, weir: &Weir<'_>) -> Result<BTreeSet<String>> {
    upstreams(&weir.status()?, VOTE)
        .iter()
        .map(|upstream| {
            let address: SocketAddr = upstream["address"].as_str().context("an address")?.parse()?;
            ensure!(
                address.port() == 80,
                "the port that the Compose file publishes: {address}"
            );
            let name = upstream["name"].as_str().unwrap_or_default();
            ensure!(
                name.starts_with("voting") && name.contains("voting-app"),
                "{name}"
            );
            Ok(site.node.talk(address)?.server)
        })
        .collect()
}

#[test]
fn the_voting_application_is_routed_and_scaled_as_it_is() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    for (image, port) in IMAGES {
        engine.image(image, *port)?;
    }
    let mut weir = Weir::start(&site.node, &site.config(&engine))?;
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/e2e/voting/docker-compose.yml");
    let compose = |words: &[&str]| engine.compose(file, "voting", words);

    compose(&["up", "-d"])?;
    await_upstreams(&mut weir, 1)?;
    // Its parts find each other by the names of the Compose file, which Docker resolves.
    let worker = compose(&["ps", "-q", "worker"])?;
    for name in ["redis:6379", "db:5432", "voting-app:80", "result-app:80"] {
        engine.docker(&["exec", &worker, "/server", "ask", name])?;
    }
    engine.docker(&["exec", "redis", "/server", "ask", "workers:8080"])?;

    compose(&["scale", "voting-app=10"])?;
    await_upstreams(&mut weir, 10)?;
    assert_eq!(answers(&site, &weir)?.len(), 10);
    let output = weir.cli(&["status"])?;
    let text = String::from_utf8_lossy(&output.stdout);
    for line in [
        "route vote.myenterprise.com/  10 of 10 upstreams active  waiting for the L7 shim",
        "route results.myenterprise.com/  1 of 1 upstreams active  waiting for the L7 shim",
    ] {
        assert!(text.contains(line), "{line:?} is missing in:\n{text}");
    }

    // One more container with a label that means nothing: it is refused by name and harms nobody.
    engine.container(
        "bad",
        &[
            "--label",
            "interlock.hostname=vote",
            "--label",
            "interlock.port=http",
        ],
    )?;
    weir.await_status("with one rejection", |status| {
        status["rejections"].as_array().is_some_and(|all| {
            all.len() == 1
                && all[0]["object"]
                    .as_str()
                    .is_some_and(|o| o.contains("label interlock.port"))
        })
    })?;
    assert_eq!(upstreams(&weir.status()?, VOTE).len(), 10);

    compose(&["scale", "voting-app=2"])?;
    await_upstreams(&mut weir, 2)?;
    assert_eq!(answers(&site, &weir)?.len(), 2);
    compose(&["down", "--volumes"])?;
    weir.await_status("without routes", |status| {
        status["routes"].as_array().is_some_and(Vec::is_empty)
    })
}
