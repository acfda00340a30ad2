//! The maps as the core sees them. The kernel body is in the binary's `kernel`; the tests have one on the heap.

use lb_common::{
    addr::Addr16,
    counter::Counter,
    flow::{Address, FlowKey},
    maps::{
        Affinity, AffinityKey, Backend, BackendStats, Device, Event, FragmentKey, FragmentPorts, Service,
        ServiceKey, ServiceStats, Settings, Timeouts, Vip,
    },
    slot::{Body, Bucket, Flow, Home, TableSettings},
};

use crate::parse::Datagram;

/// A backend chosen for a new flow.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Choice {
    /// Its id.
    pub backend: u32,
    /// The number of re-steers before this choice.
    pub attempt: u32,
}

/// Room for the two slots of a new flow, off the 512-byte stack.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Work<A: Address> {
    /// The backend that was chosen.
    pub choice: Choice,
    /// Where the forward slot may be.
    pub forward_home: Home,
    /// Where the reverse slot may be.
    pub reverse_home: Home,
    /// What a look-up of a key needs on its way.
    pub search_home: Home,
    /// Key of the forward slot.
    pub forward_key: FlowKey<A>,
    /// Key of the reverse slot.
    pub reverse_key: FlowKey<A>,
    /// The forward slot.
    pub forward: Body<A>,
    /// The reverse slot.
    pub reverse: Body<A>,
}

/// This CPU's scratch room: the value of `SCRATCH4` and `SCRATCH6`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Scratch<A: Address> {
    /// The packet at hand.
    pub frame: Datagram<A>,
    /// The packet that it quotes (ICMP errors).
    pub quote: Datagram<A>,
    /// The flow that was found.
    pub found: Flow<A>,
    /// The flow being made.
    pub work: Work<A>,
}

/// What the flow table needs of the maps: the programs, the agent's sweep and the tests each bring their own.
pub trait FlowTables: Copy {
    /// `TABLE`.
    fn table_settings<'a>(self) -> Option<&'a TableSettings>
    where
        Self: 'a;
    /// A bucket of `FLOWS4` or `FLOWS6`.
    fn flow_bucket<A: Address>(self, index: u32) -> Option<*mut Bucket<A>>;
    /// Replaces a word if it is `old`, as a full barrier; what it was.
    ///
    /// # Safety
    /// `word` is an aligned word of the maps.
    unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64;
    /// Sets bits of a word, as a full barrier.
    ///
    /// # Safety
    /// As for [`FlowTables::compare_exchange`].
    unsafe fn fetch_or(word: *mut u64, bits: u64);
    /// `TIMEOUTS`.
    fn timeouts<'a>(self, service: u32) -> Option<&'a Timeouts>
    where
        Self: 'a;
    /// Ticks of the flow clock per second.
    fn ticks_per_second(self) -> u32;
    /// Adds to, or takes from, the flows of a service that may not be evicted.
    fn count_flow<A: Address>(self, service: u32, counts: bool);
    /// Counts a flow that was evicted.
    fn flow_evicted(self);
    /// [`evict`](crate::table::evict), and whether it did. In the kernel a global function.
    #[inline(always)]
    fn evict<A: Address>(self, slot: u32, now: u32) -> u32 {
        crate::table::evict(crate::table::mapped::Mapped::<A, Self>::new(self), slot, now) as u32
    }
    /// The same word, of which the compiler knows nothing any more.
    #[inline(always)]
    fn hide(word: u64) -> u64 {
        core::hint::black_box(word)
    }
    /// The same word, of which the verifier knows nothing any more; elsewhere just the same word.
    #[inline(always)]
    fn opaque(self, word: u64) -> u64 {
        word
    }
    /// The same where the stack is too deep for one more call.
    #[inline(always)]
    fn opaque_leaf(self, word: u64) -> u64 {
        word
    }
}

/// The maps.
/// A handle (in the kernel of no size): references it returns live as long as the maps, not as the handle.
pub trait Tables: FlowTables {
    /// The flow clock: low 32 bits of jiffies.
    fn now(self) -> u32;
    /// How many flows of a service, of one family, may not be evicted.
    fn counted_flows<A: Address>(self, service: u32) -> u64;
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
    /// The backend's turn of SNAT sources: a number that goes up by one with each call on any CPU.
    fn next_source(self, backend: u32) -> u64;
    /// Flow clock when all sources of a backend were last found in use, or 0.
    fn exhausted_at(self, backend: u32) -> u32;
    /// Notes that all sources of a backend were found in use.
    fn set_exhausted(self, backend: u32, now: u32);
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
    /// This CPU's room for the packet at hand.
    fn frame<'a, A: Address>(self) -> Option<&'a mut Datagram<A>>
    where
        Self: 'a;
    /// This CPU's room for the packet that the one at hand quotes.
    fn quote<'a, A: Address>(self) -> Option<&'a mut Datagram<A>>
    where
        Self: 'a;
    /// This CPU's room for the flow that was found.
    fn found<'a, A: Address>(self) -> Option<&'a mut Flow<A>>
    where
        Self: 'a;
    /// This CPU's room for a new flow.
    fn work<'a, A: Address>(self) -> Option<&'a mut Work<A>>
    where
        Self: 'a;
    /// [`install`](crate::install::install): the raw word of its verdict. In the kernel this and the next two are global
    /// functions.
    fn install<A: Address>(self, service: u32, backend: u32, mode: u32) -> u64;
    /// [`place`](crate::install::place).
    fn place<A: Address>(self, slot: u32, state: u32) -> u64;
    /// [`gives_way`](crate::install::gives_way).
    fn gives_way<A: Address>(self, slot: u32, met: u32) -> u32;
    /// [`claim`](crate::install::claim).
    fn claim<A: Address>(self, slot: u32, state: u32, place: u64) -> u64;
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
