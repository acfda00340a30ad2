//! The core as the kernel runs it: the real object, loaded, and one frame at a time by `BPF_PROG_TEST_RUN`.

use std::{
    fs::File,
    os::fd::AsFd as _,
    path::PathBuf,
    process::Command,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader, Pod, TestRun as _, TestRunOptions, VerifierLogLevel,
    maps::{Array, HashMap, LpmTrie, MapData, PerCpuArray, PerCpuValues, lpm_trie},
    programs::{SchedClassifier, Xdp},
    util::nr_cpus,
};
use lb_common::{
    addr::{Addr4, Addr16},
    counter::{Counter, DropReason},
    limits::{AGENT_SILENT_S, flow_buckets},
    maps::{
        ABI_VERSION, AclData, Affinity, AffinityKey, Backend, BackendStats, Cursor, Device, Drops,
        FragmentKey, FragmentPorts, Meta, Rate, RingRow, SCHEMA, Service, ServiceFlows, ServiceKey,
        ServiceStats, Settings, Stats, Timeouts, Vip, limited,
    },
    slot::TableSettings,
};
use weir::datapath::flow_table::{Context, FlowMaps};

pub use crate::test_run::jiffies;
use crate::{
    row::Datapath,
    slots,
    test_run::test_run,
    world::{DEVICES, FlowEntry, World, ifindex_of},
};

/// Flows that each flow table is for in the tests.
pub const FLOWS: u32 = 32;
/// Sizes of the maps in the tests.
pub const SMALL: Sizes = Sizes {
    flows: FLOWS,
    backends: 32,
    services: 16,
};

/// Sizes of the maps.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Flows that each flow table is for.
    pub flows: u32,
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
            .verifier_log_level(VerifierLogLevel::STATS)
            .map_max_entries("FLOWS4", flow_buckets(sizes.flows))
            .map_max_entries("FLOWS6", flow_buckets(sizes.flows))
            .map_max_entries("CURSORS", sizes.backends)
            .map_max_entries("SERVICE_FLOWS", sizes.services)
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
        let table = kernel.table();
        kernel.array::<TableSettings>("TABLE")?.set(0, table, 0)?;
        Ok(kernel)
    }

    /// What the flow tables' hash is made of: nothing secret, so that rows come out the same every time.
    fn table(&self) -> TableSettings {
        TableSettings {
            buckets4: flow_buckets(self.sizes.flows),
            buckets6: flow_buckets(self.sizes.flows),
            ..slots::SETTINGS
        }
    }

    /// The flow tables in this process's memory, with the idle times of a world.
    pub fn flow_maps(&mut self, world: Option<&World>) -> Result<FlowMaps> {
        let mut timeouts = vec![Timeouts::default(); self.sizes.services as usize];
        for service in world.iter().flat_map(|world| &world.services) {
            timeouts[service.value.id as usize] = World::timeouts(service, self.hz);
        }
        let context = Context {
            settings: self.table(),
            timeouts,
            ticks_per_second: self.hz,
        };
        let mut fds = Vec::new();
        for name in ["FLOWS4", "FLOWS6", "SERVICE_FLOWS"] {
            let map = self.bpf.map(name).with_context(|| format!("no map {name}"))?;
            let aya::maps::Map::Array(map) = map else {
                bail!("map {name} is no array");
            };
            fds.push(map.fd().as_fd());
        }
        let fds = fds.try_into().map_err(|_| anyhow::anyhow!("three maps"))?;
        Ok(FlowMaps::of(fds, self.sizes.services, context)?)
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
}

// === impl Datapath ===

impl Datapath for Kernel {
    fn set(&mut self, world: &World) -> Result<()> {
        let flows = self.flow_maps(Some(world))?;
        slots::clear::<Addr4, _>(&flows);
        slots::clear::<Addr16, _>(&flows);
        for id in 0..self.sizes.backends {
            self.array::<Cursor>("CURSORS")?.set(id, Cursor::default(), 0)?;
        }
        for id in 0..self.sizes.services {
            self.array::<ServiceFlows>("SERVICE_FLOWS")?
                .set(id, world.service_flows(id), 0)?;
        }
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
            slots::insert(&flows, conn, now.wrapping_sub(age * self.hz))?;
        }
        if world.flow_table_full {
            slots::fill::<Addr4, _>(&flows, now)?;
            slots::fill::<Addr16, _>(&flows, now)?;
        }
        Ok(())
    }

    fn flows(&mut self) -> Result<Vec<FlowEntry>> {
        let flows = self.flow_maps(None)?;
        let mut all = slots::live::<Addr4, _>(&flows)?;
        all.extend(slots::live::<Addr16, _>(&flows)?);
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
