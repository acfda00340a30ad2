//! Fragments: only the first has the ports, so it is remembered for the others.

use lb_common::{
    addr::Be16,
    counter::{Counter, DropReason},
    flow::Address,
    limits::{FRAGMENT_AGE_S, FRAGMENT_ROUNDS},
    maps::{FragmentPorts, limited, vip_flags},
};

use crate::{
    packet::{Hook, Packet},
    parse::Datagram,
    send::Ip,
    tables::Tables,
    verdict::{NO_SERVICE, Verdict},
};

/// Answer of [`recall`]: the first fragment has not come.
pub const EARLY: u32 = 0;
/// Answer of [`recall`]: the datagram is one of ours, and the ports are filled in.
pub const OURS: u32 = 1;
/// Answer of [`recall`]: the first fragment passed, and so must this one.
pub const FOREIGN: u32 = 2;

/// Gives a later fragment the ports of the first one. Without them it cannot be told whose it is.
#[inline(never)]
pub fn recall<T: Tables, A: Address>(tables: T, datagram: &mut Datagram<A>) -> u32 {
    let Some(ports) = tables.fragment(&datagram.fragment_key()) else {
        return EARLY;
    };
    // Identifications come back: an old entry is another datagram's.
    if tables.now().wrapping_sub(ports.seen) > FRAGMENT_AGE_S * tables.ticks_per_second() {
        return EARLY;
    }
    if ports.sport.0 == 0 && ports.dport.0 == 0 {
        return FOREIGN;
    }
    datagram.key.sport = ports.sport;
    datagram.key.dport = ports.dport;
    OURS
}

/// Remembers a first fragment: its ports if it was ours, or that it passed. What XDP passes is TC's to remember.
#[inline(never)]
pub fn remember<P: Packet, T: Tables, A: Address>(
    tables: T,
    datagram: &Datagram<A>,
    verdict: Verdict,
) -> u32 {
    let foreign = verdict == Verdict::PASS;
    if verdict == Verdict::TO_TC || verdict == Verdict::EARLIER || (foreign && P::HOOK == Hook::Xdp) {
        return 0;
    }
    let mut ports = FragmentPorts {
        sport: datagram.key.sport,
        dport: datagram.key.dport,
        seen: tables.now(),
    };
    if foreign {
        (ports.sport, ports.dport) = (Be16(0), Be16(0));
    } else {
        tables.count(Counter::FragmentsTracked);
    }
    tables.set_fragment(&datagram.fragment_key(), &ports);
    0
}

/// A later fragment whose first has not come: the network has changed their order, and the first is right behind. Sent to
/// the device's ingress again, the packet takes its turn after those that wait there.
#[inline(never)]
pub fn wait<P: Packet, T: Tables, A: Ip>(packet: &P, tables: T, datagram: &Datagram<A>) -> Verdict {
    if P::HOOK == Hook::Xdp {
        return Verdict::TO_TC;
    }
    let loopback = tables
        .settings()
        .is_none_or(|s| s.loopback_ifindex == packet.device());
    if P::HOOK == Hook::Egress || loopback {
        return Verdict::PASS;
    }
    if packet.rounds() < FRAGMENT_ROUNDS && tables.allows(limited::FRAGMENTS) {
        return Verdict::AGAIN;
    }
    // On an address of the node it may be the stack's.
    match tables.vip(&datagram.key.dst.wide()) {
        Some(vip) if vip.flags & vip_flags::ECHO != 0 => Verdict::drop(DropReason::FragmentEarly, NO_SERVICE),
        _ => Verdict::PASS,
    }
}
