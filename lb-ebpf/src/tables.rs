//! The maps as the core sees them. The kernel body is in the binary's `kernel`; the tests have one on the heap.

use lb_common::{
    addr::Addr16,
    counter::Counter,
    flow::{Address, FlowKey},
    maps::{
        Affinity, AffinityKey, Backend, BackendStats, Device, Event, Flow, FragmentKey, FragmentPorts,
        Service, ServiceKey, ServiceStats, Settings, Timeouts, Vip, flow_state,
    },
};

use crate::parse::Datagram;

/// Why an insert failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InsertError {
    /// The key is there already.
    Exists,
    /// The map is full.
    Full,
}

/// log2 of the ticks between two stamps of an entry.
const STAMP_SHIFT: u32 = 7;

/// A flow entry in its map. The entry may change or be reused by another CPU at any time, as any map value may.
pub struct Entry<A: Address>(*mut Flow<A>);

/// A backend chosen for a new flow.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Choice {
    /// Its id.
    pub backend: u32,
    /// The number of re-steers before this choice.
    pub attempt: u32,
}

/// Room for the two entries of a new flow, off the 512-byte stack.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Work<A: Address> {
    /// The backend that was chosen.
    pub choice: Choice,
    /// Key of the forward entry.
    pub forward_key: FlowKey<A>,
    /// Key of the reverse entry.
    pub reverse_key: FlowKey<A>,
    /// The forward entry.
    pub forward: Flow<A>,
    /// The reverse entry.
    pub reverse: Flow<A>,
}

/// This CPU's scratch room: the value of `SCRATCH4` and `SCRATCH6`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Scratch<A: Address> {
    /// The packet at hand.
    pub frame: Datagram<A>,
    /// The packet that it quotes (ICMP errors).
    pub quote: Datagram<A>,
    /// The flow being made.
    pub work: Work<A>,
}

/// The maps.
/// A handle (in the kernel of no size): references it returns live as long as the maps, not as the handle.
pub trait Tables: Copy {
    /// The flow clock: low 32 bits of jiffies.
    fn now(self) -> u32;
    /// Ticks of the flow clock per second.
    fn ticks_per_second(self) -> u32;
    /// Word of the address filter in `OURS`.
    fn ours_word(self, word: u32) -> u64;
    /// Word of the port filter in `OURS`.
    fn port_word(self, word: u32) -> u64;
    /// Word of the filter of routed VIPs in `OURS`.
    fn routed_word(self, word: u32) -> u64;
    /// Counts one of what `RATES` limits (`maps::limited`); false if there were enough of it.
    fn allows(self, what: u32) -> bool;
    /// `SETTINGS`.
    fn settings<'a>(self) -> Option<&'a Settings>
    where
        Self: 'a;
    /// `VIPS`.
    fn vip<'a>(self, addr: &Addr16) -> Option<&'a Vip>
    where
        Self: 'a;
    /// `SERVICES`.
    fn service<'a>(self, key: &ServiceKey) -> Option<&'a Service>
    where
        Self: 'a;
    /// `TIMEOUTS`.
    fn timeouts<'a>(self, service: u32) -> Option<&'a Timeouts>
    where
        Self: 'a;
    /// Backend id in a row of `RINGS`; `index` is taken modulo the row's length.
    fn ring(self, row: u32, index: u32) -> u32;
    /// `BACKENDS`.
    fn backend<'a>(self, id: u32) -> Option<&'a Backend>
    where
        Self: 'a;
    /// `DEVICES`.
    fn device<'a>(self, slot: u32) -> Option<&'a Device>
    where
        Self: 'a;
    /// `DEVICE_SLOTS`.
    fn device_slot(self, ifindex: u32) -> Option<u32>;
    /// `SNAT_ADDRESSES`.
    fn snat_address<'a>(self, index: u32) -> Option<&'a Addr16>
    where
        Self: 'a;
    /// Next value of the backend's port cursor on this CPU, one further or anywhere (`leap`); starts differ between CPUs.
    fn next_port(self, backend: u32, leap: bool) -> u32;
    /// `ACL`: the action of the longest prefix, or 0.
    fn acl(self, service: u32, client: &Addr16) -> u32;
    /// `AFFINITY`.
    fn affinity(self, key: &AffinityKey) -> Option<Affinity>;
    /// Writes `AFFINITY`.
    fn set_affinity(self, key: &AffinityKey, value: &Affinity);
    /// `FRAGMENTS`.
    fn fragment(self, key: &FragmentKey) -> Option<FragmentPorts>;
    /// Writes `FRAGMENTS`.
    fn set_fragment(self, key: &FragmentKey, ports: &FragmentPorts);
    /// The flow of a key.
    fn flow<A: Address>(self, key: &FlowKey<A>) -> Option<Entry<A>>;
    /// Inserts a flow that must not be there.
    fn insert_flow<A: Address>(self, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), InsertError>;
    /// Removes a flow.
    fn remove_flow<A: Address>(self, key: &FlowKey<A>);
    /// This CPU's room for the packet at hand.
    fn frame<'a, A: Address>(self) -> Option<&'a mut Datagram<A>>
    where
        Self: 'a;
    /// This CPU's room for the packet that the one at hand quotes.
    fn quote<'a, A: Address>(self) -> Option<&'a mut Datagram<A>>
    where
        Self: 'a;
    /// This CPU's room for a new flow.
    fn work<'a, A: Address>(self) -> Option<&'a mut Work<A>>
    where
        Self: 'a;
    /// Adds one to a counter.
    fn count(self, counter: Counter);
    /// Adds one to a drop reason of the node; `reason` is an index of [`DropReason`].
    fn count_drop(self, reason: u32);
    /// Statistics of a backend on this CPU.
    fn backend_stats<'a>(self, id: u32) -> Option<&'a mut BackendStats>
    where
        Self: 'a;
    /// Statistics of a service on this CPU.
    fn service_stats<'a>(self, id: u32) -> Option<&'a mut ServiceStats>
    where
        Self: 'a;
    /// A random number, for sampling.
    fn random(self) -> u32;
    /// Sends an event.
    fn event(self, event: &Event);
}

// === impl Entry ===

impl<A: Address> Entry<A> {
    /// Wraps a map value.
    ///
    /// # Safety
    /// `flow` points to a value of a flow map and stays readable and writable until the program ends.
    #[inline(always)]
    pub const unsafe fn new(flow: *mut Flow<A>) -> Self {
        Self(flow)
    }

    /// The entry.
    #[inline(always)]
    pub fn flow(&self) -> &Flow<A> {
        // SAFETY: by the contract of `new`. A concurrent writer makes a word old or new, both of which are valid.
        unsafe { &*self.0 }
    }

    /// Changes the bits of the state that one side's packets write. The other side's are not touched, whatever
    /// another CPU does to them at the same moment.
    #[inline(always)]
    pub fn update_state(&self, by_backend: bool, sets: u32, clears: u32) {
        let shift = if by_backend { 8 } else { 16 };
        let byte = ((self.flow().state & !clears | sets) >> shift) as u8;
        let index = if cfg!(target_endian = "little") {
            shift / 8
        } else {
            3 - shift / 8
        };
        // SAFETY: as in `flow`; one byte inside the `state` word.
        unsafe { (&raw mut (*self.0).state).cast::<u8>().add(index).write(byte) }
    }

    /// Notes that a packet of this direction was seen; the old stamp stays where it is as good, since a write to a shared
    /// cache line is dear.
    #[inline(always)]
    pub fn stamp(&self, now: u32) {
        if (now ^ self.flow().last_seen) >> STAMP_SHIFT != 0 {
            // SAFETY: as in `flow`; one aligned word.
            unsafe { (*self.0).last_seen = now }
        }
    }

    /// Changes the next hop.
    #[inline(always)]
    pub fn set_hop(&self, hop: lb_common::addr::Hop) {
        // SAFETY: as in `flow`; one aligned word.
        unsafe { (*self.0).hop = hop }
    }
}

// === flow arithmetic that needs the tables ===

/// The key of the other direction of a flow.
#[inline(always)]
pub fn partner_key<A: Address>(flow: &Flow<A>, proto: u32) -> FlowKey<A> {
    FlowKey {
        src: flow.dst,
        dst: flow.src,
        sport: flow.dport,
        dport: flow.sport,
        proto,
    }
}

/// Whether a TCP flow is over: closed by both sides, or reset.
#[inline(always)]
pub const fn is_closed(state: u32) -> bool {
    let fins = flow_state::FIN_CLIENT | flow_state::FIN_BACKEND;
    state & fins == fins || state & flow_state::RESET != 0
}

/// Idle time that a flow is allowed, ticks.
#[inline(always)]
pub fn timeout(timeouts: &Timeouts, state: u32, proto: u32) -> u32 {
    if proto != crate::headers::TCP as u32 {
        timeouts.udp
    } else if is_closed(state) {
        timeouts.closing
    } else if state & flow_state::ESTABLISHED != 0 {
        timeouts.established
    } else {
        timeouts.syn
    }
}

/// Whether one entry's idle time is over.
#[inline(always)]
pub fn is_idle<A: Address, T: Tables>(tables: T, flow: &Flow<A>, proto: u32, now: u32) -> bool {
    match tables.timeouts(flow.service) {
        // Another CPU may have stamped the entry after this one read the clock: such an age is "negative".
        Some(timeouts) => {
            let age = now.wrapping_sub(flow.last_seen);
            age > timeout(timeouts, flow.state, proto) && age < 1 << 31
        }
        None => true,
    }
}

/// Whether the flow that an entry belongs to has expired: neither direction was seen for its idle time.
#[inline(always)]
pub fn is_expired<A: Address, T: Tables>(tables: T, flow: &Flow<A>, proto: u32, now: u32) -> bool {
    if !is_idle(tables, flow, proto, now) {
        return false;
    }
    match tables.flow(&partner_key(flow, proto)) {
        Some(partner) => is_idle(tables, partner.flow(), proto, now),
        None => true,
    }
}

/// Removes both directions of a flow.
#[inline(always)]
pub fn remove_pair<A: Address, T: Tables>(tables: T, key: &FlowKey<A>, flow: &Flow<A>) {
    let partner = partner_key(flow, key.proto);
    tables.remove_flow(key);
    tables.remove_flow(&partner);
}
