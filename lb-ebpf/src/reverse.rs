//! Packets of a known flow from the backend to its client.

use lb_common::{
    addr::Be16,
    counter::{Counter, DropReason},
    maps::flow_state,
    slot::Flow,
};

use crate::{
    create, csum,
    flows::{self, Expected},
    forward::payload,
    headers::{TCP, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, Tcp},
    ingress,
    packet::Packet,
    parse::Datagram,
    reply,
    send::{self, Ip, Kind},
    stats,
    tables::Tables,
    tcp,
    verdict::Verdict,
};

/// A packet whose reverse slot was found.
#[inline(always)]
pub fn known<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    flow: &Flow<A>,
) -> Verdict {
    if let Some(verdict) = ingress::refuse_reply(packet, tables, flow) {
        return verdict;
    }
    let way = send::to_client(
        packet,
        tables,
        flow.body.hop,
        flow.state() & flow_state::SNAT != 0,
    );
    if let Some(verdict) = send::refuse(packet, tables, datagram, way, flow.service()) {
        return verdict;
    }
    if !flows::touch(tables, flow) {
        return ended(packet, tables, datagram, flow);
    }
    stats::from_backend(tables, flow.backend(), datagram.length);
    if datagram.proto() == TCP {
        if !tcp::is_steady(datagram.flags, flow.state()) {
            // Not from within `transition`: the stack would be too deep.
            if is_refusal(datagram, flow.state()) && refuses(tables, flow) {
                return nudge(packet, tables, datagram, flow);
            }
            let change = transition(packet, tables, datagram, flow);
            if change == NUDGE {
                return nudge(packet, tables, datagram, flow);
            }
        }
    } else if flow.state() & flow_state::ANSWERED == 0 {
        answered(tables, flow);
    }
    send::send(packet, datagram, flow, way)
}

/// Answer of [`transition`] for "make the client send its SYN again".
const NUDGE: u32 = 1;

/// Whether the backend has not answered yet.
#[inline(always)]
const fn is_half_open(state: u32) -> bool {
    state & (flow_state::ANSWERED | flow_state::ESTABLISHED) == 0
}

/// Whether a backend answers a SYN by RST.
#[inline(always)]
const fn is_refusal<A: Ip>(datagram: &Datagram<A>, state: u32) -> bool {
    datagram.header != 0 && datagram.flags & TCP_RST != 0 && is_half_open(state)
}

/// A TCP segment that may change the state of its flow.
#[inline(never)]
fn transition<P: Packet, T: Tables, A: Ip>(
    packet: &P,
    tables: T,
    datagram: &Datagram<A>,
    flow: &Flow<A>,
) -> u32 {
    let state = flow.state();
    if datagram.header == 0 {
        return 0;
    }
    if is_half_open(state) && datagram.flags & (TCP_SYN | TCP_RST | TCP_FIN | TCP_ACK) == TCP_ACK {
        // Instead of accepting the SYN the backend speaks of a connection that it still has on this source port.
        let _ = flows::update(tables, flow, flow_state::PORT_BUSY, 0);
        return NUDGE;
    }
    let Some(tcp) = packet.get::<Tcp>(datagram.l4) else {
        return 0;
    };
    let (seq, ack) = (u32::from_be(tcp.seq), u32::from_be(tcp.ack) as u16);
    let by_client = flows::expected(tables, flow, Expected::ByClient);
    let by_backend = flows::expected(tables, flow, Expected::ByBackend);
    let again = state & (flow_state::ANSWERED | flow_state::ESTABLISHED) != 0
        && by_client == Some(seq.wrapping_add(1) as u16);
    let acks = by_backend == Some(ack);
    let change = tcp::by_backend(datagram.flags, state, acks, again);
    if change.set & flow_state::ANSWERED != 0 {
        flows::expect(tables, flow, Expected::ByClient, seq.wrapping_add(1));
    }
    if change.set & flow_state::FIN_BACKEND != 0 && state & flow_state::FIN_BACKEND_ACKED == 0 {
        let end = seq.wrapping_add(payload(datagram)).wrapping_add(1);
        flows::expect(tables, flow, Expected::ByClient, end);
    }
    if let Some(before) = flows::update(tables, flow, change.set, change.clear)
        && before & flow_state::ANSWERED == 0
        && change.set & flow_state::ANSWERED != 0
        && let Some(stats) = tables.backend_stats(flow.backend())
    {
        stats.established += 1;
    }
    0
}

/// The first datagram of the backend.
#[inline(never)]
fn answered<T: Tables, A: Ip>(tables: T, flow: &Flow<A>) -> u32 {
    if let Some(before) = flows::update(tables, flow, flow_state::ANSWERED, 0)
        && before & flow_state::ANSWERED == 0
        && let Some(stats) = tables.backend_stats(flow.backend())
    {
        stats.established += 1;
    }
    0
}

/// A packet of a backend whose flow has ended. It must not go on with the backend's own address.
#[inline(never)]
pub fn ended<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    flow: &Flow<A>,
) -> Verdict {
    let expired = Verdict::drop(DropReason::FlowExpired, flow.service());
    if datagram.proto() != TCP || datagram.header == 0 {
        return expired;
    }
    if datagram.flags & TCP_SYN != 0 {
        // A new connection of somebody else's, by chance on the same tuple.
        flows::forget_ended(tables, flow);
        return Verdict::PASS;
    }
    if datagram.flags & (TCP_RST | TCP_FIN) != 0 || flow_state::is_closed(flow.state()) {
        return expired;
    }
    reply::reset(packet, tables, datagram, flow.service())
}

/// Notes that the backend refused the SYN. True if the client's next SYN can go to another backend, so that the
/// refusal should be kept from it.
#[inline(never)]
pub fn refuses<T: Tables, A: Ip>(tables: T, flow: &Flow<A>) -> bool {
    if let Some(stats) = tables.backend_stats(flow.backend()) {
        stats.refused += 1;
    }
    let tries = flow.state() >> flow_state::TRIES_SHIFT & flow_state::TRIES_MASK;
    if tries >= lb_common::limits::MAX_RESTEERS {
        return false;
    }
    let Some(work) = tables.work::<A>() else {
        return false;
    };
    let forward = &mut work.forward_key;
    forward.src = flow.body.to_dst;
    forward.dst = flow.body.to_src;
    forward.sport = flow.body.to_dport;
    forward.dport = flow.body.to_sport;
    forward.proto = TCP as u32;
    if !create::has_other(tables, forward, tries + 1, flow.backend())
        || flows::update(tables, flow, flow_state::REFUSED, 0).is_none()
    {
        return false;
    }
    tables.count(Counter::RefusalsHidden);
    true
}

/// Turns the backend's refusal into an acknowledgement of nothing.
///
/// A client in SYN-SENT must answer an unacceptable ACK by a RST and stay in SYN-SENT (RFC 9293 §3.10.7.3). Linux
/// also sends its SYN again at once instead of after a second, so the other backend is reached without delay; other
/// systems send it when their timer ends.
#[inline(never)]
fn nudge<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    flow: &Flow<A>,
) -> Verdict {
    let hidden = Verdict::drop(DropReason::RefusalHidden, flow.service());
    let way = send::to_client(
        packet,
        tables,
        flow.body.hop,
        flow.state() & flow_state::SNAT != 0,
    );
    if datagram.flags & TCP_ACK == 0 || way.kind == Kind::NeedTc {
        return hidden;
    }
    if datagram.flags & TCP_RST != 0 {
        let Some(tcp) = packet.get_mut::<Tcp>(datagram.l4) else {
            return hidden;
        };
        let (old_ack, old_flags) = (tcp.ack, word(tcp));
        // The RST acknowledges the SYN and data that may have come with it: so far back is before both.
        tcp.ack = u32::from_be(old_ack).wrapping_sub(1 << 16).to_be();
        tcp.flags = TCP_ACK;
        let delta = csum::dword_delta(old_ack, tcp.ack) + csum::word_delta(old_flags, word(tcp));
        if !packet.fix_checksum(datagram.l4 + 16, 0, csum::fold(delta), false) {
            return hidden;
        }
    }
    send::send(packet, datagram, flow, way)
}

/// The memory word of data offset and flags.
#[inline(always)]
const fn word(tcp: &Tcp) -> u16 {
    Be16::new((tcp.offset as u16) << 8 | tcp.flags as u16).0
}
