//! Flows as packets meet them: look-up, stamps, changes of state, the end. What is in the table is `table`'s.

use lb_common::{
    addr::Hop,
    counter::Counter,
    flow::FlowKey,
    limits::STAMP_SHIFT,
    maps::{Backend, flow_state},
    slot::{Flow, head},
};

use crate::{
    headers::UDP,
    send::Ip,
    table::{self, Found, Memory, age, mapped::Mapped},
    tables::Tables,
};

/// The table's word for a protocol.
#[inline(always)]
pub const fn udp_bit(proto: u32) -> u32 {
    if proto == UDP as u32 { flow_state::UDP } else { 0 }
}

/// Looks for the flow of a key; what is found is in [`Tables::found`].
#[inline(always)]
pub fn find<T: Tables, A: Ip>(tables: T, key: &FlowKey<A>) -> Found {
    let (Some(settings), Some(found), Some(work)) =
        (tables.table_settings(), tables.found::<A>(), tables.work::<A>())
    else {
        return Found::NONE;
    };
    // In map memory, because the overflow search takes it by reference.
    work.search_home = settings.home(key);
    let udp = udp_bit(key.proto) as u64;
    table::find(Mapped::<A, T>::new(tables), &work.search_home, udp, key, found)
}

/// Notes that a packet of a flow came. False if the flow has ended, or has been idle for too long and so ends now.
#[inline(always)]
pub fn touch<T: Tables, A: Ip>(tables: T, flow: &Flow<A>) -> bool {
    let now = tables.now();
    if (now ^ flow.seen) >> STAMP_SHIFT == 0 {
        // A write to a shared cache line is dear.
        return true;
    }
    if age(now, flow.seen) < tables.ticks_per_second() / 2 {
        stamp(tables, flow, now);
        return true;
    }
    wake(tables, flow, now)
}

#[inline(always)]
fn stamp<T: Tables, A: Ip>(tables: T, flow: &Flow<A>, now: u32) {
    if let Some(cell) = Mapped::<A, T>::new(tables).slot(flow.slot) {
        // SAFETY: an aligned word of a slot that is there. If the slot has another flow by now, that one is as young.
        unsafe { (&raw mut (*cell.as_ptr()).seen).write_volatile(now) }
    }
}

/// [`touch`] for a flow that was idle for a while: it may have expired, and others may be judging it.
#[inline(never)]
fn wake<T: Tables, A: Ip>(tables: T, flow: &Flow<A>, now: u32) -> bool {
    let memory = Mapped::<A, T>::new(tables);
    let (forward, generation) = flow.forward();
    let (reverse, reverse_generation) = flow.reverse();
    let Some(cell) = memory.slot(forward) else {
        return false;
    };
    let seen = Mapped::<A, T>::head(cell);
    if !head::is_live(seen) || head::generation(seen) != generation {
        return false;
    }
    let mut idle = age(now, flow.seen);
    let other = if flow.is_reverse() { forward } else { reverse };
    if let Some(other) = memory.slot(other)
        && (flow.is_reverse() || head::generation(Mapped::<A, T>::head(other)) == reverse_generation)
    {
        idle = idle.min(age(now, Mapped::<A, T>::seen_after(other, 0)));
    }
    if idle > memory.timeout(flow.service(), head::flow_state(seen)) && table::end(memory, forward, seen) {
        tables.count(Counter::FlowsExpired);
        return false;
    }
    // The stamp first: who reads the head after it was raised reads a new stamp too. Somebody else may have ended the flow.
    stamp(tables, flow, now);
    table::wake(memory, forward, generation)
}

/// Changes the state of a flow, and of the copy in its reverse slot. The state before, or `None` if it has ended.
#[inline(always)]
pub fn update<T: Tables, A: Ip>(tables: T, flow: &Flow<A>, set: u32, clear: u32) -> Option<u32> {
    let memory = Mapped::<A, T>::new(tables);
    let (forward, generation) = flow.forward();
    let before = table::update(memory, forward, generation, set, clear)?;
    let (reverse, generation) = flow.reverse();
    // The copy may lag behind: nobody decides by it alone.
    let _ = table::update_copy(memory, reverse, generation, set, clear);
    Some(before)
}

/// Ends a flow, whatever it is doing. False if it would not end.
#[inline(always)]
pub fn end<T: Tables, A: Ip>(tables: T, flow: &Flow<A>) -> bool {
    let memory = Mapped::<A, T>::new(tables);
    let (forward, generation) = flow.forward();
    for _ in 0..ENDS {
        let Some(cell) = memory.slot(forward) else {
            return true;
        };
        let seen = Mapped::<A, T>::head(cell);
        if !head::is_live(seen) || head::generation(seen) != generation {
            return true;
        }
        if table::end(memory, forward, seen) {
            return true;
        }
    }
    false
}

/// How often [`end`] tries: packets of both directions may change the state meanwhile.
const ENDS: usize = 3;

/// Frees a slot whose flow has ended: it was met by somebody else's packet.
#[inline(never)]
pub fn forget_ended<T: Tables, A: Ip>(tables: T, flow: &Flow<A>) -> u32 {
    if let Some(cell) = Mapped::<A, T>::new(tables).slot(flow.slot) {
        // A slot that has been claimed meanwhile stays as it is.
        let _ = Mapped::<A, T>::compare_exchange(cell, flow.head, flow.head & !head::KIND);
    }
    0
}

/// Changes the client's next hop in both slots.
#[inline(never)]
pub fn set_hop<T: Tables, A: Ip>(tables: T, flow: &Flow<A>, hop: Hop) -> u32 {
    for slot in [flow.slot, flow.body.partner] {
        if let Some(cell) = Mapped::<A, T>::new(tables).slot(slot) {
            // SAFETY: an aligned word of a slot that is there. Only the flow's own hop is replaced, or that of a flow by
            // the same way, whose next packet puts it right.
            unsafe {
                T::compare_exchange(
                    (&raw mut (*cell.as_ptr()).body.hop).cast::<u64>(),
                    flow.body.hop.0,
                    hop.0,
                );
            }
        }
    }
    0
}

/// Which number has to be acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// By the client: the backend's SYN or FIN.
    ByClient,
    /// By the backend: the client's FIN.
    ByBackend,
}

/// The low 16 bits of the number that one side has to acknowledge; `None` if the flow is gone.
#[inline(always)]
pub fn expected<T: Tables, A: Ip>(tables: T, flow: &Flow<A>, which: Expected) -> Option<u16> {
    let (forward, generation) = flow.forward();
    let cell = Mapped::<A, T>::new(tables).slot(forward)?;
    // SAFETY: fields of a slot that is there.
    let number = unsafe {
        match which {
            Expected::ByClient => (&raw mut (*cell.as_ptr()).body.to_dport.0).read_volatile(),
            Expected::ByBackend => (&raw mut (*cell.as_ptr()).body.backend_ack).read_volatile(),
        }
    };
    (head::generation(Mapped::<A, T>::head(cell)) == generation).then_some(number)
}

/// Notes the number that one side has to acknowledge.
#[inline(always)]
pub fn expect<T: Tables, A: Ip>(tables: T, flow: &Flow<A>, which: Expected, number: u32) {
    let (forward, generation) = flow.forward();
    if let Some(cell) = Mapped::<A, T>::new(tables).slot(forward)
        && head::generation(Mapped::<A, T>::head(cell)) == generation
    {
        // SAFETY: fields of a slot that is there. Should the slot be claimed in this very moment, its new flow waits for a
        // number that does not come, and so stays half-open for a while.
        unsafe {
            match which {
                Expected::ByClient => {
                    (&raw mut (*cell.as_ptr()).body.to_dport.0).write_volatile(number as u16)
                }
                Expected::ByBackend => {
                    (&raw mut (*cell.as_ptr()).body.backend_ack).write_volatile(number as u16)
                }
            }
        }
    }
}

/// Fills in where packets of a forward flow go: its slot does not have it.
#[inline(always)]
pub fn complete<A: Ip>(flow: &mut Flow<A>, key: &FlowKey<A>, backend: &Backend) {
    flow.body.to_dst = A::from_wide(backend.addr);
    flow.body.to_dport = if backend.port.0 == 0 {
        key.dport
    } else {
        backend.port
    };
}

/// Flow clock when a forward flow was created.
#[inline(always)]
pub fn created<A: Ip>(flow: &Flow<A>) -> u32 {
    flow.body.to_dst.word()
}
