//! A Docker engine of our own: dockerd as on a machine of its own, with namespaces for processes, mounts, host name and
//! network. The kernel ends everything in it, containers too, with the first process of the namespace.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::{guard::Guard, netns::Namespace};

/// The image that `Engine::start` makes, FROM scratch: the test server on port 8080.
pub const IMAGE: &str = "weir/server";
/// The server's port in its container.
pub const PORT: u16 = 8080;
/// How long an engine may take to start or to stop.
const PATIENCE: Duration = Duration::from_secs(90);

/// First process of the engine's namespaces: names the machine, gives the engine an identity of its own (it keeps one
/// in /etc/docker), reaps whatever is orphaned, and ends when its input does, which is when we wish so or are dead.
const INIT: &str = "hostname node && mount --bind \"$0/etc\" /etc/docker && echo ready && exec 3<&0 && { cat <&3 & wait $!; }";

/// A Docker engine. Dropping it ends it with all its containers and removes its files.
#[derive(Debug)]
pub struct Engine {
    // In the order in which they have to go.
    daemon: Option<Daemon>,
    machine: Guard,
    cgroup: String,
    directory: tempfile::TempDir,
    options: Vec<String>,
}

#[derive(Debug)]
struct Daemon {
    process: Guard,
    log: Arc<Log>,
}

/// What the daemon says; the waiting is for its lines, not for time.
#[derive(Debug, Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    more: Condvar,
}

/// The static test server: `WEIR_SERVER_BIN`, or where `cargo xtask` builds it.
pub fn server() -> PathBuf {
    let built = || {
        let arch = std::env::consts::ARCH;
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!(
            "../target/static/{arch}-unknown-linux-gnu/release/weir-test-server"
        ))
    };
    std::env::var_os("WEIR_SERVER_BIN").map_or_else(built, PathBuf::from)
}

impl Engine {
    /// Starts one in a network namespace, with more options for dockerd, and gives it the image.
    pub fn start(namespace: &Namespace, options: &[&str]) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("weir-docker-").tempdir()?;
        std::fs::create_dir(directory.path().join("etc"))?;
        let mut machine = namespace.command("unshare");
        machine
            .args([
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "--uts",
                "--mount",
            ])
            .args(["--propagation", "private", "sh", "-c", INIT])
            .arg(directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut machine = Guard::spawn(&mut machine)?;
        let mut line = String::new();
        BufReader::new(machine.stdout().context("a pipe")?).read_line(&mut line)?;
        ensure!(
            line == "ready\n",
            "the engine's namespaces could not be made: see above"
        );
        let mut engine = Self {
            daemon: None,
            machine,
            cgroup: format!("/{}", namespace.name()),
            directory,
            options: options.iter().map(|&option| option.to_owned()).collect(),
        };
        engine.run()?;
        engine.import()?;
        Ok(engine)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Where it listens, as `docker.endpoint` of the configuration wants it.
    pub fn endpoint(&self) -> String {
        format!("unix://{}", self.path("docker.sock").display())
    }

    /// Lets whoever may use its socket (dockerd's `--group`) find it, too.
    pub fn let_in(&self) -> Result<()> {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o711);
        Ok(std::fs::set_permissions(self.directory.path(), mode)?)
    }

    /// A command on the engine's machine.
    fn inside(&self, program: &str) -> Command {
        let ns = Path::new("/proc").join(self.machine.pid().to_string()).join("ns");
        let mut command = Command::new("nsenter");
        for (option, file) in [
            ("--net", "net"),
            ("--mount", "mnt"),
            ("--uts", "uts"),
            ("--pid", "pid_for_children"),
        ] {
            command.arg(format!("{option}={}", ns.join(file).display()));
        }
        command.arg(program);
        command
    }

    /// Starts the daemon (again) and waits until it listens.
    pub fn run(&mut self) -> Result<()> {
        let mut dockerd = self.inside("dockerd");
        dockerd
            .arg("--data-root")
            .arg(self.path("data"))
            .arg("--exec-root")
            .arg(self.path("exec"))
            .arg("--pidfile")
            .arg(self.path("pid"))
            .arg("--host")
            .arg(self.endpoint())
            .args(["--cgroup-parent", &self.cgroup])
            .args(&self.options)
            .stderr(Stdio::piped());
        let mut process = Guard::spawn(&mut dockerd)?;
        let errors = process.stderr().context("a pipe")?;
        let log = Arc::new(Log::default());
        let keep = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                keep.lines.lock().expect("no holder panics").push(line);
                keep.more.notify_all();
            }
            // The end of the daemon is the end of all waiting.
            keep.lines
                .lock()
                .expect("no holder panics")
                .push(String::from("dockerd has ended"));
            keep.more.notify_all();
        });
        let until = Instant::now() + PATIENCE;
        let mut lines = log.lines.lock().expect("no holder panics");
        while !lines.iter().any(|line| line.contains("API listen on")) {
            let left = until.saturating_duration_since(Instant::now());
            let ended = lines.last().is_some_and(|line| line == "dockerd has ended");
            if ended || left.is_zero() {
                bail!("dockerd does not listen:\n{}", lines.join("\n"));
            }
            lines = log.more.wait_timeout(lines, left).expect("no holder panics").0;
        }
        drop(lines);
        self.daemon = Some(Daemon { process, log });
        Ok(())
    }

    /// Ends the daemon by a signal (SIGTERM: it stops its containers unless it has `--live-restore`) and waits for it.
    pub fn stop(&mut self, signal: Signal) -> Result<()> {
        let mut daemon = self.daemon.take().context("the engine is not running")?;
        self.signal(signal)?;
        ensure!(
            daemon.process.wait(PATIENCE)?.is_some(),
            "dockerd does not end:\n{}",
            daemon.log.text()
        );
        Ok(())
    }

    /// Sends the daemon a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = std::fs::read_to_string(self.path("pid"))?;
        let sent = self
            .inside("kill")
            .args(["-s", &signal.as_str()[3..], pid.trim()])
            .status()?;
        ensure!(sent.success(), "kill {}: {sent}", pid.trim());
        // `nsenter` stops with the daemon that it waits for, and goes on by itself alone.
        match &self.daemon {
            Some(daemon) if signal == Signal::SIGCONT => daemon.process.signal(signal),
            _ => Ok(()),
        }
    }

    fn import(&self) -> Result<()> {
        let root = self.path("image");
        std::fs::create_dir(&root)?;
        let server = server();
        std::fs::copy(&server, root.join("server"))
            .with_context(|| format!("{}: `cargo xtask test e2e` builds it", server.display()))?;
        let tar = self.path("image.tar");
        let packed = Command::new("tar")
            .arg("-C")
            .arg(&root)
            .arg("-cf")
            .arg(&tar)
            .arg("server")
            .status()?;
        ensure!(packed.success(), "tar: {packed}");
        self.image(IMAGE, PORT)
    }

    /// Makes an image of this name whose server listens on this port.
    pub fn image(&self, name: &str, port: u16) -> Result<()> {
        let tar = self.path("image.tar").to_string_lossy().into_owned();
        let expose = format!("EXPOSE {port}");
        let start = format!("CMD [\"{port}\"]");
        let entry = "ENTRYPOINT [\"/server\"]";
        self.docker(&["import", "-c", entry, "-c", &start, "-c", &expose, &tar, name])
            .map(drop)
    }

    /// The docker command line against this engine.
    pub fn command(&self) -> Command {
        let mut command = Command::new("docker");
        command
            .env_remove("DOCKER_CONTEXT")
            .env("DOCKER_HOST", self.endpoint());
        command
    }

    /// The engine's API, for what many processes of a command line would be too slow for.
    pub fn api(&self) -> Result<bollard::Docker> {
        let socket = self.path("docker.sock");
        let limit = PATIENCE.as_secs();
        Ok(bollard::Docker::connect_with_unix(
            &socket.to_string_lossy(),
            limit,
            bollard::API_DEFAULT_VERSION,
        )?)
    }

    /// `docker WORDS`: what it printed, or its complaint.
    pub fn docker(&self, words: &[&str]) -> Result<String> {
        let output = self
            .command()
            .args(words)
            .stdin(Stdio::null())
            .output()
            .context("docker")?;
        ensure!(
            output.status.success(),
            "docker {}: {}",
            words.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// `docker-compose WORDS` of a file and a project: what it printed, or its complaint.
    pub fn compose(&self, file: &str, project: &str, words: &[&str]) -> Result<String> {
        let output = Command::new("docker-compose")
            .env_remove("DOCKER_CONTEXT")
            .env("DOCKER_HOST", self.endpoint())
            .args(["-f", file, "-p", project])
            .args(words)
            .stdin(Stdio::null())
            .output()
            .context("docker-compose: `cargo xtask setup e2e` installs it")?;
        ensure!(
            output.status.success(),
            "docker-compose {}: {}",
            words.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Runs a container of the image with these options; the server in it calls itself as the container is called.
    pub fn container(&self, name: &str, options: &[&str]) -> Result<()> {
        let own = format!("NAME={name}");
        let mut words = vec!["run", "-d", "--name", name, "-e", &own];
        words.extend(options);
        words.push(IMAGE);
        self.docker(&words).map(drop)
    }

    /// Gives an order to the server in a container.
    pub fn tell(&self, container: &str, order: &str) -> Result<()> {
        self.docker(&["exec", container, "/server", "tell", order])
            .map(drop)
    }

    /// A container's address on the default bridge.
    pub fn address(&self, container: &str) -> Result<std::net::IpAddr> {
        let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}";
        let text = self.docker(&["inspect", "-f", format, container])?;
        text.trim()
            .parse()
            .with_context(|| format!("address of {container}: {text:?}"))
    }
}

impl Log {
    fn text(&self) -> String {
        self.lines.lock().expect("no holder panics").join("\n")
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(daemon) = self.daemon.take()
            && std::thread::panicking()
        {
            eprintln!("dockerd said:\n{}", daemon.log.text());
        }
        // The kernel kills the whole namespace with its first process; cgroups are empty once that is done.
        drop(self.machine.stdin());
        if !matches!(self.machine.wait(PATIENCE), Ok(Some(_))) {
            eprintln!("the engine of {} does not end", self.cgroup);
        }
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            remove_tree(&hierarchy.path().join(self.cgroup.trim_start_matches('/')));
        }
        remove_tree(&Path::new("/sys/fs/cgroup").join(self.cgroup.trim_start_matches('/')));
    }
}

/// Removes a cgroup and those below: files in them cannot be removed and need not be.
fn remove_tree(group: &Path) {
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    // One that is still in use, or was never made, stays as it is.
    let _ = std::fs::remove_dir(group);
}
