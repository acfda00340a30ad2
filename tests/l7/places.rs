//! Ports that move while requests are under way.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    time::Instant,
};

use lb_tests::listen::hang_up;
use serde_json::{Value, json};

use super::{
    agent::{Agent, route},
    origin::{Origin, nobody},
    shim::{PATIENCE, Shim},
    updates::Load,
    wire::{Wire, get},
};

/// Settings that listen on loopback: the port of HTTP at two addresses, none of HTTPS.
fn settings(addresses: &[&str], port: u16) -> Value {
    json!({
        "listen": addresses, "http_port": port, "https_port": null, "status_page": "status.test/weir"
    })
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// Waits until nobody listens there.
fn await_refused(address: SocketAddr) {
    let until = Instant::now() + PATIENCE;
    while TcpStream::connect(address).is_ok() {
        assert!(Instant::now() < until, "{address} still listens");
        std::thread::yield_now();
    }
}

/// Waits until the log says that this place is served.
fn await_served(shim: &Shim, address: SocketAddr) {
    shim.await_log("that it serves there", |lines| {
        let is_it = |line: &Value| line["message"] == "serving" && line["address"] == json!(address);
        lines.iter().any(is_it).then_some(())
    });
}

#[test]
fn ports_move_under_load_and_the_one_that_stays_fails_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let (port, other) = (nobody().port(), nobody().port());
    let (stays, moves) = (at("127.0.0.1", port), at("127.0.0.2", port));
    let agent = Agent::start(
        folder.path(),
        &settings(&["127.0.0.1", "127.0.0.2"], port),
        &json!([route("a", &[origin.address])]),
    );
    let shim = Shim::start_with(folder.path(), &[]);
    await_served(&shim, moves);
    let load = Load::start(stays, "a");
    for _ in 0..3 {
        load.more(100);
        let mut open = Wire::connect(moves);
        assert_eq!(open.get("a", "/").status, 200);
        agent.settings(&settings(&["127.0.0.1"], port));
        await_refused(moves);
        // What was connected goes on.
        assert_eq!(open.get("a", "/").status, 200);
        agent.settings(&settings(&["127.0.0.1", "127.0.0.3"], port));
        let until = Instant::now() + PATIENCE;
        while TcpStream::connect(at("127.0.0.3", port)).is_err() {
            assert!(Instant::now() < until, "the new address is not served");
            std::thread::yield_now();
        }
        agent.settings(&settings(&["127.0.0.1", "127.0.0.2"], port));
        await_refused(at("127.0.0.3", port));
        load.more(100);
    }
    let (_, failed) = load.end();
    assert_eq!(failed, [0; 0]);
    // The other setting of a place.
    agent.settings(&settings(&["127.0.0.1"], other));
    await_served(&shim, at("127.0.0.1", other));
    await_refused(stays);
    assert_eq!(get(at("127.0.0.1", other), "a", "/").text(), origin.name());
}

#[test]
fn a_port_that_another_program_has_is_told_and_takes_nothing_away() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let before = nobody();
    let (theirs, free) = (TcpListener::bind("127.0.0.1:0").unwrap(), nobody());
    let routes = json!([route("a", &[origin.address])]);
    let agent = Agent::start(folder.path(), &settings(&["127.0.0.1"], before.port()), &routes);
    let shim = Shim::start_with(folder.path(), &[]);
    await_served(&shim, before);
    let wanted = theirs.local_addr().unwrap();
    agent.settings(&settings(&["127.0.0.1"], wanted.port()));
    shim.await_log("what is wrong", |lines| {
        let is_it = |line: &Value| {
            let text = line["message"].as_str().unwrap_or_default();
            text.contains(&wanted.to_string()) && text.contains("another program has the port")
        };
        lines.iter().any(is_it).then_some(())
    });
    assert_eq!(get(before, "a", "/").status, 200);
    // Whoever looks at the page sees both.
    let until = Instant::now() + PATIENCE;
    loop {
        let page = get(before, "status.test", "/weir/json");
        let report: Value = serde_json::from_slice(&page.body).unwrap();
        let places = report["places"].as_array().unwrap();
        if places.len() == 2 {
            assert_eq!(places[0]["address"], json!(before));
            assert!(places[0]["fault"].is_null() && places[1]["fault"].is_string());
            break;
        }
        assert!(Instant::now() < until, "{report:#}");
    }
    // Another change is another try.
    hang_up(&theirs).unwrap();
    let mut more = settings(&["127.0.0.1"], wanted.port());
    more["https_port"] = json!(free.port());
    agent.settings(&more);
    await_served(&shim, wanted);
    await_refused(before);
    assert_eq!(get(wanted, "a", "/").status, 200);
}

#[test]
fn a_handover_gives_the_places_of_now_and_the_next_process_follows_the_settings_too() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let (one, two, three) = (nobody(), nobody(), nobody());
    let routes = json!([route("a", &[origin.address])]);
    let agent = Agent::start(folder.path(), &settings(&["127.0.0.1"], one.port()), &routes);
    let handover = folder.path().join("handover.sock");
    let arguments = ["--handover", handover.to_str().unwrap()];
    let mut old = Shim::start_with(folder.path(), &arguments);
    await_served(&old, one);
    agent.settings(&settings(&["127.0.0.1"], two.port()));
    await_served(&old, two);
    await_refused(one);
    let load = Load::start(two, "a");
    load.more(100);
    let new = Shim::start_with(folder.path(), &arguments);
    let by = new.await_log("where it serves", |lines| {
        let mut serving = lines.iter().filter(|line| line["message"] == "serving");
        serving
            .next()
            .map(|line| (line["address"].clone(), line["by"].clone()))
    });
    assert_eq!(by, (json!(two), json!("the shim before")));
    load.more(100);
    assert!(old.wait().success());
    let (_, failed) = load.end();
    assert_eq!(failed, [0; 0]);
    agent.settings(&settings(&["127.0.0.1"], three.port()));
    await_served(&new, three);
    await_refused(two);
    assert_eq!(get(three, "a", "/").status, 200);
}

#[test]
fn the_address_of_metrics_moves() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let (one, two) = (nobody(), nobody());
    let theirs = TcpListener::bind("127.0.0.1:0").unwrap();
    let metrics = |address: Option<SocketAddr>| json!({ "metrics": address });
    let routes = json!([route("a", &[origin.address])]);
    let agent = Agent::start(folder.path(), &metrics(Some(one)), &routes);
    let shim = Shim::start(folder.path());
    let well = |address| get(address, "localhost", "/healthz").text() == "ok\n";
    let await_metrics = |address: SocketAddr| {
        shim.await_log("its metrics", |lines| {
            let is_it = |line: &Value| line["message"] == "metrics" && line["address"] == json!(address);
            lines.iter().any(is_it).then_some(())
        });
    };
    await_metrics(one);
    assert!(well(one));
    // One that cannot be had leaves the one before.
    let states = shim.states();
    agent.settings(&metrics(Some(theirs.local_addr().unwrap())));
    shim.await_states(states + 1);
    assert!(well(one));
    agent.settings(&metrics(Some(two)));
    await_metrics(two);
    assert!(well(two));
    await_refused(one);
    agent.settings(&metrics(None));
    await_refused(two);
}
