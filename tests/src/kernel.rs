//! The core as the kernel runs it: the real object, loaded, and one frame at a time by `BPF_PROG_TEST_RUN`.

use std::{
    fs::File,
    net::IpAddr,
    os::fd::AsFd as _,
    path::PathBuf,
    process::Command,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, Pod, TestRun as _, TestRunOptions, VerifierLogLevel,
    maps::{Array, HashMap, LpmTrie, MapData, PerCpuArray, PerCpuValues, lpm_trie},
    programs::{SchedClassifier, Xdp},
    util::nr_cpus,
};
use lb_common::{
    addr::{Addr4, Addr16, Be16},
    counter::{Counter, DropReason},
    flow::{Address, FlowKey},
    limits::AGENT_SILENT_S,
    maps::{
        ABI_VERSION, AclData, Affinity, AffinityKey, Backend, BackendStats, Device, Drops, Flow, FragmentKey,
        FragmentPorts, Meta, Rate, RingRow, SCHEMA, Service, ServiceKey, ServiceStats, Settings, Stats,
        Timeouts, Vip, limited,
    },
};

pub use crate::test_run::jiffies;
use crate::{
    row::Datapath,
    test_run::test_run,
    world::{Conn, DEVICES, FlowEntry, World, ifindex_of},
};

/// Entries of each flow table in the tests.
pub const FLOW_ENTRIES: u32 = 64;
/// Sizes of the maps in the tests.
pub const SMALL: Sizes = Sizes {
    flow_entries: FLOW_ENTRIES,
    backends: 32,
    services: 16,
};

/// Sizes of the maps.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Entries of each flow table.
    pub flow_entries: u32,
    /// Backend records.
    pub backends: u32,
    /// Services.
    pub services: u32,
}

/// Where a frame is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `weir_xdp`.
    Xdp,
    /// `weir_tc_ingress`.
    Ingress,
    /// `weir_tc_egress`.
    Egress,
}

/// What a program made of a frame.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Its return value.
    pub action: i32,
    /// The frame afterwards.
    pub frame: Vec<u8>,
    /// Interface index that it is sent out of, where the body tells (the kernel does not).
    pub to: Option<u32>,
}

/// All counters by name.
pub type Counters = std::collections::BTreeMap<String, u64>;

/// The object in the kernel, with the devices of [`DEVICES`] in a network namespace of their own.
pub struct Kernel {
    bpf: Ebpf,
    hz: u32,
    sizes: Sizes,
    check_sums: bool,
}

/// The object to test: `WEIR_BPF_OBJECT`, or where `cargo xtask build-ebpf` puts it.
pub fn object_path() -> PathBuf {
    std::env::var_os("WEIR_BPF_OBJECT").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/weir-ebpf.o"),
        PathBuf::from,
    )
}

/// Moves this thread to a new network namespace with the devices of [`DEVICES`]. It ends with the thread.
fn enter_namespace() -> Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("new network namespace: needs root")?;
    for (_, name, ifindex, mac, _, mtu) in DEVICES {
        let mac = mac.map(|b| format!("{b:02x}")).join(":");
        let kind = if name == "bridge" {
            "type bridge".into()
        } else {
            format!("type veth peer name {name}-peer")
        };
        let line = format!("link add {name} index {ifindex} address {mac} mtu {mtu} {kind}");
        let status = Command::new("ip")
            .args(line.split(' '))
            .status()
            .context("ip (iproute2)")?;
        ensure!(status.success(), "ip {line}: {status}");
        let up = Command::new("ip").args(["link", "set", name, "up"]).status()?;
        ensure!(up.success(), "ip link set {name} up: {up}");
    }
    Ok(())
}

/// Ticks of the flow clock per second: the resolution of the coarse clocks is one tick.
pub fn ticks_per_second() -> u32 {
    let tick =
        nix::time::clock_getres(nix::time::ClockId::CLOCK_MONOTONIC_COARSE).expect("a clock of every Linux");
    (1_000_000_000 / Duration::from(tick).as_nanos()) as u32
}

/// The one object of this process: the verifier takes seconds for it, and minutes on an emulated machine.
static SHARED: Mutex<Option<(Kernel, File)>> = Mutex::new(None);

/// Works with the loaded object, one caller after the other, with the devices of [`DEVICES`] around.
pub fn with_kernel<R>(work: impl FnOnce(&mut Kernel) -> R) -> Result<R> {
    // A failed test leaves nothing behind that the next one does not set anew.
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, namespace)) = &*shared {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)
            .context("entering the namespace")?;
    } else {
        let kernel = Kernel::load()?;
        *shared = Some((kernel, File::open("/proc/thread-self/ns/net")?));
    }
    let (kernel, _) = shared.as_mut().context("loaded above")?;
    Ok(work(kernel))
}

impl Kernel {
    /// Loads the object with small maps, in a namespace of this thread.
    pub fn load() -> Result<Self> {
        Self::load_sized(SMALL)
    }

    /// Loads the object, in a namespace of this thread.
    pub fn load_sized(sizes: Sizes) -> Result<Self> {
        enter_namespace()?;
        let path = object_path();
        let object = std::fs::read(&path)
            .with_context(|| format!("{}: build it by `cargo xtask build-ebpf`", path.display()))?;
        // The log of a refused program is long and slow to write; `cargo xtask build-ebpf` is the place to read it.
        let mut bpf = EbpfLoader::new()
            .verifier_log_level(VerifierLogLevel::DISABLE)
            .map_max_entries("FLOWS4", sizes.flow_entries)
            .map_max_entries("FLOWS6", sizes.flow_entries)
            .map_max_entries("BACKENDS", sizes.backends)
            .map_max_entries("BACKEND_STATS", sizes.backends)
            .map_max_entries("SERVICES", sizes.services)
            .map_max_entries("SERVICE_STATS", sizes.services)
            .map_max_entries("TIMEOUTS", sizes.services)
            .map_max_entries("RINGS", sizes.services)
            .load(&object)
            .context("the object does not load")?;
        let xdp: &mut Xdp = bpf
            .program_mut("weir_xdp")
            .context("no program weir_xdp")?
            .try_into()?;
        xdp.load().context("the verifier refuses weir_xdp")?;
        for name in ["weir_tc_ingress", "weir_tc_egress"] {
            let tc: &mut SchedClassifier = bpf
                .program_mut(name)
                .with_context(|| format!("no program {name}"))?
                .try_into()?;
            tc.load()
                .with_context(|| format!("the verifier refuses {name}"))?;
        }
        let mut kernel = Self {
            bpf,
            hz: ticks_per_second(),
            sizes,
            check_sums: false,
        };
        let meta = Meta {
            schema: SCHEMA,
            abi: ABI_VERSION,
            hz: kernel.hz,
            _pad: 0,
        };
        kernel.array::<Meta>("META")?.set(0, meta, 0)?;
        Ok(kernel)
    }

    fn array<V: Pod>(&mut self, name: &str) -> Result<Array<&mut MapData, V>> {
        let map = self.bpf.map_mut(name).with_context(|| format!("no map {name}"))?;
        Array::try_from(map).with_context(|| format!("map {name}"))
    }

    fn hash<K: Pod, V: Pod>(&mut self, name: &str) -> Result<HashMap<&mut MapData, K, V>> {
        let map = self.bpf.map_mut(name).with_context(|| format!("no map {name}"))?;
        HashMap::try_from(map).with_context(|| format!("map {name}"))
    }

    fn per_cpu<V: Pod>(&mut self, name: &str) -> Result<PerCpuArray<&mut MapData, V>> {
        let map = self.bpf.map_mut(name).with_context(|| format!("no map {name}"))?;
        PerCpuArray::try_from(map).with_context(|| format!("map {name}"))
    }

    /// The loaded object.
    pub fn object(&mut self) -> &mut Ebpf {
        &mut self.bpf
    }

    fn clear<K: Pod, V: Pod>(&mut self, name: &str) -> Result<()> {
        let mut map = self.hash::<K, V>(name)?;
        let keys = map.keys().collect::<Result<Vec<K>, _>>()?;
        for key in keys {
            map.remove(&key)?;
        }
        Ok(())
    }

    fn acl(&mut self) -> Result<LpmTrie<&mut MapData, AclData, u32>> {
        Ok(LpmTrie::try_from(self.bpf.map_mut("ACL").context("no map ACL")?)?)
    }

    fn clear_acl(&mut self) -> Result<()> {
        let mut acl = self.acl()?;
        let keys = acl.keys().collect::<Result<Vec<_>, _>>()?;
        for key in keys {
            acl.remove(&key)?;
        }
        Ok(())
    }

    /// Puts both entries of a connection into its flow table.
    pub fn insert(&mut self, conn: &Conn, last_seen: u32) -> Result<()> {
        conn.entries()
            .iter()
            .try_for_each(|entry| self.insert_entry(entry, last_seen))
    }

    fn insert_entry(&mut self, entry: &FlowEntry, last_seen: u32) -> Result<()> {
        if entry.src.0.is_ipv4() {
            let (key, flow) = flow_of::<Addr4>(entry, last_seen);
            self.hash("FLOWS4")?.insert(key, flow, 0).context("FLOWS4")
        } else {
            let (key, flow) = flow_of::<Addr16>(entry, last_seen);
            self.hash("FLOWS6")?.insert(key, flow, 0).context("FLOWS6")
        }
    }

    /// Fills both flow tables with flows that belong to nobody here, until the kernel says that there is no room.
    fn fill(&mut self, now: u32) -> Result<()> {
        for v6 in [false, true] {
            let full = (0..4 * FLOW_ENTRIES).any(|n| self.insert_entry(&strangers(v6, n), now).is_err());
            ensure!(
                full,
                "a flow table has room for more than {} entries",
                4 * FLOW_ENTRIES
            );
        }
        Ok(())
    }
}

// === impl Datapath ===

impl Datapath for Kernel {
    fn set(&mut self, world: &World) -> Result<()> {
        self.clear::<FlowKey<Addr4>, Flow<Addr4>>("FLOWS4")?;
        self.clear::<FlowKey<Addr16>, Flow<Addr16>>("FLOWS6")?;
        self.clear::<ServiceKey, Service>("SERVICES")?;
        self.clear::<AffinityKey, Affinity>("AFFINITY")?;
        self.clear::<FragmentKey, FragmentPorts>("FRAGMENTS")?;
        self.clear::<Addr16, Vip>("VIPS")?;
        self.clear_acl()?;

        self.array("OURS")?.set(0, *world.filter(), 0)?;
        let mut settings = world.settings;
        if let Some(age) = world.agent_silent_for {
            let last = jiffies()?.wrapping_sub(age * self.hz);
            settings.heartbeat = last.wrapping_add(AGENT_SILENT_S * self.hz);
        }
        self.array::<Settings>("SETTINGS")?.set(0, settings, 0)?;
        for (slot, device) in world.devices() {
            self.array::<Device>("DEVICES")?.set(slot.into(), device, 0)?;
            self.hash::<u32, u32>("DEVICE_SLOTS")?
                .insert(device.ifindex, u32::from(slot), 0)?;
        }
        for (i, addr) in world.sources.iter().enumerate() {
            self.array::<Addr16>("SNAT_ADDRESSES")?
                .set(i as u32, Addr16::from(*addr), 0)?;
        }
        for id in 1..self.sizes.backends {
            let backend = world.backends.get(id as usize - 1).copied().unwrap_or_default();
            self.array::<Backend>("BACKENDS")?.set(id, backend, 0)?;
        }
        for (vip, flags) in &world.vips {
            self.hash("VIPS")?
                .insert(Addr16::from(*vip), Vip { flags: *flags }, 0)?;
        }
        for (service, addr, bits, action) in &world.acl {
            let bits = u32::from(*bits) + if addr.is_ipv4() { 96 } else { 0 };
            let data = AclData {
                service: *service,
                addr: Addr16::from(*addr),
            };
            self.acl()?
                .insert(&lpm_trie::Key::new(32 + bits, data), action, 0)?;
        }
        for (key, value) in &world.affinity {
            self.hash::<AffinityKey, Affinity>("AFFINITY")?
                .insert(key, value, 0)?;
        }
        for service in &world.services {
            let mut row = Box::new(RingRow { backends: [0; _] });
            row.backends.copy_from_slice(&world.ring_of(service));
            self.array::<RingRow>("RINGS")?.set(service.value.id, *row, 0)?;
            let timeouts = World::timeouts(service, self.hz);
            self.array::<Timeouts>("TIMEOUTS")?
                .set(service.value.id, timeouts, 0)?;
            self.hash("SERVICES")?
                .insert(service.key, world.value_of(service), 0)?;
        }
        let now = jiffies()?;
        for what in 0..limited::COUNT {
            // A window that began an hour from now does not end before.
            let rate = Rate {
                since: now.wrapping_add(if world.answers_exhausted {
                    3600 * self.hz
                } else {
                    0
                }),
                count: if world.answers_exhausted { u32::MAX } else { 0 },
            };
            let all = PerCpuValues::try_from(vec![rate; nr_cpus().map_err(|(_, e)| e)?])?;
            self.per_cpu::<Rate>("RATES")?.set(what, all, 0)?;
        }
        for (key, ports, age) in &world.fragments {
            let seen = now.wrapping_sub(age * self.hz);
            self.hash::<FragmentKey, FragmentPorts>("FRAGMENTS")?.insert(
                key,
                FragmentPorts { seen, ..*ports },
                0,
            )?;
        }
        for (conn, age) in &world.conns {
            self.insert(conn, now.wrapping_sub(age * self.hz))?;
        }
        if world.flow_table_full {
            self.fill(now)?;
        }
        Ok(())
    }

    fn flows(&mut self) -> Result<Vec<FlowEntry>> {
        let mut all = Vec::new();
        for entry in self.hash::<FlowKey<Addr4>, Flow<Addr4>>("FLOWS4")?.iter() {
            let (key, flow) = entry?;
            all.push(entry_of(&key, &flow));
        }
        for entry in self.hash::<FlowKey<Addr16>, Flow<Addr16>>("FLOWS6")?.iter() {
            let (key, flow) = entry?;
            all.push(entry_of(&key, &flow));
        }
        all.sort_by_key(|e| (e.src, e.dst, e.proto));
        Ok(all)
    }

    fn counters(&mut self) -> Result<Counters> {
        let mut all = Counters::new();
        let mut put = |name: String, value: u64| {
            if value > 0 {
                *all.entry(name).or_default() += value;
            }
        };
        for cpu in self.per_cpu::<Stats>("STATS")?.get(&0, 0)?.iter() {
            for counter in Counter::ALL {
                put(counter.name().into(), cpu.counters[*counter as usize]);
            }
        }
        for cpu in self.per_cpu::<Drops>("DROPS")?.get(&0, 0)?.iter() {
            for reason in DropReason::ALL {
                put(format!("drops {}", reason.name()), cpu.reasons[*reason as usize]);
            }
        }
        for id in 0..self.sizes.backends {
            for cpu in self.per_cpu::<BackendStats>("BACKEND_STATS")?.get(&id, 0)?.iter() {
                for (name, value) in backend_fields(cpu) {
                    put(format!("backend {id} {name}"), value);
                }
            }
        }
        for id in 0..self.sizes.services {
            for cpu in self.per_cpu::<ServiceStats>("SERVICE_STATS")?.get(&id, 0)?.iter() {
                put(format!("service {id} flows"), cpu.flows);
                for reason in DropReason::ALL {
                    put(
                        format!("service {id} drops {}", reason.name()),
                        cpu.drops[*reason as usize],
                    );
                }
            }
        }
        Ok(all)
    }

    fn check_sums(&mut self, on: bool) {
        self.check_sums = on;
    }

    fn run(&mut self, program: Program, slot: u16, frame: &[u8]) -> Result<Ran> {
        let mut out = vec![0; frame.len() + 2048];
        let ifindex = ifindex_of(slot);
        let result = match program {
            Program::Xdp => {
                // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
                let context = words(&[0, frame.len() as u32, 0, ifindex, 0, 0]);
                let xdp: &Xdp = self
                    .bpf
                    .program("weir_xdp")
                    .context("no program weir_xdp")?
                    .try_into()?;
                xdp.test_run(options(frame, &mut out, &context))?
            }
            Program::Ingress | Program::Egress => {
                let name = if program == Program::Ingress {
                    "weir_tc_ingress"
                } else {
                    "weir_tc_egress"
                };
                // struct __sk_buff: ingress_ifindex is word 9, ifindex word 10; most others have to be zero.
                let mut context = [0; 48];
                context[9] = ifindex;
                context[10] = ifindex;
                let context = words(&context);
                let sums = self.check_sums;
                let tc: &SchedClassifier = self
                    .bpf
                    .program(name)
                    .with_context(|| format!("no program {name}"))?
                    .try_into()?;
                let (action, length) = test_run(tc.fd()?.as_fd(), frame, &mut out, &context, sums)?;
                out.truncate(length);
                return Ok(Ran {
                    action,
                    frame: out,
                    to: None,
                });
            }
        };
        out.truncate(result.data_size_out as usize);
        Ok(Ran {
            action: result.return_value as i32,
            frame: out,
            to: None,
        })
    }
}

fn options<'a>(frame: &'a [u8], out: &'a mut [u8], context: &'a [u8]) -> TestRunOptions<'a> {
    TestRunOptions {
        data_in: Some(frame),
        data_out: Some(out),
        ctx_in: Some(context),
        ..TestRunOptions::new()
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// A live flow that belongs to nobody in the rows: what full tables are full of.
pub fn strangers(v6: bool, n: u32) -> FlowEntry {
    let (src, dst): (IpAddr, IpAddr) = if v6 {
        (
            [0xfdff, 0, 0, 0, 0, 0, 0, 1].into(),
            [0xfdff, 0, 0, 0, 0, 0, 0, 2].into(),
        )
    } else {
        ([10, 255, 0, 1].into(), [10, 255, 0, 2].into())
    };
    let (src, dst) = ((src, n as u16 + 1), (dst, 9));
    FlowEntry {
        proto: 6,
        src,
        dst,
        to_src: src,
        to_dst: dst,
        backend: 1,
        epoch: 100,
        service: 1,
        state: lb_common::maps::flow_state::ESTABLISHED,
        hop: lb_common::addr::Hop::UNKNOWN,
    }
}

/// The counters of a backend by name.
pub fn backend_fields(stats: &BackendStats) -> [(&'static str, u64); 8] {
    [
        ("packets_in", stats.packets_in),
        ("bytes_in", stats.bytes_in),
        ("packets_out", stats.packets_out),
        ("bytes_out", stats.bytes_out),
        ("flows", stats.flows),
        ("refused", stats.refused),
        ("resteered", stats.resteered),
        ("established", stats.established),
    ]
}

/// A flow entry as the maps hold it.
pub fn flow_of<A: Address + Default>(entry: &FlowEntry, last_seen: u32) -> (FlowKey<A>, Flow<A>) {
    let addr = |ip: IpAddr| A::from_wide(Addr16::from(ip));
    let key = FlowKey {
        src: addr(entry.src.0),
        dst: addr(entry.dst.0),
        sport: Be16::new(entry.src.1),
        dport: Be16::new(entry.dst.1),
        proto: entry.proto.into(),
    };
    let flow = Flow {
        src: addr(entry.to_src.0),
        dst: addr(entry.to_dst.0),
        sport: Be16::new(entry.to_src.1),
        dport: Be16::new(entry.to_dst.1),
        addr_delta: delta(&[entry.src.0, entry.dst.0], &[entry.to_src.0, entry.to_dst.0]),
        port_delta: port_delta([entry.src.1, entry.dst.1], [entry.to_src.1, entry.to_dst.1]),
        hop: entry.hop,
        backend: entry.backend,
        epoch: entry.epoch,
        service: entry.service,
        state: entry.state,
        last_seen,
        created: last_seen,
        _pad: A::Pad::default(),
    };
    (key, flow)
}

/// A flow entry of the maps in the form that rows compare.
pub fn entry_of<A: Address>(key: &FlowKey<A>, flow: &Flow<A>) -> FlowEntry {
    let end = |addr: A, port: Be16| (IpAddr::from(addr.wide()), port.get());
    FlowEntry {
        proto: key.proto as u8,
        src: end(key.src, key.sport),
        dst: end(key.dst, key.dport),
        to_src: end(flow.src, flow.sport),
        to_dst: end(flow.dst, flow.dport),
        backend: flow.backend,
        epoch: flow.epoch,
        service: flow.service,
        state: flow.state,
        hop: flow.hop,
    }
}

/// One's complement difference new − old in memory words (RFC 1624: the sum of ~old and new).
fn difference(old: &[u8], new: &[u8]) -> u16 {
    let mut sum = 0u32;
    for (o, n) in old.chunks(2).zip(new.chunks(2)) {
        sum += u32::from(!u16::from_ne_bytes([o[0], o[1]])) + u32::from(u16::from_ne_bytes([n[0], n[1]]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn delta(old: &[IpAddr], new: &[IpAddr]) -> u16 {
    let bytes = |ips: &[IpAddr]| -> Vec<u8> {
        ips.iter()
            .flat_map(|ip| match ip {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            })
            .collect()
    };
    difference(&bytes(old), &bytes(new))
}

fn port_delta(old: [u16; 2], new: [u16; 2]) -> u16 {
    let bytes = |ports: [u16; 2]| ports.map(u16::to_be_bytes).concat();
    difference(&bytes(old), &bytes(new))
}
