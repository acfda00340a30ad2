//! What is for a routed VIP and for no service. The VIP is no address of the node: passed, the packet would go back to the
//! router that sent it, and round and round until its time to live is over.

use lb_common::{
    counter::{Counter, DropReason},
    flow::{Address, routed_bit},
    maps::{limited, vip_flags},
};

use crate::{
    error,
    headers::{ICMPV6, ICMPV6_DISCOVERY_FIRST, ICMPV6_DISCOVERY_LAST, Icmp, TCP, TCP_RST, UDP},
    ingress,
    packet::{Hook, Packet},
    parse::Datagram,
    reply,
    send::Ip,
    tables::Tables,
    verdict::{NO_SERVICE, Verdict},
};

/// Whether an address may be a routed VIP.
#[inline(always)]
pub fn may_be_routed<T: Tables, A: Address>(tables: T, addr: A) -> bool {
    let (word, mask) = routed_bit(addr);
    tables.routed_word(word) & mask != 0
}

/// Ends a packet that would pass otherwise, if its destination is a routed VIP: refused, or dropped.
#[inline(never)]
pub fn refuse<P: Packet, T: Tables, A: Ip>(packet: &mut P, tables: T, datagram: &Datagram<A>) -> Verdict {
    let Some(vip) = tables.vip(&datagram.key.dst.wide()) else {
        return Verdict::PASS;
    };
    if vip.flags & vip_flags::ROUTED == 0 || (A::V6 && is_discovery(packet, datagram)) {
        return Verdict::PASS;
    }
    if let Some(verdict) = ingress::refuse_foreign(packet, tables) {
        return verdict;
    }
    let dropped = Verdict::drop(DropReason::UnusedPort, NO_SERVICE);
    if vip.flags & vip_flags::UNUSED_DROP != 0 || datagram.header == 0 {
        return dropped;
    }
    if datagram.proto() == TCP {
        if datagram.flags & TCP_RST != 0 || datagram.header < 20 || !tables.allows(limited::RESETS) {
            return dropped;
        }
        tables.count(Counter::UnusedPortsRefused);
        return reply::reset(packet, tables, datagram, NO_SERVICE);
    }
    if datagram.proto() != UDP {
        return dropped;
    }
    if P::HOOK == Hook::Xdp {
        return Verdict::TO_TC;
    }
    error::port_unreachable(packet, tables, datagram)
}

/// Whether a packet is of neighbour discovery, which never leaves its link.
#[inline(always)]
fn is_discovery<P: Packet, A: Ip>(packet: &P, datagram: &Datagram<A>) -> bool {
    datagram.proto() == ICMPV6
        && packet
            .get::<Icmp>(datagram.l4)
            .is_some_and(|icmp| icmp.kind >= ICMPV6_DISCOVERY_FIRST && icmp.kind <= ICMPV6_DISCOVERY_LAST)
}
