//! Hundreds of nodes: what the agent of a balancer spends on their containers, and how long a change takes.

use std::{
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{HashMap, Map, MapData};
use lb_common::{
    addr::{Addr16, Be16},
    maps::{Service, ServiceKey},
};
use lb_tests::{
    etcd::Etcd,
    fleet::{Fleet, Prober, Random},
    netns::Namespace,
    weir::Weir,
};

const NODES: usize = 200;
/// Containers of each node: 5,000 in all.
const EACH: usize = 25;
const SERVICES: usize = 100;
/// Changes a second, and for how long.
const RATE: u32 = 50;
const SECONDS: u32 = 60;
/// Time between two measured changes, which come on top.
const PROBE_EVERY: Duration = Duration::from_millis(150);
/// Port of the service that has nothing but the measured container.
const PROBE: u16 = 1_000;
/// How long one change may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Time between two looks into the map.
const LOOK: Duration = Duration::from_micros(200);
const VIP: &str = "198.51.100.1";

pub fn run() -> Result<()> {
    let (node, world) = (Namespace::new("node")?, Namespace::new("world")?);
    node.veth("c0", &world, "e0")?;
    node.address("c0", "192.0.2.1/24")?;
    node.ip("neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev c0 nud permanent")?;
    node.ip("route add 10.80.0.0/16 via 192.0.2.2")?;
    let etcd = Etcd::start(&node, "127.0.0.1", 3)?;
    let mut fleet = Fleet::start(&node, &etcd, NODES, EACH, SERVICES)?;
    let prober = fleet.prober();
    prober.say("probe", PROBE, 1)?;
    let config = format!(
        "interfaces = [\"c0\"]\n[vips.bench]\naddress = \"{VIP}\"\n[limits]\nring-rows = 2048\n[defaults]\ndrain = \"1s\"\n\
         [nodes]\n{}",
        etcd.section()
    );
    let mut weir = Weir::start_with(&node, "off", &config)?;
    let all = NODES * EACH + 1;
    weir.await_status("hearing every container", |status| serving(status) == all)?;
    let maps = Services::open(&weir.maps())?;

    let (cpu, mut random) = (cpu(weir.pid()?)?, Random(0x5eed));
    let (start, pace) = (Instant::now(), Duration::from_secs(1) / RATE);
    let end = start + Duration::from_secs(SECONDS.into());
    let mut latency = std::thread::scope(|scope| {
        let probes = scope.spawn(|| probe(&prober, &maps, end));
        for change in 0..RATE * SECONDS {
            // Late ones are not left out: the rate is that of the whole.
            sleep((start + pace * change).saturating_duration_since(Instant::now()));
            fleet.change(&mut random)?;
        }
        probes.join().ok().context("the prober panicked")?
    })?;
    let (took, spent) = (start.elapsed(), cpu_since(weir.pid()?, cpu)?);
    let expected: usize = fleet
        .expected()
        .values()
        .map(std::collections::BTreeSet::len)
        .sum();
    weir.await_status("as published", |status| serving(status) == expected + 1)?;
    latency.sort();
    let at = |share: usize| latency[(latency.len() * share / 100).min(latency.len() - 1)].as_secs_f64() * 1e3;
    println!(
        "{NODES} nodes, {} containers, {SERVICES} services, 3 etcd servers",
        NODES * EACH
    );
    println!(
        "{:.1} changes/s for {:.0} s: agent {:.1} % of one CPU, {} MiB resident (at most {})",
        f64::from(RATE * SECONDS) / took.as_secs_f64(),
        took.as_secs_f64(),
        100.0 * spent.as_secs_f64() / took.as_secs_f64(),
        memory(weir.pid()?, "VmRSS:")? / 1024,
        memory(weir.pid()?, "VmHWM:")? / 1024,
    );
    println!(
        "event at the node → commit in the map, {} changes, ms: p50 {:.1}, p99 {:.1}, longest {:.1}",
        latency.len(),
        at(50),
        at(99),
        at(100)
    );
    Ok(())
}

/// One container moves to and fro until the end: how long each move took from the word to the ring in the kernel.
fn probe(prober: &Prober, maps: &Services, end: Instant) -> Result<Vec<Duration>> {
    let mut found = Vec::new();
    while Instant::now() < end {
        let before = maps.generation()?;
        let said = Instant::now();
        prober.say("probe", PROBE, 2 + (found.len() % 2) as u16)?;
        while maps.generation()? == before {
            ensure!(
                said.elapsed() < PATIENCE,
                "a change is not in the maps after {PATIENCE:?}"
            );
            sleep(LOOK);
        }
        found.push(said.elapsed());
        sleep(PROBE_EVERY);
    }
    Ok(found)
}

/// Backends that take new flows.
fn serving(status: &serde_json::Value) -> usize {
    lb_tests::site::backends(status)
        .filter(|backend| backend["ring_share"].as_u64() > Some(0))
        .count()
}

/// The pinned map of services, read entry by entry.
struct Services(HashMap<MapData, ServiceKey, Service>);

impl Services {
    fn open(pins: &Path) -> Result<Self> {
        let map = Map::HashMap(MapData::from_pin(pins.join("SERVICES"))?);
        Ok(Self(map.try_into()?))
    }

    /// How often the ring of the measured service has been replaced.
    fn generation(&self) -> Result<u32> {
        let key = ServiceKey {
            vip: Addr16::from(VIP.parse::<std::net::IpAddr>()?),
            port: Be16::new(PROBE),
            proto: 6,
        };
        match self.0.get(&key, 0) {
            Ok(service) => Ok(service.generation),
            Err(fault) => bail!("the measured service is not in the map: {fault}"),
        }
    }
}

/// Ticks of CPU that a process has used.
fn cpu(pid: u32) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold anything.
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let field = |at: usize| -> Result<u64> { Ok(fields.get(at).context("/proc/PID/stat")?.parse()?) };
    Ok(field(11)? + field(12)?)
}

fn cpu_since(pid: u32, before: u64) -> Result<Duration> {
    // SAFETY: a question without pointers.
    let hz = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(Duration::from_secs_f64((cpu(pid)? - before) as f64 / hz as f64))
}

/// A line of a process's status, KiB.
fn memory(pid: u32, name: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context("/proc/PID/status")?.parse()?)
}
