//! Packets of a known flow from the client to its backend.

use lb_common::{
    addr::Hop,
    counter::{Counter, DropReason},
    maps::{Backend, backend_state, flow_state},
};

use crate::{
    create,
    headers::{Ethernet, TCP, TCP_RST},
    packet::{Hook, Packet},
    parse::Datagram,
    reply,
    send::{self, Ip},
    stats,
    tables::{Entry, Tables, is_closed, partner_key, remove_pair},
    tcp,
    verdict::Verdict,
};

/// A packet whose forward entry was found.
#[inline(always)]
pub fn known<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    entry: &Entry<A>,
) -> Verdict {
    let flow = entry.flow();
    let service = flow.service;
    let Some(backend) = tables.backend(flow.backend) else {
        return orphan(packet, tables, datagram, entry);
    };
    if backend.epoch != flow.epoch || backend.state == backend_state::DEAD {
        return orphan(packet, tables, datagram, entry);
    }
    let way = send::to_backend(packet, tables, backend);
    if let Some(verdict) = send::refuse(packet, tables, datagram, way, service) {
        return verdict;
    }
    if datagram.proto() == TCP && tcp::is_transition(datagram.flags, flow.state) {
        let verdict = transition(tables, datagram, entry, backend);
        if verdict != CONTINUE {
            return verdict;
        }
    }
    entry.stamp(tables.now());
    if P::HOOK != Hook::Egress && has_moved(packet, flow.hop) {
        relearn(packet, tables, datagram, entry);
    }
    stats::from_client(tables, flow.backend, datagram.length);
    send::send(packet, datagram, flow, way)
}

/// Answer of [`transition`] for "go on as usual". No packet of a known flow is passed, so the value is free.
const CONTINUE: Verdict = Verdict::PASS;

/// SYN, FIN or RST of the client, or anything after a RST.
#[inline(never)]
fn transition<T: Tables, A: Ip>(
    tables: T,
    datagram: &Datagram<A>,
    entry: &Entry<A>,
    backend: &Backend,
) -> Verdict {
    let flow = entry.flow();
    let state = flow.state;
    let answered = state & flow_state::ESTABLISHED != 0;
    if tcp::is_syn(datagram.flags) {
        // A copy made by the network is no retransmission: those come after 200 ms at the earliest (RFC 6298).
        let waited = tables.now().wrapping_sub(flow.created) >= tables.ticks_per_second() / 5;
        // The client begins anew on an old tuple, or its backend is on its way out.
        if is_closed(state) || (backend.state != backend_state::ACTIVE && (answered || waited)) {
            return Verdict::replace(0, 0);
        }
        if !answered {
            let attempt = (state >> flow_state::TRIES_SHIFT & flow_state::TRIES_MASK) + 1;
            if (waited || state & flow_state::REFUSED != 0)
                && attempt <= lb_common::limits::MAX_RESTEERS
                && create::has_other(tables, &datagram.key, attempt, flow.backend)
            {
                return Verdict::replace(attempt, flow.backend);
            }
        }
    } else if state & flow_state::REFUSED != 0 && datagram.flags & TCP_RST != 0 {
        // The client's answer to the nudge that hid the refusal, not the end of its connection.
        return Verdict::drop(DropReason::RefusalHidden, flow.service);
    } else if datagram.flags & TCP_RST != 0 && !answered {
        // So a client in SYN-SENT answers an ACK that it cannot accept: the backend still has an older connection of
        // this tuple (TIME-WAIT), which the RST ends. The client goes on; its next SYN must find the same port.
        return CONTINUE;
    }
    apply(tables, datagram, entry, false);
    CONTINUE
}

/// Applies a packet's flags to both directions of its flow.
#[inline(always)]
pub fn apply<T: Tables, A: Ip>(tables: T, datagram: &Datagram<A>, entry: &Entry<A>, from_backend: bool) {
    let (sets, clears) = (
        tcp::sets(datagram.flags, from_backend),
        tcp::clears(datagram.flags, from_backend),
    );
    let state = entry.flow().state;
    if state & clears == 0 && state | sets == state {
        return;
    }
    entry.update_state(from_backend, sets, clears);
    if let Some(partner) = tables.flow(&partner_key(entry.flow(), TCP as u32)) {
        partner.update_state(from_backend, sets, clears);
    }
}

/// A packet whose backend is gone: TCP cannot go on, UDP can go elsewhere.
#[inline(never)]
fn orphan<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    entry: &Entry<A>,
) -> Verdict {
    let service = entry.flow().service;
    if datagram.header == 0 {
        return Verdict::drop(DropReason::BackendDead, service);
    }
    if datagram.proto() != TCP {
        tables.count(Counter::FlowsMoved);
        return Verdict::replace(0, 0);
    }
    if tcp::is_syn(datagram.flags) {
        return Verdict::replace(0, 0);
    }
    remove_pair(tables, &datagram.key, entry.flow());
    if datagram.flags & TCP_RST != 0 {
        return Verdict::drop(DropReason::BackendDead, service);
    }
    reply::reset(packet, tables, datagram, service)
}

/// Whether the frame came from another MAC than the flow's earlier ones.
#[inline(always)]
fn has_moved<P: Packet>(packet: &P, hop: Hop) -> bool {
    match packet.get::<Ethernet>(0) {
        Some(eth) => hop.slot() != 0 && !hop.same_mac(Hop::from_words(eth.src_high, eth.src_low, 0)),
        None => false,
    }
}

/// Learns the client's next hop anew: its router has changed.
#[inline(never)]
fn relearn<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    entry: &Entry<A>,
) -> u32 {
    if let Some(slot) = tables.device_slot(packet.device())
        && let Some(eth) = packet.get::<Ethernet>(0)
    {
        let hop = Hop::from_words(eth.src_high, eth.src_low, slot as u16);
        entry.set_hop(hop);
        if let Some(partner) = tables.flow(&partner_key(entry.flow(), datagram.proto() as u32)) {
            partner.set_hop(hop);
        }
        tables.count(Counter::HopsRelearned);
    }
    0
}
