//! The maps' kernel body.

use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_or, atomic_xadd};

use aya_ebpf::{
    btf_maps::lpm_trie::Key,
    helpers::generated::{bpf_get_prandom_u32, bpf_jiffies64},
};
use lb_common::{
    addr::{Addr4, Addr16},
    counter::Counter,
    flow::Address,
    limits::{AGENT_SILENT_S, DEFAULT_MARK, RATE_LIMITS, RING_ROW},
    maps::{
        AclData, Affinity, AffinityKey, Backend, BackendStats, Device, Event, FragmentKey, FragmentPorts,
        Service, ServiceKey, ServiceStats, Settings, Timeouts, Vip,
    },
    slot::{Bucket, Flow, TableSettings},
};
use lb_ebpf::{
    install,
    parse::Datagram,
    rate,
    table::{self, mapped::Mapped},
    tables::{FlowTables, Scratch, Tables, Work},
};

use crate::maps::{
    ACL, AFFINITY, BACKEND_STATS, BACKENDS, CURSORS, DEVICE_SLOTS, DEVICES, DROPS, EVENTS, FLOWS4, FLOWS6,
    FRAGMENTS, META, OPAQUE, OURS, RATES, RINGS, SCRATCH4, SCRATCH6, SERVICE_FLOWS, SERVICE_STATS, SERVICES,
    SETTINGS, SNAT_ADDRESSES, STATS, TABLE, TIMEOUTS, VIPS,
};

/// All atomic operations fetch, which makes them full barriers (Documentation/bpf/standardization/instruction-set.rst).
const ORDER: AtomicOrdering = AtomicOrdering::SeqCst;
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

impl FlowTables for Kernel {
    #[inline(always)]
    fn table_settings<'a>(self) -> Option<&'a TableSettings> {
        TABLE.get(0)
    }

    #[inline(always)]
    fn flow_bucket<A: Address>(self, index: u32) -> Option<*mut Bucket<A>> {
        // Hidden from the compiler, which would otherwise add offsets before it is known whether the bucket is there; the
        // verifier refuses that.
        if A::V6 {
            Some(FLOWS6.get_ptr_mut(index)?.cast())
        } else {
            Some(FLOWS4.get_ptr_mut(index)?.cast())
        }
    }

    #[inline(always)]
    unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
        // SAFETY: by the contract.
        unsafe { atomic_cxchg::<u64, { ORDER }, { ORDER }>(word, old, new).0 }
    }

    #[inline(always)]
    unsafe fn fetch_or(word: *mut u64, bits: u64) {
        // The result is used as far as the compiler knows: without, the operation would not fetch, and be no barrier.
        // SAFETY: by the contract.
        core::hint::black_box(unsafe { atomic_or::<u64, u64, { ORDER }>(word, bits) });
    }

    #[inline(always)]
    fn timeouts<'a>(self, service: u32) -> Option<&'a Timeouts> {
        TIMEOUTS.get(service)
    }

    #[inline(always)]
    fn ticks_per_second(self) -> u32 {
        META.get(0).map_or(250, |m| m.hz)
    }

    #[inline(always)]
    fn count_flow<A: Address>(self, service: u32, counts: bool) {
        if let Some(flows) = SERVICE_FLOWS.get_ptr_mut(service) {
            let by = if counts { 1 } else { u64::MAX };
            // SAFETY: an aligned word of a map value.
            core::hint::black_box(unsafe {
                atomic_xadd::<u64, u64, { ORDER }>(&raw mut (*flows).families[A::V6 as usize], by)
            });
        }
    }

    #[inline(always)]
    fn flow_evicted(self) {
        self.count(Counter::FlowsReclaimed);
    }

    #[inline(always)]
    fn evict<A: Address>(self, slot: u32, now: u32) -> u32 {
        if A::V6 {
            weir_evict6(slot, now)
        } else {
            weir_evict4(slot, now)
        }
    }

    #[inline(always)]
    fn opaque(self, word: u64) -> u64 {
        weir_opaque(word)
    }

    #[inline(always)]
    fn opaque_leaf(self, word: u64) -> u64 {
        match OPAQUE.get_ptr_mut(0) {
            // SAFETY: this CPU's own word.
            Some(place) => unsafe {
                place.write_volatile(word);
                place.read_volatile()
            },
            None => word,
        }
    }

    #[inline(always)]
    fn hide(word: u64) -> u64 {
        let hidden;
        // SAFETY: no instruction at all.
        unsafe {
            core::arch::asm!("", inlateout("r0") word => hidden, options(pure, nomem, nostack, preserves_flags));
        }
        hidden
    }
}

impl Tables for Kernel {
    #[inline(always)]
    fn now(self) -> u32 {
        // SAFETY: a helper without arguments; the JIT makes it one load.
        unsafe { bpf_jiffies64() as u32 }
    }

    #[inline(always)]
    fn counted_flows<A: Address>(self, service: u32) -> u64 {
        match SERVICE_FLOWS.get_ptr(service) {
            // SAFETY: an aligned word of a map value, which others change meanwhile.
            Some(flows) => unsafe { (&raw const (*flows).families[A::V6 as usize]).read_volatile() },
            None => 0,
        }
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
    fn next_source(self, backend: u32) -> u64 {
        let (Some(cursor), Some(table)) = (CURSORS.get_ptr_mut(backend), TABLE.get(0)) else {
            return 0;
        };
        // SAFETY: an aligned word of a map value.
        let turn = unsafe { atomic_xadd::<u64, u64, { ORDER }>(&raw mut (*cursor).next, 1) };
        // A new datapath does not begin where the one before it began: there the backends still have old connections in
        // TIME-WAIT.
        turn.wrapping_add(table.secret[6] >> 32)
    }

    #[inline(always)]
    fn exhausted_at(self, backend: u32) -> u32 {
        CURSORS.get(backend).map_or(0, |cursor| cursor.exhausted_at)
    }

    #[inline(always)]
    fn set_exhausted(self, backend: u32, now: u32) {
        if let Some(cursor) = CURSORS.get_ptr_mut(backend) {
            // SAFETY: an aligned word of a map value.
            unsafe { (&raw mut (*cursor).exhausted_at).write_volatile(now) }
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
    fn found<'a, A: Address>(self) -> Option<&'a mut Flow<A>> {
        // SAFETY: as in `frame`, for another field.
        unsafe { Some(&mut (*scratch::<A>()?).found) }
    }

    #[inline(always)]
    fn work<'a, A: Address>(self) -> Option<&'a mut Work<A>> {
        // SAFETY: as in `frame`, for another field.
        unsafe { Some(&mut (*scratch::<A>()?).work) }
    }

    #[inline(always)]
    fn install<A: Address>(self, service: u32, backend: u32, mode: u32) -> u64 {
        if A::V6 {
            weir_install6(service, backend, mode)
        } else {
            weir_install4(service, backend, mode)
        }
    }

    #[inline(always)]
    fn place<A: Address>(self, slot: u32, state: u32) -> u64 {
        if A::V6 {
            weir_place6(slot, state)
        } else {
            weir_place4(slot, state)
        }
    }

    #[inline(always)]
    fn gives_way<A: Address>(self, slot: u32, met: u32) -> u32 {
        if A::V6 {
            weir_gives_way6(slot, met)
        } else {
            weir_gives_way4(slot, met)
        }
    }

    #[inline(always)]
    fn claim<A: Address>(self, slot: u32, state: u32, place: u64) -> u64 {
        if A::V6 {
            weir_claim6(slot, state, place)
        } else {
            weir_claim4(slot, state, place)
        }
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

/// Of what a global function returns the verifier knows nothing.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn weir_opaque(word: u64) -> u64 {
    Kernel::hide(word)
}

/// Functions that the verifier walks once each, on their own, because they are global: they take and return numbers, and
/// find all else in map memory.
macro_rules! global {
    ($($family:ty: $install:ident, $place:ident, $claim:ident, $gives_way:ident, $evict:ident;)+) => { $(
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $install(service: u32, backend: u32, mode: u32) -> u64 {
            install::install::<Kernel, $family>(Kernel, service, backend, mode).raw()
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $place(slot: u32, state: u32) -> u64 {
            install::place::<Kernel, $family>(Kernel, slot, state)
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $claim(slot: u32, state: u32, place: u64) -> u64 {
            install::claim::<Kernel, $family>(Kernel, slot, state, place)
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $gives_way(slot: u32, met: u32) -> u32 {
            install::gives_way::<Kernel, $family>(Kernel, slot, met)
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $evict(slot: u32, now: u32) -> u32 {
            table::evict(Mapped::<$family, Kernel>::new(Kernel), slot, now) as u32
        }
    )+ };
}
global! {
    Addr4: weir_install4, weir_place4, weir_claim4, weir_gives_way4, weir_evict4;
    Addr16: weir_install6, weir_place6, weir_claim6, weir_gives_way6, weir_evict6;
}
