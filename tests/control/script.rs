//! The words of a script, one command a line:
//!
//! ```text
//! limits services=8 backends=32 rows=8 acl=8      sizes of the maps; must come first
//! device 1 eth0 192.0.2.9 2001:db8::9 [bridge]    a device of the node with its addresses
//! place 10.0.0.1 remote 1 | bridge 2 | node | unroutable | unknown
//! places 130                                      the addresses that `many=130` makes are remote
//! snat 192.0.2.50                                 configured SNAT addresses
//! docker reset                                    the source's complete list is empty
//! docker put c1 5 web 203.0.113.1:80/tcp 10.0.0.1:8080[,weight=2,draining,unready,check,drain=5] [affinity] [allow=10.0.0.0/8]
//! docker remove c1                                (`put`: id, age, service name, address, backends, settings)
//! drain 10.0.0.1:8080 [5s] · undrain 10.0.0.1:8080   the operator
//! verdict 203.0.113.1:80/tcp 10.0.0.1:8080 fit [3] · unfit   a check, with tenths of its share
//! sweep 10.0.0.1:8080=3                           live flows by backend; all others have none
//! wait 30s                                        time passes
//! restart docker file                             a new agent that expects these sources
//! expect … end                                    the maps
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant, SystemTime},
};

use lb_common::maps::{NO_RING, backend_flags, backend_state, service_flags, vip_flags};
use tokio::sync::oneshot;
use weir::{
    datapath::{
        Capacities, DeviceInfo, Dump, Place, Topology, XdpSend,
        fake::{FakeMaps, Fault},
    },
    desired::Retention,
    health::{By, Key, Report, Targets, Verdict, WHOLE},
    model::{
        Attachment, Backend, BackendState, Check, CheckKind, EmptyPolicy, Protocol, ServiceAddress,
        ServiceSettings, ServiceWish, SnatMode, UnhealthyPolicy,
    },
    plan::{Policy, Sweep, address_of},
    reconcile::{Command, Options, Reconciler, Surroundings},
    source::{Message, Object, SourceId, Update},
};

/// What came of a script.
pub struct Outcome {
    /// The script with what was found in place of what was expected.
    pub blessed: String,
    /// Writes.
    pub writes: u64,
}

struct World {
    name: String,
    maps: FakeMaps,
    reconciler: Reconciler,
    topology: Topology,
    policy: Policy,
    now: Instant,
    /// Backends with flows at the last sweep: their ids must stay theirs.
    held: BTreeMap<u32, u32>,
    /// Ids and epochs that a sweep found dead and without flows: nothing brings their flows back.
    ended: BTreeSet<(u32, u32)>,
    /// Whom to check.
    targets: Targets,
}

/// Runs a script, with one failing write if wanted.
pub fn run(name: &str, text: &str, fault: Option<(u64, Fault)>) -> Outcome {
    let mut capacities = Capacities {
        services: 16,
        backends: 64,
        ring_rows: 64,
        acl: 64,
        flows4: 1024,
        flows6: 1024,
    };
    let mut world: Option<World> = None;
    let mut blessed = String::new();
    let mut skipping = false;
    for line in text.lines() {
        if skipping {
            skipping = line != "end";
            continue;
        }
        blessed += line;
        blessed += "\n";
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [] => continue,
            [first, ..] if first.starts_with('#') => continue,
            ["limits", ref limits @ ..] => {
                assert!(world.is_none(), "{name}: limits must come first");
                for limit in limits {
                    let (what, number) = limit.split_once('=').unwrap();
                    let number = number.parse().unwrap();
                    match what {
                        "services" => capacities.services = number,
                        "backends" => capacities.backends = number,
                        "rows" => capacities.ring_rows = number,
                        "acl" => capacities.acl = number,
                        _ => panic!("{name}: {line}"),
                    }
                }
                continue;
            }
            _ => {}
        }
        let world = world.get_or_insert_with(|| World::new(name, capacities, fault));
        if words[..] == ["expect"] {
            blessed += &world.show();
            blessed += "end\n";
            skipping = true;
        } else {
            world.step(line, &words);
        }
    }
    let world = world.unwrap();
    assert_eq!(world.maps.broken(), Vec::<String>::new(), "{name}");
    Outcome {
        blessed,
        writes: world.maps.writes(),
    }
}

fn policy() -> Policy {
    Policy {
        snat_addresses: Vec::new(),
        own_vips: Default::default(),
        routed_vips: Default::default(),
        mark: 1,
        snat_port_min: 16384,
        snat_port_max: 32767,
        event_sample: 0,
        flow_share: 50,
        hz: 250,
        default_drain: Duration::from_secs(30),
        retention: Retention::default(),
        firewall: BTreeSet::new(),
    }
}

// === impl World ===

impl World {
    fn new(name: &str, capacities: Capacities, fault: Option<(u64, Fault)>) -> Self {
        let maps = FakeMaps::new(capacities);
        if let Some((write, fault)) = fault {
            maps.fail(write, fault);
        }
        let now = Instant::now();
        let reconciler = Reconciler::new(Box::new(maps.clone()), Options::default(), policy(), now).unwrap();
        let topology = Topology {
            loopback_ifindex: 1,
            ..Topology::default()
        };
        Self {
            name: name.into(),
            maps,
            reconciler,
            topology,
            policy: policy(),
            now,
            held: BTreeMap::new(),
            ended: BTreeSet::new(),
            targets: Targets::default(),
        }
    }

    fn step(&mut self, line: &str, words: &[&str]) {
        self.now += Duration::from_millis(1);
        match *words {
            ["device", slot, name, ref addresses @ ..] => {
                let slot: u16 = slot.parse().unwrap();
                let info = DeviceInfo {
                    name: name.into(),
                    ifindex: 10 + u32::from(slot),
                    mac: [2, 0, 0, 0, 0, slot as u8],
                    mtu: 1500,
                    xdp: XdpSend {
                        back: true,
                        redirect: true,
                        frags: true,
                    },
                    bridge: addresses.contains(&"bridge"),
                    uplink: !addresses.contains(&"bridge"),
                    vlan_offload: false,
                    further_macs: Vec::new(),
                    addresses: addresses.iter().filter_map(|a| a.parse().ok()).collect(),
                };
                self.topology.devices.insert(slot, info);
                self.topology.node_addresses = self
                    .topology
                    .devices
                    .values()
                    .flat_map(|d| d.addresses.clone())
                    .collect();
                self.reconciler.set_topology(&self.topology);
            }
            ["place", ip, ref place @ ..] => {
                let ip: IpAddr = ip.parse().unwrap();
                let place = match *place {
                    ["remote", slot] => Place::Remote {
                        slot: slot.parse().unwrap(),
                        mac: Some([2, 1, 0, 0, 0, 1]),
                        uplink: true,
                    },
                    ["bridge", slot] => Place::Bridge {
                        slot: slot.parse().unwrap(),
                    },
                    ["node"] => Place::Node,
                    ["unroutable"] => Place::Unroutable,
                    _ => panic!("{}: {line}", self.name),
                };
                self.topology.places.insert(ip, place);
                self.reconciler.set_topology(&self.topology);
            }
            ["places", count] => {
                for i in 0..count.parse().unwrap() {
                    let place = Place::Remote {
                        slot: 1,
                        mac: Some([2, 1, 0, 0, 0, 1]),
                        uplink: true,
                    };
                    self.topology.places.insert(many(i).ip(), place);
                }
                self.reconciler.set_topology(&self.topology);
            }
            ["snat", ref addresses @ ..] => {
                self.policy.snat_addresses = addresses.iter().map(|a| a.parse().unwrap()).collect();
                self.reconciler.set_policy(self.policy.clone());
            }
            ["drain", backend, ref deadline @ ..] => {
                let (reply, mut answer) = oneshot::channel();
                self.reconciler.command(
                    Command::Drain {
                        backend: backend.into(),
                        deadline: deadline.first().map(|time| seconds(time)),
                        reply,
                    },
                    self.now,
                );
                answer.try_recv().unwrap().unwrap();
            }
            ["undrain", backend] => {
                let (reply, mut answer) = oneshot::channel();
                self.reconciler.command(
                    Command::Undrain {
                        backend: backend.into(),
                        reply,
                    },
                    self.now,
                );
                answer.try_recv().unwrap().unwrap();
            }
            ["sweep", ref counts @ ..] => self.sweep(counts),
            ["wait", time] => {
                self.now += seconds(time);
            }
            ["restart", ref sources @ ..] => {
                let sources = sources.iter().map(|s| SourceId((*s).into())).collect();
                let options = Options {
                    sources,
                    ..Options::default()
                };
                let maps = Box::new(self.maps.clone());
                self.reconciler = Reconciler::new(maps, options, self.policy.clone(), self.now).unwrap();
                self.reconciler.set_topology(&self.topology);
                self.targets = Targets::default();
            }
            ["verdict", service, backend, fit, ref tenths @ ..] => {
                let key = Key {
                    service: Some(service_address(service)),
                    backend: backend.parse().unwrap(),
                };
                let verdict = Verdict {
                    key,
                    generation: self.targets.active[&key].generation,
                    by: By::Check,
                    fit: fit == "fit",
                    tenths: tenths.first().map_or(WHOLE, |tenths| tenths.parse().unwrap()),
                    reason: "as told".into(),
                    since: SystemTime::UNIX_EPOCH,
                };
                self.hear("health", Update::Verdicts(vec![verdict]));
            }
            [source, "reset"] => self.hear(source, Update::Reset(Vec::new())),
            [source, "remove", id] => self.hear(source, Update::Remove(id.into())),
            [source, "put", id, age, name, address, ref rest @ ..] => {
                self.hear(source, Update::Put(object(id, age, name, address, rest)));
            }
            _ => panic!("{}: {line}", self.name),
        }
        self.settle();
        self.reconciler.target_changes().apply(&mut self.targets);
    }

    fn hear(&mut self, source: &str, update: Update) {
        self.reconciler.hear(Message {
            source: SourceId(source.into()),
            update,
        });
    }

    fn sweep(&mut self, counts: &[&str]) {
        let counts: BTreeMap<SocketAddr, u64> = counts
            .iter()
            .map(|count| {
                let (address, count) = count.split_once('=').unwrap();
                (address.parse().unwrap(), count.parse().unwrap())
            })
            .collect();
        let mut flows = BTreeMap::new();
        self.held.clear();
        for (id, backend) in self.maps.contents().backends {
            let address = SocketAddr::new(backend.addr.into(), backend.port.get());
            let user = (id, backend.epoch);
            match counts.get(&address).filter(|_| !self.ended.contains(&user)) {
                Some(count) => {
                    flows.insert(id, *count);
                    self.held.insert(id, backend.epoch);
                }
                None if backend.state == backend_state::DEAD => drop(self.ended.insert(user)),
                None => {}
            }
        }
        self.reconciler.set_sweep(Sweep {
            started: Some(self.now),
            flows,
            ..Sweep::default()
        });
    }

    /// Passes until nothing fails any more, and once more to see that nothing is left to do.
    fn settle(&mut self) {
        let now = self.now;
        for pass in 0.. {
            assert!(pass < 10, "{}: does not come to rest", self.name);
            let before = self.maps.writes();
            self.reconciler.pass(&|| now);
            let faults = self
                .reconciler
                .status(&Surroundings::default(), &Report::default(), now)
                .faults;
            if faults.is_empty() && self.maps.writes() == before {
                break;
            }
        }
        let contents = self.maps.contents();
        for (id, epoch) in &self.held {
            assert_eq!(
                contents.backends[id].epoch, *epoch,
                "{}: id {id} reused while flows refer to it",
                self.name
            );
        }
    }

    fn show(&self) -> String {
        let mut out = show(&self.maps.contents());
        for rejection in self
            .reconciler
            .status(&Surroundings::default(), &Report::default(), self.now)
            .rejections
        {
            writeln!(out, "  refused {}: {}", rejection.object, rejection.fault).unwrap();
        }
        out
    }
}

/// The maps by addresses: ids, epochs and rows are the agent's own affair.
fn show(dump: &Dump) -> String {
    let mut out = String::new();
    let names: BTreeMap<u32, String> = dump
        .services
        .iter()
        .map(|(key, service)| (service.id, address_of(key).to_string()))
        .collect();
    let text = |b: &lb_common::maps::Backend| SocketAddr::new(b.addr.into(), b.port.get()).to_string();
    let addresses: BTreeMap<u32, String> = dump.backends.iter().map(|(id, b)| (*id, text(b))).collect();
    let address = |id: &u32| addresses.get(id).map_or("absent", String::as_str);
    for (key, service) in &dump.services {
        write!(out, "  service {}", address_of(key)).unwrap();
        for (flag, name) in [
            (service_flags::AFFINITY, "affinity"),
            (service_flags::ACL_DEFAULT_DENY, "default-deny"),
            (service_flags::SNAT_ALWAYS, "snat-always"),
            (service_flags::SNAT_NEVER, "snat-never"),
            (service_flags::RESET_UNKNOWN, "reset-unknown"),
            (service_flags::REFUSE_WHEN_EMPTY, "refuse"),
        ] {
            if service.flags & flag != 0 {
                write!(out, " {name}").unwrap();
            }
        }
        let acl = dump.acl.iter().filter(|((id, _), _)| *id == service.id);
        for ((_, prefix), action) in acl {
            write!(
                out,
                " {}={prefix}",
                if *action == lb_common::maps::ACL_ALLOW {
                    "allow"
                } else {
                    "deny"
                }
            )
            .unwrap();
        }
        if service.ring_row == NO_RING {
            out += " no-ring\n";
            continue;
        }
        let ring = &dump.rings[&service.ring_row];
        let ids = weir::ring::counts(ring);
        let mut shares: BTreeMap<&str, usize> = BTreeMap::new();
        for (id, count) in &ids {
            *shares.entry(address(id)).or_default() += *count as usize;
        }
        // Of addresses, since ids differ from run to run.
        let hash = |text: &str| {
            text.bytes()
                .fold(0u32, |d, byte| d.wrapping_mul(31).wrapping_add(byte.into()))
        };
        let mut hashes = vec![0; ids.keys().max().map_or(0, |id| *id as usize + 1)];
        ids.keys().for_each(|id| hashes[*id as usize] = hash(address(id)));
        let by_address: Vec<u32> = ring.iter().map(|id| hashes[*id as usize]).collect();
        let digest = weir::ring::digest(&by_address) as u32;
        writeln!(out, " rows={} ring={digest:08x}", ring.len() >> 14).unwrap();
        for (address, share) in shares.iter().take(8) {
            writeln!(
                out,
                "    {address} {:.1}%",
                *share as f64 * 100.0 / ring.len() as f64
            )
            .unwrap();
        }
        if shares.len() > 8 {
            writeln!(out, "    … {} backends", shares.len()).unwrap();
        }
    }
    let mut backends: Vec<String> = Vec::new();
    for (id, backend) in dump
        .backends
        .iter()
        .filter(|(_, b)| b.state != backend_state::DEAD)
    {
        let service = names.get(&backend.service).map_or("(gone)", String::as_str);
        let state = if backend.state == backend_state::ACTIVE {
            "active"
        } else {
            "draining"
        };
        let way = match backend.flags {
            backend_flags::LOCAL => "local".into(),
            backend_flags::NODE => "node".into(),
            _ => format!("remote {}", backend.hop.slot()),
        };
        let first = backend.snat_first;
        let snat: Vec<String> = (first..first + backend.snat_count)
            .map(|i| dump.snat_addresses[&i].to_string())
            .collect();
        backends.push(format!(
            "  backend {} of {service} {state} {way} snat [{}]\n",
            address(id),
            snat.join(" ")
        ));
    }
    backends.sort();
    if backends.len() > 8 {
        backends.splice(8.., [format!("  … {} backends\n", backends.len())]);
    }
    out.extend(backends);
    for (vip, value) in &dump.vips {
        writeln!(
            out,
            "  vip {vip}{}",
            if value.flags & vip_flags::ECHO != 0 {
                " echo"
            } else {
                ""
            }
        )
        .unwrap();
    }
    out
}

fn service_address(text: &str) -> ServiceAddress {
    let (listen, protocol) = text.split_once('/').unwrap();
    let listen: SocketAddr = listen.parse().unwrap();
    ServiceAddress {
        vip: listen.ip(),
        port: listen.port(),
        protocol: if protocol == "udp" {
            Protocol::Udp
        } else {
            Protocol::Tcp
        },
    }
}

fn object(id: &str, age: &str, name: &str, address: &str, rest: &[&str]) -> Object {
    let mut settings = ServiceSettings::default();
    let mut backends = Vec::new();
    for word in rest {
        match word.split_once('=') {
            _ if *word == "affinity" => settings.client_ip_affinity = true,
            Some(("allow", prefix)) => settings.allow.push(prefix.parse().unwrap()),
            Some(("deny", prefix)) => settings.deny.push(prefix.parse().unwrap()),
            Some(("snat", "always")) => settings.snat = SnatMode::Always,
            Some(("snat", "never")) => settings.snat = SnatMode::Never,
            Some(("empty", "refuse")) => settings.when_empty = EmptyPolicy::Refuse,
            Some(("unhealthy", "serve-all")) => settings.when_unhealthy = UnhealthyPolicy::ServeAll,
            Some(("empty", "drop")) => settings.when_empty = EmptyPolicy::Drop,
            // Many backends at once: many=130 is 10.9.0.0:80 and the 129 after it.
            Some(("many", count)) => {
                let count: u32 = count.parse().unwrap();
                backends.extend((0..count).map(|i| backend(id, &many(i).to_string())));
            }
            _ => backends.push(backend(id, word)),
        }
    }
    Object {
        id: id.into(),
        name: id.into(),
        created: SystemTime::UNIX_EPOCH + Duration::from_secs(age.parse().unwrap()),
        services: vec![ServiceWish {
            name: name.into(),
            address: service_address(address),
            settings,
            backends,
        }],
        routes: Vec::new(),
        rejections: Vec::new(),
    }
}

/// A time as scripts write it: `30s`.
fn seconds(text: &str) -> Duration {
    Duration::from_secs(text.trim_end_matches('s').parse().unwrap())
}

/// The addresses of `many=` and `places`.
fn many(i: u32) -> SocketAddr {
    SocketAddr::new(IpAddr::from((0x0a09_0000 + i).to_be_bytes()), 80)
}

fn backend(name: &str, word: &str) -> Backend {
    let mut parts = word.split(',');
    let mut backend = Backend {
        address: parts
            .next()
            .unwrap()
            .parse()
            .unwrap_or_else(|e| panic!("{word}: {e}")),
        weight: 1,
        state: BackendState::Active,
        reason: String::new(),
        drain: Duration::from_secs(30),
        check: None,
        attachment: Attachment::Address,
        name: name.into(),
    };
    for part in parts {
        match part.split_once('=') {
            Some(("weight", weight)) => backend.weight = weight.parse().unwrap(),
            Some(("drain", seconds)) => backend.drain = Duration::from_secs(seconds.parse().unwrap()),
            _ if part == "draining" => backend.state = BackendState::Draining,
            _ if part == "check" => backend.check = Some(Check::of(vec![CheckKind::Tcp]).into()),
            _ if part == "unready" => backend.state = BackendState::Unready,
            _ => panic!("{word}"),
        }
    }
    backend
}
