//! Changes, and deaths, while requests are under way.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread::JoinHandle,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};
use serde_json::json;

use super::{
    agent::{Agent, route},
    origin::Origin,
    shim::Shim,
    upgrades::{open, says_back},
    wire::{Wire, get},
};

/// Clients that ask all the time, half of them on connections that stay open.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<Vec<u16>>>,
}

impl Load {
    pub fn start(address: std::net::SocketAddr, host: &'static str) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let clients = (0..4)
            .map(|client| {
                let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
                std::thread::spawn(move || {
                    let mut wire = Wire::connect(address);
                    let mut failed = Vec::new();
                    while !stop.load(SeqCst) {
                        if client % 2 == 0 {
                            wire = Wire::connect(address);
                        }
                        let answer = wire.get(host, "/");
                        if answer.status != 200 {
                            failed.push(answer.status);
                        }
                        if answer.header("connection") == Some("close") {
                            wire = Wire::connect(address);
                        }
                        done.fetch_add(1, SeqCst);
                    }
                    failed
                })
            })
            .collect();
        Self { stop, done, clients }
    }

    /// Waits until so many more requests have been answered.
    pub fn more(&self, requests: usize) {
        let until = self.done.load(SeqCst) + requests;
        while self.done.load(SeqCst) < until {
            assert!(
                self.clients.iter().all(|client| !client.is_finished()),
                "a client has failed"
            );
            std::thread::yield_now();
        }
    }

    /// How many requests were answered, and what those got that failed.
    pub fn end(self) -> (usize, Vec<u16>) {
        self.stop.store(true, SeqCst);
        let failed = self
            .clients
            .into_iter()
            .flat_map(|client| client.join().unwrap())
            .collect();
        (self.done.load(SeqCst), failed)
    }
}

#[test]
fn fifty_changes_under_load_fail_no_request() {
    let folder = tempfile::tempdir().unwrap();
    let origins: Vec<Origin> = (0..4).map(|_| Origin::start()).collect();
    let all: Vec<_> = origins.iter().map(|origin| origin.address).collect();
    let agent = Agent::start(
        folder.path(),
        &json!({}),
        &json!([route("a", &all), route("ws", &all[..1])]),
    );
    let shim = Shim::start(folder.path());
    let mut socket = Wire::connect(shim.address());
    assert_eq!(open(&mut socket, "ws", "/upgrade"), 101);
    let load = Load::start(shim.address(), "a");
    for change in 0..50 {
        let some = [all[change % 4], all[(change + 1 + change / 4) % 4]];
        let mut routes = vec![
            route("a", &some),
            route("other", &all[..change % 3]),
            route("ws", &all[..1]),
        ];
        if change % 5 == 0 {
            routes[0]["upstreams"][1]["state"] = json!("draining");
        }
        let states = shim.states();
        agent.routes(&json!(routes));
        shim.await_states(states + 1);
        load.more(20);
        assert!(says_back(&mut socket, "still open"));
    }
    let (done, failed) = load.end();
    assert!(
        done >= 1000 && failed.is_empty(),
        "{done} requests, of which failed {failed:?}"
    );
}

#[test]
fn a_container_that_dies_under_load_fails_no_request() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    for _ in 0..5 {
        let dying = Origin::start();
        let routes = json!([route("a", &[origin.address, dying.address])]);
        let _agent = Agent::start(folder.path(), &json!({}), &routes);
        let shim = Shim::start(folder.path());
        let load = Load::start(shim.address(), "a");
        load.more(100);
        // Nobody has told the shim.
        drop(dying);
        load.more(200);
        let (_, failed) = load.end();
        assert_eq!(failed, [0; 0]);
    }
}

#[test]
fn the_last_good_state_outlives_the_agent_and_the_shim() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (Origin::start(), Origin::start());
    let agent = Agent::start(folder.path(), &json!({}), &json!([route("a", &[first.address])]));
    let shim = Shim::start(folder.path());
    let address = shim.address();
    assert_eq!(get(address, "a", "/").text(), first.name());
    drop(agent);
    shim.await_log("that the agent is gone", |lines| {
        let said = |l: &serde_json::Value| {
            l["message"]
                .as_str()
                .is_some_and(|m| m.contains("serving on by what"))
        };
        lines.iter().any(said).then_some(())
    });
    assert_eq!(get(address, "a", "/").text(), first.name());
    // Killed, and started again without an agent.
    drop(shim);
    let shim = Shim::start(folder.path());
    let address = shim.address();
    assert_eq!(get(address, "a", "/").text(), first.name());
    // The agent comes back with other routes.
    let states = shim.states();
    let _agent = Agent::start(folder.path(), &json!({}), &json!([route("a", &[second.address])]));
    shim.await_states(states + 1);
    let mut wire = Wire::connect(address);
    while wire.get("a", "/").text() != second.name() {}
}

#[test]
fn what_is_under_way_ends_before_the_shim_does() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let _agent = Agent::start(folder.path(), &json!({}), &json!([route("a", &[origin.address])]));
    let mut shim = Shim::start(folder.path());
    let (mut busy, mut idle) = (Wire::connect(shim.address()), Wire::connect(shim.address()));
    assert_eq!(idle.get("a", "/").status, 200);
    busy.send("GET /slow/2500 HTTP/1.1\r\nHost: a\r\n\r\n");
    while origin.requests().len() < 2 {
        std::thread::yield_now();
    }
    shim.signal(Signal::SIGTERM);
    shim.await_log("that it stops", |lines| {
        let said = |l: &serde_json::Value| l["message"].as_str().is_some_and(|m| m.starts_with("stopping"));
        lines.iter().any(said).then_some(())
    });
    // An idle connection learns by its next answer that there will be none after it.
    while idle.get("a", "/").header("connection") != Some("close") {}
    assert!(idle.is_closed());
    let answer = busy.answer();
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    assert!(shim.wait().success());
}

#[test]
fn settings_of_the_agent_are_followed() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let agent = Agent::start(
        folder.path(),
        &json!({ "max_body": 3 }),
        &json!([route("a", &[origin.address])]),
    );
    let shim = Shim::start(folder.path());
    let post = || {
        let mut wire = Wire::connect(shim.address());
        wire.send("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody");
        wire.answer().status
    };
    assert_eq!(post(), 413);
    agent.settings(&json!({ "max_body": 4 }));
    shim.await_states(2);
    while post() != 200 {}
}

#[test]
fn a_new_process_takes_over_under_load_without_a_failed_request() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let _agent = Agent::start(folder.path(), &json!({}), &json!([route("a", &[origin.address])]));
    let handover = folder.path().join("handover.sock");
    let arguments = ["--http", "127.0.0.1:0", "--handover", handover.to_str().unwrap()];
    let mut old = Shim::start_with(folder.path(), &arguments);
    let address = old.address();
    let load = Load::start(address, "a");
    for _ in 0..3 {
        load.more(100);
        let new = Shim::start_with(folder.path(), &arguments);
        assert_eq!(new.address(), address);
        load.more(200);
        assert!(old.wait().success(), "the old one has drained");
        old = new;
    }
    load.more(100);
    let (_, failed) = load.end();
    assert_eq!(failed, [0; 0]);
    assert_eq!(get(address, "a", "/").text(), origin.name());
}

/// A process that is nobody's child any more, killed on drop.
pub struct Orphan(pub i32);

impl Orphan {
    /// Kills it, and waits until nothing of it is left.
    pub fn end(self) {
        use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};
        // SAFETY: a system call without pointers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.0, 0) };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the kernel has just made it for us.
        let ended = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        drop(self);
        let mut fds = [PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(20_000_u16)), Ok(1));
    }
}

impl Drop for Orphan {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0), Signal::SIGKILL);
    }
}

#[test]
fn a_signal_starts_the_program_anew() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let _agent = Agent::start(folder.path(), &json!({}), &json!([route("a", &[origin.address])]));
    let handover = folder.path().join("handover.sock");
    let arguments = ["--http", "127.0.0.1:0", "--handover", handover.to_str().unwrap()];
    let mut shim = Shim::start_with(folder.path(), &arguments);
    let address = shim.address();
    shim.signal(Signal::SIGUSR2);
    let _new = Orphan(shim.await_log("that another one takes over", |lines| {
        lines
            .iter()
            .find_map(|line| line["pid"].as_i64())
            .map(|pid| pid as i32)
    }));
    assert!(shim.wait().success());
    assert_eq!(get(address, "a", "/").text(), origin.name());
}
