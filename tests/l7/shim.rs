//! The shim's process.

use std::{
    io::{BufRead as _, BufReader},
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use lb_tests::guard::Guard;
use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::signal::Signal,
};
use serde_json::Value;

/// How long the shim may take for anything that a test waits for.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A shim, killed when this is dropped.
pub struct Shim {
    process: Guard,
    log: Arc<Log>,
    reader: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Log {
    lines: Mutex<(Vec<Value>, bool)>,
    more: Condvar,
}

/// The binary, beside that of the agent.
fn binary() -> PathBuf {
    lb_tests::weir::binary().with_file_name("weir-l7")
}

impl Shim {
    /// Starts one that listens to the agent of `folder`, keeps its state there, and serves at a free port.
    pub fn start(folder: &Path) -> Self {
        Self::start_with(folder, &["--http", "127.0.0.1:0"])
    }

    /// As [`Shim::start`], with these arguments about what it serves.
    pub fn start_with(folder: &Path, arguments: &[&str]) -> Self {
        Self::spawn(folder, Command::new(binary()), arguments)
    }

    /// As systemd starts the service of these sockets, which have these names. It keeps them.
    pub fn activated(folder: &Path, sockets: &[(&TcpListener, &str)], arguments: &[&str]) -> Self {
        // Only the new process itself knows its number.
        let mut command = Command::new("sh");
        command
            .args(["-c", "export LISTEN_PID=$$; exec \"$0\" \"$@\""])
            .arg(binary())
            .env("LISTEN_FDS", sockets.len().to_string())
            .env(
                "LISTEN_FDNAMES",
                sockets
                    .iter()
                    .map(|(_, name)| *name)
                    .collect::<Vec<_>>()
                    .join(":"),
            );
        // Above those that they get, so that none is overwritten before it has been copied.
        let copies: Vec<OwnedFd> = sockets
            .iter()
            .map(|(socket, _)| {
                let copy = fcntl(*socket, FcntlArg::F_DUPFD_CLOEXEC(100)).unwrap();
                // SAFETY: the kernel has just made it for us.
                unsafe { OwnedFd::from_raw_fd(copy) }
            })
            .collect();
        // SAFETY: system calls alone between fork and exec.
        unsafe {
            command.pre_exec(move || {
                for (copy, number) in copies.iter().zip(3..) {
                    if libc::dup2(copy.as_raw_fd(), number) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        Self::spawn(folder, command, arguments)
    }

    fn spawn(folder: &Path, mut command: Command, arguments: &[&str]) -> Self {
        command
            .arg("--agent")
            .arg(super::agent::socket(folder))
            .arg("--state")
            .arg(folder.join("state.json"))
            .args(["--log-json", "--log", "weir_l7=debug"])
            .args(arguments)
            .stdout(std::fs::File::create(folder.join("access.log")).unwrap())
            .stderr(Stdio::piped());
        let mut process = Guard::spawn(&mut command).unwrap();
        let log = Arc::new(Log::default());
        let (to, from) = (Arc::clone(&log), process.stderr().unwrap());
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(from).lines().map_while(Result::ok) {
                let value = serde_json::from_str(&line).unwrap_or(Value::String(line));
                to.lines.lock().unwrap().0.push(value);
                to.more.notify_all();
            }
            to.lines.lock().unwrap().1 = true;
            to.more.notify_all();
        });
        Self {
            process,
            log,
            reader: Some(reader),
        }
    }

    /// Waits until connections have come to rest so many times.
    pub fn await_rest(&self, times: usize) {
        self.await_log("that a connection rests", |lines| {
            let rests = lines.iter().filter(|line| line["message"] == "rests");
            (rests.count() >= times).then_some(())
        });
    }

    /// Waits until enough has been logged: `enough` gets all messages and their fields so far.
    pub fn await_log<T>(&self, what: &str, enough: impl Fn(&[Value]) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        let mut lines = self.log.lines.lock().unwrap();
        loop {
            let fields: Vec<Value> = lines.0.iter().map(|line| line["fields"].clone()).collect();
            if let Some(found) = enough(&fields) {
                return found;
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero() && !lines.1,
                "the shim has not logged {what}: {:#?}",
                lines.0
            );
            lines = self.log.more.wait_timeout(lines, left).unwrap().0;
        }
    }

    /// Where it serves; waits until it does.
    pub fn address(&self) -> SocketAddr {
        self.addresses(1)[0].0
    }

    /// Where it serves, and whether by TLS, once these are so many places.
    pub fn addresses(&self, count: usize) -> Vec<(SocketAddr, bool)> {
        self.await_log("where it serves", |lines| {
            let serving = lines.iter().filter(|line| line["message"] == "serving");
            let places: Vec<_> = serving
                .filter_map(|line| Some((line["address"].as_str()?.parse().ok()?, line["tls"].as_bool()?)))
                .collect();
            (places.len() >= count).then_some(places)
        })
    }

    /// Waits until it has taken over states so many times.
    pub fn await_states(&self, count: usize) {
        self.await_log("its routes", |lines| {
            (self.states_in(lines) >= count).then_some(())
        });
    }

    /// How many states it has taken over.
    pub fn states(&self) -> usize {
        self.await_log("anything", |lines| Some(self.states_in(lines)))
    }

    fn states_in(&self, lines: &[Value]) -> usize {
        lines.iter().filter(|line| line["message"] == "routes").count()
    }

    /// As [`Shim::start_with`], in a namespace.
    pub fn start_in(namespace: &lb_tests::netns::Namespace, folder: &Path, arguments: &[&str]) -> Self {
        Self::spawn(folder, namespace.command(binary()), arguments)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal).unwrap();
    }

    /// Waits until it ends.
    pub fn wait(&mut self) -> ExitStatus {
        self.process.wait(PATIENCE).unwrap().expect("the shim still runs")
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        let _ = self.process.signal(Signal::SIGKILL);
        let _ = self.process.wait(PATIENCE);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
