//! The way out of a rewritten packet, and the rewrite itself.

use lb_common::{
    addr::{Addr4, Addr16, Be16, Hop},
    counter::DropReason,
    flow::Address,
    maps::{Backend, Device, Flow, backend_flags, device_flags},
};

use crate::{
    csum,
    headers::{Ethernet, IPV4_DF, Ipv4, Ipv6, Ports, TCP, UDP},
    packet::{Hook, Packet},
    parse::{self, Datagram},
    reply,
    tables::Tables,
    verdict::Verdict,
};

/// How a packet leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// This body cannot send it: the TC program will.
    NeedTc,
    /// Up the stack from here.
    Node,
    /// Up the stack by way of `lo`, where source checks are off.
    NodeByLoopback,
    /// The stack is sending it already (egress).
    Stack,
    /// Out of a device with these MACs.
    Device {
        /// Interface index.
        ifindex: u32,
        /// Its MTU, bytes of IP.
        mtu: u32,
        /// Destination MAC.
        hop: Hop,
        /// Source MAC, in the same form.
        from: Hop,
    },
    /// Out of a device; the kernel resolves the neighbour.
    Neighbour {
        /// Interface index.
        ifindex: u32,
        /// Its MTU, bytes of IP.
        mtu: u32,
    },
    /// The device is gone.
    Nowhere,
}

/// The way to a backend.
#[inline(always)]
pub fn to_backend<P: Packet, T: Tables>(tables: T, backend: &Backend) -> Way {
    if backend.flags & backend_flags::NODE != 0 {
        return match P::HOOK {
            Hook::Xdp => Way::NeedTc,
            Hook::Ingress => Way::Node,
            Hook::Egress => Way::NodeByLoopback,
        };
    }
    match tables.device(backend.hop.slot() as u32) {
        Some(device) => by_device::<P>(device, backend.hop),
        None => Way::Nowhere,
    }
}

/// The way to a client, by the hop learnt from its packets. `translated`: its own packets were given our source.
#[inline(always)]
pub fn to_client<P: Packet, T: Tables>(packet: &P, tables: T, hop: Hop, translated: bool) -> Way {
    if P::HOOK == Hook::Egress && !translated {
        return Way::Stack;
    }
    if hop.slot() == 0 {
        return match P::HOOK {
            Hook::Xdp => Way::NeedTc,
            _ if tables.settings().is_some_and(|s| s.loopback_ifindex == packet.device()) => Way::Node,
            _ => Way::NodeByLoopback,
        };
    }
    match tables.device(hop.slot() as u32) {
        Some(device) => by_device::<P>(device, hop),
        None => Way::Nowhere,
    }
}

#[inline(always)]
fn by_device<P: Packet>(device: &Device, hop: Hop) -> Way {
    if device.ifindex == 0 {
        return Way::Nowhere;
    }
    if P::HOOK == Hook::Xdp && (!hop.has_mac() || device.flags & device_flags::XDP == 0) {
        return Way::NeedTc;
    }
    if hop.has_mac() {
        let from = Hop::from_words(device.mac_high, device.mac_low, 0);
        Way::Device { ifindex: device.ifindex, mtu: device.mtu, hop, from }
    } else {
        Way::Neighbour { ifindex: device.ifindex, mtu: device.mtu }
    }
}

/// Checks before anything is changed: body, device, time to live, size. `Some` is the end of the packet.
#[inline(always)]
pub fn refuse<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    way: Way,
    service: u32,
) -> Option<Verdict> {
    let mtu = match way {
        Way::NeedTc => return Some(Verdict::TO_TC),
        Way::Nowhere => return Some(Verdict::drop(DropReason::RewriteFailed, service)),
        Way::Node | Way::NodeByLoopback | Way::Stack => return None,
        Way::Device { mtu, .. } | Way::Neighbour { mtu, .. } => mtu,
    };
    if datagram.ttl <= 1 {
        return Some(Verdict::drop(DropReason::TtlExpired, service));
    }
    if datagram.length > mtu {
        if P::HOOK == Hook::Xdp {
            return Some(Verdict::TO_TC);
        }
        let segment = packet.segment_size();
        let headers = datagram.l4 - datagram.l3 + datagram.header as usize;
        if segment == 0 || headers + segment > mtu as usize {
            return Some(reply::too_big(packet, tables, datagram, mtu, service));
        }
    }
    None
}

/// Rewrites the packet as `flow` says and sends it on its way.
#[inline(always)]
pub fn send<P: Packet, A: Ip>(packet: &mut P, datagram: &Datagram<A>, flow: &Flow<A>, way: Way) -> Verdict {
    let failed = Verdict::drop(DropReason::RewriteFailed, flow.service);
    let hops = matches!(way, Way::Device { .. } | Way::Neighbour { .. });
    if !set_macs(packet, way)
        || !A::rewrite(packet, datagram.l3, flow.src, flow.dst, flow.addr_delta, hops)
        || (datagram.header != 0 && !rewrite_transport(packet, datagram, flow))
    {
        return failed;
    }
    leave(packet, way)
}

/// The verdict of a way.
#[inline(always)]
pub fn leave<P: Packet>(packet: &P, way: Way) -> Verdict {
    match way {
        Way::NeedTc => Verdict::TO_TC,
        Way::Node => Verdict::TO_NODE,
        Way::NodeByLoopback => Verdict::TO_NODE_BY_LOOPBACK,
        Way::Stack => Verdict::TRANSMIT,
        Way::Device { ifindex, .. } if P::HOOK != Hook::Egress && ifindex == packet.device() => Verdict::TRANSMIT,
        Way::Device { ifindex, .. } => Verdict::redirect(ifindex),
        Way::Neighbour { ifindex, .. } => Verdict::neighbour(ifindex),
        Way::Nowhere => Verdict::drop(DropReason::RewriteFailed, crate::verdict::NO_SERVICE),
    }
}

/// Writes the MACs, where the way knows them.
#[inline(always)]
pub fn set_macs<P: Packet>(packet: &mut P, way: Way) -> bool {
    let Way::Device { hop, from, .. } = way else { return true };
    let Some(ethernet) = packet.get_mut::<Ethernet>(0) else { return false };
    ethernet.dst_high = hop.mac_high();
    ethernet.dst_low = hop.mac_low();
    ethernet.src_high = from.mac_high();
    ethernet.src_low = from.mac_low();
    true
}

#[inline(always)]
fn rewrite_transport<P: Packet, A: Ip>(packet: &mut P, datagram: &Datagram<A>, flow: &Flow<A>) -> bool {
    let Some(ports) = packet.get_mut::<Ports>(datagram.l4) else { return false };
    ports.source = flow.sport;
    ports.dest = flow.dport;
    let offset = datagram.l4 + check_offset(datagram.proto);
    packet.fix_checksum(offset, flow.addr_delta, flow.port_delta, datagram.proto == UDP)
}

/// Where the checksum is in a TCP or UDP header.
#[inline(always)]
pub const fn check_offset(proto: u8) -> usize {
    if proto == TCP { 16 } else { 6 }
}

/// What differs between IPv4 and IPv6.
pub trait Ip: Address {
    /// Bytes of the header without options.
    const HEADER: usize;

    /// Reads a header of this family.
    fn parse<P: Packet>(packet: &P, l3: usize) -> Option<Datagram<Self>>;

    /// Writes a whole header for a packet of our own with `length` bytes after it.
    fn write_header<P: Packet>(packet: &mut P, l3: usize, src: Self, dst: Self, proto: u8, length: u16) -> bool;

    /// Swaps source and destination and sets the time to live.
    fn turn<P: Packet>(packet: &mut P, l3: usize, ttl: u8) -> bool;

    /// Whether routers must not fragment the packet: always so in IPv6.
    fn may_not_fragment<P: Packet>(packet: &P, l3: usize) -> bool;

    /// Writes the addresses; `hops` takes one from the time to live.
    fn rewrite<P: Packet>(packet: &mut P, l3: usize, src: Self, dst: Self, addr_delta: u16, hops: bool) -> bool;
}

impl Ip for Addr4 {
    const HEADER: usize = size_of::<Ipv4>();

    #[inline(always)]
    fn rewrite<P: Packet>(packet: &mut P, l3: usize, src: Self, dst: Self, addr_delta: u16, hops: bool) -> bool {
        let Some(ip) = packet.get_mut::<Ipv4>(l3) else { return false };
        let mut delta = addr_delta as u32;
        if hops {
            ip.ttl = ip.ttl.wrapping_sub(1);
            delta += csum::TTL_DELTA;
        }
        ip.src = src;
        ip.dst = dst;
        ip.check = csum::apply(ip.check, delta);
        true
    }

    #[inline(always)]
    fn parse<P: Packet>(packet: &P, l3: usize) -> Option<Datagram<Self>> {
        parse::ipv4(packet, l3)
    }

    #[inline(always)]
    fn write_header<P: Packet>(packet: &mut P, l3: usize, src: Self, dst: Self, proto: u8, length: u16) -> bool {
        let Some(ip) = packet.get_mut::<Ipv4>(l3) else { return false };
        let total = length + Self::HEADER as u16;
        *ip = Ipv4 {
            version_ihl: 0x45,
            tos: 0,
            total_length: Be16::new(total),
            id: Be16(0),
            fragment: IPV4_DF,
            ttl: reply::TTL,
            proto,
            check: 0,
            src,
            dst,
        };
        let words = Be16::new(0x4500).0 as u32
            + Be16::new(total).0 as u32
            + IPV4_DF.0 as u32
            + Be16::new((reply::TTL as u16) << 8 | proto as u16).0 as u32;
        ip.check = !csum::fold(words + src.sum() + dst.sum());
        true
    }

    #[inline(always)]
    fn turn<P: Packet>(packet: &mut P, l3: usize, ttl: u8) -> bool {
        let Some(ip) = packet.get_mut::<Ipv4>(l3) else { return false };
        let old = Be16::new((ip.ttl as u16) << 8).0;
        ip.ttl = ttl;
        ip.check = csum::apply(ip.check, csum::word_delta(old, Be16::new((ttl as u16) << 8).0));
        (ip.src, ip.dst) = (ip.dst, ip.src);
        true
    }

    #[inline(always)]
    fn may_not_fragment<P: Packet>(packet: &P, l3: usize) -> bool {
        packet.get::<Ipv4>(l3).is_some_and(|ip| ip.fragment.0 & IPV4_DF.0 != 0)
    }
}

impl Ip for Addr16 {
    const HEADER: usize = size_of::<Ipv6>();

    #[inline(always)]
    fn rewrite<P: Packet>(packet: &mut P, l3: usize, src: Self, dst: Self, _delta: u16, hops: bool) -> bool {
        let Some(ip) = packet.get_mut::<Ipv6>(l3) else { return false };
        if hops {
            ip.hop_limit = ip.hop_limit.wrapping_sub(1);
        }
        ip.src = src;
        ip.dst = dst;
        true
    }

    #[inline(always)]
    fn parse<P: Packet>(packet: &P, l3: usize) -> Option<Datagram<Self>> {
        parse::ipv6(packet, l3)
    }

    #[inline(always)]
    fn write_header<P: Packet>(packet: &mut P, l3: usize, src: Self, dst: Self, proto: u8, length: u16) -> bool {
        let Some(ip) = packet.get_mut::<Ipv6>(l3) else { return false };
        *ip = Ipv6 {
            version_flow: [0x60, 0, 0, 0],
            payload_length: Be16::new(length),
            next: proto,
            hop_limit: reply::TTL,
            src,
            dst,
        };
        true
    }

    #[inline(always)]
    fn turn<P: Packet>(packet: &mut P, l3: usize, ttl: u8) -> bool {
        let Some(ip) = packet.get_mut::<Ipv6>(l3) else { return false };
        ip.hop_limit = ttl;
        (ip.src, ip.dst) = (ip.dst, ip.src);
        true
    }

    #[inline(always)]
    fn may_not_fragment<P: Packet>(_packet: &P, _l3: usize) -> bool {
        true
    }
}
