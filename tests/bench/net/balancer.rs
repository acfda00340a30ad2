//! The balancers, each set up as its own manual says for one service of four servers, replies by way of the balancer.

use std::{io::Write as _, net::SocketAddr, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{guard::Guard, weir::Weir};
use nix::sys::signal::Signal;

use super::rig::{BACKENDS, PORT, Rig, VIP, backend};

/// How long a process may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

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
    Weir(#[expect(dead_code, reason = "held until the run is over")] Weir<'r>),
    Process { guard: Guard, rig: &'r Rig },
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
                nft(rig, &rules())?;
                Running::Nft(rig)
            }
            Self::WeirXdp => Running::Weir(Weir::start(&rig.node, "native", &weir())?),
            Self::WeirTc => Running::Weir(Weir::start(&rig.node, "off", &weir())?),
            Self::Haproxy => process(rig, "haproxy", &["-db", "-q", "-f"], &haproxy())?,
            Self::Nginx => process(rig, "nginx", &["-c"], &nginx(rig))?,
        };
        rig.await_port(SocketAddr::new(VIP.parse()?, PORT))
            .with_context(|| self.name())?;
        Ok(running)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let done = match self {
            Self::Weir(_) => Ok(()),
            Self::Process { guard, rig } => {
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

fn process<'r>(rig: &'r Rig, program: &str, arguments: &[&str], config: &str) -> Result<Running<'r>> {
    let path = rig.directory.path().join(format!("{program}.conf"));
    std::fs::write(&path, config)?;
    // A process needs the address to listen on.
    rig.node.ip(&format!("addr add {VIP}/32 dev lo"))?;
    let mut command = rig.node.command(program);
    command.args(arguments).arg(&path);
    let guard = Guard::spawn(&mut command)?;
    Ok(Running::Process { guard, rig })
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

fn rules() -> String {
    let servers: Vec<_> = (0..BACKENDS).map(|i| format!("{i} : {}", backend(i))).collect();
    format!(
        "table ip balance {{\n\
         chain in {{ type nat hook prerouting priority dstnat;\n\
         ip daddr {VIP} tcp dport {PORT} dnat to jhash ip saddr . tcp sport mod {BACKENDS} map {{ {} }}; }}\n\
         chain out {{ type nat hook postrouting priority srcnat; oifname \"b0\" masquerade; }}\n}}\n",
        servers.join(", ")
    )
}

fn weir() -> String {
    let mut text = format!(
        "interfaces = [\"b0\", \"c0\"]\n[limits]\nflows4 = 262144\n[vips.bench]\naddress = \"{VIP}\"\n\
         [[services]]\nname = \"bench\"\nvip = \"bench\"\nlisten = [\"{PORT}/tcp\"]\n"
    );
    for i in 0..BACKENDS {
        text.push_str(&format!(
            "[[services.backends]]\naddress = \"{}:{PORT}\"\n",
            backend(i)
        ));
    }
    text
}

fn haproxy() -> String {
    let servers: String = (0..BACKENDS)
        .map(|i| format!("  server s{i} {}:{PORT}\n", backend(i)))
        .collect();
    format!(
        "global\n  nbthread 2\n  maxconn 20000\n\
         defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1m\n  timeout server 1m\n\
         listen bench\n  bind {VIP}:{PORT}\n  balance roundrobin\n{servers}"
    )
}

fn nginx(rig: &Rig) -> String {
    let servers: String = (0..BACKENDS)
        .map(|i| format!("server {}:{PORT}; ", backend(i)))
        .collect();
    let root = rig.directory.path().display();
    format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n\
         daemon off; worker_processes 2; pid {root}/balancer.pid; error_log stderr crit;\n\
         events {{ worker_connections 8192; }}\n\
         stream {{ upstream servers {{ {servers}}} server {{ listen {VIP}:{PORT} backlog=4096; proxy_pass servers; }} }}\n"
    )
}
