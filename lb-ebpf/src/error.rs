//! ICMP errors of our own, as a router sends them: "too big", "time exceeded", "port unreachable".
//!
//! TC only: XDP has no room in front of the frame that it could rely on, and leaves such packets to TC.

use lb_common::{
    addr::Be16,
    counter::{Counter, DropReason},
    maps::limited,
};

use crate::{
    csum,
    headers::{
        Ethernet, ICMP, ICMP_CODE_PORT, ICMP_CODE_TOO_BIG, ICMP_TIME_EXCEEDED, ICMP_UNREACHABLE, ICMPV6,
        ICMPV6_CODE_PORT, ICMPV6_TIME_EXCEEDED, ICMPV6_TOO_BIG, ICMPV6_UNREACHABLE, Icmp, TCP, Tcp, UDP, Udp,
    },
    packet::Packet,
    parse::{Datagram, L3, Part},
    reply,
    send::Ip,
    tables::Tables,
    verdict::{NO_SERVICE, Verdict},
};

/// Words of 32 bits that an error quotes at most: an IPv4 header with all its options and a TCP header, or an IPv6 header
/// with a hundred bytes of extensions.
const QUOTED_WORDS: usize = 40;

/// Answers a packet that is longer than the device it must leave by (RFC 1191, RFC 8201).
///
/// Without DF too: nothing here can cut a packet up, and Linux obeys the message all the same.
#[inline(never)]
pub fn too_big<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    mtu: u32,
    service: u32,
) -> Verdict {
    let dropped = Verdict::drop(DropReason::MtuExceeded, service);
    let message = if A::V6 {
        message(ICMPV6_TOO_BIG, 0)
    } else {
        message(ICMP_UNREACHABLE, ICMP_CODE_TOO_BIG)
    };
    let verdict = answer(packet, datagram, message, mtu.to_be(), dropped);
    if verdict != ANSWERED {
        return verdict;
    }
    tables.count(Counter::TooBigSent);
    reply::back(packet, tables)
}

/// Answers a packet that has no hop left (RFC 1812 §5.3.1, RFC 4443 §3.3).
#[inline(never)]
pub fn time_exceeded<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    service: u32,
) -> Verdict {
    let dropped = Verdict::drop(DropReason::TtlExpired, service);
    if !tables.allows(limited::ERRORS) {
        return dropped;
    }
    let kind = if A::V6 {
        ICMPV6_TIME_EXCEEDED
    } else {
        ICMP_TIME_EXCEEDED
    };
    let verdict = answer(packet, datagram, message(kind, 0), 0, dropped);
    if verdict != ANSWERED {
        return verdict;
    }
    tables.count(Counter::TimeExceededSent);
    reply::back(packet, tables)
}

/// Answers a datagram for a port that nobody has (RFC 1122 §4.1.3.1, RFC 4443 §3.1).
#[inline(never)]
pub fn port_unreachable<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
) -> Verdict {
    let dropped = Verdict::drop(DropReason::UnusedPort, NO_SERVICE);
    if !tables.allows(limited::ERRORS) {
        return dropped;
    }
    let message = if A::V6 {
        message(ICMPV6_UNREACHABLE, ICMPV6_CODE_PORT)
    } else {
        message(ICMP_UNREACHABLE, ICMP_CODE_PORT)
    };
    let verdict = answer(packet, datagram, message, 0, dropped);
    if verdict != ANSWERED {
        return verdict;
    }
    tables.count(Counter::UnusedPortsRefused);
    reply::back(packet, tables)
}

/// Type and code of a message in one word.
#[inline(always)]
const fn message(kind: u8, code: u8) -> u32 {
    (kind as u32) << 8 | code as u32
}

/// "The frame is an error now": the answer of [`answer`], which never leaves this module.
const ANSWERED: Verdict = Verdict::CREATED;

/// How much of a packet is quoted, bytes: all of its IP header and up to the TCP checksum, which the kernel must still
/// find; a multiple of four. 0: nobody may be told of this packet (RFC 1122 §3.2.2, RFC 4443 §2.4).
#[inline(always)]
fn quoted<A: Ip>(datagram: &Datagram<A>) -> usize {
    let proto = datagram.proto();
    if datagram.part == Part::Later || (proto != TCP && proto != UDP) {
        return 0;
    }
    let header = datagram.l4 - datagram.l3;
    let transport = if datagram.length as usize >= header + size_of::<Tcp>() {
        size_of::<Tcp>()
    } else {
        size_of::<Udp>()
    };
    let length = (header + transport) & !3;
    if length > QUOTED_WORDS * 4 {
        QUOTED_WORDS * 4
    } else {
        length
    }
}

/// Turns the frame into an ICMP error about itself. [`ANSWERED`], or `dropped` if that cannot be.
#[inline(never)]
fn answer<P: Packet, A: Ip>(
    packet: &mut P,
    datagram: &Datagram<A>,
    message: u32,
    rest: u32,
    dropped: Verdict,
) -> Verdict {
    let quoted = quoted(datagram);
    let Some(eth) = packet.get::<Ethernet>(0) else {
        return dropped;
    };
    let eth = *eth;
    if quoted == 0 || !packet.truncate(L3 + quoted) || !packet.grow_head(A::HEADER + size_of::<Icmp>()) {
        return dropped;
    }
    let Some(front) = packet.get_mut::<Ethernet>(0) else {
        return dropped;
    };
    *front = eth;
    let proto = if A::V6 { ICMPV6 } else { ICMP };
    let length = (size_of::<Icmp>() + quoted) as u16;
    if !A::write_header(packet, L3, datagram.key.dst, datagram.key.src, proto, length) {
        return dropped;
    }
    let l4 = L3 + A::HEADER;
    let mut sum = Be16::new(message as u16).0 as u32 + (rest & 0xffff) + (rest >> 16);
    if A::V6 {
        sum += csum::pseudo_sum(datagram.key.dst, datagram.key.src, proto, length);
    }
    sum += sum_words(packet, l4 + size_of::<Icmp>(), quoted);
    let Some(icmp) = packet.get_mut::<Icmp>(l4) else {
        return dropped;
    };
    *icmp = Icmp {
        kind: (message >> 8) as u8,
        code: message as u8,
        check: !csum::fold(sum),
        rest,
    };
    ANSWERED
}

/// Sum of `length` bytes of the frame, not folded to the end.
#[inline(never)]
fn sum_words<P: Packet>(packet: &P, offset: usize, length: usize) -> u32 {
    let mut sum = 0u32;
    for word in 0..QUOTED_WORDS {
        if word * 4 >= length {
            break;
        }
        let Some(value) = packet.get::<u32>(offset + word * 4) else {
            break;
        };
        sum += (*value & 0xffff) + (*value >> 16);
    }
    sum
}
