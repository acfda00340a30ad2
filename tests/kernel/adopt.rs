//! Adoption of maps of layout 2, which the test writes as the agents of that layout left them.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use aya::{
    maps::MapType,
    programs::{
        Xdp, XdpMode,
        links::{FdLink, PinnedLink},
    },
};
use lb_common::{
    addr::{Addr4, Addr16, Be16, Hop},
    counter::{Counter, DropReason},
    flow::{Address, FlowKey},
    limits::RING_ROW,
    maps::{self as m, ABI_VERSION, Meta, SCHEMA, adopting, backend_flags, device_flags, flow_state},
    slot::head,
};
use weir::datapath::{
    Maps as _,
    adopt::layout2::{self, Flow4, Flow6, state},
    batch::Table,
    bpf::KernelMaps,
    counters::Counters,
    flow_table::FlowMaps,
    load::{LoadError, Pins, load},
    preflight::preflight,
    sweep::Sweeper,
};

use crate::{netns::Netns, object, sizes};

/// Counters and drop reasons of layout 2.
const COUNTERS: usize = 20;
const DROPS: usize = 12;

/// A map of layout 2, pinned.
struct Old(OwnedFd);

/// bpf(2) with an attribute of words; what it returns.
fn bpf(command: libc::c_long, attr: &[u32]) -> i32 {
    // SAFETY: the addresses in it are those of values that outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of_val(attr)) };
    assert!(result >= 0, "bpf({command}): {}", io::Error::last_os_error());
    result as i32
}

fn halves<T>(pointer: *const T) -> [u32; 2] {
    let address = pointer as u64;
    [address as u32, (address >> 32) as u32]
}

impl Old {
    /// `BPF_MAP_CREATE` and `BPF_OBJ_PIN`.
    fn new(maps: &Path, name: &str, kind: MapType, [key, value, entries, flags]: [usize; 4]) -> Self {
        let attr = [
            kind as u32,
            key as u32,
            value as u32,
            entries as u32,
            flags as u32,
        ];
        // SAFETY: the kernel made the descriptor for this call.
        let map = unsafe { OwnedFd::from_raw_fd(bpf(0, &attr)) };
        let path = std::ffi::CString::new(maps.join(name).to_str().unwrap()).unwrap();
        let [low, high] = halves(path.as_ptr());
        bpf(6, &[low, high, map.as_raw_fd() as u32, 0]);
        Self(map)
    }

    /// `BPF_MAP_UPDATE_ELEM`.
    fn put<K, V>(&self, key: &K, value: &V) {
        let ([key_low, key_high], [low, high]) = (halves(key), halves(value));
        bpf(
            2,
            &[self.0.as_raw_fd() as u32, 0, key_low, key_high, low, high, 0, 0],
        );
    }

    /// The same value on every CPU.
    fn put_each<const N: usize>(&self, index: u32, value: [u64; N]) {
        let all = vec![value; aya::util::nr_cpus().unwrap()];
        // The kernel reads the values of all CPUs from the first one on.
        self.put(&index, &all[0]);
    }
}

/// The maps that the released agent made, with something in each that holds state.
struct Layout2 {
    pins: PathBuf,
    flows4: Old,
    flows6: Old,
    kept: Vec<Old>,
}

impl Layout2 {
    /// Writes it under a pin path. The programs are those of another set of pins.
    fn write(pin: &Path, programs: &Pins, now: u32) -> Self {
        use MapType::{Array, Hash, LpmTrie, LruHash, PerCpuArray, RingBuf};
        let pins = pin.join("v1");
        for part in ["maps", "programs", "links"] {
            std::fs::create_dir_all(pins.join(part)).unwrap();
        }
        for name in ["weir_tc_ingress", "weir_tc_egress"] {
            std::fs::rename(programs.programs().join(name), pins.join("programs").join(name)).unwrap();
        }
        let maps = pins.join("maps");
        let map = |name: &str, kind, shape| Old::new(&maps, name, kind, shape);
        let sized = |name: &str, kind, key, value, entries| map(name, kind, [key, value, entries, 0]);
        let services = sized("SERVICES", Hash, 20, 36, 64);
        services.put(&key(), &service());
        let rings = sized("RINGS", Array, 4, size_of::<m::RingRow>(), 8);
        let mut row = Box::new(m::RingRow {
            backends: [0; RING_ROW],
        });
        row.backends[7] = 70;
        rings.put(&3_u32, &*row);
        let backends = sized("BACKENDS", Array, 4, 48, 9500);
        backends.put(&70_u32, &backend());
        let backend_stats = sized("BACKEND_STATS", PerCpuArray, 4, 64, 9500);
        backend_stats.put_each(70, [5_u64; 8]);
        let service_stats = sized("SERVICE_STATS", PerCpuArray, 4, 8 + 8 * DROPS, 64);
        service_stats.put_each(3, [6_u64; 1 + DROPS]);
        let timeouts = sized("TIMEOUTS", Array, 4, 16, 64);
        timeouts.put(&3_u32, &[100_000_u32; 4]);
        let acl = map("ACL", LpmTrie, [24, 4, 64, 1]);
        acl.put(&[32 + 96 + 8, 3, 0, 0, 0xffff_u32.to_be(), 10_u32], &m::ACL_DENY);
        let vips = sized("VIPS", Hash, 16, 4, 64);
        vips.put(&Addr16::from(vip()), &m::vip_flags::ECHO);
        let devices = sized("DEVICES", Array, 4, 16, 256);
        devices.put(&4_u32, &[70_u32, 1500, 0x0202_0202, 0x0202_u16.to_le().into()]);
        let slots = sized("DEVICE_SLOTS", Hash, 4, 4, 256);
        slots.put(&70_u32, &4_u32);
        let snat = sized("SNAT_ADDRESSES", Array, 4, 16, 1024);
        snat.put(&9_u32, &Addr16::from(vip()));
        let affinity = sized("AFFINITY", LruHash, 20, 8, 1024);
        affinity.put(&affine(), &[70_u32, 9]);
        let fragments = sized("FRAGMENTS", LruHash, 40, 4, 1024);
        fragments.put(&m::FragmentKey::default(), &[Be16::new(7), Be16::new(80)]);
        let cursors = sized("CURSORS", PerCpuArray, 4, 4, 9500);
        cursors.put_each(70, [11_u64]);
        let ours = sized("OURS", Array, 4, size_of::<m::Ours>() - 128, 1);
        let all = vec![u64::MAX; size_of::<m::Ours>() / 8];
        ours.put(&0_u32, &all[0]);
        let settings = sized("SETTINGS", Array, 4, 16, 1);
        settings.put(&0_u32, &[1024_u16, 2048, 0, 0, 1, 0, 0, 0]);
        let stats = sized("STATS", PerCpuArray, 4, 8 * COUNTERS, 1);
        stats.put_each(0, [3_u64; COUNTERS]);
        let drops = sized("DROPS", PerCpuArray, 4, 8 * DROPS, 1);
        drops.put_each(0, [2_u64; DROPS]);
        let meta = sized("META", Array, 4, 16, 1);
        meta.put(&0_u32, &[layout2::SCHEMA, layout2::ABI, 250, 0]);
        let events = map("EVENTS", RingBuf, [0, 0, 4096, 0]);
        let flows4 = sized("FLOWS4", Hash, 16, size_of::<Flow4>(), 4096);
        let flows6 = sized("FLOWS6", Hash, 40, size_of::<Flow6>(), 4096);
        let this = Self {
            pins,
            flows4,
            flows6,
            kept: vec![
                services, rings, backends, timeouts, acl, vips, devices, slots, snat, affinity, fragments,
                cursors, ours, settings, stats, drops, meta, events,
            ],
        };
        for (n, bits) in STATES.iter().enumerate() {
            this.put_flows(n as u32, bits.0, now);
        }
        this
    }

    /// A flow of each family.
    fn put_flows(&self, n: u32, bits: u32, now: u32) {
        let address = |ip: IpAddr| Addr4::from_wide(Addr16::from(ip));
        let server = [172, 17, 0, 2].into();
        put_flow(
            &self.flows4,
            n,
            bits,
            now,
            [client(n), vip(), server, source()].map(address),
        );
        let of = |last| Addr16::from(IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last]));
        put_flow(
            &self.flows6,
            n,
            bits,
            now,
            [of(1000 + n as u16), of(1), of(2), of(3)],
        );
    }
}

/// Both directions of flow `n`: the client's address, the VIP, the backend's and the source towards it.
fn put_flow<A: Address>(flows: &Old, n: u32, bits: u32, now: u32, [client, vip, server, source]: [A; 4]) {
    let (own, port, to, from) = (
        Be16::new(5000),
        Be16::new(80),
        Be16::new(8080),
        Be16::new(1024 + n as u16),
    );
    let hop = Hop::new([2, 0, 0, 0, 0, 9], 4);
    let forward = layout2::Flow {
        src: source,
        dst: server,
        sport: from,
        dport: to,
        addr_delta: 0x1234,
        port_delta: 0x5678,
        hop,
        backend: 70,
        epoch: 9,
        service: 3,
        state: bits | state::SNAT,
        last_seen: now.wrapping_sub(50),
        created: now.wrapping_sub(60),
        _pad: [0_u32; 4],
    };
    let reverse = layout2::Flow {
        src: vip,
        dst: client,
        sport: port,
        dport: own,
        addr_delta: !forward.addr_delta,
        port_delta: !forward.port_delta,
        state: forward.state | state::REVERSE,
        last_seen: now.wrapping_sub(40),
        ..forward
    };
    let key = |src, dst, sport, dport| FlowKey {
        src,
        dst,
        sport,
        dport,
        proto: 6,
    };
    flows.put(&key(client, vip, own, port), &forward);
    flows.put(&key(server, source, to, from), &reverse);
}

/// States of layout 2 and what they have to become.
const STATES: [(u32, u32); 5] = [
    (0, 0),
    (state::ESTABLISHED, flow_state::ANSWERED | flow_state::ESTABLISHED),
    (
        state::ESTABLISHED | state::FIN_CLIENT | state::FIN_BACKEND,
        flow_state::ANSWERED | flow_state::ESTABLISHED | flow_state::FINS | flow_state::CLOSED,
    ),
    (
        state::ESTABLISHED | state::RESET_BACKEND,
        flow_state::ANSWERED | flow_state::ESTABLISHED | flow_state::RESET_BACKEND,
    ),
    (
        state::REFUSED | 2 << state::TRIES_SHIFT,
        flow_state::REFUSED | 2 << flow_state::TRIES_SHIFT,
    ),
];

fn client(n: u32) -> IpAddr {
    [10, 0, 0, n as u8].into()
}
fn vip() -> IpAddr {
    [192, 0, 2, 1].into()
}
fn source() -> IpAddr {
    [172, 17, 0, 1].into()
}
fn key() -> m::ServiceKey {
    m::ServiceKey {
        vip: vip().into(),
        port: Be16::new(80),
        proto: 6,
    }
}
fn service() -> m::Service {
    m::Service {
        id: 3,
        flags: m::service_flags::RESET_UNKNOWN,
        generation: 8,
        ring_row: 3,
        ring_mask: 0,
        previous_row: m::NO_RING,
        previous_mask: 0,
        alternates: [70, 0],
    }
}
fn backend() -> m::Backend {
    m::Backend {
        hop: Hop::new([2, 0, 0, 0, 0, 1], 4),
        addr: IpAddr::from([172, 17, 0, 2]).into(),
        port: Be16::new(8080),
        flags: backend_flags::LOCAL,
        state: m::backend_state::ACTIVE,
        epoch: 9,
        service: 3,
        snat_first: 9,
        snat_count: 2,
        _pad: 0,
    }
}
fn affine() -> m::AffinityKey {
    m::AffinityKey {
        client: client(1).into(),
        service: 3,
    }
}

/// A set of pins whose programs a set of layout 2 gets, and the flow clock.
fn programs(ns: &Netns) -> (Pins, u32) {
    let other = ns.pin.join("v9");
    let loaded = load(object(), &other, &sizes()).unwrap();
    let now = Sweeper::open(&loaded.pins).unwrap().now().unwrap();
    (loaded.pins, now)
}

fn remove_all(directory: &Path) {
    for part in ["maps", "programs", "links", ""] {
        let part = directory.join(part);
        for file in std::fs::read_dir(&part).into_iter().flatten().flatten() {
            let _gone = std::fs::remove_file(file.path());
        }
        let _gone = std::fs::remove_dir(part);
    }
}

/// The state of flow `n` in the new tables, of IPv4 and IPv6; both directions are there.
fn states(flows: &FlowMaps, n: u32) -> [Option<u32>; 2] {
    let v4 = |ip: IpAddr| Addr4::from_wide(Addr16::from(ip));
    let v6 = |last| Addr16::from(IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last]));
    [
        state_of(
            flows,
            n,
            [v4(client(n)), v4(vip()), v4([172, 17, 0, 2].into()), v4(source())],
        ),
        state_of(flows, n, [v6(1000 + n as u16), v6(1), v6(2), v6(3)]),
    ]
}

fn state_of<A: Address>(flows: &FlowMaps, n: u32, [client, vip, server, source]: [A; 4]) -> Option<u32> {
    let key = |src, dst, sport: u16, dport: u16| FlowKey {
        src,
        dst,
        sport: Be16::new(sport),
        dport: Be16::new(dport),
        proto: 6,
    };
    let port = 1024 + n as u16;
    let (found, forward) = flows.find(&key(client, vip, 5000, 80));
    if !found.is_live() {
        return None;
    }
    let (found, reverse) = flows.find(&key(server, source, 8080, port));
    assert!(found.is_live() && reverse.is_reverse() && !forward.is_reverse());
    assert_eq!(forward.reverse(), (reverse.slot, head::generation(reverse.head)));
    assert_eq!(reverse.forward(), (forward.slot, head::generation(forward.head)));
    assert_eq!(
        (forward.backend(), forward.body.epoch(), forward.service()),
        (70, 9, 3)
    );
    assert_eq!(
        (forward.body.to_src, forward.body.to_sport),
        (source, Be16::new(port))
    );
    assert_eq!((reverse.body.to_src, reverse.body.to_dst), (vip, client));
    assert_eq!(
        (forward.body.addr_delta, reverse.body.addr_delta),
        (0x1234, !0x1234)
    );
    assert_eq!(forward.body.hop, Hop::new([2, 0, 0, 0, 0, 9], 4));
    Some(forward.state())
}

#[test]
fn maps_of_the_layout_before_are_adopted() {
    let ns = Netns::new();
    preflight(&ns.pin).unwrap();
    let (other, now) = programs(&ns);
    let old = Layout2::write(&ns.pin, &other, now);
    remove_all(other.root());
    remove_all(&ns.pin.join("v9"));
    assert_eq!(old.kept.len(), 18);
    // Its XDP program is on a device.
    ns.ip("link add d0 type veth peer name d1");
    let links = old.pins.join("links");
    let (pin, beside) = (ns.pin.clone(), ns.pin.join("v8"));
    let (ifindex, loaded) = ns.inside(move || {
        let mut before = load(object(), &beside, &sizes()).unwrap();
        let ifindex = nix::net::if_::if_nametoindex("d0").unwrap();
        let program: &mut Xdp = before.ebpf.program_mut("weir_xdp").unwrap().try_into().unwrap();
        let id = program.attach_to_if_index(ifindex, XdpMode::Skb).unwrap();
        let link = FdLink::try_from(program.take_link(id).unwrap()).unwrap();
        link.pin(links.join(format!("xdp_generic_{ifindex}"))).unwrap();
        remove_all(before.pins.root());
        remove_all(&beside);
        (ifindex, load(object(), &pin, &sizes()).unwrap())
    });
    assert!(loaded.adopted);
    // The maps have the room that the earlier ones had.
    assert!(
        loaded
            .warnings
            .iter()
            .all(|w| w.contains("BACKEND") || w.contains("CURSORS")),
        "{:?}",
        loaded.warnings
    );
    assert!(!old.pins.exists(), "the earlier maps are still pinned");
    let pins = &loaded.pins;
    let xdp = aya::programs::ProgramInfo::from_pin(pins.programs().join("weir_xdp")).unwrap();
    let link = PinnedLink::from_pin(pins.links().join(format!("xdp_generic_{ifindex}"))).unwrap();
    assert_eq!(FdLink::from(link).info().unwrap().program_id(), xdp.id());

    let maps = KernelMaps::open(&pins.maps()).unwrap();
    let dump = maps.dump().unwrap();
    assert_eq!(dump.services, BTreeMap::from([(key(), service())]));
    assert_eq!(dump.backends, BTreeMap::from([(70, backend())]));
    assert_eq!(dump.rings[&3][7], 70);
    assert_eq!(dump.timeouts[&3].syn, 100_000);
    assert_eq!(dump.acl[&(3, "10.0.0.0/8".parse().unwrap())], m::ACL_DENY);
    assert_eq!(dump.vips[&vip()].flags, m::vip_flags::ECHO);
    assert_eq!(dump.snat_addresses, BTreeMap::from([(9, vip())]));
    let device = dump.devices[&4];
    assert_eq!((device.ifindex, device.mtu), (70, 1500));
    assert_eq!(device.flags, device_flags::UPLINK);
    let settings = dump.settings;
    assert_eq!((settings.snat_port_min, settings.snat_port_max), (1024, 2048));
    assert_eq!(
        (settings.loopback_ifindex, settings.adopting),
        (1, adopting::NONE)
    );
    let meta: Table<u32, Meta> = Table::open(&pins.maps(), "META").unwrap();
    let meta = meta.get(&0).unwrap().unwrap();
    assert_eq!((meta.schema, meta.abi, meta.hz), (SCHEMA, ABI_VERSION, 250));

    let affinity: Table<m::AffinityKey, m::Affinity> = Table::open(&pins.maps(), "AFFINITY").unwrap();
    let known = affinity.get(&affine()).unwrap().unwrap();
    assert_eq!((known.backend, known.epoch), (70, 9));
    let fragments: Table<m::FragmentKey, m::FragmentPorts> = Table::open(&pins.maps(), "FRAGMENTS").unwrap();
    let fragment = fragments.get(&m::FragmentKey::default()).unwrap().unwrap();
    assert_eq!((fragment.sport, fragment.dport), (Be16::new(7), Be16::new(80)));
    assert!(fragment.seen.wrapping_sub(now) < 1 << 30);
    let cursors: Table<u32, m::Cursor> = Table::open(&pins.maps(), "CURSORS").unwrap();
    // Two sources share the ports that were dealt out.
    assert_eq!(cursors.get(&70).unwrap().unwrap().next, 22);
    let cpus = aya::util::nr_cpus().unwrap() as u64;
    let counters = Counters::open(&pins.maps()).unwrap();
    let stats = counters.stats().unwrap();
    assert!(stats[..COUNTERS].iter().all(|n| *n == 3 * cpus), "{stats:?}");
    assert_eq!(stats[Counter::TimeExceededSent as usize], 0);
    let drops = counters.drops().unwrap();
    assert!(drops[..DROPS].iter().all(|n| *n == 2 * cpus), "{drops:?}");
    assert_eq!(drops[DropReason::FlowExpired as usize], 0);
    assert_eq!(counters.services(&[3]).unwrap()[&3].flows, 6 * cpus);

    let flows = FlowMaps::open(&pins.maps()).unwrap();
    for (n, (_, wanted)) in STATES.iter().enumerate() {
        let wanted = Some(wanted | flow_state::SNAT);
        assert_eq!(states(&flows, n as u32), [wanted; 2], "flow {n}");
    }
    let counts: Table<u32, m::ServiceFlows> = Table::open(&pins.maps(), "SERVICE_FLOWS").unwrap();
    // The half-open ones and the closed one may be evicted.
    assert_eq!(counts.get(&3).unwrap().unwrap().families, [2, 2]);
    // The earlier programs are in use no more.
    let earlier: Table<u32, u32> = Table::open(&pins.maps(), "EARLIER").unwrap();
    assert_eq!((earlier.get(&0).unwrap(), earlier.get(&1).unwrap()), (None, None));
}

/// The agent was killed between the copy of the maps and the end: both sets are there, and flows have come meanwhile.
#[test]
fn an_adoption_that_was_cut_short_goes_on() {
    let ns = Netns::new();
    preflight(&ns.pin).unwrap();
    let (other, now) = programs(&ns);
    let old = Layout2::write(&ns.pin, &other, now);
    let first = load(object(), &ns.pin, &sizes()).unwrap();
    drop((first, old));
    remove_all(other.root());
    let (other, now) = programs(&ns);
    let old = Layout2::write(&ns.pin, &other, now);
    remove_all(other.root());
    remove_all(&ns.pin.join("v9"));
    old.put_flows(20, state::ESTABLISHED, now);
    let second = load(object(), &ns.pin, &sizes()).unwrap();
    assert!(second.adopted && !old.pins.exists());
    let flows = FlowMaps::open(&second.pins.maps()).unwrap();
    let open = Some(flow_state::ANSWERED | flow_state::ESTABLISHED | flow_state::SNAT);
    for n in [1, 20] {
        assert_eq!(states(&flows, n), [open; 2], "flow {n}");
    }
    let third = load(object(), &ns.pin, &sizes()).unwrap();
    assert!(third.adopted);
}

#[test]
fn other_layouts_are_refused_and_left_alone() {
    let ns = Netns::new();
    preflight(&ns.pin).unwrap();
    let (other, now) = programs(&ns);
    let old = Layout2::write(&ns.pin, &other, now);
    remove_all(other.root());
    remove_all(&ns.pin.join("v9"));
    old.kept[16].put(&0_u32, &[layout2::SCHEMA, 1, 250, 0]);
    let refusal = load(object(), &ns.pin, &sizes()).unwrap_err();
    assert!(matches!(refusal, LoadError::Incompatible { .. }), "{refusal}");
    let refusal = refusal.to_string();
    assert!(
        refusal.contains("layout 1") && refusal.contains("weir detach"),
        "{refusal}"
    );
    assert!(old.pins.join("maps/FLOWS4").exists());
}
