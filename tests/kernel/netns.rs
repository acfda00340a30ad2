//! A network namespace of its own for one test, with a random name, gone with its guard; and a runtime inside it.

use std::{
    fs::File,
    future::Future,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use nix::sched::{CloneFlags, setns};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A named namespace, a pin directory and a state file that belong to one test.
pub struct Netns {
    pub name: String,
    pub pin: PathBuf,
    pub state: PathBuf,
}

impl Netns {
    /// Makes an empty namespace with `lo` up.
    pub fn new() -> Self {
        let name = format!(
            "weir-k{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let netns = Self {
            pin: lb_tests::netns::bpffs().unwrap().join(&name),
            state: std::env::temp_dir().join(format!("{name}.json")),
            name,
        };
        run(&format!("ip netns add {}", netns.name));
        netns.ip("link set lo up");
        netns
    }

    /// `ip -n <this>` with the arguments given.
    pub fn ip(&self, arguments: &str) {
        run(&format!("ip -n {} {arguments}", self.name));
    }

    /// Output of a command inside.
    pub fn output(&self, command: &str) -> String {
        run(&format!("nsenter --net=/run/netns/{} {command}", self.name))
    }

    /// Runs a future on a multi-threaded runtime whose threads are all inside: threads inherit the namespace.
    pub fn block_on<F, T>(&self, future: F) -> T
    where
        F: Future<Output = T> + Send + 'static,
        T: Send + 'static,
    {
        self.inside(move || {
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap()
                .block_on(future)
        })
    }

    /// Runs a function on a thread of its own inside.
    pub fn inside<T: Send + 'static>(&self, function: impl FnOnce() -> T + Send + 'static) -> T {
        let file = File::open(format!("/run/netns/{}", self.name)).unwrap();
        let thread = std::thread::spawn(move || {
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            function()
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _gone = Command::new("ip").args(["netns", "del", &self.name]).status();
        for version in std::fs::read_dir(&self.pin).into_iter().flatten().flatten() {
            for part in ["links", "programs", "maps"] {
                let part = version.path().join(part);
                for file in std::fs::read_dir(&part).into_iter().flatten().flatten() {
                    let _gone = std::fs::remove_file(file.path());
                }
                let _gone = std::fs::remove_dir(part);
            }
            let _gone = std::fs::remove_dir(version.path());
        }
        let _gone = std::fs::remove_dir(&self.pin);
        let _gone = std::fs::remove_file(&self.state);
    }
}

/// Runs a command; its standard output. A failure is the test's.
pub fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}
