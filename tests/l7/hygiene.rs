//! What must not pass: requests that look different from different sides, floods, and silence.

use std::{
    io::Write as _,
    time::{Duration, Instant},
};

use serde_json::json;

use super::{
    agent::{Agent, route},
    origin::{Origin, Raw},
    rig::{rig, with_raw},
    shim::Shim,
    wire::{Wire, get},
};

/// Requests that are refused, and after which the connection is of no use.
const REFUSED: &[(&str, &str)] = &[
    (
        "two lengths",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    ),
    (
        "two lengths in one line",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 6\r\n\r\nhello!",
    ),
    (
        "a signed length",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\nhello",
    ),
    (
        "a negative length",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    ),
    (
        "a length in hex",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\nhello",
    ),
    (
        "an unknown coding",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ),
    (
        "chunked, then another",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    ),
    (
        "chunked in HTTP/1.0",
        "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "a space before the colon",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "a folded line",
        "GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n Transfer-Encoding: chunked\r\n\r\n",
    ),
    (
        "a line without a name",
        "GET / HTTP/1.1\r\nHost: a\r\n: x\r\n\r\n",
    ),
    ("a zero byte", "GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n"),
    (
        "a bare CR",
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\rTransfer-Encoding: chunked\r\n\r\n",
    ),
    ("no host", "GET / HTTP/1.1\r\n\r\n"),
    ("two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    ("a host with a path", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    (
        "a host with a user",
        "GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    ),
    ("a tunnel", "CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n"),
    (
        "no HTTP",
        "\x16\x03\x01\x02\x00\x01\x00\x01\x7c\x03\x03 hello\r\n\r\n",
    ),
    ("an unknown version", "GET / HTTP/3.0\r\nHost: a\r\n\r\n"),
];

#[test]
fn ambiguous_requests_are_refused_and_end_their_connection() {
    let rig = rig(json!({}));
    for (what, bytes) in REFUSED {
        let mut wire = Wire::connect(rig.shim.address());
        wire.send(bytes);
        // What follows is part of the trick.
        let _ = wire.try_send("GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n");
        let answer = wire.answer();
        assert!((400..500).contains(&answer.status), "{what}: {}", answer.status);
        assert!(wire.is_closed(), "{what}: the connection goes on");
    }
    assert_eq!(rig.origin.requests(), [""; 0], "none of it reached a server");
}

#[test]
fn a_length_beside_chunks_does_not_reach_a_server() {
    let rig = rig(json!({}));
    for header in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 4",
    ] {
        let mut wire = Wire::connect(rig.shim.address());
        wire.send(format!(
            "POST /length HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n5\r\nhello\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
        ));
        assert_eq!(wire.answer().text(), "5", "the chunks count (RFC 9112, 6.3)");
        assert!(wire.is_closed(), "and nothing behind them");
    }
    let seen = rig.origin.requests();
    assert!(
        seen.iter()
            .all(|r| !r.contains("content-length") && !r.contains("smuggled")),
        "{seen:?}"
    );
}

#[test]
fn chunks_that_are_none_end_the_request() {
    let rig = rig(json!({}));
    for body in [
        "5\r\nhello0\r\n\r\n",
        "zz\r\nhello\r\n0\r\n\r\n",
        "ffffffffffffffffff\r\n",
        "5 \n\rhello",
        "-1\r\n\r\n",
    ] {
        let mut wire = Wire::connect(rig.shim.address());
        wire.send(format!(
            "POST /length HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}"
        ));
        let answer = wire.answer();
        assert!((400..=502).contains(&answer.status), "{body:?}: {answer:?}");
        assert!(wire.is_closed(), "{body:?}");
    }
    // Cut off in the middle: the server is not told that this was all.
    let server = Raw::start();
    rig.agent.routes(&json!([route("b", &[server.address])]));
    rig.shim.await_states(2);
    let mut wire = Wire::connect(rig.shim.address());
    wire.send("POST / HTTP/1.1\r\nHost: b\r\nContent-Length: 10\r\n\r\nhalf");
    let (mut stream, _) = server.accept();
    drop(wire);
    let mut rest = Vec::new();
    let end = std::io::Read::read_to_end(&mut stream, &mut rest);
    assert!(rest == b"half" || end.is_err(), "{rest:?}");
}

#[test]
fn headers_have_an_end() {
    let rig = rig(json!({}));
    let address = rig.shim.address();
    let many: String = (0..200).map(|i| format!("X-{i}: 1\r\n")).collect();
    for headers in [format!("X: {}\r\n", "x".repeat(100_000)), many] {
        let mut wire = Wire::connect(address);
        let _ = wire.try_send(format!("GET / HTTP/1.1\r\nHost: a\r\n{headers}\r\n"));
        assert_eq!(wire.answer().status, 431);
    }
    let mut wire = Wire::connect(address);
    let _ = wire.try_send(format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(70_000)));
    assert!((414..=431).contains(&wire.answer().status));
    assert_eq!(get(address, "a", &format!("/{}", "x".repeat(30_000))).status, 200);
}

#[test]
fn silence_ends_connections() {
    let rig = rig(json!({ "timeouts": { "header_ms": 400, "client_ms": 1000, "server_ms": 500 } }));
    let address = rig.shim.address();
    // The clocks start before those of the shim, so that a slow machine only makes the times longer.
    let start = Instant::now();
    assert!(Wire::connect(address).is_closed());
    let nothing = start.elapsed();
    assert!(nothing >= Duration::from_millis(300), "{nothing:?}");
    // A header that comes byte by byte has no more time than one that stops.
    let mut slow = Wire::connect(address);
    slow.send("GET / HTTP/1.1\r\nHost: a\r\nX: ");
    let start = Instant::now();
    while slow.try_send("x").is_ok() {
        assert!(
            start.elapsed() < super::shim::PATIENCE,
            "a slow header is waited for"
        );
        std::thread::yield_now();
    }
    // Between requests there is more time,
    let mut idle = Wire::connect(address);
    let start = Instant::now();
    assert_eq!(idle.get("a", "/").status, 200);
    assert!(idle.is_closed());
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(700), "{took:?}");
    // bodies must not stop,
    let mut stopped = Wire::connect(address);
    stopped.send("POST /length HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf");
    assert_eq!(stopped.answer().status, 408);
    // and servers must answer.
    assert_eq!(get(address, "a", "/slow/5000").status, 504);
}

#[test]
fn a_silent_connection_rests_serves_again_and_ends_in_time() {
    let rig = rig(json!({ "timeouts": { "client_ms": 3000 } }));
    let mut wire = Wire::connect(rig.shim.address());
    for times in 1..=2 {
        assert_eq!(wire.get("a", "/").status, 200);
        rig.shim.await_rest(times);
    }
    assert!(wire.is_closed());
}

/// Two servers that each break off after 2 s: one try is within the limit of 3 s, both together are not. The answer would be
/// 502 if each try had a limit of its own.
#[test]
fn all_tries_together_have_one_limit() {
    let folder = tempfile::tempdir().unwrap();
    let servers = [Raw::start(), Raw::start()];
    let settings = json!({ "timeouts": { "request_ms": 3000 } });
    let routes = json!([route("a", &servers.each_ref().map(|server| server.address))]);
    let _agent = Agent::start(folder.path(), &settings, &routes);
    let shim = Shim::start(folder.path());
    std::thread::scope(|scope| {
        for server in &servers {
            scope.spawn(|| {
                let (stream, _) = server.accept();
                std::thread::sleep(Duration::from_secs(2));
                drop(stream);
            });
        }
        assert_eq!(get(shim.address(), "a", "/").status, 504);
    });
}

#[test]
fn a_client_that_takes_nothing_does_not_hold_a_server() {
    let rig = with_raw(json!({ "timeouts": { "client_ms": 1000 } }));
    let (wire, mut stream) = rig.ask();
    stream.set_write_timeout(Some(super::shim::PATIENCE)).unwrap();
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        .unwrap();
    // Until the shim, which can give them to nobody, ends the connection.
    let part = vec![b'x'; 1 << 20];
    let ended = std::iter::repeat_with(|| stream.write_all(&part))
        .find_map(Result::err)
        .unwrap();
    let gone = [
        std::io::ErrorKind::BrokenPipe,
        std::io::ErrorKind::ConnectionReset,
    ];
    assert!(gone.contains(&ended.kind()), "{ended}");
    drop(wire);
}

#[test]
fn no_more_clients_are_served_at_a_time_than_allowed() {
    let rig = rig(json!({ "max_connections": 2 }));
    let address = rig.shim.address();
    let (mut first, mut second) = (Wire::connect(address), Wire::connect(address));
    assert_eq!(
        (first.get("a", "/").status, second.get("a", "/").status),
        (200, 200)
    );
    let mut third = Wire::connect(address);
    third.send("GET /third HTTP/1.1\r\nHost: a\r\n\r\n");
    third
        .raw()
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    assert!(third.raw().peek(&mut [0]).is_err(), "it waits");
    drop(first);
    third.raw().set_read_timeout(Some(super::shim::PATIENCE)).unwrap();
    assert_eq!(third.answer().status, 200);
}

#[test]
fn a_server_is_not_asked_twice_for_what_may_not_be_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let (server, origin) = (Raw::start(), Origin::start());
    // Only one of them is there at first, so that the first request goes to it.
    let agent = Agent::start(folder.path(), &json!({}), &json!([route("a", &[server.address])]));
    let shim = Shim::start_with(folder.path(), &["--http", "127.0.0.1:0", "--workers", "1"]);
    let mut wire = Wire::connect(shim.address());
    wire.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx");
    drop(server.accept());
    assert_eq!(wire.answer().status, 502);
    // A GET goes to the other one,
    agent.routes(&json!([route("a", &[server.address, origin.address])]));
    shim.await_states(2);
    let answering = std::thread::spawn(move || {
        // whenever it is the server's turn,
        drop(server.accept());
        server
    });
    for _ in 0..4 {
        assert_eq!(wire.get("a", "/").text(), origin.name());
    }
    let server = answering.join().unwrap();
    // and so does everything when a server has closed a connection that was idle.
    agent.routes(&json!([route("a", &[server.address])]));
    shim.await_states(3);
    wire.send("GET /1 HTTP/1.1\r\nHost: a\r\n\r\n");
    let (mut stream, _) = server.accept();
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        .unwrap();
    assert_eq!(wire.answer().status, 200);
    drop(stream);
    wire.send("POST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx");
    let (mut stream, header) = server.accept();
    assert!(header.starts_with("POST /2"), "{header}");
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        .unwrap();
    assert_eq!(wire.answer().status, 200);
}
