//! Putting a new flow into the table: the client's tuple, then a source towards the backend.
//!
//! What it works on lies in [`Work`], the rest are numbers: so the kernel program makes each of [`install`], [`place`] and
//! [`claim`] a global function, which the verifier walks once and not once for each way to it ([`Tables::install`]).

use lb_common::{
    addr::Be16,
    counter::DropReason,
    flow::Address,
    limits::SNAT_PROBES,
    maps::{Backend, flow_state},
    slot::mode,
};

use crate::{
    csum, flows,
    table::{self, Claim, class, mapped::Mapped},
    tables::{Tables, Work},
    verdict::Verdict,
};

/// Which slot of a new flow.
pub mod which {
    /// The one that the client's packets find.
    pub const FORWARD: u32 = 0;
    /// The one that the backend's packets find.
    pub const REVERSE: u32 = 1;
}

/// Claims the tuple of the client, then a source towards the backend, and makes the flow visible.
#[inline(always)]
pub fn install<T: Tables, A: Address>(tables: T, service: u32, backend: u32, mode: u32) -> Verdict {
    let exhausted = Verdict::drop(DropReason::SnatPortsExhausted, service);
    let (Some(work), Some(backend)) = (tables.work::<A>(), tables.backend(backend)) else {
        return exhausted;
    };
    let snat = mode == mode::NAT as u32;
    if snat && (backend.snat_count == 0 || is_exhausted(tables, work.choice.backend)) {
        return exhausted;
    }
    let state = flows::udp_bit(work.forward_key.proto)
        | work.choice.attempt.min(flow_state::TRIES_MASK) << flow_state::TRIES_SHIFT
        | if snat { flow_state::SNAT } else { 0 };
    // What the verifier would tell apart, but need not, is made opaque: else it walks the rest for each combination.
    let state = tables.opaque(state as u64) as u32;
    let Some(settings) = tables.table_settings() else {
        return exhausted;
    };
    work.forward_home = settings.home(&work.forward_key);
    let place = tables.place::<A>(which::FORWARD, state);
    let forward = Claim::from_raw(tables.claim::<A>(which::FORWARD, state, place));
    if !forward.is_done() {
        return failed(forward, service);
    }
    let place = if snat {
        place_source(tables, work, backend, state)
    } else {
        work.forward.to_src = work.forward_key.src;
        work.forward.to_sport = work.forward_key.sport;
        place_reverse(tables, work, state)
    };
    let reverse = Claim::from_raw(tables.claim::<A>(which::REVERSE, state, place));
    if !reverse.is_done() {
        table::give_up(Mapped::<A, T>::new(tables), forward);
        return if reverse.is_taken() {
            exhausted
        } else {
            failed(reverse, service)
        };
    }
    publish(tables, work, forward.raw(), reverse.raw(), mode);
    Verdict::CREATED
}

/// The verdict of a claim that failed.
#[inline(always)]
fn failed(claim: Claim, service: u32) -> Verdict {
    if claim.is_taken() {
        return Verdict::EXISTS;
    }
    let reason = if claim == Claim::FULL {
        DropReason::FlowTableFull
    } else {
        DropReason::Raced
    };
    Verdict::drop(reason, service)
}

/// Looks for a place for one of the slots ([`which`]).
#[inline(always)]
pub fn place<T: Tables, A: Address>(tables: T, slot: u32, state: u32) -> u64 {
    let Some(work) = tables.work::<A>() else {
        return Claim::FULL.raw();
    };
    let (home, key) = if slot == which::REVERSE {
        (&work.reverse_home, &work.reverse_key)
    } else {
        (&work.forward_home, &work.forward_key)
    };
    table::place(Mapped::<A, T>::new(tables), home, state, key).raw()
}

/// Claims the place that was found for one of the slots, or makes one.
#[inline(always)]
pub fn claim<T: Tables, A: Address>(tables: T, slot: u32, state: u32, place: u64) -> u64 {
    let (memory, place) = (Mapped::<A, T>::new(tables), Claim::from_raw(place));
    let Some(work) = tables.work::<A>() else {
        return Claim::FULL.raw();
    };
    let (home, key, state) = if slot == which::REVERSE {
        (&work.reverse_home, &work.reverse_key, state | flow_state::REVERSE)
    } else {
        (&work.forward_home, &work.forward_key, state)
    };
    let slot = if place.is_done() {
        place.slot()
    } else if place == Claim::FULL {
        table::make_room(memory, home, tables.now())
    } else {
        return place.raw();
    };
    let slot = tables.opaque(slot as u64) as u32;
    if slot == table::NO_SLOT {
        return Claim::FULL.raw();
    }
    table::occupy(memory, home, state, key, slot).raw()
}

/// Looks for a place for the reverse slot of the source that is in `work`.
#[inline(always)]
fn place_reverse<T: Tables, A: Address>(tables: T, work: &mut Work<A>, state: u32) -> u64 {
    work.reverse_key.dst = work.forward.to_src;
    work.reverse_key.dport = work.forward.to_sport;
    let Some(settings) = tables.table_settings() else {
        return Claim::FULL.raw();
    };
    work.reverse_home = settings.home(&work.reverse_key);
    tables.place::<A>(which::REVERSE, state)
}

/// Looks for a source towards the backend: the next in turn, so that each rests for as long as possible after its last flow.
#[inline(never)]
fn place_source<T: Tables, A: Address>(tables: T, work: &mut Work<A>, backend: &Backend, state: u32) -> u64 {
    let Some(settings) = tables.settings() else {
        return Claim::FULL.raw();
    };
    let low = settings.snat_port_min as u64;
    let range = (settings.snat_port_max as u64 + 1).saturating_sub(low);
    let count = backend.snat_count as u64;
    let mut turn = tables.next_source(work.choice.backend);
    for probe in 0..SNAT_PROBES {
        let index = backend.snat_first as u64 + turn.checked_rem(count).unwrap_or(0);
        let port = low
            + turn
                .checked_div(count)
                .unwrap_or(0)
                .checked_rem(range)
                .unwrap_or(0);
        let Some(address) = tables.snat_address(index as u32) else {
            break;
        };
        work.forward.to_src = A::from_wide(*address);
        work.forward.to_sport = Be16::new(port as u16);
        let place = Claim::from_raw(place_reverse(tables, work, state));
        // Where there is no place at all, the last source has one made.
        if place.is_done() || (place == Claim::FULL && probe + 1 == SNAT_PROBES) {
            return place.raw();
        }
        // Whose turn it is has had its source for the longest time: if it has expired, or is half-open, it has to go, and
        // the same source is looked at again.
        if !place.is_taken() || tables.gives_way::<A>(place.slot(), probe) == 0 {
            turn = tables.next_source(work.choice.backend);
        }
    }
    tables.set_exhausted(work.choice.backend, tables.now());
    Claim::taken(0).raw()
}

/// Evicts the holder of a source, if it may go: expired, or half-open, since a moment ago only if it is not the first one
/// that was met.
#[inline(always)]
pub fn gives_way<T: Tables, A: Address>(tables: T, slot: u32, met: u32) -> u32 {
    let memory = Mapped::<A, T>::new(tables);
    let now = tables.now();
    let class = table::class_of_slot(memory, slot, now);
    let goes = class == class::EXPIRED || class == class::HALF_OPEN || (class == class::FRESH && met > 0);
    if goes { tables.evict::<A>(slot, now) } else { 0 }
}

/// Whether all sources of a backend were found in use in this very tick: then nobody looks again.
#[inline(always)]
fn is_exhausted<T: Tables>(tables: T, backend: u32) -> bool {
    let at = tables.exhausted_at(backend);
    at != 0 && at == tables.now()
}

/// Fills in the rest of both claimed slots and makes them visible, the one that replies need first.
#[inline(never)]
fn publish<T: Tables, A: Address>(
    tables: T,
    work: &mut Work<A>,
    forward: u64,
    reverse: u64,
    mode: u32,
) -> u32 {
    let (forward_claim, reverse_claim) = (Claim::from_raw(forward), Claim::from_raw(reverse));
    let Work {
        forward_key: key,
        reverse_key,
        forward,
        reverse,
        ..
    } = work;
    forward.addr_delta = csum::addr_delta((key.src, key.dst), (forward.to_src, reverse_key.src));
    forward.port_delta = csum::port_delta((key.sport, key.dport), (forward.to_sport, reverse_key.sport));
    reverse.addr_delta = !forward.addr_delta;
    reverse.port_delta = !forward.port_delta;
    forward.partner = reverse_claim.slot();
    forward.partner_generation = reverse_claim.generation() | mode << 24;
    reverse.partner = forward_claim.slot();
    reverse.partner_generation = forward_claim.generation() | mode << 24;
    let memory = Mapped::<A, T>::new(tables);
    let now = tables.now();
    table::write(memory, reverse_claim, reverse_key, reverse, now);
    table::write(memory, forward_claim, key, forward, now);
    table::publish(memory, reverse_claim);
    table::publish(memory, forward_claim);
    0
}
