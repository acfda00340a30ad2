//! What operators see: the page, the metrics, the log of requests.

use std::{fs, path::Path, time::Instant};

use serde_json::{Value, json};

use super::{
    agent::{Agent, route},
    origin::{Origin, nobody},
    rig::{rig, with_raw},
    shim::{PATIENCE, Shim},
    wire::{Wire, get},
};

#[test]
fn requests_are_seen_on_the_page_in_the_metrics_and_in_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let metrics = nobody();
    let settings = json!({ "access_log": "json", "status_page": "status.test/weir", "metrics": metrics });
    let routes = json!([route("a", &[origin.address, nobody()])]);
    let _agent = Agent::start(folder.path(), &settings, &routes);
    let shim = Shim::start(folder.path());
    let address = shim.address();
    let mut wire = Wire::connect(address);
    for _ in 0..4 {
        assert_eq!(wire.get("a", "/x").status, 200);
    }
    wire.send("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello");
    assert_eq!(wire.answer().text(), "hello");
    // What is no request is counted too, though nobody else hears of it.
    let mut odd = Wire::connect(address);
    odd.send("GET / HTTP/1.1\r\nHost : a\r\n\r\n");
    assert_eq!((odd.answer().status, odd.is_closed()), (400, true));
    assert_eq!(wire.get("unknown", "/").status, 503);

    let report: Value = serde_json::from_slice(&get(address, "status.test", "/weir/json").body).unwrap();
    let upstreams = report["routes"][0]["upstreams"].as_array().unwrap();
    let of = |address: std::net::SocketAddr| {
        upstreams
            .iter()
            .find(|u| u["address"] == address.to_string())
            .unwrap()["numbers"]
            .clone()
    };
    let numbers = of(origin.address);
    assert_eq!(numbers["answers"], json!([0, 5, 0, 0, 0]));
    assert_eq!(
        (numbers["bytes_in"].as_u64(), numbers["active"].as_u64()),
        (Some(5), Some(0))
    );
    let retries: u64 = upstreams
        .iter()
        .map(|u| u["numbers"]["retries"].as_u64().unwrap())
        .sum();
    let refused: u64 = upstreams
        .iter()
        .map(|u| u["numbers"]["connect_errors"].as_u64().unwrap())
        .sum();
    assert!(retries >= 1 && retries == refused, "{upstreams:#?}");
    assert_eq!(
        (&report["unrouted"][3], &report["unrouted"][4]),
        (&json!(1), &json!(1))
    );
    let page = get(address, "status.test", "/weir").text();
    assert!(
        page.contains("http-equiv=\"refresh\"") && page.contains(&origin.address.to_string()),
        "{page}"
    );

    let text = get(metrics, "localhost", "/metrics").text();
    let line = format!(
        "weir_l7_requests_total{{route=\"a/\",upstream=\"c{port}\",address=\"{}\",class=\"2xx\"}} 5",
        origin.address,
        port = origin.address.port()
    );
    assert!(text.lines().any(|l| l == line), "{line} is missing in {text}");
    assert_eq!(get(metrics, "localhost", "/healthz").text(), "ok\n");

    let log = logged(folder.path(), 6);
    let first: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert_eq!(
        (first["status"].as_u64(), first["url"].as_str()),
        (Some(200), Some("/x"))
    );
    assert_eq!(first["upstream_address"], json!(origin.address));
}

#[test]
fn what_an_upgraded_connection_carried_is_counted_however_it_ends() {
    let rig = rig(json!({ "access_log": "json" }));
    for is_reset in [false, true] {
        let mut wire = Wire::connect(rig.shim.address());
        assert_eq!(super::upgrades::open(&mut wire, "a", "/upgrade"), 101);
        assert!(super::upgrades::says_back(&mut wire, "hello"));
        if is_reset {
            let linger = nix::libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            nix::sys::socket::setsockopt(wire.raw(), nix::sys::socket::sockopt::Linger, &linger).unwrap();
        }
    }
    let log = logged(rig.folder.path(), 2);
    for line in log.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(
            (&line["bytes_in"], &line["bytes_out"]),
            (&json!(5), &json!(5)),
            "{line}"
        );
    }
}

#[test]
fn an_answer_that_its_client_did_not_wait_for_is_broken_in_the_log() {
    use std::io::Write as _;
    let rig = with_raw(json!({ "access_log": "json" }));
    let (mut wire, mut stream) = rig.ask();
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart")
        .unwrap();
    assert_eq!(wire.line(), "HTTP/1.1 200 OK");
    drop(wire);
    let log = logged(rig.folder.path(), 1);
    let line: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert_eq!((&line["status"], &line["broken"]), (&json!(200), &json!(true)));
}

/// The log of requests, once it has so many lines.
fn logged(folder: &Path, lines: usize) -> String {
    let until = Instant::now() + PATIENCE;
    loop {
        let log = fs::read_to_string(folder.join("access.log")).unwrap();
        if log.lines().count() >= lines {
            return log;
        }
        assert!(Instant::now() < until, "{log}");
    }
}
