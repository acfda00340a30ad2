//! Sockets that systemd makes and keeps: here the test is systemd.

use std::{
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{
    agent::{Agent, route},
    origin::{Origin, nobody},
    shim::Shim,
    updates::{Load, Orphan},
    wire::{Wire, get},
};

/// What systemd keeps of a socket unit: the socket, and its `FileDescriptorName=`.
struct Unit {
    listener: TcpListener,
    name: &'static str,
}

fn unit(name: &'static str) -> Unit {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    Unit { listener, name }
}

impl Unit {
    fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }
}

/// A folder, a server, an agent that leads host `a` to it, and a unit for HTTP.
fn site() -> (tempfile::TempDir, Origin, Agent, Unit) {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let agent = Agent::start(folder.path(), &json!({}), &json!([route("a", &[origin.address])]));
    (folder, origin, agent, unit("http"))
}

/// Starts a shim as systemd starts the service of these sockets.
fn start(folder: &Path, units: &[&Unit], arguments: &[&str]) -> Shim {
    let sockets: Vec<(&TcpListener, &str)> = units.iter().map(|unit| (&unit.listener, unit.name)).collect();
    Shim::activated(folder, &sockets, arguments)
}

/// Who listens where, as the log has it.
fn served(lines: &[Value]) -> Vec<(SocketAddr, bool, String)> {
    let serving = lines.iter().filter(|line| line["message"] == "serving");
    serving
        .map(|line| {
            (
                line["address"].as_str().unwrap().parse().unwrap(),
                line["tls"].as_bool().unwrap(),
                line["by"].as_str().unwrap().to_owned(),
            )
        })
        .collect()
}

#[test]
fn sockets_of_systemd_are_served_and_what_they_do_not_cover_is_bound() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let http = unit("http");
    let bound = nobody();
    // The HTTP port of the settings is systemd's, at another address; the HTTPS port is nobody's.
    let settings =
        json!({ "listen": ["127.0.0.1"], "http_port": http.address().port(), "https_port": bound.port() });
    let _agent = Agent::start(folder.path(), &settings, &json!([route("a", &[origin.address])]));
    let shim = start(folder.path(), &[&http], &[]);
    shim.await_states(1);
    let all = shim.await_log("its places", |lines| {
        let all = served(lines);
        (all.len() == 2).then_some(all)
    });
    assert_eq!(
        all,
        [
            (http.address(), false, "systemd".to_owned()),
            (bound, true, "[l7]".to_owned())
        ]
    );
    assert_eq!(get(http.address(), "a", "/").text(), origin.name());
}

#[test]
fn a_restart_with_sockets_of_systemd_fails_no_request() {
    let (folder, _origin, _agent, http) = site();
    let mut shim = start(folder.path(), &[&http], &["--http", &http.address().to_string()]);
    shim.await_states(1);
    let load = Load::start(http.address(), "a");
    for _ in 0..3 {
        load.more(200);
        // As `systemctl restart` does it: the next one is started when this one has ended, and new clients wait until then.
        shim.signal(Signal::SIGTERM);
        assert!(shim.wait().success());
        shim = start(folder.path(), &[&http], &["--http", &http.address().to_string()]);
    }
    load.more(200);
    let (_, failed) = load.end();
    assert_eq!(failed, [0; 0]);
}

/// A request that lasts keeps the old process from ending: clients that come meanwhile are served by it.
#[test]
fn nobody_waits_for_a_process_that_drains() {
    let (folder, origin, _agent, http) = site();
    let mut shim = start(
        folder.path(),
        &[&http],
        &["--workers", "2", "--http", &http.address().to_string()],
    );
    shim.await_states(1);
    let mut busy = Wire::connect(http.address());
    busy.send("GET /slow/4000 HTTP/1.1\r\nHost: a\r\n\r\n");
    while origin.requests().is_empty() {
        std::thread::yield_now();
    }
    shim.signal(Signal::SIGTERM);
    shim.await_log("that it stops", |lines| {
        let said = |l: &Value| l["message"].as_str().is_some_and(|m| m.starts_with("stopping"));
        lines.iter().any(said).then_some(())
    });
    // Each worker hears of it a moment after it is said; until the slow answer there is time for both.
    let mut last = 0;
    while last < 20 {
        let answer = get(http.address(), "a", "/");
        assert_eq!(answer.status, 200);
        last = match answer.header("connection") {
            Some("close") => last + 1,
            _ => 0,
        };
    }
    assert_eq!(busy.answer().status, 200);
    assert!(shim.wait().success());
}

#[test]
fn a_process_that_is_killed_leaves_its_queue_to_the_next() {
    let (folder, _origin, _agent, http) = site();
    let address = http.address();
    let mut shim = start(folder.path(), &[&http], &["--http", &address.to_string()]);
    shim.await_states(1);
    let stop = AtomicBool::new(false);
    let (served, cut) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(SeqCst) {
                    // Panics, and fails the test, if it is refused.
                    let mut wire = Wire::connect(address);
                    let count = if wire.try_get("a").is_some_and(|status| status == 200) {
                        &served
                    } else {
                        &cut
                    };
                    count.fetch_add(1, SeqCst);
                }
            });
        }
        let more = |count: usize| {
            let until = served.load(SeqCst) + count;
            while served.load(SeqCst) < until {
                std::thread::yield_now();
            }
        };
        for _ in 0..3 {
            more(100);
            shim.signal(Signal::SIGKILL);
            assert!(!shim.wait().success());
            // Nobody accepts now.
            let mut waiting = Wire::connect(address);
            waiting.send("GET /waited HTTP/1.1\r\nHost: a\r\n\r\n");
            shim = start(folder.path(), &[&http], &["--http", &address.to_string()]);
            assert_eq!(waiting.answer().status, 200);
        }
        more(100);
        stop.store(true, SeqCst);
    });
    let (served, cut) = (served.into_inner(), cut.into_inner());
    assert!(served >= 400, "{served} served");
    // Those that it had accepted when it was killed: at most one of each client, each time.
    assert!(cut <= 3 * 4, "{cut} requests of {served} were cut off");
}

#[test]
fn sockets_of_systemd_go_to_the_next_process_at_a_handover_and_it_keeps_them() {
    let (folder, _origin, _agent, http) = site();
    let address = http.address();
    let handover = folder.path().join("handover.sock");
    let at = address.to_string();
    let arguments = ["--http", &at, "--handover", handover.to_str().unwrap()];
    let mut shim = start(folder.path(), &[&http], &arguments);
    shim.await_states(1);
    let load = Load::start(address, "a");
    load.more(100);
    shim.signal(Signal::SIGUSR2);
    let (new, by) = shim.await_log("that another one takes over", |lines| {
        let pid = lines.iter().find_map(|line| line["pid"].as_i64())?;
        Some((Orphan(pid as i32), served(lines)))
    });
    // The one of the signal has them from its predecessor, and does not take descriptors for systemd's that are something else.
    assert_eq!(
        by.iter().map(|(_, _, by)| by.as_str()).collect::<Vec<_>>(),
        ["systemd", "systemd"]
    );
    assert!(shim.wait().success());
    load.more(200);
    let (_, failed) = load.end();
    assert_eq!(failed, [0; 0]);
    // It knows that they are systemd's: its queue outlives it.
    new.end();
    let mut waiting = Wire::connect(address);
    waiting.send("GET /waited HTTP/1.1\r\nHost: a\r\n\r\n");
    let _next = start(folder.path(), &[&http], &arguments);
    assert_eq!(waiting.answer().status, 200);
}
