//! The core as the host compiles it, over maps on the heap: the same code as in the kernel, without the kernel.

use std::{
    cell::UnsafeCell,
    collections::HashMap,
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::Result;
use lb_common::{
    addr::{Addr4, Addr16},
    counter::{Counter, DropReason},
    flow::Address,
    limits::{AGENT_SILENT_S, RING_ROW, flow_buckets},
    maps::{
        Affinity, AffinityKey, Backend, BackendStats, Cursor, Device, Event, FragmentKey, FragmentPorts,
        Ours, Service, ServiceFlows, ServiceKey, ServiceStats, Settings, Timeouts, Vip,
    },
    slot::{Bucket, Bucket4, Bucket6, Flow, TableSettings},
};
use lb_ebpf::{
    install::{self, which},
    parse::Datagram,
    pipeline,
    tables::{FlowTables, Scratch, Tables, Work},
    verdict::{Action, Verdict},
};

use crate::{
    frame::{EGRESS, Frame, INGRESS, XDP},
    kernel::{Counters, FLOWS, Program, Ran, SMALL, backend_fields},
    row::Datapath,
    slots,
    world::{Conn, FlowEntry, World, ifindex_of},
};

/// Ticks per second of the model's clock.
const HZ: u32 = 250;
/// The clock: any value will do, this one wraps soon.
const NOW: u32 = u32::MAX - 100;

/// All maps on the heap. One thread, one packet at a time.
pub struct Model(UnsafeCell<Maps>);

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
    cursors: Vec<Cursor>,
    acl: Vec<(u32, IpAddr, u8, u32)>,
    affinity: HashMap<AffinityKey, Affinity>,
    fragments: HashMap<FragmentKey, FragmentPorts>,
    table: TableSettings,
    flows4: Vec<Bucket4>,
    flows6: Vec<Bucket6>,
    service_flows: Vec<ServiceFlows>,
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
            cursors: vec![Cursor::default(); SMALL.backends as usize],
            acl: Vec::new(),
            affinity: HashMap::new(),
            fragments: HashMap::new(),
            table: TableSettings {
                buckets4: flow_buckets(FLOWS),
                buckets6: flow_buckets(FLOWS),
                ..slots::SETTINGS
            },
            flows4: vec![Bucket4::default(); flow_buckets(FLOWS) as usize],
            flows6: vec![Bucket6::default(); flow_buckets(FLOWS) as usize],
            service_flows: vec![ServiceFlows::default(); SMALL.services as usize],
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
        for (id, flows) in (0_u32..).zip(&mut maps.service_flows) {
            *flows = world.service_flows(id);
        }
        for (conn, age) in &world.conns {
            slots::insert(View(self), conn, NOW.wrapping_sub(age * HZ))?;
        }
        if world.flow_table_full {
            slots::fill::<Addr4, _>(View(self), NOW)?;
            slots::fill::<Addr16, _>(View(self), NOW)?;
        }
        Ok(())
    }

    fn flows(&mut self) -> Result<Vec<FlowEntry>> {
        let mut all = slots::live::<Addr4, _>(View(self))?;
        all.extend(slots::live::<Addr16, _>(View(self))?);
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
        let xdp = program == Program::Xdp;
        let (action, to) = match verdict.action() {
            Action::Pass | Action::ToTc | Action::Earlier => (if xdp { 2 } else { -1 }, None),
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

impl FlowTables for View<'_> {
    fn table_settings<'a>(self) -> Option<&'a TableSettings>
    where
        Self: 'a,
    {
        Some(&self.0.maps().table)
    }
    fn flow_bucket<A: Address>(self, index: u32) -> Option<*mut Bucket<A>> {
        let (maps, index) = (self.0.maps(), index as usize);
        if A::V6 {
            Some((&raw mut *maps.flows6.get_mut(index)?).cast())
        } else {
            Some((&raw mut *maps.flows4.get_mut(index)?).cast())
        }
    }
    unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
        // SAFETY: an aligned word of the model's maps.
        match unsafe { AtomicU64::from_ptr(word) }.compare_exchange(
            old,
            new,
            Ordering::SeqCst,
            Ordering::SeqCst,
        ) {
            Ok(seen) | Err(seen) => seen,
        }
    }
    unsafe fn fetch_or(word: *mut u64, bits: u64) {
        // SAFETY: as in `compare_exchange`.
        unsafe { AtomicU64::from_ptr(word) }.fetch_or(bits, Ordering::SeqCst);
    }
    fn timeouts<'a>(self, service: u32) -> Option<&'a Timeouts>
    where
        Self: 'a,
    {
        self.0.maps().timeouts.get(&service)
    }
    fn ticks_per_second(self) -> u32 {
        HZ
    }
    fn count_flow<A: Address>(self, service: u32, counts: bool) {
        let flows = &mut self.0.maps().service_flows[service as usize].families[usize::from(A::V6)];
        *flows = flows.wrapping_add(if counts { 1 } else { u64::MAX });
    }
    fn flow_evicted(self) {
        self.count(Counter::FlowsReclaimed);
    }
}

impl Tables for View<'_> {
    fn now(self) -> u32 {
        NOW
    }
    fn counted_flows<A: Address>(self, service: u32) -> u64 {
        self.0.maps().service_flows[service as usize].families[usize::from(A::V6)]
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
    fn next_source(self, backend: u32) -> u64 {
        let cursor = &mut self.0.maps().cursors[backend as usize];
        cursor.next += 1;
        cursor.next - 1
    }
    fn exhausted_at(self, backend: u32) -> u32 {
        self.0.maps().cursors[backend as usize].exhausted_at
    }
    fn set_exhausted(self, backend: u32, now: u32) {
        self.0.maps().cursors[backend as usize].exhausted_at = now;
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
    fn found<'a, A: Address>(self) -> Option<&'a mut Flow<A>>
    where
        Self: 'a,
    {
        // SAFETY: the model's own room, of which the core takes each field once.
        Some(unsafe { &mut (*self.scratch::<A>()).found })
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
    fn install<A: Address>(self, service: u32, backend: u32, mode: u32) -> u64 {
        install::install::<Self, A>(self, service, backend, mode).raw()
    }
    fn place<A: Address>(self, slot: u32, state: u32) -> u64 {
        if slot == which::FORWARD
            && let Some(winner) = self.0.maps().winner.take()
        {
            // Another CPU has been quicker.
            let _ = slots::insert(self, &winner, NOW);
        }
        install::place::<Self, A>(self, slot, state)
    }
    fn gives_way<A: Address>(self, slot: u32, met: u32) -> u32 {
        install::gives_way::<Self, A>(self, slot, met)
    }
    fn claim<A: Address>(self, slot: u32, state: u32, place: u64) -> u64 {
        install::claim::<Self, A>(self, slot, state, place)
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
