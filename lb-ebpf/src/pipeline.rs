//! The whole of it on one screen: parse → flow → service → ring → rewrite → verdict.

use lb_common::{
    flow::{Address, ours_bit},
    maps::{FragmentPorts, flow_state},
};

use crate::{
    create, forward,
    headers::{ETH_IPV4, ETH_IPV6, ICMP, ICMPV6, TCP, Tcp, UDP, Udp},
    icmp,
    packet::Packet,
    parse::{self, Datagram, Part},
    reverse,
    send::Ip,
    stats,
    tables::Tables,
    verdict::Verdict,
};

/// What becomes of a frame. The one entry, the one exit.
#[inline(always)]
pub fn process<P: Packet, T: Tables>(packet: &mut P, tables: T) -> Verdict {
    let verdict = match parse::link(packet) {
        Some(link) if link.kind == ETH_IPV4 => ipv4(packet, tables, link.l3),
        Some(link) if link.kind == ETH_IPV6 => ipv6(packet, tables, link.l3),
        _ => Verdict::PASS,
    };
    stats::finish(tables, verdict)
}

#[inline(always)]
fn ipv4<P: Packet, T: Tables>(packet: &mut P, tables: T, l3: usize) -> Verdict {
    match parse::ipv4(packet, l3) {
        Some(mut datagram) if maybe_ours(tables, &datagram) => transport(packet, tables, &mut datagram, ICMP),
        _ => Verdict::PASS,
    }
}

#[inline(never)]
fn ipv6<P: Packet, T: Tables>(packet: &mut P, tables: T, l3: usize) -> Verdict {
    match parse::ipv6(packet, l3) {
        Some(mut datagram) if maybe_ours(tables, &datagram) => transport(packet, tables, &mut datagram, ICMPV6),
        _ => Verdict::PASS,
    }
}

/// The first question to every packet, and for most foreign ones the last.
#[inline(always)]
fn maybe_ours<T: Tables, A: Address>(tables: T, datagram: &Datagram<A>) -> bool {
    let (word, mask) = ours_bit(datagram.dst);
    if tables.ours_word(word) & mask != 0 {
        return true;
    }
    let (word, mask) = ours_bit(datagram.src);
    tables.ours_word(word) & mask != 0
}

#[inline(always)]
fn transport<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &mut Datagram<A>,
    icmp_proto: u8,
) -> Verdict {
    if datagram.part == Part::Later {
        if !recall_fragment(tables, datagram) {
            return Verdict::PASS;
        }
    } else if datagram.proto == TCP {
        let Some(tcp) = packet.get::<Tcp>(datagram.l4) else { return Verdict::PASS };
        datagram.sport = tcp.ports.source;
        datagram.dport = tcp.ports.dest;
        datagram.flags = tcp.flags;
        datagram.header = (tcp.offset >> 4) * 4;
    } else if datagram.proto == UDP {
        let Some(udp) = packet.get::<Udp>(datagram.l4) else { return Verdict::PASS };
        datagram.sport = udp.ports.source;
        datagram.dport = udp.ports.dest;
        datagram.header = size_of::<Udp>() as u8;
    } else if datagram.proto == icmp_proto {
        return icmp::process(packet, tables, datagram);
    } else {
        return Verdict::PASS;
    }
    let verdict = match tables.flow(&datagram.key()) {
        Some(entry) if entry.flow().state & flow_state::REVERSE == 0 => {
            forward::known(packet, tables, datagram, &entry)
        }
        Some(entry) => reverse::known(packet, tables, datagram, &entry),
        None => create::unknown(packet, tables, datagram),
    };
    if datagram.part == Part::First {
        remember_fragment(tables, datagram, verdict);
    }
    verdict
}

/// Gives a later fragment the ports of the first one. Without them it cannot be told whose it is.
#[inline(never)]
fn recall_fragment<T: Tables, A: Address>(tables: T, datagram: &mut Datagram<A>) -> bool {
    match tables.fragment(&datagram.fragment_key()) {
        Some(ports) => {
            datagram.sport = ports.sport;
            datagram.dport = ports.dport;
            true
        }
        None => false,
    }
}

/// Remembers the ports for the fragments to come, if the first one was ours.
#[inline(never)]
fn remember_fragment<T: Tables, A: Address>(tables: T, datagram: &Datagram<A>, verdict: Verdict) -> u32 {
    if verdict != Verdict::PASS && verdict != Verdict::TO_TC {
        let ports = FragmentPorts { sport: datagram.sport, dport: datagram.dport };
        tables.set_fragment(&datagram.fragment_key(), &ports);
        tables.count(lb_common::counter::Counter::FragmentsTracked);
    }
    0
}
