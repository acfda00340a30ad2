//! The maps' kernel body.

#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "a key given by value is copied to the stack, which has 512 bytes"
)]

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    btf_maps::{HashMap, lpm_trie::Key},
    helpers::generated::{bpf_get_prandom_u32, bpf_jiffies64},
};
use lb_common::{
    addr::Addr16,
    counter::Counter,
    flow::{Address, FlowKey, FlowKey4, FlowKey6},
    limits::{AGENT_SILENT_S, DEFAULT_MARK, RATE_LIMITS, RING_ROW},
    maps::{
        AclData, Affinity, AffinityKey, Backend, BackendStats, Device, Event, Flow, Flow4, Flow6,
        FragmentKey, FragmentPorts, Service, ServiceKey, ServiceStats, Settings, Timeouts, Vip,
    },
};
use lb_ebpf::{
    parse::Datagram,
    rate,
    tables::{Entry, InsertError, Scratch, Tables, Work},
};

use crate::maps::{
    ACL, AFFINITY, BACKEND_STATS, BACKENDS, CURSORS, DEVICE_SLOTS, DEVICES, DROPS, EVENTS, FLOWS4, FLOWS6,
    FRAGMENTS, META, OURS, RATES, RINGS, SCRATCH4, SCRATCH6, SERVICE_STATS, SERVICES, SETTINGS,
    SNAT_ADDRESSES, STATS, TIMEOUTS, VIPS,
};

/// `errno` of an insert whose key is there.
const EEXIST: i32 = -17;
/// Bits of an `ACL` key with a full address.
const ACL_BITS: u32 = 32 + 128;
/// The maps of this program.
#[derive(Clone, Copy)]
pub struct Kernel;

/// Interface index of the loopback device; 1 until the agent has said so.
#[inline(always)]
pub fn loopback() -> u32 {
    SETTINGS.get(0).map_or(1, |s| s.loopback_ifindex)
}

/// Bits of the mark of packets that a TC program has sent on, so that the next one on their way leaves them alone.
#[inline(always)]
pub fn mark() -> u32 {
    match SETTINGS.get(0) {
        Some(settings) if settings.mark != 0 => settings.mark,
        _ => DEFAULT_MARK,
    }
}

/// Notes that the agent is alive. The time.
#[inline(always)]
pub fn heartbeat() -> u32 {
    let now = Kernel.now();
    let until = now
        .wrapping_add(AGENT_SILENT_S * Kernel.ticks_per_second())
        .max(1);
    if let Some(settings) = SETTINGS.get_ptr_mut(0) {
        // SAFETY: one aligned word of a map value.
        unsafe { (&raw mut (*settings).heartbeat).write_volatile(until) }
    }
    now
}

/// Sees a flow table of one family as that of another: the family is known at compile time and is the same one.
#[inline(always)]
const fn same<X, Y>(x: *const X) -> *const Y {
    x.cast()
}

impl Tables for Kernel {
    #[inline(always)]
    fn now(self) -> u32 {
        // SAFETY: a helper without arguments; the JIT makes it one load.
        unsafe { bpf_jiffies64() as u32 }
    }

    #[inline(always)]
    fn ticks_per_second(self) -> u32 {
        META.get(0).map_or(250, |m| m.hz)
    }

    #[inline(always)]
    fn ours_word(self, word: u32) -> u64 {
        match OURS.get(0) {
            Some(ours) => ours.words.get(word as usize).copied().unwrap_or(0),
            None => 0,
        }
    }

    #[inline(always)]
    fn port_word(self, word: u32) -> u64 {
        match OURS.get(0) {
            // Hidden from the compiler as in `count`.
            Some(ours) => ours
                .ports
                .get(core::hint::black_box(word as usize))
                .copied()
                .unwrap_or(0),
            None => 0,
        }
    }

    #[inline(always)]
    fn routed_word(self, word: u32) -> u64 {
        match OURS.get(0) {
            // Hidden from the compiler as in `count`.
            Some(ours) => ours
                .routed
                .get(core::hint::black_box(word as usize))
                .copied()
                .unwrap_or(0),
            None => 0,
        }
    }

    #[inline(always)]
    fn allows(self, what: u32) -> bool {
        let (Some(rate), Some(limit)) = (RATES.get_ptr_mut(what), RATE_LIMITS.get(what as usize)) else {
            return false;
        };
        // SAFETY: this CPU's own value.
        let rate = unsafe { &mut *rate };
        rate::allows(rate, *limit, self.now(), self.ticks_per_second())
    }

    #[inline(always)]
    fn settings<'a>(self) -> Option<&'a Settings> {
        SETTINGS.get(0)
    }

    #[inline(always)]
    fn vip<'a>(self, addr: &Addr16) -> Option<&'a Vip> {
        // SAFETY: the value is one word; a concurrent update replaces the element.
        unsafe { VIPS.get(addr) }
    }

    #[inline(always)]
    fn service<'a>(self, key: &ServiceKey) -> Option<&'a Service> {
        // SAFETY: an update replaces the element, so that what is read is one version of it.
        unsafe { SERVICES.get(key) }
    }

    #[inline(always)]
    fn timeouts<'a>(self, service: u32) -> Option<&'a Timeouts> {
        TIMEOUTS.get(service)
    }

    #[inline(always)]
    fn ring(self, row: u32, index: u32) -> u32 {
        match RINGS.get(row) {
            Some(row) => {
                let index = index as usize & (RING_ROW - 1);
                // SAFETY: masked to the row's length, a power of two. An index check would be a branch that the
                // compiler drops and the verifier then misses.
                unsafe { *row.backends.get_unchecked(index) }
            }
            None => 0,
        }
    }

    #[inline(always)]
    fn backend<'a>(self, id: u32) -> Option<&'a Backend> {
        BACKENDS.get(id)
    }

    #[inline(always)]
    fn device<'a>(self, slot: u32) -> Option<&'a Device> {
        DEVICES.get(slot)
    }

    #[inline(always)]
    fn device_slot(self, ifindex: u32) -> Option<u32> {
        // SAFETY: one word.
        unsafe { DEVICE_SLOTS.get(ifindex).copied() }
    }

    #[inline(always)]
    fn snat_address<'a>(self, index: u32) -> Option<&'a Addr16> {
        SNAT_ADDRESSES.get(index)
    }

    #[inline(always)]
    fn next_port(self, backend: u32, leap: bool) -> u32 {
        match CURSORS.get_ptr_mut(backend) {
            Some(cursor) => {
                // A new datapath does not begin where the one before it began: there the backends still have old
                // connections in TIME-WAIT.
                // SAFETY: this CPU's own word.
                unsafe {
                    if leap || *cursor == 0 {
                        *cursor = self.random();
                    }
                    *cursor = (*cursor).wrapping_add(1);
                    *cursor
                }
            }
            None => 0,
        }
    }

    #[inline(always)]
    fn acl(self, service: u32, client: &Addr16) -> u32 {
        let key = Key::new(
            ACL_BITS,
            AclData {
                service,
                addr: *client,
            },
        );
        ACL.get(&key).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn affinity(self, key: &AffinityKey) -> Option<Affinity> {
        // SAFETY: copied at once; backend and epoch are checked against each other before use.
        unsafe { AFFINITY.get(key).copied() }
    }

    #[inline(always)]
    fn set_affinity(self, key: &AffinityKey, value: &Affinity) {
        // A full LRU makes room by itself; a failure under contention costs the client its affinity, no more.
        let _ = AFFINITY.insert(key, value, 0);
    }

    #[inline(always)]
    fn fragment(self, key: &FragmentKey) -> Option<FragmentPorts> {
        // SAFETY: one word, copied at once.
        unsafe { FRAGMENTS.get(key).copied() }
    }

    #[inline(always)]
    fn set_fragment(self, key: &FragmentKey, ports: &FragmentPorts) {
        // As for affinity: on failure the later fragments pass as foreign.
        let _ = FRAGMENTS.insert(key, ports, 0);
    }

    #[inline(always)]
    fn flow<A: Address>(self, key: &FlowKey<A>) -> Option<Entry<A>> {
        let key = core::ptr::from_ref(key);
        // SAFETY: `A::V6` says which of the two concrete types `FlowKey<A>` and `Flow<A>` are; map values of a
        // preallocated hash stay accessible until the program ends.
        unsafe {
            let flow: *mut Flow<A> = if A::V6 {
                FLOWS6.get_ptr_mut(&*same::<_, FlowKey6>(key))?.cast()
            } else {
                FLOWS4.get_ptr_mut(&*same::<_, FlowKey4>(key))?.cast()
            };
            Some(Entry::new(flow))
        }
    }

    #[inline(always)]
    fn insert_flow<A: Address>(self, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), InsertError> {
        let (key, flow) = (core::ptr::from_ref(key), core::ptr::from_ref(flow));
        // SAFETY: as in `flow`.
        let result = unsafe {
            if A::V6 {
                insert(&FLOWS6, &*same::<_, FlowKey6>(key), &*same::<_, Flow6>(flow))
            } else {
                insert(&FLOWS4, &*same::<_, FlowKey4>(key), &*same::<_, Flow4>(flow))
            }
        };
        match result {
            Ok(()) => Ok(()),
            Err(EEXIST) => Err(InsertError::Exists),
            Err(_) => Err(InsertError::Full),
        }
    }

    #[inline(always)]
    fn remove_flow<A: Address>(self, key: &FlowKey<A>) {
        let key = core::ptr::from_ref(key);
        // SAFETY: as in `flow`. A key that is gone already is what was wanted.
        unsafe {
            let _ = if A::V6 {
                FLOWS6.remove(&*same::<_, FlowKey6>(key))
            } else {
                FLOWS4.remove(&*same::<_, FlowKey4>(key))
            };
        }
    }

    #[inline(always)]
    fn frame<'a, A: Address>(self) -> Option<&'a mut Datagram<A>> {
        // SAFETY: this CPU's own room, and a program is not entered twice on one CPU. Nothing else refers to `frame`.
        unsafe { Some(&mut (*scratch::<A>()?).frame) }
    }

    #[inline(always)]
    fn quote<'a, A: Address>(self) -> Option<&'a mut Datagram<A>> {
        // SAFETY: as in `frame`, for another field.
        unsafe { Some(&mut (*scratch::<A>()?).quote) }
    }

    #[inline(always)]
    fn work<'a, A: Address>(self) -> Option<&'a mut Work<A>> {
        // SAFETY: as in `frame`, for another field.
        unsafe { Some(&mut (*scratch::<A>()?).work) }
    }

    #[inline(always)]
    fn count(self, counter: Counter) {
        if let Some(stats) = STATS.get_ptr_mut(0) {
            // SAFETY: this CPU's own value.
            let counters = unsafe { &mut (*stats).counters };
            // Hidden from the compiler, which knows that the number is in range and would not check it; the verifier
            // of kernel 6.1 does not know.
            if let Some(slot) = counters.get_mut(core::hint::black_box(counter as usize)) {
                *slot += 1;
            }
        }
    }

    #[inline(always)]
    fn count_drop(self, reason: u32) {
        if let Some(drops) = DROPS.get_ptr_mut(0) {
            // SAFETY: this CPU's own value.
            let reasons = unsafe { &mut (*drops).reasons };
            if let Some(slot) = reasons.get_mut(reason as usize) {
                *slot += 1;
            }
        }
    }

    #[inline(always)]
    fn backend_stats<'a>(self, id: u32) -> Option<&'a mut BackendStats> {
        // SAFETY: this CPU's own value.
        BACKEND_STATS.get_ptr_mut(id).map(|stats| unsafe { &mut *stats })
    }

    #[inline(always)]
    fn service_stats<'a>(self, id: u32) -> Option<&'a mut ServiceStats> {
        // SAFETY: this CPU's own value.
        SERVICE_STATS.get_ptr_mut(id).map(|stats| unsafe { &mut *stats })
    }

    #[inline(always)]
    fn random(self) -> u32 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn event(self, event: &Event) {
        // A full buffer loses the event, which is a sample anyway.
        let _ = EVENTS.output(event, 0);
    }
}

/// This CPU's scratch room for the family `A`.
#[inline(always)]
fn scratch<A: Address>() -> Option<*mut Scratch<A>> {
    if A::V6 {
        SCRATCH6.get_ptr_mut(0).map(|s| s.cast())
    } else {
        SCRATCH4.get_ptr_mut(0).map(|s| s.cast())
    }
}

#[inline(always)]
fn insert<K, V, const N: usize>(map: &HashMap<K, V, N>, key: &K, value: &V) -> Result<(), i32> {
    map.insert(key, value, BPF_NOEXIST as u64)
}
