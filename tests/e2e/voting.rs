//! The reference architecture's voting application: its Compose file, its labels, its scaling, through real Compose. Small
//! programs of our own stand in for the five, under the names of their images.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use lb_tests::{
    docker::Engine,
    netns::Namespace,
    site::{Site, VIP, http_service, vip},
    weir::Weir,
};
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

/// How long the shim may take to hear of a change.
const PATIENCE: Duration = Duration::from_secs(20);

/// Who answers a request at the VIP, by a connection of its own.
fn fetch(client: &Namespace, host: &str) -> Result<String> {
    Ok(client.fetch(vip(80), host)?.server)
}

/// Waits until this many containers answer at the VIP.
fn await_answers(client: &Namespace, host: &str, containers: usize) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    let mut last = anyhow::anyhow!("nothing tried");
    while Instant::now() < until {
        let round: Result<BTreeSet<String>> = (0..4 * containers).map(|_| fetch(client, host)).collect();
        match round {
            Ok(names) if names.len() == containers => return Ok(()),
            Ok(names) => last = anyhow::anyhow!("{names:?} answer"),
            Err(error) => last = error,
        }
    }
    bail!("not {containers} containers of {host}: {last:#}")
}

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
    let mut weir = Weir::start(&site.node, &(site.config(&engine) + &http_service()))?;
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

    let shown = |line: &str| -> Result<()> {
        let output = weir.cli(&["status"])?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(text.contains(line), "{line:?} is missing in:\n{text}");
        Ok(())
    };
    shown("route vote.myenterprise.com/  1 of 1 upstreams active  waiting for the L7 shim")?;

    // HTTP by the labels alone: client, XDP, shim, container.
    let _shim = weir.start_shim()?;
    for host in [VOTE, RESULTS] {
        await_answers(&site.client, host, 1)?;
    }
    let curl = site
        .client
        .command("curl")
        .args(["-sS", "--resolve", &format!("{VOTE}:80:{VIP}")])
        .arg(format!("http://{VOTE}/"))
        .output()?;
    let text = String::from_utf8_lossy(&curl.stdout).into_owned();
    ensure!(
        curl.status.success() && text.ends_with("GET / HTTP/1.1\n"),
        "{text:?}"
    );
    let nobody = fetch(&site.client, "nobody.myenterprise.com")
        .unwrap_err()
        .to_string();
    ensure!(nobody.starts_with("HTTP/1.1 503 "), "{nobody}");
    shown("route vote.myenterprise.com/  1 of 1 upstreams active  round-robin")?;

    // Containers come and go under load.
    let stop = AtomicBool::new(false);
    let (failures, requests) = std::thread::scope(|scope| -> Result<_> {
        let load = scope.spawn(|| {
            let (mut failures, mut requests) = (Vec::new(), 0);
            while !stop.load(Ordering::Relaxed) {
                requests += 1;
                failures.extend(fetch(&site.client, VOTE).err().map(|e| format!("{e:#}")));
            }
            (failures, requests)
        });
        let scaled = scale(&site, &engine, file, &mut weir);
        stop.store(true, Ordering::Relaxed);
        let report = load.join().map_err(|_| anyhow::anyhow!("the load has failed"))?;
        scaled.map(|()| report)
    })?;
    ensure!(
        failures.is_empty() && requests > 100,
        "{requests} requests, failed: {failures:#?}"
    );
    compose(&["down", "--volumes"])?;
    weir.await_status("without routes", |status| {
        status["routes"].as_array().is_some_and(Vec::is_empty)
    })
}

/// Ten containers of the vote, one more that is wrong, then two.
fn scale(site: &Site, engine: &Engine, file: &str, weir: &mut Weir<'_>) -> Result<()> {
    let compose = |words: &[&str]| engine.compose(file, "voting", words);
    compose(&["scale", "voting-app=10"])?;
    await_upstreams(weir, 10)?;
    ensure!(answers(site, weir)?.len() == 10);
    await_answers(&site.client, VOTE, 10)?;

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
    ensure!(upstreams(&weir.status()?, VOTE).len() == 10);

    compose(&["scale", "voting-app=2"])?;
    await_upstreams(weir, 2)?;
    ensure!(answers(site, weir)?.len() == 2);
    await_answers(&site.client, VOTE, 2)
}
