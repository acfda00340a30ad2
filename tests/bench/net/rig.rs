//! Client, balancer and four web servers in namespaces, wired by veth, alike for every balancer.

use std::{
    net::{IpAddr, SocketAddr, TcpStream},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{
    guard::Guard,
    netns::{Attached, Namespace},
};

/// Servers.
pub const BACKENDS: usize = 4;
/// Their port, and that of the service: so that no balancer needs to change it.
pub const PORT: u16 = 80;
/// The service's address.
pub const VIP: &str = "198.51.100.1";
/// Bytes of `/64k`.
const LARGE: usize = 64 << 10;
/// Bytes of `/`.
const SMALL: usize = 128;
/// How long a server may take to listen.
const READY: Duration = Duration::from_secs(10);

/// The namespaces and the servers in them.
pub struct Rig {
    pub client: Namespace,
    pub node: Namespace,
    pub directory: tempfile::TempDir,
    _backends: Vec<(Namespace, Guard)>,
    _switch: Namespace,
    _programs: Vec<Attached>,
}

/// Address of a server.
pub fn backend(index: usize) -> IpAddr {
    IpAddr::from([203, 0, 113, 11 + index as u8])
}

impl Rig {
    /// Two arms: the client on one device of the node, the servers by a bridge on the other. Every sender completes
    /// its checksums (XDP forwards frames as they are), so no frame is larger than the MTU, whoever balances.
    pub fn new() -> Result<Self> {
        let (client, node) = (Namespace::new("client")?, Namespace::new("node")?);
        let switch = Namespace::new("switch")?;
        let directory = tempfile::tempdir()?;
        std::fs::write(directory.path().join("index.html"), [b'.'; SMALL])?;
        std::fs::write(directory.path().join("64k"), vec![b'.'; LARGE])?;
        // nginx reads the files as a user of its own.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(directory.path(), open)?;
        let mut programs = Vec::new();
        switch.bridge("br0")?;
        client.veth("e0", &node, "c0")?;
        client.complete_checksums("e0")?;
        node.complete_checksums("c0")?;
        programs.push(client.pass_all("e0")?);
        client.address("e0", "192.0.2.10/24")?;
        node.address("c0", "192.0.2.1/24")?;
        client.ip("route add default via 192.0.2.1")?;
        let mut plug = |namespace: &Namespace, device: &str, port: &str| -> Result<()> {
            namespace.veth(device, &switch, port)?;
            switch.ip(&format!("link set {port} master br0"))?;
            switch.complete_checksums(port)?;
            namespace.complete_checksums(device)?;
            programs.push(switch.pass_all(port)?);
            Ok(())
        };
        plug(&node, "b0", "node")?;
        node.address("b0", "203.0.113.1/24")?;
        let mut backends = Vec::new();
        for i in 0..BACKENDS {
            let namespace = Namespace::new("backend")?;
            plug(&namespace, "e0", &format!("backend{i}"))?;
            namespace.address("e0", &format!("{}/24", backend(i)))?;
            namespace.ip("route add default via 203.0.113.1")?;
            tune(&namespace)?;
            let server = web_server(&namespace, &directory, i)?;
            backends.push((namespace, server));
        }
        tune(&client)?;
        tune(&node)?;
        node.sysctl("net.ipv4.ip_forward", "1")?;
        let rig = Self {
            client,
            node,
            directory,
            _backends: backends,
            _switch: switch,
            _programs: programs,
        };
        for i in 0..BACKENDS {
            rig.await_port(SocketAddr::new(backend(i), PORT))?;
        }
        Ok(rig)
    }

    /// Waits until a connection from the client succeeds.
    pub fn await_port(&self, to: SocketAddr) -> Result<()> {
        let until = Instant::now() + READY;
        self.client.run(|| {
            loop {
                match TcpStream::connect_timeout(&to, Duration::from_millis(200)) {
                    Ok(_) => return Ok(()),
                    Err(e) if Instant::now() > until => return Err(e).context(to.to_string()),
                    // Nobody tells that a server of another make listens.
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        })
    }
}

/// The same in every namespace.
fn tune(namespace: &Namespace) -> Result<()> {
    // Below Weir's SNAT ports nothing, above them all: what connects from here takes these.
    namespace.sysctl("net.ipv4.ip_local_port_range", "32768 60999")?;
    namespace.sysctl("net.ipv4.tcp_tw_reuse", "1")?;
    namespace.sysctl("net.ipv4.tcp_max_tw_buckets", "65536")?;
    namespace.sysctl("net.core.somaxconn", "4096")
}

fn web_server(namespace: &Namespace, directory: &tempfile::TempDir, index: usize) -> Result<Guard> {
    let root = directory.path().display();
    let config = format!(
        "daemon off; master_process off; pid {root}/web{index}.pid; error_log stderr crit;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log off; keepalive_requests 1000000000; server {{ listen {PORT} backlog=4096; root {root}; }} }}\n"
    );
    let path = directory.path().join(format!("web{index}.conf"));
    std::fs::write(&path, config)?;
    let mut command = namespace.command("nginx");
    command.arg("-c").arg(&path).stderr(Stdio::inherit());
    Guard::spawn(&mut command)
}

/// What one run of `wrk` asks for.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Without a path.
    pub url: &'a str,
    pub path: &'a str,
    /// `Host`; empty: the URL's.
    pub host: &'a str,
    /// Each request has a connection of its own.
    pub close: bool,
    pub seconds: u32,
}

/// What one run of `wrk` found.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests per second.
    pub rate: f64,
    /// CPU time of the whole machine per request, µs: client, balancer and servers.
    pub cpu: f64,
    /// Time that half of the requests took at most, ms.
    pub p50: f64,
    /// The same of 99 of 100.
    pub p99: f64,
    /// Requests that failed.
    pub errors: u64,
}

impl Rig {
    /// Runs `wrk` in the client's namespace.
    pub fn load(&self, to: IpAddr, path: &str, close: bool, seconds: u32) -> Result<Load> {
        self.wrk(Ask {
            url: &format!("http://{to}:{PORT}"),
            path,
            host: "",
            close,
            seconds,
        })
    }

    /// The same with more to say.
    pub fn wrk(&self, ask: Ask<'_>) -> Result<Load> {
        let mut command = self.client.command("wrk");
        command.args([
            "-t",
            "1",
            "-c",
            "32",
            "--latency",
            "-d",
            &format!("{}s", ask.seconds),
        ]);
        if ask.close {
            command.args(["-H", "Connection: close"]);
        }
        if !ask.host.is_empty() {
            command.args(["-H", &format!("Host: {}", ask.host)]);
        }
        command.arg(format!("{}{}", ask.url, ask.path));
        let before = busy()?;
        let output = command.output().context("wrk")?;
        let spent = busy()? - before;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "wrk: {text}");
        let word = |after: &str| -> Option<&str> { text.split_once(after)?.1.split_whitespace().next() };
        let rate: f64 = word("Requests/sec:").context("wrk told no rate")?.parse()?;
        let total: f64 = text
            .split_once(" requests in ")
            .and_then(|(head, _)| head.split_whitespace().last())
            .context("wrk told no total")?
            .parse()?;
        let time = |share: &str| word(share).and_then(milliseconds).context("wrk told no times");
        Ok(Load {
            rate,
            cpu: spent * 1e6 / total.max(1.0),
            p50: time("\n     50%")?,
            p99: time("\n     99%")?,
            errors: errors(&text),
        })
    }
}

/// A time as wrk writes it: `950.00us`, `1.25ms`, `2.00s`.
fn milliseconds(text: &str) -> Option<f64> {
    let (number, factor) = [("us", 1e-3), ("ms", 1.0), ("s", 1e3)]
        .iter()
        .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))?;
    Some(number.parse::<f64>().ok()? * factor)
}

/// The sum of the numbers in wrk's lines about errors; without errors there are none.
fn errors(text: &str) -> u64 {
    text.lines()
        .filter(|line| line.contains("Socket errors:") || line.contains("Non-2xx"))
        .flat_map(|line| line.split([' ', ',', ':']))
        .filter_map(|word| word.parse::<u64>().ok())
        .sum()
}

/// Seconds of CPU that the whole machine has spent so far on anything, soft interrupts included; time that the
/// hypervisor took is not.
fn busy() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    let fields: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .map_while(|f| f.parse().ok())
        .collect();
    ensure!(fields.len() >= 8, "/proc/stat: {line}");
    // user, nice, system, idle, iowait, irq, softirq.
    let ticks: u64 = [0, 1, 2, 5, 6].iter().map(|i| fields[*i]).sum();
    Ok(ticks as f64 / 100.0)
}
