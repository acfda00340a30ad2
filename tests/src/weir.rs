//! The real `weir` binary in a namespace, with pins, socket and files of its own.

use std::{
    io::{Read as _, Write as _},
    os::unix::{net::UnixStream, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    guard::Guard,
    kernel::object_path,
    netns::{Namespace, bpffs},
};

/// How long an agent may take to be ready: it loads three programs.
const READY: Duration = Duration::from_secs(60);
/// The user of the L7 shim.
pub const SHIM_USER: u32 = 65_534;
/// The group of those who may listen to the agent, `weir-l7` on a machine.
pub const SHIM_GROUP: u32 = 64_990;

/// An agent in a namespace. Dropping it kills it and detaches its datapath.
#[derive(Debug)]
pub struct Weir<'n> {
    namespace: &'n Namespace,
    directory: tempfile::TempDir,
    pins: PathBuf,
    xdp: &'static str,
    binary: PathBuf,
    /// Numbers of the only capabilities that agents have; `None`: all.
    capabilities: Option<Vec<u32>>,
    /// Whose clock agents go by; `None`: the machine's.
    clock: Option<PathBuf>,
    agent: Option<Guard>,
}

/// The binary: `WEIR_BIN`, or where cargo puts it.
pub fn binary() -> PathBuf {
    let debug = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/debug/weir");
    std::env::var_os("WEIR_BIN").map_or_else(debug, PathBuf::from)
}

/// The library that sets the clock of one process (Debian: libfaketime).
fn faketime() -> Result<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib")?.filter_map(Result::ok);
    folders
        .map(|folder| folder.path().join("faketime/libfaketimeMT.so.1"))
        .find(|path| path.exists())
        .context("libfaketimeMT.so.1 is nowhere below /usr/lib (Debian: libfaketime)")
}

impl<'n> Weir<'n> {
    /// Starts an agent with this configuration (interfaces, VIPs, services) and waits until it is ready.
    /// Pins, socket and metrics are set here; Docker is off unless the configuration has a section of its own.
    pub fn start(namespace: &'n Namespace, config: &str) -> Result<Self> {
        Self::start_with(namespace, "auto", config)
    }

    /// As [`Weir::start`], with `bpf.xdp` as given.
    pub fn start_with(namespace: &'n Namespace, xdp: &'static str, config: &str) -> Result<Self> {
        let mut weir = Self::new(namespace, xdp, config)?;
        weir.run()?;
        Ok(weir)
    }

    /// As [`Weir::start_with`], without waiting for more than an answer: the agent need not become ready.
    pub fn launch(namespace: &'n Namespace, xdp: &'static str, config: &str) -> Result<Self> {
        let mut weir = Self::new(namespace, xdp, config)?;
        weir.spawn()?;
        weir.await_status("answering", |_| true)?;
        Ok(weir)
    }

    /// As [`Weir::start_with`], with no other capabilities than these (`CAP_BPF CAP_NET_ADMIN …`).
    pub fn start_confined(
        namespace: &'n Namespace,
        xdp: &'static str,
        config: &str,
        capabilities: &str,
    ) -> Result<Self> {
        let mut weir = Self::new(namespace, xdp, config)?;
        let names = capabilities.split_whitespace();
        weir.capabilities = Some(names.map(capability).collect::<Result<_>>()?);
        weir.run()?;
        Ok(weir)
    }

    /// As [`Weir::start`], by a clock of its own: see [`Weir::set_clock`].
    pub fn start_by_own_clock(namespace: &'n Namespace, config: &str) -> Result<Self> {
        let mut weir = Self::new(namespace, "auto", config)?;
        weir.clock = Some(weir.directory.path().join("clock"));
        weir.set_clock("+0")?;
        weir.run()?;
        Ok(weir)
    }

    /// Sets the time of day, and nothing else, of an agent with its own clock: `+400d`, `-400d` from the machine's.
    pub fn set_clock(&self, offset: &str) -> Result<()> {
        let path = self
            .clock
            .as_ref()
            .context("the agent goes by the machine's clock")?;
        let next = path.with_extension("next");
        std::fs::write(&next, format!("{offset}\n"))?;
        Ok(std::fs::rename(next, path)?)
    }

    fn new(namespace: &'n Namespace, xdp: &'static str, config: &str) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let pins = bpffs()?.join(namespace.name());
        let weir = Self {
            namespace,
            directory,
            pins,
            xdp,
            binary: binary(),
            capabilities: None,
            clock: None,
            agent: None,
        };
        weir.configure(config)?;
        Ok(weir)
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("weir.sock")
    }

    /// The configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.directory.path().join("weir.toml")
    }

    /// Writes the configuration in one step, as an operator's editor would.
    pub fn configure(&self, config: &str) -> Result<()> {
        let mut text = config.to_owned();
        text.push_str(&format!(
            "\n[bpf]\npin-path = \"{}\"\nxdp = \"{}\"\n\n[admin]\nsocket = \"{}\"\nmetrics = \"127.0.0.1:0\"\n",
            self.pins.display(),
            self.xdp,
            self.socket().display()
        ));
        if !config.contains("[docker]") {
            text.push_str("\n[docker]\nenabled = false\n");
        }
        let next = self.directory.path().join("weir.toml.next");
        std::fs::write(&next, text)?;
        Ok(std::fs::rename(next, self.config_path())?)
    }

    /// Changes `bpf.xdp` of the configurations that follow.
    pub fn set_xdp(&mut self, xdp: &'static str) {
        self.xdp = xdp;
    }

    /// Starts the agent (again) and waits until it is ready.
    pub fn run(&mut self) -> Result<()> {
        self.spawn()?;
        self.await_ready()
    }

    fn spawn(&mut self) -> Result<()> {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_path())?;
        let mut command = self.namespace.command(&self.binary);
        command.arg("run").arg("--config").arg(self.config_path());
        command.env("WEIR_BPF_OBJECT", object_path());
        command.stdout(log.try_clone()?).stderr(log);
        if let Some(clock) = &self.clock {
            command.env("LD_PRELOAD", faketime()?).envs([
                ("FAKETIME_TIMESTAMP_FILE", clock.as_os_str()),
                ("FAKETIME_NO_CACHE", "1".as_ref()),
                ("FAKETIME_DONT_FAKE_MONOTONIC", "1".as_ref()),
                ("NO_FAKE_STAT", "1".as_ref()),
            ]);
        }
        if let Some(kept) = &self.capabilities {
            confine(&mut command, kept);
        }
        self.agent = Some(Guard::spawn(&mut command)?);
        Ok(())
    }

    /// `weir <words>` in the same namespace with these settings of `[admin]` and `[bpf]`, but a socket of its own: what another
    /// agent would be that uses the same pins. It has a mount namespace of its own, as containers have.
    pub fn beside(&self, words: &[&str]) -> Result<Command> {
        let text = std::fs::read_to_string(self.config_path())?;
        let other = self.directory.path().join("other");
        std::fs::create_dir_all(&other)?;
        let socket = self.socket().display().to_string();
        let config = other.join("weir.toml");
        std::fs::write(
            &config,
            text.replace(&socket, &other.join("weir.sock").display().to_string()),
        )?;
        let mut command = self.namespace.command("unshare");
        command.args(["--mount", "--"]).arg(&self.binary).args(words);
        command.arg("--config").arg(config);
        command.env("WEIR_BPF_OBJECT", object_path());
        Ok(command)
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("weir.log")
    }

    /// What the agents have said so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn await_ready(&mut self) -> Result<()> {
        let until = Instant::now() + READY;
        while Instant::now() < until {
            if self.status().is_ok_and(|status| status["ready"] == true) {
                return Ok(());
            }
            // The socket tells nobody that it will come; the end of the agent can be waited for meanwhile.
            let agent = self.agent.as_mut().expect("started");
            if let Some(status) = agent.wait(Duration::from_millis(20))? {
                bail!("weir ended ({status}) before it was ready:\n{}", self.log());
            }
        }
        bail!("weir is not ready after {READY:?}:\n{}", self.log())
    }

    /// Waits until `done` holds of the agent's status.
    pub fn await_status(&mut self, what: &str, done: impl Fn(&serde_json::Value) -> bool) -> Result<()> {
        let until = Instant::now() + READY;
        while Instant::now() < until {
            if self.status().is_ok_and(|status| done(&status)) {
                return Ok(());
            }
            let agent = self.agent.as_mut().context("the agent is not running")?;
            ensure!(
                agent.wait(Duration::from_millis(20))?.is_none(),
                "weir ended:\n{}",
                self.log()
            );
        }
        bail!(
            "still not {what} after {READY:?}: {:#}\n{}",
            self.status()?,
            self.log()
        )
    }

    /// Waits until `done` holds of what is in the pinned maps.
    pub fn await_dump(&self, what: &str, done: impl Fn(&weir::datapath::Dump) -> bool) -> Result<()> {
        let until = Instant::now() + READY;
        while Instant::now() < until {
            if done(&self.dump()?) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!(
            "still not {what} after {READY:?}: {:#?}\n{}",
            self.dump()?,
            self.log()
        )
    }

    /// The agent's status as its socket tells it.
    pub fn status(&self) -> Result<serde_json::Value> {
        let body = get(&self.socket(), "/v1/status")?;
        serde_json::from_str(&body).with_context(|| body)
    }

    /// What is in the pinned maps.
    pub fn dump(&self) -> Result<weir::datapath::Dump> {
        use weir::datapath::{Maps as _, bpf::KernelMaps, load::Pins};
        Ok(KernelMaps::open(&Pins::new(&self.pins).maps())?.dump()?)
    }

    /// The datapath's counters as its socket tells them.
    pub fn counters(&self) -> Result<serde_json::Value> {
        let body = get(&self.socket(), "/v1/counters")?;
        serde_json::from_str(&body).with_context(|| body)
    }

    /// Counters of the datapath, backends and what the agents said: what a failed test has to show.
    pub fn explain(&self) -> String {
        let status = self
            .status()
            .map_or_else(|e| e.to_string(), |status| brief(&status));
        let counters = get(&self.socket(), "/v1/counters").unwrap_or_else(|e| e.to_string());
        let moved = serde_json::from_str::<serde_json::Value>(&counters)
            .map_or(counters, |counters| moved(&counters).to_string());
        format!("counters {moved}\nstatus {status}\nlog\n{}", self.log())
    }

    /// Tags (digests of the instructions) of the programs in the pinned links of devices, in the order of the links' names.
    pub fn programs(&self) -> Result<Vec<u64>> {
        use aya::programs::links::{FdLink, PinnedLink};
        let mut paths = Vec::new();
        for version in std::fs::read_dir(&self.pins)? {
            let links = version?.path().join("links");
            for link in std::fs::read_dir(&links).with_context(|| links.display().to_string())? {
                let link = link?;
                let name = link.file_name().to_string_lossy().into_owned();
                if ["xdp_", "tc_"].iter().any(|kind| name.starts_with(kind)) {
                    paths.push(link.path());
                }
            }
        }
        paths.sort();
        let loaded = aya::programs::loaded_programs().collect::<Result<Vec<_>, _>>()?;
        let tag = |path: &PathBuf| {
            let id = FdLink::from(PinnedLink::from_pin(path)?).info()?.program_id();
            let program = loaded.iter().find(|program| program.id() == id);
            Ok(program.context("a link without a program")?.tag())
        };
        paths.iter().map(tag).collect()
    }

    /// Has later agents carry programs that were built otherwise: in a copy of the binary, moves of small constants
    /// become the 32-bit moves of the same effect, so that the kernel loads other programs which do the same.
    pub fn upgrade(&mut self) -> Result<()> {
        let mut agent = std::fs::read(&self.binary)?;
        let object = std::fs::read(object_path())?;
        let start = agent
            .windows(64)
            .position(|window| window == &object[..64])
            .context("the agent carries no object")?;
        let end = start + object.len();
        ensure!(agent[start..end] == object, "the agent carries another object");
        let mut changed = 0;
        for at in (start..end - 16).step_by(8) {
            // r0 = 0..127, then exit: the end of a function.
            let is_move = agent[at..at + 4] == [0xb7, 0, 0, 0] && agent[at + 4] < 0x80;
            if is_move && agent[at + 5..at + 8] == [0; 3] && agent[at + 8] == 0x95 {
                agent[at] = 0xb4;
                changed += 1;
            }
        }
        ensure!(changed > 0, "nothing to build otherwise");
        let binary = self.directory.path().join("weir-next");
        std::fs::write(&binary, agent)?;
        std::fs::set_permissions(&binary, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        self.binary = binary;
        Ok(())
    }

    /// Runs another command of the binary against this agent: `weir <words> --socket …`.
    pub fn cli(&self, words: &[&str]) -> Result<Output> {
        let mut command = self.namespace.command(&self.binary);
        Ok(command.args(words).arg("--socket").arg(self.socket()).output()?)
    }

    /// Runs another command of the binary in the agent's namespace.
    pub fn plain(&self, words: &[&str]) -> Result<Output> {
        Ok(self.namespace.command(&self.binary).args(words).output()?)
    }

    /// Starts the L7 shim of this agent as its unit file does: the command line, a user of its own whose directories nobody
    /// else can enter, the group that may listen to the agent, and the capabilities.
    pub fn start_shim(&self) -> Result<Guard> {
        use std::{
            fs::Permissions,
            os::unix::fs::{PermissionsExt as _, chown},
        };
        let unit = include_str!("../../deploy/weir-l7.service");
        let of = |key: &str| {
            let mut lines = unit.lines();
            let value = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            value.with_context(|| format!("{key}= of the unit"))
        };
        let socket = self.socket().with_file_name("l7.sock");
        chown(&socket, None, Some(SHIM_GROUP))?;
        std::fs::set_permissions(self.directory.path(), Permissions::from_mode(0o755))?;
        let own = |name: &str, mode: &str| -> Result<String> {
            let path = self.directory.path().join(name);
            std::fs::create_dir_all(&path)?;
            chown(&path, Some(SHIM_USER), Some(SHIM_USER))?;
            let mode = u32::from_str_radix(of(mode)?, 8)?;
            std::fs::set_permissions(&path, Permissions::from_mode(mode))?;
            Ok(path.display().to_string())
        };
        let state = own("shim-state", "StateDirectoryMode")?;
        let runtime = own("shim-runtime", "RuntimeDirectoryMode")?;
        let capability = of("CapabilityBoundingSet")?.to_lowercase();
        ensure!(
            of("AmbientCapabilities")?.to_lowercase() == capability,
            "the unit bounds other capabilities than it gives"
        );
        let only = format!("-all,+{}", capability.trim_start_matches("cap_"));
        let mut command = self.namespace.command("setpriv");
        let (user, group) = (SHIM_USER.to_string(), SHIM_GROUP.to_string());
        command.args([
            "--reuid",
            &user,
            "--regid",
            &user,
            "--groups",
            &group,
            "--no-new-privs",
        ]);
        command.args([
            "--bounding-set",
            &only,
            "--inh-caps",
            &only,
            "--ambient-caps",
            &only,
        ]);
        for word in of("ExecStart")?.split(' ') {
            let word = word
                .replace("/run/weir/l7.sock", &socket.display().to_string())
                .replace("${STATE_DIRECTORY}", &state)
                .replace("${RUNTIME_DIRECTORY}", &runtime);
            match word.strip_prefix("/usr/local/bin/") {
                Some(program) => command.arg(self.binary.with_file_name(program)),
                None => command.arg(word),
            };
        }
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_path())?;
        Guard::spawn(command.stdout(log.try_clone()?).stderr(log))
    }

    /// As [`Weir::cli`], for a command that goes on until it is dropped; its output is piped.
    pub fn follow(&self, words: &[&str]) -> Result<Guard> {
        let mut command = self.namespace.command(&self.binary);
        command.args(words).arg("--socket").arg(self.socket());
        Guard::spawn(command.stdout(std::process::Stdio::piped()))
    }

    /// Process id of the agent.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.agent.as_ref().context("the agent is not running")?.pid())
    }

    /// Where its maps are pinned.
    pub fn maps(&self) -> PathBuf {
        weir::datapath::load::Pins::new(&self.pins).maps()
    }

    /// Kills the agent (SIGKILL); the datapath stays.
    pub fn kill(&mut self) {
        self.agent = None;
    }
}

impl Drop for Weir<'_> {
    fn drop(&mut self) {
        self.agent = None;
        let mut detach: Command = self.namespace.command(&self.binary);
        detach
            .arg("detach")
            .arg("--config")
            .arg(self.config_path())
            .stdout(std::process::Stdio::null());
        match detach.status() {
            Ok(status) if status.success() => {}
            other => eprintln!("weir detach: {other:?}"),
        }
        if self.pins.exists() {
            // Links die with their pins, so nothing stays attached.
            let _ = std::fs::remove_dir_all(&self.pins);
        }
        if std::thread::panicking() {
            eprintln!("weir said:\n{}", self.log());
        }
    }
}

/// Number of a capability (linux/capability.h).
fn capability(name: &str) -> Result<u32> {
    Ok(match name {
        "CAP_CHOWN" => 0,
        "CAP_NET_ADMIN" => 12,
        "CAP_NET_RAW" => 13,
        "CAP_PERFMON" => 38,
        "CAP_BPF" => 39,
        other => bail!("number of capability {other}?"),
    })
}

/// Takes all capabilities but these from what a command starts, as systemd does with `CapabilityBoundingSet=`.
fn confine(command: &mut Command, kept: &[u32]) {
    let kept = kept.to_vec();
    // SAFETY: between fork and exec the closure makes system calls without memory arguments and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            for number in (0..64).filter(|number| !kept.contains(number)) {
                // It fails past the last capability that the kernel knows.
                if libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) != 0 {
                    break;
                }
            }
            Ok(())
        });
    }
}

/// The parts of a status that a failed test needs.
fn brief(status: &serde_json::Value) -> String {
    format!(
        "ready {} faults {} attachments {} rejections {} services {:#}",
        status["ready"], status["faults"], status["attachments"], status["rejections"], status["services"]
    )
}

/// What is not zero.
fn moved(value: &serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    let keep =
        |value: &Value| value.as_u64() != Some(0) && value.as_object().is_none_or(|inner| !inner.is_empty());
    match value {
        Value::Object(entries) => entries
            .iter()
            .map(|(name, value)| (name.clone(), moved(value)))
            .filter(|(_, value)| keep(value))
            .collect(),
        other => other.clone(),
    }
}

/// `GET` over a Unix socket; the body.
fn get(socket: &Path, path: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(READY))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: weir\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
    ensure!(
        !head.to_lowercase().contains("transfer-encoding: chunked"),
        "chunked answer"
    );
    Ok(body.to_owned())
}
