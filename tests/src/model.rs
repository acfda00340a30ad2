//! The core as the host compiles it, over maps on the heap: the same code as in the kernel, without the kernel.

use std::{
    cell::{Cell, UnsafeCell},
    collections::HashMap,
    net::IpAddr,
};

use anyhow::{Result, ensure};
use lb_common::{
    addr::{Addr4, Addr16},
    counter::{Counter, DropReason},
    flow::{Address, FlowKey, FlowKey6},
    limits::{AGENT_SILENT_S, RING_ROW},
    maps::{
        Affinity, AffinityKey, Backend, BackendStats, Device, Event, Flow, Flow4, Flow6, FragmentKey,
        FragmentPorts, Ours, Service, ServiceKey, ServiceStats, Settings, Timeouts, Vip, flow_state,
    },
};
use lb_ebpf::{
    parse::Datagram,
    pipeline,
    tables::{Entry, InsertError, Scratch, Tables, Work},
    verdict::{Action, Verdict},
};

use crate::{
    frame::{EGRESS, Frame, INGRESS, XDP},
    kernel::{Counters, FLOW_ENTRIES, Program, Ran, SMALL, backend_fields, entry_of, flow_of, strangers},
    row::Datapath,
    world::{Conn, FlowEntry, World, ifindex_of},
};

/// Ticks per second of the model's clock.
const HZ: u32 = 250;
/// The clock: any value will do, this one wraps soon.
const NOW: u32 = u32::MAX - 100;

/// All maps on the heap. One thread, one packet at a time.
pub struct Model(UnsafeCell<Maps>);

#[expect(
    clippy::vec_box,
    reason = "the core may hold pointers into what was removed: it must not move"
)]
struct Maps {
    ours: Box<Ours>,
    settings: Settings,
    answers_exhausted: bool,
    winner: Option<Conn>,
    vips: HashMap<Addr16, Vip>,
    services: HashMap<ServiceKey, Service>,
    timeouts: HashMap<u32, Timeouts>,
    rings: HashMap<u32, Vec<u32>>,
    backends: Vec<Backend>,
    devices: Vec<Device>,
    sources: Vec<Addr16>,
    cursor: Cell<u32>,
    acl: Vec<(u32, IpAddr, u8, u32)>,
    affinity: HashMap<AffinityKey, Affinity>,
    fragments: HashMap<FragmentKey, FragmentPorts>,
    flows4: HashMap<FlowKey6, Box<Flow4>>,
    flows6: HashMap<FlowKey6, Box<Flow6>>,
    /// As under RCU, what was removed stays readable while a packet is on its way.
    removed4: Vec<Box<Flow4>>,
    removed6: Vec<Box<Flow6>>,
    scratch4: Scratch<Addr4>,
    scratch6: Scratch<Addr16>,
    counters: Vec<u64>,
    drops: Vec<u64>,
    backend_stats: Vec<BackendStats>,
    service_stats: Vec<ServiceStats>,
}

/// The maps as the core takes them.
#[derive(Clone, Copy)]
struct View<'m>(&'m Model);

impl Default for Model {
    fn default() -> Self {
        Self(UnsafeCell::new(Maps {
            ours: World::new().filter(),
            settings: Settings::default(),
            answers_exhausted: false,
            winner: None,
            vips: HashMap::new(),
            services: HashMap::new(),
            timeouts: HashMap::new(),
            rings: HashMap::new(),
            backends: Vec::new(),
            devices: Vec::new(),
            sources: Vec::new(),
            cursor: Cell::new(0),
            acl: Vec::new(),
            affinity: HashMap::new(),
            fragments: HashMap::new(),
            flows4: HashMap::new(),
            flows6: HashMap::new(),
            removed4: Vec::new(),
            removed6: Vec::new(),
            scratch4: blank(),
            scratch6: blank(),
            counters: vec![0; Counter::COUNT],
            drops: vec![0; DropReason::COUNT],
            backend_stats: vec![BackendStats::default(); SMALL.backends as usize],
            service_stats: vec![ServiceStats::default(); SMALL.services as usize],
        }))
    }
}

impl Model {
    #[expect(
        clippy::mut_from_ref,
        reason = "maps are changed behind the back of their readers, as in the kernel"
    )]
    fn maps(&self) -> &mut Maps {
        // SAFETY: `Model` is not `Sync`, and what the core keeps across a call (values of flow maps, statistics) is
        // boxed or in vectors that never grow while a packet is on its way.
        unsafe { &mut *self.0.get() }
    }
}

// === impl Datapath ===

impl Datapath for Model {
    fn set(&mut self, world: &World) -> Result<()> {
        let before = std::mem::take(self).0.into_inner();
        let maps = self.maps();
        // Counters go on.
        maps.counters = before.counters;
        maps.drops = before.drops;
        maps.backend_stats = before.backend_stats;
        maps.service_stats = before.service_stats;

        maps.ours = world.filter();
        maps.settings = world.settings;
        if let Some(age) = world.agent_silent_for {
            maps.settings.heartbeat = NOW.wrapping_sub(age * HZ).wrapping_add(AGENT_SILENT_S * HZ);
        }
        maps.answers_exhausted = world.answers_exhausted;
        maps.winner.clone_from(&world.winner);
        maps.vips = world
            .vips
            .iter()
            .map(|(ip, flags)| (Addr16::from(*ip), Vip { flags: *flags }))
            .collect();
        // An array map has a value at every index.
        maps.backends = vec![Backend::default(); SMALL.backends as usize];
        maps.backends[1..=world.backends.len()].copy_from_slice(&world.backends);
        maps.sources = world.sources.iter().map(|ip| Addr16::from(*ip)).collect();
        maps.devices = vec![Device::default(); 8];
        for (slot, device) in world.devices() {
            maps.devices[usize::from(slot)] = device;
        }
        maps.acl.clone_from(&world.acl);
        maps.affinity = world.affinity.iter().copied().collect();
        for (key, ports, age) in &world.fragments {
            let seen = NOW.wrapping_sub(age * HZ);
            maps.fragments.insert(*key, FragmentPorts { seen, ..*ports });
        }
        for service in &world.services {
            maps.services.insert(service.key, world.value_of(service));
            maps.rings.insert(service.value.id, world.ring_of(service));
            maps.timeouts
                .insert(service.value.id, World::timeouts(service, HZ));
        }
        for (conn, age) in &world.conns {
            for entry in conn.entries() {
                insert(maps, &entry, NOW.wrapping_sub(age * HZ));
            }
        }
        if world.flow_table_full {
            for n in 0..FLOW_ENTRIES {
                if maps.flows4.len() < FLOW_ENTRIES as usize {
                    insert(maps, &strangers(false, n), NOW);
                }
                if maps.flows6.len() < FLOW_ENTRIES as usize {
                    insert(maps, &strangers(true, n), NOW);
                }
            }
        }
        Ok(())
    }

    fn flows(&mut self) -> Result<Vec<FlowEntry>> {
        let maps = self.maps();
        let narrow = |key: &FlowKey6| FlowKey {
            src: Addr4::from_wide(key.src),
            dst: Addr4::from_wide(key.dst),
            sport: key.sport,
            dport: key.dport,
            proto: key.proto,
        };
        let four = maps.flows4.iter().map(|(key, flow)| entry_of(&narrow(key), flow));
        let six = maps.flows6.iter().map(|(key, flow)| entry_of(key, flow));
        let mut all: Vec<_> = four.chain(six).collect();
        all.sort_by_key(|e| (e.src, e.dst, e.proto));
        Ok(all)
    }

    fn counters(&mut self) -> Result<Counters> {
        let maps = self.maps();
        let mut all = Counters::new();
        for counter in Counter::ALL {
            all.insert(counter.name().into(), maps.counters[*counter as usize]);
        }
        for reason in DropReason::ALL {
            all.insert(format!("drops {}", reason.name()), maps.drops[*reason as usize]);
        }
        for (id, stats) in maps.backend_stats.iter().enumerate() {
            for (name, value) in backend_fields(stats) {
                all.insert(format!("backend {id} {name}"), value);
            }
        }
        for (id, stats) in maps.service_stats.iter().enumerate() {
            all.insert(format!("service {id} flows"), stats.flows);
            for reason in DropReason::ALL {
                all.insert(
                    format!("service {id} drops {}", reason.name()),
                    stats.drops[*reason as usize],
                );
            }
        }
        Ok(all)
    }

    fn run(&mut self, program: Program, slot: u16, frame: &[u8]) -> Result<Ran> {
        let ifindex = ifindex_of(slot);
        let (verdict, frame) = match program {
            Program::Xdp => run::<XDP>(View(self), ifindex, frame),
            Program::Ingress => run::<INGRESS>(View(self), ifindex, frame),
            Program::Egress => run::<EGRESS>(View(self), ifindex, frame),
        };
        let maps = self.maps();
        maps.removed4.clear();
        maps.removed6.clear();
        ensure!(
            maps.flows4.len().max(maps.flows6.len()) <= FLOW_ENTRIES as usize,
            "too many flows"
        );
        let xdp = program == Program::Xdp;
        let (action, to) = match verdict.action() {
            Action::Pass | Action::ToTc => (if xdp { 2 } else { -1 }, None),
            Action::Transmit if program == Program::Egress => (0, None),
            Action::Transmit => (if xdp { 3 } else { 7 }, Some(ifindex)),
            Action::Redirect(to) => (if xdp { 4 } else { 7 }, Some(to)),
            Action::Neighbour(to) => (7, Some(to)),
            Action::Again => (7, Some(ifindex)),
            Action::ToNode => (0, None),
            Action::ToNodeByLoopback => (7, Some(maps.settings.loopback_ifindex)),
            Action::Drop(..) => (if xdp { 1 } else { 2 }, None),
        };
        Ok(Ran { action, frame, to })
    }
}

fn run<const HOOK: u8>(view: View<'_>, device: u32, frame: &[u8]) -> (Verdict, Vec<u8>) {
    let mut frame = Frame::<HOOK>::new(device, frame);
    let verdict = pipeline::process(&mut frame, view);
    (verdict, frame.bytes().to_vec())
}

fn insert(maps: &mut Maps, entry: &FlowEntry, last_seen: u32) {
    if entry.src.0.is_ipv4() {
        let (key, flow) = flow_of::<Addr4>(entry, last_seen);
        maps.flows4.insert(wide(&key), Box::new(flow));
    } else {
        let (key, flow) = flow_of::<Addr16>(entry, last_seen);
        maps.flows6.insert(wide(&key), Box::new(flow));
    }
}

fn wide<A: Address>(key: &FlowKey<A>) -> FlowKey6 {
    FlowKey {
        src: key.src.wide(),
        dst: key.dst.wide(),
        sport: key.sport,
        dport: key.dport,
        proto: key.proto,
    }
}

impl View<'_> {
    /// The scratch room of a family; `V6` says which of the two types `Scratch<A>` is.
    fn scratch<A: Address>(self) -> *mut Scratch<A> {
        let maps = self.0.maps();
        if A::V6 {
            (&raw mut maps.scratch6).cast()
        } else {
            (&raw mut maps.scratch4).cast()
        }
    }
}

/// Scratch room as a map has it at first.
fn blank<A: Address>() -> Scratch<A> {
    // SAFETY: integers, and an enum that has a variant zero.
    unsafe { std::mem::zeroed() }
}

// === impl Tables ===

impl Tables for View<'_> {
    fn now(self) -> u32 {
        NOW
    }
    fn ticks_per_second(self) -> u32 {
        HZ
    }
    fn ours_word(self, word: u32) -> u64 {
        self.0.maps().ours.words[word as usize]
    }
    fn port_word(self, word: u32) -> u64 {
        self.0.maps().ours.ports[word as usize]
    }
    fn routed_word(self, word: u32) -> u64 {
        self.0.maps().ours.routed[word as usize]
    }
    fn allows(self, _what: u32) -> bool {
        !self.0.maps().answers_exhausted
    }
    fn settings<'a>(self) -> Option<&'a Settings>
    where
        Self: 'a,
    {
        Some(&self.0.maps().settings)
    }
    fn vip<'a>(self, addr: &Addr16) -> Option<&'a Vip>
    where
        Self: 'a,
    {
        self.0.maps().vips.get(addr)
    }
    fn service<'a>(self, key: &ServiceKey) -> Option<&'a Service>
    where
        Self: 'a,
    {
        self.0.maps().services.get(key)
    }
    fn timeouts<'a>(self, service: u32) -> Option<&'a Timeouts>
    where
        Self: 'a,
    {
        self.0.maps().timeouts.get(&service)
    }
    fn ring(self, row: u32, index: u32) -> u32 {
        self.0
            .maps()
            .rings
            .get(&row)
            .map_or(0, |ring| ring[index as usize % RING_ROW])
    }
    fn backend<'a>(self, id: u32) -> Option<&'a Backend>
    where
        Self: 'a,
    {
        self.0.maps().backends.get(id as usize)
    }
    fn device<'a>(self, slot: u32) -> Option<&'a Device>
    where
        Self: 'a,
    {
        self.0.maps().devices.get(slot as usize)
    }
    fn device_slot(self, ifindex: u32) -> Option<u32> {
        self.0
            .maps()
            .devices
            .iter()
            .position(|d| ifindex != 0 && d.ifindex == ifindex)
            .map(|slot| slot as u32)
    }
    fn snat_address<'a>(self, index: u32) -> Option<&'a Addr16>
    where
        Self: 'a,
    {
        self.0.maps().sources.get(index as usize)
    }
    fn next_port(self, _backend: u32, leap: bool) -> u32 {
        let cursor = &self.0.maps().cursor;
        let from = if leap {
            cursor.get().wrapping_mul(0x9e37_79b1)
        } else {
            cursor.get()
        };
        cursor.set(from.wrapping_add(1));
        cursor.get()
    }
    fn acl(self, service: u32, client: &Addr16) -> u32 {
        let bits = u128::from_be_bytes(client.octets());
        let matches = self
            .0
            .maps()
            .acl
            .iter()
            .filter_map(|(id, prefix, length, action)| {
                let length = u32::from(*length) + if prefix.is_ipv4() { 96 } else { 0 };
                let mask = if length == 0 {
                    0
                } else {
                    u128::MAX << (128 - length)
                };
                let prefix = u128::from_be_bytes(Addr16::from(*prefix).octets());
                (*id == service && (prefix ^ bits) & mask == 0).then_some((length, *action))
            });
        matches.max().map_or(0, |(_, action)| action)
    }
    fn affinity(self, key: &AffinityKey) -> Option<Affinity> {
        self.0.maps().affinity.get(key).copied()
    }
    fn set_affinity(self, key: &AffinityKey, value: &Affinity) {
        self.0.maps().affinity.insert(*key, *value);
    }
    fn fragment(self, key: &FragmentKey) -> Option<FragmentPorts> {
        self.0.maps().fragments.get(key).copied()
    }
    fn set_fragment(self, key: &FragmentKey, ports: &FragmentPorts) {
        self.0.maps().fragments.insert(*key, *ports);
    }
    fn flow<A: Address>(self, key: &FlowKey<A>) -> Option<Entry<A>> {
        let (maps, key) = (self.0.maps(), wide(key));
        let found: *mut Flow<A> = if A::V6 {
            (&raw mut **maps.flows6.get_mut(&key)?).cast()
        } else {
            (&raw mut **maps.flows4.get_mut(&key)?).cast()
        };
        // SAFETY: `V6` says which of the two types `Flow<A>` is; removed entries live on until the packet is done.
        Some(unsafe { Entry::new(found) })
    }
    fn insert_flow<A: Address>(self, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), InsertError> {
        let (maps, key) = (self.0.maps(), wide(key));
        if flow.state & flow_state::REVERSE == 0
            && let Some(winner) = maps.winner.take()
        {
            for entry in winner.entries() {
                insert(maps, &entry, NOW);
            }
        }
        let (exists, length) = if A::V6 {
            (maps.flows6.contains_key(&key), maps.flows6.len())
        } else {
            (maps.flows4.contains_key(&key), maps.flows4.len())
        };
        if exists {
            return Err(InsertError::Exists);
        }
        if length >= FLOW_ENTRIES as usize {
            return Err(InsertError::Full);
        }
        let flow = std::ptr::from_ref(flow);
        if A::V6 {
            // SAFETY: `V6` says that `Flow<A>` is `Flow6`.
            maps.flows6.insert(key, Box::new(unsafe { *flow.cast() }));
        } else {
            // SAFETY: not `V6` says that `Flow<A>` is `Flow4`.
            maps.flows4.insert(key, Box::new(unsafe { *flow.cast() }));
        }
        Ok(())
    }
    fn remove_flow<A: Address>(self, key: &FlowKey<A>) {
        let (maps, key) = (self.0.maps(), wide(key));
        if A::V6 {
            maps.removed6.extend(maps.flows6.remove(&key));
        } else {
            maps.removed4.extend(maps.flows4.remove(&key));
        }
    }
    fn frame<'a, A: Address>(self) -> Option<&'a mut Datagram<A>>
    where
        Self: 'a,
    {
        // SAFETY: the core takes each field once per packet, and the room outlives the packet.
        Some(unsafe { &mut (*self.scratch::<A>()).frame })
    }
    fn quote<'a, A: Address>(self) -> Option<&'a mut Datagram<A>>
    where
        Self: 'a,
    {
        // SAFETY: as in `frame`, for another field.
        Some(unsafe { &mut (*self.scratch::<A>()).quote })
    }
    fn work<'a, A: Address>(self) -> Option<&'a mut Work<A>>
    where
        Self: 'a,
    {
        // SAFETY: as in `frame`, for another field.
        Some(unsafe { &mut (*self.scratch::<A>()).work })
    }
    fn count(self, counter: Counter) {
        self.0.maps().counters[counter as usize] += 1;
    }
    fn count_drop(self, reason: u32) {
        self.0.maps().drops[reason as usize] += 1;
    }
    fn backend_stats<'a>(self, id: u32) -> Option<&'a mut BackendStats>
    where
        Self: 'a,
    {
        self.0.maps().backend_stats.get_mut(id as usize)
    }
    fn service_stats<'a>(self, id: u32) -> Option<&'a mut ServiceStats>
    where
        Self: 'a,
    {
        self.0.maps().service_stats.get_mut(id as usize)
    }
    fn random(self) -> u32 {
        0
    }
    fn event(self, _event: &Event) {}
}
