//! Packets of a known flow from the client to its backend.

use lb_common::{
    addr::Hop,
    counter::{Counter, DropReason},
    maps::{Backend, backend_state, flow_state},
    slot::{EPOCH_MASK, Flow},
};

use crate::{
    create,
    flows::{self, Expected},
    headers::{Ethernet, TCP, TCP_ACK, TCP_FIN, TCP_RST, Tcp},
    ingress,
    packet::{Hook, Packet},
    parse::Datagram,
    reply,
    send::{self, Ip},
    stats,
    tables::Tables,
    tcp,
    verdict::Verdict,
};

/// A packet whose forward slot was found.
#[inline(always)]
pub fn known<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    flow: &mut Flow<A>,
) -> Verdict {
    if let Some(verdict) = ingress::refuse_request(packet, tables, flow.body.hop.slot()) {
        return verdict;
    }
    let Some(backend) = tables.backend(flow.backend()) else {
        return no_backend(packet, tables, datagram, flow);
    };
    if !is_backend_of(backend, flow) {
        return no_backend(packet, tables, datagram, flow);
    }
    let way = send::to_backend::<P, T, A>(packet, tables, backend);
    if let Some(verdict) = send::refuse(packet, tables, datagram, way, flow.service()) {
        return verdict;
    }
    if datagram.proto() != TCP {
        if flow.state() & (flow_state::ANSWERED | flow_state::ESTABLISHED) == flow_state::ANSWERED {
            established(tables, flow);
        }
    } else if !tcp::is_steady(datagram.flags, flow.state()) {
        let verdict = transition(packet, tables, datagram, flow);
        if verdict != CONTINUE {
            return verdict;
        }
    }
    if !flows::touch(tables, flow) {
        return ended(packet, tables, datagram, flow);
    }
    if P::HOOK != Hook::Egress && has_moved(packet, flow.body.hop) {
        relearn(packet, tables, flow);
    }
    stats::from_client(tables, flow.backend(), datagram.length);
    flows::complete(flow, &datagram.key, backend);
    send::send(packet, datagram, flow, way)
}

/// Whether a backend record is still the one that a flow was given to, and not dead.
#[inline(always)]
pub fn is_backend_of<A: Ip>(backend: &Backend, flow: &Flow<A>) -> bool {
    backend.epoch & EPOCH_MASK == flow.body.epoch() && backend.state != backend_state::DEAD
}

/// Answer of [`transition`] for "go on as usual". No packet of a known flow is passed, so the value is free.
const CONTINUE: Verdict = Verdict::PASS;

/// The second datagram of a client whose first was answered.
#[inline(never)]
fn established<T: Tables, A: Ip>(tables: T, flow: &Flow<A>) -> u32 {
    // A flow that has ended meanwhile is found out by its stamp.
    let _ = flows::update(tables, flow, flow_state::ESTABLISHED, 0);
    0
}

/// A TCP segment that may change the state of its flow.
#[inline(never)]
fn transition<P: Packet, T: Tables, A: Ip>(
    packet: &P,
    tables: T,
    datagram: &Datagram<A>,
    flow: &Flow<A>,
) -> Verdict {
    let state = flow.state();
    if datagram.header == 0 {
        return CONTINUE;
    }
    if tcp::is_syn(datagram.flags) {
        return begin_again(tables, datagram, flow);
    }
    if datagram.flags & TCP_RST != 0 && state & (flow_state::REFUSED | flow_state::PORT_BUSY) != 0 {
        // The client's answer to the challenge that made it send its SYN again, not the end of its connection.
        return Verdict::drop(DropReason::RefusalHidden, flow.service());
    }
    let Some(tcp) = packet.get::<Tcp>(datagram.l4) else {
        return CONTINUE;
    };
    let (seq, ack) = (u32::from_be(tcp.seq), u32::from_be(tcp.ack) as u16);
    let expected = flows::expected(tables, flow, Expected::ByClient);
    let acks = datagram.flags & TCP_ACK != 0 && expected == Some(ack);
    let change = tcp::by_client(datagram.flags, state, acks);
    if change.set & flow_state::FIN_CLIENT != 0 && state & flow_state::FIN_CLIENT_ACKED == 0 {
        let end = seq.wrapping_add(payload(datagram)).wrapping_add(1);
        flows::expect(tables, flow, Expected::ByBackend, end);
    }
    // A flow that has ended meanwhile is found out by its stamp.
    let _ = flows::update(tables, flow, change.set, change.clear);
    CONTINUE
}

/// Bytes of TCP payload.
#[inline(always)]
pub const fn payload<A: Ip>(datagram: &Datagram<A>) -> u32 {
    datagram
        .length
        .wrapping_sub((datagram.l4 - datagram.l3) as u32)
        .wrapping_sub(datagram.header as u32)
}

/// A SYN on a tuple that has a flow.
#[inline(always)]
fn begin_again<T: Tables, A: Ip>(tables: T, datagram: &Datagram<A>, flow: &Flow<A>) -> Verdict {
    let state = flow.state();
    if flow_state::is_closed(state) {
        return Verdict::replace(0, 0);
    }
    if state & flow_state::ESTABLISHED != 0 {
        // The backend knows the sequence numbers: it tells a new connection from somebody's guess (RFC 5961), and if the
        // client has really started again, the two of them settle it.
        return CONTINUE;
    }
    // A copy made by the network is no retransmission: those come after 200 ms at the earliest (RFC 6298).
    let waited = tables.now().wrapping_sub(flows::created(flow)) >= tables.ticks_per_second() / 5;
    let draining = tables
        .backend(flow.backend())
        .is_none_or(|backend| backend.state != backend_state::ACTIVE);
    if state & flow_state::ANSWERED != 0 {
        // The answer may have acknowledged data that came with the SYN (RFC 7413): these must go where they are known.
        return if draining && waited && payload(datagram) == 0 {
            Verdict::replace(0, 0)
        } else {
            CONTINUE
        };
    }
    if draining && waited {
        return Verdict::replace(0, 0);
    }
    if state & flow_state::PORT_BUSY != 0 {
        return Verdict::replace(state >> flow_state::TRIES_SHIFT & flow_state::TRIES_MASK, 0);
    }
    let attempt = (state >> flow_state::TRIES_SHIFT & flow_state::TRIES_MASK) + 1;
    if (waited || state & flow_state::REFUSED != 0)
        && attempt <= lb_common::limits::MAX_RESTEERS
        && create::has_other(tables, &datagram.key, attempt, flow.backend())
    {
        return Verdict::replace(attempt, flow.backend());
    }
    CONTINUE
}

/// A packet of a client whose flow has ended.
#[inline(never)]
pub fn ended<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    flow: &Flow<A>,
) -> Verdict {
    if datagram.header == 0 || datagram.flags & TCP_RST != 0 {
        return Verdict::drop(DropReason::FlowExpired, flow.service());
    }
    if datagram.proto() != TCP || tcp::is_syn(datagram.flags) {
        return Verdict::OPEN;
    }
    if datagram.flags & (TCP_FIN | TCP_ACK) == TCP_FIN | TCP_ACK || payload(datagram) == 0 {
        // The last words of a connection that both sides have closed are no reason to reset it.
        return Verdict::drop(DropReason::FlowExpired, flow.service());
    }
    reply::reset(packet, tables, datagram, flow.service())
}

/// A packet whose backend is gone: TCP cannot go on, UDP can go elsewhere.
#[inline(never)]
fn no_backend<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    flow: &Flow<A>,
) -> Verdict {
    let service = flow.service();
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
    flows::end(tables, flow);
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
fn relearn<P: Packet, T: Tables, A: Ip>(packet: &P, tables: T, flow: &Flow<A>) -> u32 {
    if let Some(slot) = tables.device_slot(packet.device())
        && let Some(eth) = packet.get::<Ethernet>(0)
    {
        let hop = Hop::from_words(eth.src_high, eth.src_low, slot as u16);
        flows::set_hop(tables, flow, hop);
        tables.count(Counter::HopsRelearned);
    }
    0
}
