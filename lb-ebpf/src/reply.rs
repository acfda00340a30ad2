//! Packets that the balancer answers itself, made from the packet they answer: RST and echo reply. ICMP errors: [`crate::error`].

use lb_common::{
    addr::Be16,
    counter::{Counter, DropReason},
};

use crate::{
    csum,
    headers::{
        Ethernet, ICMP_ECHO_REPLY, ICMPV6_ECHO_REPLY, Icmp, Ports, TCP, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN,
        Tcp,
    },
    packet::{Hook, Packet},
    parse::Datagram,
    send::Ip,
    tables::Tables,
    verdict::Verdict,
};

/// TTL and hop limit of our own packets.
pub const TTL: u8 = 64;

/// Sends the packet back where it came from; the MACs are swapped. `lo`, whose MAC is zero, takes only frames for itself.
#[inline(always)]
pub fn back<P: Packet, T: Tables>(packet: &mut P, tables: T) -> Verdict {
    if P::HOOK == Hook::Egress {
        return match packet.get_mut::<Ethernet>(0) {
            Some(eth) => {
                (eth.dst_high, eth.dst_low, eth.src_high, eth.src_low) = (0, 0, 0, 0);
                Verdict::TO_NODE_BY_LOOPBACK
            }
            None => Verdict::PASS,
        };
    }
    if P::HOOK == Hook::Ingress
        && tables
            .settings()
            .is_some_and(|s| s.loopback_ifindex == packet.device())
    {
        return Verdict::TO_NODE;
    }
    match packet.get_mut::<Ethernet>(0) {
        Some(eth) => {
            swap_macs(eth);
            Verdict::TRANSMIT
        }
        None => Verdict::PASS,
    }
}

#[inline(always)]
fn swap_macs(eth: &mut Ethernet) {
    let (high, low) = (eth.dst_high, eth.dst_low);
    eth.dst_high = eth.src_high;
    eth.dst_low = eth.src_low;
    eth.src_high = high;
    eth.src_low = low;
}

/// Answers a TCP segment by RST (RFC 9293 §3.5.2).
#[inline(never)]
pub fn reset<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    service: u32,
) -> Verdict {
    let failed = Verdict::drop(DropReason::RewriteFailed, service);
    let Some(tcp) = packet.get::<Tcp>(datagram.l4) else {
        return failed;
    };
    let (seq, ack, flags, check) = (u32::from_be(tcp.seq), tcp.ack, tcp.flags, tcp.check);
    let segment = datagram.length.wrapping_sub((datagram.l4 - datagram.l3) as u32);
    // Hardware will complete a checksum that holds the pseudo-header's sum alone: ours must then do likewise.
    let pseudo = csum::pseudo_sum(datagram.key.src, datagram.key.dst, TCP, segment as u16);
    let partial = P::HOOK != Hook::Xdp && check == csum::fold(pseudo);
    let answer = if flags & TCP_ACK != 0 {
        (ack, 0, TCP_RST)
    } else {
        let syn_fin = (flags & TCP_SYN != 0) as u32 + (flags & TCP_FIN != 0) as u32;
        let length = segment.wrapping_sub(datagram.header as u32) + syn_fin;
        (0, seq.wrapping_add(length).to_be(), TCP_RST | TCP_ACK)
    };
    let l4 = datagram.l3 + A::HEADER;
    if !packet.truncate(l4 + size_of::<Tcp>())
        || !A::write_header(
            packet,
            datagram.l3,
            datagram.key.dst,
            datagram.key.src,
            TCP,
            size_of::<Tcp>() as u16,
        )
    {
        return failed;
    }
    let Some(tcp) = packet.get_mut::<Tcp>(l4) else {
        return failed;
    };
    *tcp = Tcp {
        ports: Ports {
            source: datagram.key.dport,
            dest: datagram.key.sport,
        },
        seq: answer.0,
        ack: answer.1,
        offset: (size_of::<Tcp>() as u8 / 4) << 4,
        flags: answer.2,
        window: Be16(0),
        check: 0,
        urgent: Be16(0),
    };
    let pseudo = csum::pseudo_sum(datagram.key.dst, datagram.key.src, TCP, size_of::<Tcp>() as u16);
    tcp.check = if partial {
        csum::fold(pseudo)
    } else {
        !csum::fold(pseudo + sum_tcp(tcp))
    };
    tables.count(Counter::ResetsSent);
    back(packet, tables)
}

/// Unfolded sum of the words that [`reset`] sets.
#[inline(always)]
const fn sum_tcp(tcp: &Tcp) -> u32 {
    tcp.ports.source.0 as u32
        + tcp.ports.dest.0 as u32
        + (tcp.seq & 0xffff)
        + (tcp.seq >> 16)
        + (tcp.ack & 0xffff)
        + (tcp.ack >> 16)
        + Be16::new((tcp.offset as u16) << 8 | tcp.flags as u16).0 as u32
}

/// Answers an echo request to a VIP (RFC 792, RFC 4443 §4.2).
#[inline(always)]
pub fn echo<P: Packet, T: Tables, A: Ip>(packet: &mut P, tables: T, datagram: &Datagram<A>) -> Verdict {
    let failed = Verdict::drop(DropReason::RewriteFailed, crate::verdict::NO_SERVICE);
    let Some(icmp) = packet.get_mut::<Icmp>(datagram.l4) else {
        return failed;
    };
    let old = Be16::new((icmp.kind as u16) << 8).0;
    icmp.kind = if A::V6 { ICMPV6_ECHO_REPLY } else { ICMP_ECHO_REPLY };
    let new = Be16::new((icmp.kind as u16) << 8).0;
    let delta = csum::fold(csum::word_delta(old, new));
    if !A::turn(packet, datagram.l3, TTL) || !packet.fix_checksum(datagram.l4 + 2, 0, delta, false) {
        return failed;
    }
    tables.count(Counter::EchoReplies);
    back(packet, tables)
}
