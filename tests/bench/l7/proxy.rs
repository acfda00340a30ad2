//! The proxies, each set up as its own manual says for the same hosts and servers.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use lb_tests::guard::Guard;
use nix::sys::signal::Signal;

use crate::net::rig::{BACKENDS, PORT, Rig, VIP, backend};

/// Hosts; each has the same servers, and one is asked for.
const HOSTS: usize = 20;
/// Port of HTTPS.
pub const TLS_PORT: u16 = 443;
/// The host that is asked for: neither the first nor the last.
pub const HOST: &str = "host-7.bench.example";
/// Threads or processes of each.
const WORKERS: usize = 2;
/// Connections that each must be able to hold: HAProxy wants two files for each, and 20,000 are all that many machines let a
/// process have.
pub const CONNECTIONS: usize = 9_900;
/// How long a process may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proxy {
    Weir,
    Haproxy,
    Nginx,
}

/// A proxy at work; it ends when dropped.
pub struct Running<'r> {
    kind: Proxy,
    guard: Guard,
    rig: &'r Rig,
}

impl Proxy {
    pub const ALL: [Self; 3] = [Self::Weir, Self::Haproxy, Self::Nginx];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Weir => "weir l7",
            Self::Haproxy => "HAProxy",
            Self::Nginx => "nginx",
        }
    }

    /// Its configuration file.
    fn file(self, rig: &Rig) -> PathBuf {
        rig.directory.path().join(format!("{self:?}.conf"))
    }

    fn configure(self, rig: &Rig, servers: usize) -> Result<PathBuf> {
        let path = self.file(rig);
        let text = match self {
            Self::Weir => weir(rig, servers),
            Self::Haproxy => haproxy(rig, servers),
            Self::Nginx => nginx(rig, servers),
        };
        fs::write(&path, text)?;
        Ok(path)
    }

    /// Starts it and waits until it serves.
    pub fn start(self, rig: &Rig) -> Result<Running<'_>> {
        let path = self.configure(rig, BACKENDS)?;
        rig.node.ip(&format!("addr replace {VIP}/32 dev lo"))?;
        let mut command = match self {
            Self::Weir => {
                let binary = std::env::var_os("WEIR_L7_BIN").context("WEIR_L7_BIN is not set")?;
                let mut command = rig.node.command(binary);
                command.args(["--log", "warn", "--workers", &WORKERS.to_string(), "--routes"]);
                command
            }
            Self::Haproxy => {
                let mut command = rig.node.command("haproxy");
                command.args(["-db", "-q", "-f"]);
                command
            }
            Self::Nginx => {
                let mut command = rig.node.command("nginx");
                command.arg("-c");
                command
            }
        };
        let guard = Guard::spawn(command.arg(path))?;
        let running = Running {
            kind: self,
            guard,
            rig,
        };
        for port in [PORT, TLS_PORT] {
            rig.await_port(SocketAddr::new(VIP.parse()?, port))
                .with_context(|| self.name())?;
        }
        Ok(running)
    }
}

impl Running<'_> {
    /// Changes the set of servers to the first so many, in the way that the proxy's own manual gives.
    pub fn change(&mut self, servers: usize) -> Result<()> {
        let path = self.kind.configure(self.rig, servers)?;
        if self.kind != Proxy::Haproxy {
            return self.guard.signal(Signal::SIGHUP);
        }
        let mut command = self.rig.node.command("haproxy");
        command.args(["-db", "-q", "-f"]).arg(&path);
        command.arg("-sf").arg(self.guard.pid().to_string());
        let mut old = std::mem::replace(&mut self.guard, Guard::spawn(&mut command)?);
        // The new process asks the old one to end; it does when its connections have.
        std::thread::spawn(move || old.wait(PATIENCE));
        Ok(())
    }

    /// Memory of its processes, KiB, what they share counted once.
    pub fn memory(&self) -> Result<u64> {
        let mut processes = vec![self.guard.pid()];
        let mut memory = 0;
        while let Some(pid) = processes.pop() {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
            let pss = text.lines().find_map(|line| line.strip_prefix("Pss:"));
            let pss = pss
                .and_then(|rest| rest.split_whitespace().next())
                .context("no Pss")?;
            memory += pss.parse::<u64>()?;
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
            processes.extend(
                children
                    .split_whitespace()
                    .filter_map(|pid| pid.parse::<u32>().ok()),
            );
        }
        Ok(memory)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // nginx ends at once by SIGTERM, the others when asked twice: their clients are still there.
        let ended = self.guard.signal(Signal::SIGTERM).and_then(|()| {
            let _one_that_ended_by_the_first = self.guard.signal(Signal::SIGTERM);
            self.guard.wait(PATIENCE)
        });
        if let Err(fault) = ended {
            eprintln!("{}: {fault:#}", self.kind.name());
        }
    }
}

/// Puts certificate and key where each of the three looks for them.
pub fn certificates(rig: &Rig) -> Result<()> {
    let folder = rig.directory.path();
    let authority = lb_tests::pki::Authority::new(&folder.join("ca.pem"))?;
    let (cert, key) = (folder.join("bench.pem"), folder.join("bench.key"));
    authority.certify(HOST, HOST, 2099, &cert, &key)?;
    let both = [fs::read(cert)?, fs::read(key)?].concat();
    Ok(fs::write(folder.join("both.pem"), both)?)
}

fn host(index: usize) -> String {
    format!("host-{index}.bench.example")
}

fn weir(rig: &Rig, servers: usize) -> String {
    let upstreams: Vec<_> = (0..servers)
        .map(|i| serde_json::json!({ "address": SocketAddr::new(backend(i), PORT) }))
        .collect();
    let routes: Vec<_> = (0..HOSTS)
        .map(|i| serde_json::json!({ "host": host(i), "upstreams": upstreams, "settings": { "tls": { "serve": true } } }))
        .collect();
    let settings = serde_json::json!({
        "listen": [VIP],
        "max_connections": CONNECTIONS,
        "default_certificate": rig.directory.path().join("both.pem"),
    });
    serde_json::json!({ "settings": settings, "routes": routes }).to_string()
}

fn haproxy(rig: &Rig, servers: usize) -> String {
    let list: String = (0..servers)
        .map(|i| format!("  server s{i} {}:{PORT}\n", backend(i)))
        .collect();
    let rules: String = (0..HOSTS)
        .map(|i| format!("  use_backend b{i} if {{ hdr(host) -i {} }}\n", host(i)))
        .collect();
    let backends: String = (0..HOSTS)
        .map(|i| format!("backend b{i}\n  balance roundrobin\n{list}"))
        .collect();
    format!(
        "global\n  nbthread {WORKERS}\n  maxconn {CONNECTIONS}\n\
         defaults\n  mode http\n  http-reuse always\n  option forwardfor\n  timeout connect 5s\n  timeout client 1m\n  \
         timeout server 1m\n\
         frontend bench\n  bind {VIP}:{PORT} backlog 4096\n  bind {VIP}:{TLS_PORT} backlog 4096 ssl crt {}\n{rules}{backends}",
        rig.directory.path().join("both.pem").display()
    )
}

fn nginx(rig: &Rig, servers: usize) -> String {
    let list: String = (0..servers)
        .map(|i| format!("server {}:{PORT}; ", backend(i)))
        .collect();
    let root = rig.directory.path().display();
    let hosts: String = (0..HOSTS)
        .map(|i| {
            // Said once for an address, however many servers share it.
            let backlog = if i == 0 { " backlog=4096" } else { "" };
            format!(
                "upstream u{i} {{ {list} keepalive 128; keepalive_requests 1000000000; }}\n\
                 server {{ listen {VIP}:{PORT}{backlog}; listen {VIP}:{TLS_PORT} ssl{backlog}; server_name {};\n\
                 ssl_protocols TLSv1.2 TLSv1.3; ssl_certificate {root}/bench.pem; ssl_certificate_key {root}/bench.key;\n\
                 location / {{ proxy_pass http://u{i}; proxy_http_version 1.1; proxy_set_header Connection \"\"; \
                 proxy_set_header Host $host; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; }} }}\n",
                host(i)
            )
        })
        .collect();
    format!(
        "daemon off; worker_processes {WORKERS}; pid {root}/proxy.pid; error_log stderr crit;\n\
         events {{ worker_connections {}; }}\n\
         http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 1h;\n{hosts}}}\n",
        CONNECTIONS
    )
}
