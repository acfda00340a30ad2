//! What operators see: the page, the metrics, the log of requests.

use std::fs;

use serde_json::{Value, json};

use super::{
    agent::{Agent, route},
    origin::{Origin, nobody},
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
    assert_eq!(report["unrouted"][4], 1);
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

    let until = std::time::Instant::now() + PATIENCE;
    let log = loop {
        let log = fs::read_to_string(folder.path().join("access.log")).unwrap();
        if log.lines().count() >= 6 {
            break log;
        }
        assert!(std::time::Instant::now() < until, "{log}");
    };
    let first: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert_eq!(
        (first["status"].as_u64(), first["url"].as_str()),
        (Some(200), Some("/x"))
    );
    assert_eq!(first["upstream_address"], json!(origin.address));
}
