//! The real `weir node` on a machine of its own: a process without privileges that may use the engine's socket.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

use crate::{docker::Engine, etcd::Etcd, guard::Guard, netns::Namespace, weir};

/// Who it runs as: nobody's user.
const USER: u32 = 61_001;
/// The group that may use the engine's socket.
pub const GROUP: u32 = 61_002;
/// How long it may take to say something.
const PATIENCE: Duration = Duration::from_secs(30);

/// A `weir node`. Dropping it kills it; what it has published ends with its lease.
#[derive(Debug)]
pub struct Node<'n> {
    namespace: &'n Namespace,
    directory: tempfile::TempDir,
    process: Option<Guard>,
    /// Bytes of the log that earlier processes wrote.
    earlier: usize,
}

impl<'n> Node<'n> {
    /// Starts one on the machine of an engine and waits until it has published. `section` is what `[node]` holds, `login`
    /// what `[etcd]` holds besides the certificate.
    pub fn start(
        namespace: &'n Namespace,
        engine: &Engine,
        etcd: &Etcd<'_>,
        section: &str,
        login: &str,
    ) -> Result<Self> {
        let mut node = Self::new(namespace, engine, etcd, section, login)?;
        node.run()?;
        Ok(node)
    }

    /// As [`Node::start`], but it does not run yet.
    pub fn new(
        namespace: &'n Namespace,
        engine: &Engine,
        etcd: &Etcd<'_>,
        section: &str,
        login: &str,
    ) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("weir-node-").tempdir()?;
        etcd.let_in()?;
        engine.let_in()?;
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        // The folders above the built one may be closed to others.
        fs::copy(weir::binary(), directory.path().join("weir"))?;
        let config = format!(
            "[node]\n{section}\n[docker]\nendpoint = \"{}\"\n{}{login}",
            engine.endpoint(),
            etcd.section()
        );
        fs::write(directory.path().join("node.toml"), config)?;
        Ok(Self {
            namespace,
            directory,
            process: None,
            earlier: 0,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts it (again) and waits until it has published.
    pub fn run(&mut self) -> Result<()> {
        self.spawn()?;
        self.await_line("etcd is connected")?;
        self.await_line("Docker is heard")
    }

    /// Starts it (again).
    pub fn spawn(&mut self) -> Result<()> {
        self.earlier = self.log().len();
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))?;
        let mut command = self.namespace.command("setpriv");
        command
            .args([format!("--reuid={USER}"), format!("--regid={GROUP}")])
            .args([
                "--clear-groups",
                "--inh-caps=-all",
                "--bounding-set=-all",
                "--no-new-privs",
            ])
            .args(["--pdeathsig", "KILL"])
            .arg(self.path("weir"))
            .args(["node", "--config"])
            .arg(self.path("node.toml"))
            .stdout(log.try_clone()?)
            .stderr(log);
        self.process = Some(Guard::spawn(&mut command)?);
        Ok(())
    }

    /// What all of them have said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Waits until the process that runs has said this.
    pub fn await_line(&mut self, words: &str) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let log = self.log();
            if log.get(self.earlier..).is_some_and(|log| log.contains(words)) {
                return Ok(());
            }
            ensure!(Instant::now() < until, "weir node does not say {words:?}:\n{log}");
            let process = self.process.as_mut().context("it is not running")?;
            let ended = process.wait(Duration::from_millis(20))?;
            ensure!(ended.is_none(), "weir node has ended: {ended:?}\n{log}");
        }
    }

    /// Kills it (SIGKILL).
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Tells it to stop (SIGTERM) and waits for its end.
    pub fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("it is not running")?;
        process.signal(Signal::SIGTERM)?;
        let status = process.wait(PATIENCE)?.context("it does not end")?;
        ensure!(status.success(), "weir node: {status}\n{}", self.log());
        Ok(())
    }

    /// User and effective capabilities of the process, as the kernel has them.
    pub fn privileges(&self) -> Result<(u32, u64)> {
        let pid = self.process.as_ref().context("it is not running")?.pid();
        let status = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next())
                .context("a field of the status")
        };
        Ok((
            field("Uid:")?.parse()?,
            u64::from_str_radix(field("CapEff:")?, 16)?,
        ))
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        self.process = None;
        if std::thread::panicking() {
            eprintln!("weir node said:\n{}", self.log());
        }
    }
}
