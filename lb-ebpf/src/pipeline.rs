//! The whole of it on one screen: parse → flow → service → ring → rewrite → verdict.

use lb_common::{
    addr::{Addr4, Addr16},
    counter::DropReason,
    flow::{Address, FlowKey, ours_bit, port_bit},
};

use crate::{
    create, earlier, flows, forward, fragment,
    headers::{ETH_IPV4, ETH_IPV6, ICMP, ICMPV6, TCP, Tcp, UDP, Udp},
    icmp,
    packet::Packet,
    parse::{self, Datagram, Part},
    reverse,
    send::Ip,
    stats,
    tables::Tables,
    unused,
    verdict::{NO_SERVICE, Verdict},
};

/// What becomes of a frame. The one entry, the one exit.
#[inline(always)]
pub fn process<P: Packet, T: Tables>(packet: &mut P, tables: T) -> Verdict {
    let verdict = match parse::link(packet) {
        _ if !packet.is_for_device() => Verdict::PASS,
        Some(ETH_IPV4) if ipv4(packet, tables) => parsed::<P, T, Addr4>(packet, tables),
        Some(ETH_IPV6) if ipv6(packet, tables) => parsed::<P, T, Addr16>(packet, tables),
        _ => Verdict::PASS,
    };
    stats::finish(tables, verdict)
}

/// Puts what is parsed into map memory; false for what is none of our business.
///
/// There the verifier forgets which of the many ways of parsing led to it and walks the rest of the program once, not
/// once per number of extension headers. And the function ends before the rest begins: its room on the
/// stack, which all nested calls share, is free again.
#[inline(never)]
fn ipv4<P: Packet, T: Tables>(packet: &mut P, tables: T) -> bool {
    match parse::ipv4(packet, parse::L3) {
        Some(datagram) if maybe_ours(tables, &datagram) => match tables.frame::<Addr4>() {
            Some(frame) => {
                *frame = datagram;
                true
            }
            None => false,
        },
        _ => false,
    }
}

/// See [`ipv4`].
#[inline(never)]
fn ipv6<P: Packet, T: Tables>(packet: &mut P, tables: T) -> bool {
    let (Some(frame), Some(datagram)) = (tables.frame(), parse::ipv6(packet, parse::L3)) else {
        return false;
    };
    // Stored before it is looked at: it is too large for registers and the stack is short.
    *frame = datagram;
    maybe_ours(tables, frame)
}

#[inline(always)]
fn parsed<P: Packet, T: Tables, A: Ip>(packet: &mut P, tables: T) -> Verdict {
    match tables.frame::<A>() {
        Some(frame) => match transport(packet, tables, frame) {
            Verdict::PASS => unserved::<P, T, A>(packet, tables),
            verdict => verdict,
        },
        None => Verdict::PASS,
    }
}

/// The end of a packet that is none of a service's. Out of line, with the frame fetched anew, to keep the entry's part of
/// the stack small.
#[inline(never)]
fn unserved<P: Packet, T: Tables, A: Ip>(packet: &mut P, tables: T) -> Verdict {
    match tables.frame::<A>() {
        Some(frame) if unused::may_be_routed(tables, frame.key.dst) => unused::refuse(packet, tables, frame),
        _ => Verdict::PASS,
    }
}

/// The first question to every packet, and for most foreign ones the last.
#[inline(always)]
fn maybe_ours<T: Tables, A: Address>(tables: T, datagram: &Datagram<A>) -> bool {
    let (word, mask) = ours_bit(datagram.key.dst);
    if tables.ours_word(word) & mask != 0 {
        return true;
    }
    let (word, mask) = ours_bit(datagram.key.src);
    tables.ours_word(word) & mask != 0
}

#[inline(never)]
fn transport<P: Packet, T: Tables, A: Ip>(packet: &mut P, tables: T, datagram: &mut Datagram<A>) -> Verdict {
    let icmp_proto = if A::V6 { ICMPV6 } else { ICMP };
    if !parse::extensions(packet, datagram) {
        return Verdict::PASS;
    }
    if datagram.part == Part::Later {
        if datagram.proto() != TCP && datagram.proto() != UDP {
            return Verdict::PASS;
        }
        match fragment::recall(tables, datagram) {
            fragment::OURS => {}
            fragment::FOREIGN => return Verdict::PASS,
            _ if earlier::has_flows(tables) => return Verdict::EARLIER,
            _ => return fragment::wait(packet, tables, datagram),
        }
    } else if datagram.proto() == TCP {
        let Some(tcp) = packet.get::<Tcp>(datagram.l4) else {
            return Verdict::PASS;
        };
        datagram.key.sport = tcp.ports.source;
        datagram.key.dport = tcp.ports.dest;
        datagram.flags = tcp.flags;
        datagram.header = (tcp.offset >> 4) * 4;
    } else if datagram.proto() == UDP {
        let Some(udp) = packet.get::<Udp>(datagram.l4) else {
            return Verdict::PASS;
        };
        datagram.key.sport = udp.ports.source;
        datagram.key.dport = udp.ports.dest;
        datagram.header = size_of::<Udp>() as u8;
    } else if datagram.proto() == icmp_proto {
        return icmp::process(packet, tables, datagram);
    } else {
        return Verdict::PASS;
    }
    let mut verdict = known(packet, tables, datagram);
    if verdict.opens() {
        verdict = create::open(packet, tables, datagram, verdict);
        if verdict == Verdict::CREATED || verdict == Verdict::EXISTS {
            verdict = known(packet, tables, datagram);
            if verdict.opens() {
                // Made and gone again: the sender will send again.
                verdict = Verdict::drop(DropReason::Raced, NO_SERVICE);
            }
        }
    }
    if datagram.part == Part::First {
        fragment::remember::<P, T, A>(tables, datagram, verdict);
    }
    verdict
}

/// Flow → rewrite, or the wish to open a flow. Foreign packets to an address of ours end here, by the filter.
#[inline(never)]
fn known<P: Packet, T: Tables, A: Ip>(packet: &mut P, tables: T, datagram: &Datagram<A>) -> Verdict {
    let found = flows::find(tables, &datagram.key);
    let Some(flow) = tables.found::<A>() else {
        return Verdict::PASS;
    };
    if found.is_live() {
        if flow.is_reverse() {
            reverse::known(packet, tables, datagram, flow)
        } else {
            forward::known(packet, tables, datagram, flow)
        }
    } else if found.is_ended() {
        if flow.is_reverse() {
            reverse::ended(packet, tables, datagram, flow)
        } else if serves(tables, &datagram.key) {
            forward::ended(packet, tables, datagram, flow)
        } else {
            Verdict::PASS
        }
    } else if earlier::decides(tables, datagram) {
        Verdict::EARLIER
    } else if serves(tables, &datagram.key) {
        Verdict::OPEN
    } else {
        Verdict::PASS
    }
}

/// Whether any service has the port that a packet without a flow is for.
#[inline(always)]
pub fn serves<T: Tables, A: Address>(tables: T, key: &FlowKey<A>) -> bool {
    let (word, mask) = port_bit(key.proto, key.dport);
    tables.port_word(word) & mask != 0
}
