//! Real etcd servers in a namespace: one, or a cluster. Clients are let in by certificate only. All gone on drop.

use std::{
    io::{BufRead as _, BufReader},
    net::TcpListener,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::{guard::Guard, listen::hang_up, netns::Namespace, pki::Authority};

/// How long a server may take to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// Servers of one cluster, all in one namespace.
#[derive(Debug)]
pub struct Etcd<'n> {
    namespace: &'n Namespace,
    address: String,
    members: Vec<Member>,
    authority: Authority,
    directory: tempfile::TempDir,
    /// Changes with every wipe, so that the servers make a new cluster.
    token: u32,
}

#[derive(Debug)]
struct Member {
    name: String,
    client: u16,
    peer: u16,
    process: Option<Guard>,
    log: Arc<Log>,
}

/// What a server says; the waiting is for its lines, not for time.
#[derive(Debug, Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    more: Condvar,
}

impl<'n> Etcd<'n> {
    /// Starts so many servers that listen for clients on an address of the namespace.
    pub fn start(namespace: &'n Namespace, address: &str, size: usize) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("weir-etcd-").tempdir()?;
        let authority = Authority::new(&directory.path().join("ca.pem"))?;
        let ports = free_ports(namespace, address, 2 * size)?;
        let member = |(at, ports): (usize, &[u16])| Member {
            name: format!("m{at}"),
            client: ports[0],
            peer: ports[1],
            process: None,
            log: Arc::default(),
        };
        let etcd = Self {
            namespace,
            address: address.to_owned(),
            members: ports.chunks(2).enumerate().map(member).collect(),
            authority,
            directory,
            token: 0,
        };
        etcd.certify("server", 2099)?;
        etcd.certify("client", 2099)?;
        let mut etcd = etcd;
        etcd.run_all()?;
        Ok(etcd)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Gives `server` or `client` a certificate that is good until the beginning of that year.
    pub fn certify(&self, role: &str, until: i32) -> Result<()> {
        let (cert, key) = (
            self.path(&format!("{role}.pem")),
            self.path(&format!("{role}.key")),
        );
        self.authority.certify(role, &self.address, until, &cert, &key)
    }

    /// Starts every server that is not running, and waits until they all serve.
    pub fn run_all(&mut self) -> Result<()> {
        for at in 0..self.members.len() {
            if self.members[at].process.is_none() {
                self.spawn(at)?;
            }
        }
        // A member serves once it has a quorum: all have to be started first.
        self.members
            .iter()
            .try_for_each(|member| member.log.await_line("ready to serve client requests"))
    }

    fn spawn(&mut self, at: usize) -> Result<()> {
        let peers: Vec<String> = self
            .members
            .iter()
            .map(|member| format!("{}=http://127.0.0.1:{}", member.name, member.peer))
            .collect();
        let Member {
            name, client, peer, ..
        } = &self.members[at];
        let (client, peer) = (self.url(*client), format!("http://127.0.0.1:{peer}"));
        let mut command = self.namespace.command("etcd");
        command
            .args(["--name", name])
            .arg("--data-dir")
            .arg(self.path(&format!("data-{}-{name}", self.token)))
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ])
            .args(["--initial-cluster", &peers.join(",")])
            .args(["--initial-cluster-token", &format!("weir-{}", self.token)])
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            .arg("--client-cert-auth")
            .arg("--trusted-ca-file")
            .arg(self.path("ca.pem"))
            .arg("--cert-file")
            .arg(self.path("server.pem"))
            .arg("--key-file")
            .arg(self.path("server.key"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut process = Guard::spawn(&mut command).context("etcd (Debian: etcd-server)")?;
        let errors = process.stderr().context("a pipe")?;
        let log = Arc::new(Log::default());
        let keep = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                keep.push(line);
            }
            keep.push(ENDED.into());
        });
        let member = &mut self.members[at];
        (member.process, member.log) = (Some(process), log);
        Ok(())
    }

    fn url(&self, port: u16) -> String {
        match self.address.contains(':') {
            true => format!("https://[{}]:{port}", self.address),
            false => format!("https://{}:{port}", self.address),
        }
    }

    /// Where clients connect.
    pub fn endpoints(&self) -> Vec<String> {
        self.members
            .iter()
            .map(|member| self.url(member.client))
            .collect()
    }

    /// Lets clients that are not root read their certificate.
    pub fn let_in(&self) -> Result<()> {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o711);
        Ok(std::fs::set_permissions(self.directory.path(), mode)?)
    }

    /// Section `[etcd]` of an agent's configuration; its deadlines are those of a test.
    pub fn section(&self) -> String {
        let path = |name: &str| self.path(name).display().to_string();
        format!(
            "\n[etcd]\nendpoints = {:?}\nca = {:?}\ncert = {:?}\nkey = {:?}\ntimeout = \"1s\"\nliveness = \"500ms\"\n",
            self.endpoints(),
            path("ca.pem"),
            path("client.pem"),
            path("client.key")
        )
    }

    /// The same as flags of `weir`.
    pub fn flags(&self) -> Vec<String> {
        let path = |name: &str| self.path(name).display().to_string();
        let values = [
            ("--endpoints", self.endpoints().join(",")),
            ("--ca", path("ca.pem")),
            ("--cert", path("client.pem")),
            ("--key", path("client.key")),
        ];
        values
            .into_iter()
            .flat_map(|(flag, value)| [flag.to_owned(), value])
            .collect()
    }

    /// `etcdctl WORDS`, with `input` as its input: what it printed.
    pub fn ctl(&self, words: &[&str], input: &str) -> Result<String> {
        let path = self.path("input");
        std::fs::write(&path, input)?;
        let mut command: Command = self.namespace.command("etcdctl");
        let output = command
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.endpoints().join(",")])
            .arg("--cacert")
            .arg(self.path("ca.pem"))
            .arg("--cert")
            .arg(self.path("client.pem"))
            .arg("--key")
            .arg(self.path("client.key"))
            .args(words)
            .stdin(std::fs::File::open(&path)?)
            .output()
            .context("etcdctl (Debian: etcd-client)")?;
        ensure!(
            output.status.success(),
            "etcdctl {}: {}",
            words.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Sets a key, as an operator without `weir` would: again, if an election comes between.
    pub fn put(&self, key: &str, text: &str) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.ctl(&["put", key], text) {
                Err(_) if Instant::now() < until => {}
                done => return done.map(drop),
            }
        }
    }

    /// Deletes a key.
    pub fn delete(&self, key: &str) -> Result<()> {
        self.ctl(&["del", key], "").map(drop)
    }

    /// Sends a signal to one server.
    pub fn signal(&self, member: usize, signal: Signal) -> Result<()> {
        let process = self.members[member].process.as_ref();
        process.context("the server is not running")?.signal(signal)
    }

    /// Kills one server (SIGKILL); its data stay.
    pub fn kill(&mut self, member: usize) {
        self.members[member].process = None;
    }

    /// Index of the leader.
    pub fn leader(&self) -> Result<usize> {
        let table = self.ctl(&["endpoint", "status"], "")?;
        let leader = table.lines().find(|line| line.split(", ").nth(4) == Some("true"));
        let leader = leader.with_context(|| format!("no leader in {table}"))?;
        let endpoint = leader.split(", ").next().unwrap_or_default();
        let found = self.endpoints().iter().position(|other| other == endpoint);
        found.with_context(|| format!("{endpoint} is none of ours"))
    }

    /// Kills all servers and starts them with nothing in them, as a new cluster.
    pub fn wipe(&mut self) -> Result<()> {
        (0..self.members.len()).for_each(|member| self.kill(member));
        self.token += 1;
        self.run_all()
    }
}

impl Drop for Etcd<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for member in &self.members {
                eprintln!("etcd {} said:\n{}", member.name, member.log.tail());
            }
        }
    }
}

/// Last line of a log.
const ENDED: &str = "etcd has ended";

impl Log {
    fn push(&self, line: String) {
        self.lines.lock().expect("no holder panics").push(line);
        self.more.notify_all();
    }

    fn await_line(&self, words: &str) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        let mut lines = self.lines.lock().expect("no holder panics");
        while !lines.iter().any(|line| line.contains(words)) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || lines.last().is_some_and(|line| line == ENDED) {
                bail!("etcd does not say {words:?}:\n{}", lines.join("\n"));
            }
            lines = self.more.wait_timeout(lines, left).expect("no holder panics").0;
        }
        Ok(())
    }

    fn tail(&self) -> String {
        let lines = self.lines.lock().expect("no holder panics");
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

/// Ports of an address that nobody listens on. The namespace is ours: nobody takes them before the servers do.
fn free_ports(namespace: &Namespace, address: &str, count: usize) -> Result<Vec<u16>> {
    namespace.run(|| {
        let sockets: Vec<TcpListener> = (0..count)
            .map(|_| TcpListener::bind((address, 0)))
            .collect::<Result<_, _>>()?;
        sockets
            .iter()
            .map(|socket| {
                hang_up(socket)?;
                Ok(socket.local_addr()?.port())
            })
            .collect()
    })
}
