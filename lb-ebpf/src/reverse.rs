//! Packets of a known flow from the backend to its client.

use lb_common::{
    addr::Be16,
    counter::{Counter, DropReason},
    maps::flow_state,
};

use crate::{
    create, csum,
    forward::apply,
    headers::{TCP, TCP_ACK, TCP_RST, Tcp},
    ingress,
    packet::Packet,
    parse::Datagram,
    send::{self, Ip, Kind},
    stats,
    tables::{Entry, Tables, is_closed, partner_key},
    tcp,
    verdict::Verdict,
};

/// A packet whose reverse entry was found.
#[inline(always)]
pub fn known<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    entry: &Entry<A>,
) -> Verdict {
    let flow = entry.flow();
    if let Some(verdict) = ingress::refuse_reply(packet, tables, flow) {
        return verdict;
    }
    let way = send::to_client(packet, tables, flow.hop, flow.state & flow_state::SNAT != 0);
    if let Some(verdict) = send::refuse(packet, tables, datagram, way, flow.service) {
        return verdict;
    }
    entry.stamp(tables.now());
    stats::from_backend(tables, flow.backend, datagram.length);
    if datagram.proto() == TCP {
        if tcp::is_transition(datagram.flags, flow.state) {
            let refused = datagram.flags & TCP_RST != 0
                && flow.state & flow_state::ESTABLISHED == 0
                && !is_closed(flow.state);
            if refused && refuses(tables, entry) {
                return nudge(packet, tables, datagram, entry);
            }
            transition(tables, datagram, entry);
        }
    } else if flow.state & flow_state::ESTABLISHED == 0 {
        answered(tables, datagram, entry);
    }
    send::send(packet, datagram, flow, way)
}

/// SYN-ACK, FIN or RST of the backend, or anything after a RST.
#[inline(never)]
fn transition<T: Tables, A: Ip>(tables: T, datagram: &Datagram<A>, entry: &Entry<A>) -> u32 {
    let before = entry.flow().state & flow_state::ESTABLISHED;
    apply(tables, datagram, entry, true);
    if before == 0
        && entry.flow().state & flow_state::ESTABLISHED != 0
        && let Some(stats) = tables.backend_stats(entry.flow().backend)
    {
        stats.established += 1;
    }
    0
}

/// The first datagram of the backend.
#[inline(never)]
fn answered<T: Tables, A: Ip>(tables: T, datagram: &Datagram<A>, entry: &Entry<A>) -> u32 {
    entry.update_state(true, flow_state::ESTABLISHED, 0);
    if let Some(partner) = tables.flow(&partner_key(entry.flow(), datagram.proto() as u32)) {
        partner.update_state(true, flow_state::ESTABLISHED, 0);
    }
    if let Some(stats) = tables.backend_stats(entry.flow().backend) {
        stats.established += 1;
    }
    0
}

/// Notes that the backend refused the SYN. True if the client's next SYN can go to another backend, so that the
/// refusal should be kept from it.
#[inline(never)]
pub fn refuses<T: Tables, A: Ip>(tables: T, entry: &Entry<A>) -> bool {
    let flow = entry.flow();
    if let Some(stats) = tables.backend_stats(flow.backend) {
        stats.refused += 1;
    }
    if flow.state >> flow_state::TRIES_SHIFT & flow_state::TRIES_MASK >= lb_common::limits::MAX_RESTEERS {
        return false;
    }
    let forward = partner_key(flow, TCP as u32);
    let attempt = (flow.state >> flow_state::TRIES_SHIFT & flow_state::TRIES_MASK) + 1;
    if !create::has_other(tables, &forward, attempt, flow.backend) {
        return false;
    }
    let Some(partner) = tables.flow(&forward) else {
        return false;
    };
    entry.update_state(true, flow_state::REFUSED, 0);
    partner.update_state(true, flow_state::REFUSED, 0);
    tables.count(Counter::RefusalsHidden);
    true
}

/// Turns the backend's RST into an acknowledgement of nothing.
///
/// A client in SYN-SENT must answer an unacceptable ACK by a RST and stay in SYN-SENT (RFC 9293 §3.10.7.3). Linux
/// also sends its SYN again at once instead of after a second, so the other backend is reached without delay; other
/// systems send it when their timer ends.
#[inline(never)]
fn nudge<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    entry: &Entry<A>,
) -> Verdict {
    let flow = entry.flow();
    let hidden = Verdict::drop(DropReason::RefusalHidden, flow.service);
    let way = send::to_client(packet, tables, flow.hop, flow.state & flow_state::SNAT != 0);
    if datagram.flags & TCP_ACK == 0 || way.kind == Kind::NeedTc {
        return hidden;
    }
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
    send::send(packet, datagram, flow, way)
}

/// The memory word of data offset and flags.
#[inline(always)]
const fn word(tcp: &Tcp) -> u16 {
    Be16::new((tcp.offset as u16) << 8 | tcp.flags as u16).0
}
