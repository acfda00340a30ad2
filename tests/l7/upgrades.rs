//! WebSockets: bytes both ways after an upgrade, and their end.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{
    agent::{Agent, route, with},
    origin::Origin,
    shim::Shim,
    wire::Wire,
};

pub fn open(wire: &mut Wire, host: &str, path: &str) -> u16 {
    wire.send(format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ));
    let answer = wire.answer();
    if answer.status == 101 {
        assert_eq!(answer.header("upgrade"), Some("websocket"));
        assert_eq!(answer.header("connection"), Some("upgrade"));
    }
    answer.status
}

pub fn says_back(wire: &mut Wire, text: &str) -> bool {
    wire.send(text);
    wire.read(text.len()) == text.as_bytes()
}

#[test]
fn websockets_pass_and_end_when_their_upstream_has_to_go() {
    let folder = tempfile::tempdir().unwrap();
    let (kept, leaving) = (Origin::start(), Origin::start());
    let both = |state: &str| {
        let mut gone = route("b", &[leaving.address]);
        gone["upstreams"][0]["state"] = json!(state);
        gone["upstreams"][0]["drain_ms"] = json!(2000);
        json!([route("a", &[kept.address]), gone])
    };
    let agent = Agent::start(folder.path(), &json!({}), &both("active"));
    let shim = Shim::start(folder.path());
    let (mut a, mut b) = (Wire::connect(shim.address()), Wire::connect(shim.address()));
    assert_eq!(
        (open(&mut a, "a", "/upgrade"), open(&mut b, "b", "/upgrade")),
        (101, 101)
    );
    assert!(says_back(&mut a, "hello") && says_back(&mut b, "hello"));
    assert!(says_back(&mut a, &"long ".repeat(10_000)));

    let drained = Instant::now();
    agent.routes(&both("draining"));
    assert!(says_back(&mut b, "still here"));
    assert!(b.is_closed());
    let took = drained.elapsed();
    assert!(
        took >= Duration::from_secs(1),
        "cut after {took:?}, before its deadline"
    );
    // An upstream that is no longer there at all has the drain time that it had.
    agent.routes(&json!([route("b", &[leaving.address])]));
    assert!(a.is_closed());
}

#[test]
fn only_some_paths_may_become_websockets() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let routes = json!([with(
        route("a", &[origin.address]),
        json!({ "settings": { "websocket_endpoints": ["/ws"] } })
    )]);
    let _agent = Agent::start(folder.path(), &json!({}), &routes);
    let shim = Shim::start(folder.path());
    let mut wire = Wire::connect(shim.address());
    // Without the upgrade the server has nothing to switch to, and what it says anyway is refused.
    assert_eq!(open(&mut wire, "a", "/upgrade"), 502);
    assert_eq!(open(&mut Wire::connect(shim.address()), "a", "/ws"), 200);
    let seen = origin.requests();
    assert!(
        !seen[0].contains("upgrade: websocket") && seen[1].contains("upgrade: websocket"),
        "{seen:?}"
    );
}
