//! ICMP and ICMPv6: echo to a VIP, and errors about packets of our flows (RFC 5508).

use lb_common::{
    counter::{Counter, DropReason},
    flow::FlowKey,
    maps::{backend_state, flow_state, vip_flags},
};

use crate::{
    csum,
    headers::{
        ICMP_CODE_TOO_BIG, ICMP_ECHO, ICMP_PARAMETER, ICMP_QUENCH, ICMP_TIME_EXCEEDED, ICMP_UNREACHABLE,
        ICMPV6_ECHO, ICMPV6_PARAMETER, ICMPV6_UNREACHABLE, Icmp, Ports, TCP, UDP,
    },
    packet::Packet,
    parse::{Datagram, Part},
    reply,
    reverse,
    send::{self, Ip, Way},
    tables::{Entry, Tables},
    verdict::Verdict,
};

/// An ICMP packet from or to an address of ours.
#[inline(never)]
pub fn process<P: Packet, T: Tables, A: Ip>(packet: &mut P, tables: T, datagram: &Datagram<A>) -> Verdict {
    let Some(icmp) = packet.get::<Icmp>(datagram.l4) else { return Verdict::PASS };
    let (kind, code) = (icmp.kind, icmp.code);
    if datagram.part != Part::Whole {
        return Verdict::PASS;
    }
    if kind == if A::V6 { ICMPV6_ECHO } else { ICMP_ECHO } {
        return match tables.vip(&datagram.dst.wide()) {
            Some(vip) if vip.flags & vip_flags::ECHO != 0 => reply::echo(packet, tables, datagram),
            _ => Verdict::PASS,
        };
    }
    if quotes::<A>(kind) { translate(packet, tables, datagram, refusal::<A>(kind, code)) } else { Verdict::PASS }
}

/// Whether messages of this type carry the start of the packet they are about.
#[inline(always)]
const fn quotes<A: Ip>(kind: u8) -> bool {
    if A::V6 {
        kind >= ICMPV6_UNREACHABLE && kind <= ICMPV6_PARAMETER
    } else {
        matches!(kind, ICMP_UNREACHABLE | ICMP_QUENCH | ICMP_TIME_EXCEEDED | ICMP_PARAMETER)
    }
}

/// Whether the message says that the destination does not serve.
#[inline(always)]
const fn refusal<A: Ip>(kind: u8, code: u8) -> bool {
    if A::V6 { kind == ICMPV6_UNREACHABLE } else { kind == ICMP_UNREACHABLE && code != ICMP_CODE_TOO_BIG }
}

/// What the quoted packet tells.
struct Quote<A> {
    /// Its IP header and where its transport header is.
    datagram: Datagram<A>,
    /// Its ports.
    ports: Ports,
}

/// Reads the quoted packet: at least its IP header and eight bytes (RFC 792).
#[inline(always)]
fn quote<P: Packet, A: Ip>(packet: &P, offset: usize) -> Option<Quote<A>> {
    let datagram = A::parse(packet, offset)?;
    if datagram.part == Part::Later || (datagram.proto != TCP && datagram.proto != UDP) {
        return None;
    }
    let ports = *packet.get::<Ports>(datagram.l4)?;
    Some(Quote { datagram, ports })
}

#[inline(always)]
fn translate<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    refusal: bool,
) -> Verdict {
    let Some(quote) = quote::<P, A>(packet, datagram.l4 + size_of::<Icmp>()) else { return Verdict::PASS };
    // The packet that the error is about went the other way.
    let key = FlowKey {
        src: quote.datagram.dst,
        dst: quote.datagram.src,
        sport: quote.ports.dest,
        dport: quote.ports.source,
        proto: quote.datagram.proto as u32,
    };
    let Some(entry) = tables.flow(&key) else { return Verdict::PASS };
    let flow = entry.flow();
    let Some(way) = way(packet, tables, &entry) else {
        return Verdict::drop(DropReason::BackendDead, flow.service);
    };
    if let Some(verdict) = send::refuse(packet, tables, datagram, way, flow.service) {
        return verdict;
    }
    let unanswered = flow.state & (flow_state::REVERSE | flow_state::ESTABLISHED) == flow_state::REVERSE;
    if refusal && unanswered && quote.datagram.proto == TCP && reverse::refuses(tables, &entry) {
        return Verdict::drop(DropReason::RefusalHidden, flow.service);
    }
    if !rewrite(packet, datagram, &quote, &entry, way) {
        return Verdict::drop(DropReason::RewriteFailed, flow.service);
    }
    tables.count(Counter::IcmpTranslated);
    send::leave(packet, way)
}

/// Where the error goes: as the packets of its direction do.
#[inline(always)]
fn way<P: Packet, T: Tables, A: Ip>(packet: &P, tables: T, entry: &Entry<A>) -> Option<Way> {
    let flow = entry.flow();
    if flow.state & flow_state::REVERSE != 0 {
        return Some(send::to_client(packet, tables, flow.hop, flow.state & flow_state::SNAT != 0));
    }
    let backend = tables.backend(flow.backend)?;
    if backend.epoch != flow.epoch || backend.state == backend_state::DEAD {
        return None;
    }
    Some(send::to_backend::<P, T>(tables, backend))
}

/// Gives the quoted packet the addresses that its sender knows, and the error the addresses of its direction.
#[inline(always)]
fn rewrite<P: Packet, A: Ip>(
    packet: &mut P,
    outer: &Datagram<A>,
    quote: &Quote<A>,
    entry: &Entry<A>,
    way: Way,
) -> bool {
    let (flow, inner) = (entry.flow(), &quote.datagram);
    let addr_delta = csum::addr_delta((inner.src, inner.dst), (flow.dst, flow.src));
    let port_delta =
        csum::port_delta((quote.ports.source, quote.ports.dest), (flow.dport, flow.sport));
    if !A::rewrite(packet, inner.l3, flow.dst, flow.src, addr_delta, false) {
        return false;
    }
    let Some(ports) = packet.get_mut::<Ports>(inner.l4) else { return false };
    ports.source = flow.dport;
    ports.dest = flow.sport;
    let both = addr_delta as u32 + port_delta as u32;
    // The quoted checksum may be cut off (eight bytes of TCP do not reach it) or absent (UDP).
    let checked = match packet.get_mut::<u16>(inner.l4 + send::check_offset(inner.proto)) {
        Some(check) if inner.proto == TCP || *check != 0 => {
            *check = csum::apply(*check, both);
            true
        }
        _ => false,
    };
    // Sum of what changed in the quote. Where the quote's own checksums follow, they take their part back.
    let quoted = match (A::V6, checked) {
        (false, true) => !addr_delta,
        (false, false) => port_delta,
        (true, true) => 0,
        (true, false) => csum::fold(both),
    };
    let hides_sender = flow.state & (flow_state::REVERSE | flow_state::SNAT) != 0;
    let src = if hides_sender { flow.src } else { outer.src };
    let outer_delta = csum::addr_delta((outer.src, outer.dst), (src, flow.dst));
    let hops = matches!(way, Way::Device { .. } | Way::Neighbour { .. });
    let pseudo = if A::V6 { outer_delta } else { 0 };
    send::set_macs(packet, way)
        && A::rewrite(packet, outer.l3, src, flow.dst, outer_delta, hops)
        && packet.fix_checksum(outer.l4 + 2, pseudo, quoted, false)
}
