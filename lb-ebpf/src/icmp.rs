//! ICMP and ICMPv6: echo to a VIP, and errors about packets of our flows (RFC 5508).

use lb_common::{
    counter::{Counter, DropReason},
    flow::FlowKey,
    maps::{flow_state, vip_flags},
    slot::Flow,
};

use crate::{
    csum, earlier, flows, forward,
    headers::{
        ICMP_CODE_TOO_BIG, ICMP_ECHO, ICMP_PARAMETER, ICMP_QUENCH, ICMP_TIME_EXCEEDED, ICMP_UNREACHABLE,
        ICMPV6_ECHO, ICMPV6_PARAMETER, ICMPV6_UNREACHABLE, Icmp, Ports, TCP, UDP,
    },
    ingress,
    packet::Packet,
    parse::{self, Datagram, Part},
    reply, reverse,
    send::{self, Ip, Way},
    tables::{Tables, Work},
    verdict::Verdict,
};

/// An ICMP packet from or to an address of ours.
#[inline(never)]
pub fn process<P: Packet, T: Tables, A: Ip>(packet: &mut P, tables: T, datagram: &Datagram<A>) -> Verdict {
    let Some(icmp) = packet.get::<Icmp>(datagram.l4) else {
        return Verdict::PASS;
    };
    let (kind, code) = (icmp.kind, icmp.code);
    if datagram.part != Part::Whole {
        return Verdict::PASS;
    }
    if let Some(verdict) = ingress::refuse_foreign(packet, tables) {
        return verdict;
    }
    if kind == if A::V6 { ICMPV6_ECHO } else { ICMP_ECHO } {
        return match tables.vip(&datagram.key.dst.wide()) {
            Some(vip) if vip.flags & vip_flags::ECHO != 0 => reply::echo(packet, tables, datagram),
            _ => Verdict::PASS,
        };
    }
    let Some(quote) = tables.quote::<A>() else {
        return Verdict::PASS;
    };
    if !quotes::<A>(kind) || !read_quote(packet, datagram.l4 + size_of::<Icmp>(), quote) {
        return Verdict::PASS;
    }
    translate(packet, tables, datagram, quote, refusal::<A>(kind, code))
}

/// Whether messages of this type carry the start of the packet they are about.
#[inline(always)]
const fn quotes<A: Ip>(kind: u8) -> bool {
    if A::V6 {
        kind >= ICMPV6_UNREACHABLE && kind <= ICMPV6_PARAMETER
    } else {
        matches!(
            kind,
            ICMP_UNREACHABLE | ICMP_QUENCH | ICMP_TIME_EXCEEDED | ICMP_PARAMETER
        )
    }
}

/// Whether the message says that the destination does not serve.
#[inline(always)]
const fn refusal<A: Ip>(kind: u8, code: u8) -> bool {
    if A::V6 {
        kind == ICMPV6_UNREACHABLE
    } else {
        kind == ICMP_UNREACHABLE && code != ICMP_CODE_TOO_BIG
    }
}

/// Reads the quoted packet: at least its IP header and eight bytes (RFC 792).
#[inline(never)]
fn read_quote<P: Packet, A: Ip>(packet: &P, offset: usize, quote: &mut Datagram<A>) -> bool {
    match A::parse(packet, offset) {
        Some(parsed) => *quote = parsed,
        None => return false,
    }
    if !parse::extensions(packet, quote)
        || quote.part == Part::Later
        || (quote.proto() != TCP && quote.proto() != UDP)
    {
        return false;
    }
    let Some(ports) = packet.get::<Ports>(quote.l4) else {
        return false;
    };
    quote.key.sport = ports.source;
    quote.key.dport = ports.dest;
    true
}

#[inline(never)]
fn translate<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    quote: &mut Datagram<A>,
    refusal: bool,
) -> Verdict {
    // The packet that the error is about went the other way.
    let Some(Work {
        forward_key: key,
        reverse_key: original,
        ..
    }) = tables.work::<A>()
    else {
        return Verdict::PASS;
    };
    *key = quote.key.reversed();
    if !flows::find(tables, key).is_live() {
        return if earlier::has_flows(tables) {
            Verdict::EARLIER
        } else {
            Verdict::PASS
        };
    }
    let Some(flow) = tables.found::<A>() else {
        return Verdict::PASS;
    };
    let Some(way) = way(packet, tables, key, flow) else {
        return Verdict::drop(DropReason::BackendDead, flow.service());
    };
    if let Some(verdict) = send::refuse(packet, tables, datagram, way, flow.service()) {
        return verdict;
    }
    *original = FlowKey {
        src: flow.body.to_dst,
        dst: flow.body.to_src,
        sport: flow.body.to_dport,
        dport: flow.body.to_sport,
        proto: key.proto,
    };
    let unanswered = flow.state() & (flow_state::REVERSE | flow_state::ANSWERED) == flow_state::REVERSE;
    if refusal && unanswered && quote.proto() == TCP && reverse::refuses(tables, flow) {
        return Verdict::drop(DropReason::RefusalHidden, flow.service());
    }
    let quoted = rewrite_quote(packet, quote, original);
    if quoted == FAILED || !rewrite(packet, datagram, quote, flow, way, quoted as u16) {
        return Verdict::drop(DropReason::RewriteFailed, flow.service());
    }
    tables.count(Counter::IcmpTranslated);
    send::leave(packet, way)
}

/// Where the error goes: as the packets of its direction do.
#[inline(always)]
fn way<P: Packet, T: Tables, A: Ip>(
    packet: &P,
    tables: T,
    key: &FlowKey<A>,
    flow: &mut Flow<A>,
) -> Option<Way> {
    if flow.is_reverse() {
        return Some(send::to_client(
            packet,
            tables,
            flow.body.hop,
            flow.state() & flow_state::SNAT != 0,
        ));
    }
    let backend = tables.backend(flow.backend())?;
    if !forward::is_backend_of(backend, flow) {
        return None;
    }
    flows::complete(flow, key, backend);
    Some(send::to_backend::<P, T, A>(packet, tables, backend))
}

/// Gives the error the addresses of its direction. `quoted` is the checksum delta of the quote.
#[inline(always)]
fn rewrite<P: Packet, A: Ip>(
    packet: &mut P,
    outer: &Datagram<A>,
    quote: &mut Datagram<A>,
    flow: &Flow<A>,
    way: Way,
    quoted: u16,
) -> bool {
    // The quote has been dealt with: its room in map memory now holds the new addresses.
    let new = &mut quote.key;
    let hides_sender = flow.state() & (flow_state::REVERSE | flow_state::SNAT) != 0;
    new.src = if hides_sender {
        flow.body.to_src
    } else {
        outer.key.src
    };
    new.dst = flow.body.to_dst;
    let delta = addr_delta(&outer.key, new) as u16;
    let pseudo = if A::V6 { delta } else { 0 };
    let rewritten = send::set_macs(packet, way)
        && A::rewrite(packet, outer.l3, new.src, new.dst, delta, way.is_hop())
        && packet.fix_checksum(outer.l4 + 2, pseudo, quoted, false);
    if rewritten {
        send::adjust_sum::<P, A>(packet, delta, way);
    }
    rewritten
}

/// Checksum delta of two pairs of addresses; out of line for its many registers.
#[inline(never)]
fn addr_delta<A: Ip>(old: &FlowKey<A>, new: &FlowKey<A>) -> u32 {
    csum::addr_delta((old.src, old.dst), (new.src, new.dst)) as u32
}

/// Answer of [`rewrite_quote`] when the quote is cut short.
const FAILED: u32 = u32::MAX;

/// Rewrites the quoted packet back to the `original` that its sender sent. Returns the checksum delta that this makes.
#[inline(never)]
fn rewrite_quote<P: Packet, A: Ip>(packet: &mut P, quote: &Datagram<A>, original: &FlowKey<A>) -> u32 {
    let addr_delta = addr_delta(&quote.key, original) as u16;
    let port_delta = csum::port_delta(
        (quote.key.sport, quote.key.dport),
        (original.sport, original.dport),
    );
    if !A::rewrite(packet, quote.l3, original.src, original.dst, addr_delta, false) {
        return FAILED;
    }
    let Some(ports) = packet.get_mut::<Ports>(quote.l4) else {
        return FAILED;
    };
    ports.source = original.sport;
    ports.dest = original.dport;
    let both = addr_delta as u32 + port_delta as u32;
    // The quoted checksum may be cut off (eight bytes of TCP do not reach it) or absent (UDP).
    let checked = match packet.get_mut::<u16>(quote.l4 + send::check_offset(quote.proto())) {
        Some(check) if quote.proto() == TCP || *check != 0 => {
            *check = csum::apply(*check, both);
            true
        }
        _ => false,
    };
    // Where the quote's own checksums follow, they take their part of the change back.
    let delta = match (A::V6, checked) {
        (false, true) => !addr_delta,
        (false, false) => port_delta,
        (true, true) => 0,
        (true, false) => csum::fold(both),
    };
    delta as u32
}
