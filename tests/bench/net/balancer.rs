//! The balancers, each set up as its own manual says for one service of four servers, replies by way of the balancer.

use std::{io::Write as _, net::SocketAddr, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{guard::Guard, weir::Weir};
use nix::sys::signal::Signal;

use super::rig::{BACKENDS, PORT, Rig, VIP, backend};

/// How long a process may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a replaced process may serve its connections.
const DRAIN: Duration = Duration::from_secs(30);

/// Who balances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Balancer {
    /// The kernel's NAT by nftables: the reference.
    Nft,
    WeirXdp,
    WeirTc,
    Haproxy,
    Nginx,
}

/// A balancer at work; it ends when dropped.
pub enum Running<'r> {
    Weir(Weir<'r>),
    Process {
        guard: Guard,
        kind: Balancer,
        rig: &'r Rig,
    },
    Nft(&'r Rig),
}

impl Balancer {
    pub const ALL: [Self; 5] = [Self::Nft, Self::WeirXdp, Self::WeirTc, Self::Haproxy, Self::Nginx];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Nft => "nftables DNAT",
            Self::WeirXdp => "weir, XDP native",
            Self::WeirTc => "weir, TC",
            Self::Haproxy => "HAProxy tcp",
            Self::Nginx => "nginx stream",
        }
    }

    /// Starts it and waits until it serves.
    pub fn start(self, rig: &Rig) -> Result<Running<'_>> {
        let running = match self {
            Self::Nft => {
                nft(rig, &rules(BACKENDS))?;
                Running::Nft(rig)
            }
            Self::WeirXdp => Running::Weir(Weir::start_with(&rig.node, "native", &weir(BACKENDS))?),
            Self::WeirTc => Running::Weir(Weir::start_with(&rig.node, "off", &weir(BACKENDS))?),
            Self::Haproxy => process(rig, self, "haproxy", &["-db", "-q", "-f"], &haproxy(BACKENDS))?,
            Self::Nginx => process(rig, self, "nginx", &["-c"], &nginx(rig, BACKENDS))?,
        };
        rig.await_port(SocketAddr::new(VIP.parse()?, PORT))
            .with_context(|| self.name())?;
        Ok(running)
    }
}

impl Running<'_> {
    /// Changes the set of servers to the first so many, in the way that the balancer's own manual gives.
    pub fn change(&mut self, servers: usize) -> Result<()> {
        match self {
            Self::Weir(agent) => agent.configure(&weir(servers)),
            // One transaction: the rules are replaced at once.
            Self::Nft(rig) => nft(rig, &format!("delete table ip balance\n{}", rules(servers))),
            Self::Process {
                guard,
                kind: Balancer::Nginx,
                rig,
            } => {
                std::fs::write(rig.directory.path().join("nginx.conf"), nginx(rig, servers))?;
                guard.signal(Signal::SIGHUP)
            }
            Self::Process { guard, rig, .. } => {
                let path = rig.directory.path().join("haproxy.conf");
                std::fs::write(&path, haproxy(servers))?;
                let mut command = rig.node.command("haproxy");
                command.args(["-db", "-q", "-f"]).arg(&path);
                command.arg("-sf").arg(guard.pid().to_string());
                let mut old = std::mem::replace(guard, Guard::spawn(&mut command)?);
                // The new process asks the old one to end; it does when its connections have.
                std::thread::spawn(move || old.wait(DRAIN));
                Ok(())
            }
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let done = match self {
            Self::Weir(_) => Ok(()),
            Self::Process { guard, rig, .. } => {
                // Asked to end: killed, nginx would leave its workers behind.
                let ended = guard.signal(Signal::SIGTERM).and_then(|()| guard.wait(PATIENCE));
                let removed = rig.node.ip(&format!("addr del {VIP}/32 dev lo"));
                ended.and(removed)
            }
            Self::Nft(rig) => nft(rig, "flush ruleset\n"),
        };
        if let Err(fault) = done {
            eprintln!("{fault:#}");
        }
    }
}

fn process<'r>(
    rig: &'r Rig,
    kind: Balancer,
    program: &str,
    arguments: &[&str],
    config: &str,
) -> Result<Running<'r>> {
    let path = rig.directory.path().join(format!("{program}.conf"));
    std::fs::write(&path, config)?;
    // A process needs the address to listen on.
    rig.node.ip(&format!("addr add {VIP}/32 dev lo"))?;
    let mut command = rig.node.command(program);
    command.args(arguments).arg(&path);
    let guard = Guard::spawn(&mut command)?;
    Ok(Running::Process { guard, kind, rig })
}

fn nft(rig: &Rig, script: &str) -> Result<()> {
    let mut command = rig.node.command("nft");
    let mut child = command.args(["-f", "-"]).stdin(Stdio::piped()).spawn()?;
    child
        .stdin
        .take()
        .context("piped")?
        .write_all(script.as_bytes())?;
    let status = child.wait()?;
    ensure!(status.success(), "nft: {status}\n{script}");
    Ok(())
}

fn rules(servers: usize) -> String {
    let map: Vec<_> = (0..servers).map(|i| format!("{i} : {}", backend(i))).collect();
    format!(
        "table ip balance {{\n\
         chain in {{ type nat hook prerouting priority dstnat;\n\
         ip daddr {VIP} tcp dport {PORT} dnat to jhash ip saddr . tcp sport mod {servers} map {{ {} }}; }}\n\
         chain out {{ type nat hook postrouting priority srcnat; oifname \"b0\" masquerade; }}\n}}\n",
        map.join(", ")
    )
}

fn weir(servers: usize) -> String {
    let mut text = format!(
        "interfaces = [\"b0\", \"c0\"]\n[limits]\nflows4 = 262144\n[vips.bench]\naddress = \"{VIP}\"\n\
         [[services]]\nname = \"bench\"\nvip = \"bench\"\nlisten = [\"{PORT}/tcp\"]\n"
    );
    for i in 0..servers {
        text.push_str(&format!(
            "[[services.backends]]\naddress = \"{}:{PORT}\"\n",
            backend(i)
        ));
    }
    text
}

fn haproxy(servers: usize) -> String {
    let list: String = (0..servers)
        .map(|i| format!("  server s{i} {}:{PORT}\n", backend(i)))
        .collect();
    format!(
        "global\n  nbthread 2\n  maxconn 8000\n\
         defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1m\n  timeout server 1m\n\
         listen bench\n  bind {VIP}:{PORT}\n  balance roundrobin\n{list}"
    )
}

fn nginx(rig: &Rig, servers: usize) -> String {
    let list: String = (0..servers)
        .map(|i| format!("server {}:{PORT}; ", backend(i)))
        .collect();
    let root = rig.directory.path().display();
    format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n\
         daemon off; worker_processes 2; pid {root}/balancer.pid; error_log stderr crit;\n\
         events {{ worker_connections 8192; }}\n\
         stream {{ upstream servers {{ {list}}} server {{ listen {VIP}:{PORT} backlog=4096; proxy_pass servers; }} }}\n"
    )
}
