//! The way out of a rewritten packet, and the rewrite itself.

use lb_common::{
    addr::{Addr4, Addr16, Be16, Hop},
    counter::DropReason,
    flow::Address,
    maps::{Backend, Device, backend_flags, device_flags},
    slot::Flow,
};

use crate::{
    csum, error,
    headers::{Ethernet, IPV4_DF, Ipv4, Ipv6, Ports, TCP, UDP},
    packet::{Hook, Packet},
    parse::{self, Datagram},
    reply,
    tables::Tables,
    verdict::Verdict,
};

/// How a packet leaves.
///
/// A kind and always-set fields rather than an enum with contents: the compiler would leave the contents of the other
/// variants unset in registers, and the verifier refuses to see such a register copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// The kind.
    pub kind: Kind,
    /// Interface index of the device, if the kind has one.
    pub ifindex: u32,
    /// Its MTU, bytes of IP.
    pub mtu: u32,
    /// Destination MAC, for [`Kind::Device`].
    pub hop: Hop,
    /// Source MAC in the same form, for [`Kind::Device`].
    pub from: Hop,
}

/// The kinds of [`Way`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// The device is gone.
    Nowhere,
    /// This body cannot send it: the TC program will.
    NeedTc,
    /// Up the stack from here.
    Node,
    /// Up the stack by way of `lo`, where source checks are off.
    NodeByLoopback,
    /// The stack is sending it already (egress).
    Stack,
    /// Out of a device with known MACs.
    Device,
    /// Out of a device; the kernel resolves the neighbour.
    Neighbour,
}

impl Way {
    /// A way without a device.
    #[inline(always)]
    const fn plain(kind: Kind) -> Self {
        Self {
            kind,
            ifindex: 0,
            mtu: u32::MAX,
            hop: Hop(0),
            from: Hop(0),
        }
    }

    /// Whether the packet makes a hop: one is taken from its time to live.
    #[inline(always)]
    pub const fn is_hop(&self) -> bool {
        matches!(self.kind, Kind::Device | Kind::Neighbour)
    }
}

/// The way to a backend.
#[inline(always)]
pub fn to_backend<P: Packet, T: Tables, A: Ip>(packet: &P, tables: T, backend: &Backend) -> Way {
    if backend.flags & backend_flags::NODE != 0 {
        return match P::HOOK {
            Hook::Xdp => Way::plain(Kind::NeedTc),
            Hook::Ingress => Way::plain(Kind::Node),
            Hook::Egress => Way::plain(Kind::NodeByLoopback),
        };
    }
    match tables.device(backend.hop.slot() as u32) {
        Some(device) => {
            let way = by_device(packet, device, backend.hop);
            if way.kind == Kind::Device && is_agent_silent(tables) {
                ask_kernel::<P, A>(packet, way, backend)
            } else {
                way
            }
        }
        None => Way::plain(Kind::Nowhere),
    }
}

/// Whether the agent has given no sign of life for so long that next hops in the maps may be old.
#[inline(always)]
fn is_agent_silent<T: Tables>(tables: T) -> bool {
    match tables.settings() {
        Some(settings) => settings.heartbeat != 0 && tables.now().wrapping_sub(settings.heartbeat) < 1 << 31,
        None => false,
    }
}

/// The same way, with the next hop that the kernel knows.
#[inline(always)]
fn ask_kernel<P: Packet, A: Ip>(packet: &P, way: Way, backend: &Backend) -> Way {
    if P::HOOK != Hook::Xdp {
        return Way {
            kind: Kind::Neighbour,
            ..way
        };
    }
    match packet.next_hop(&backend.addr, A::V6, way.ifindex) {
        Some((hop, from)) => Way { hop, from, ..way },
        None => Way::plain(Kind::NeedTc),
    }
}

/// The way to a client, by the hop learnt from its packets. `translated`: its own packets were given our source.
#[inline(always)]
pub fn to_client<P: Packet, T: Tables>(packet: &P, tables: T, hop: Hop, translated: bool) -> Way {
    if P::HOOK == Hook::Egress && !translated {
        return Way::plain(Kind::Stack);
    }
    if hop.slot() == 0 {
        return match P::HOOK {
            Hook::Xdp => Way::plain(Kind::NeedTc),
            _ if tables
                .settings()
                .is_some_and(|s| s.loopback_ifindex == packet.device()) =>
            {
                Way::plain(Kind::Node)
            }
            _ => Way::plain(Kind::NodeByLoopback),
        };
    }
    match tables.device(hop.slot() as u32) {
        Some(device) => by_device(packet, device, hop),
        None => Way::plain(Kind::Nowhere),
    }
}

#[inline(always)]
fn by_device<P: Packet>(packet: &P, device: &Device, hop: Hop) -> Way {
    if device.ifindex == 0 {
        return Way::plain(Kind::Nowhere);
    }
    if P::HOOK == Hook::Xdp && !(hop.has_mac() && takes_from_xdp(packet, device)) {
        return Way::plain(Kind::NeedTc);
    }
    let kind = if hop.has_mac() {
        Kind::Device
    } else {
        Kind::Neighbour
    };
    let from = Hop::from_words(device.mac_high, device.mac_low, 0);
    Way {
        kind,
        ifindex: device.ifindex,
        mtu: device.mtu,
        hop,
        from,
    }
}

/// Whether XDP can send this frame out of a device. The kernel says no only after the verdict, when the frame is lost.
#[inline(always)]
fn takes_from_xdp<P: Packet>(packet: &P, device: &Device) -> bool {
    if device.ifindex == packet.device() {
        return device.flags & device_flags::XDP_TX != 0;
    }
    device.flags & device_flags::XDP != 0
        && (device.flags & device_flags::XDP_FRAGS != 0 || !packet.is_multi_buffer())
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
    match way.kind {
        Kind::NeedTc => return Some(Verdict::TO_TC),
        Kind::Nowhere => return Some(Verdict::drop(DropReason::RewriteFailed, service)),
        Kind::Node | Kind::NodeByLoopback | Kind::Stack => return None,
        Kind::Device | Kind::Neighbour => {}
    }
    if datagram.ttl <= 1 {
        return Some(if P::HOOK == Hook::Xdp {
            Verdict::TO_TC
        } else {
            error::time_exceeded(packet, tables, datagram, service)
        });
    }
    if datagram.length > way.mtu {
        if P::HOOK == Hook::Xdp {
            return Some(Verdict::TO_TC);
        }
        let segment = packet.segment_size();
        let headers = datagram.l4 - datagram.l3 + datagram.header as usize;
        if segment == 0 || headers + segment > way.mtu as usize {
            return Some(error::too_big(packet, tables, datagram, way.mtu, service));
        }
    }
    None
}

/// Rewrites the packet as `flow` says and sends it on its way.
#[inline(always)]
pub fn send<P: Packet, A: Ip>(packet: &mut P, datagram: &Datagram<A>, flow: &Flow<A>, way: Way) -> Verdict {
    let failed = Verdict::drop(DropReason::RewriteFailed, flow.service());
    if !set_macs(packet, way)
        || !A::rewrite(
            packet,
            datagram.l3,
            flow.body.to_src,
            flow.body.to_dst,
            flow.body.addr_delta,
            way.is_hop(),
        )
        || (datagram.header != 0 && !rewrite_transport(packet, datagram, flow))
    {
        return failed;
    }
    adjust_sum::<P, A>(packet, flow.body.addr_delta, way);
    leave(packet, way)
}

/// Tells the kernel what a translation has changed of the sum of the whole packet: in IPv6 no checksum makes up for the
/// hop limit, and helpers that know only of IPv4 take the addresses for made up for by the header's.
#[inline(always)]
pub fn adjust_sum<P: Packet, A: Ip>(packet: &mut P, addr_delta: u16, way: Way) {
    if A::V6 && P::HOOK != Hook::Xdp {
        let hop = if way.is_hop() { csum::HOP_DELTA } else { 0 };
        packet.adjust_sum(addr_delta as u32 + hop);
    }
}

/// The verdict of a way.
#[inline(always)]
pub fn leave<P: Packet>(packet: &P, way: Way) -> Verdict {
    match way.kind {
        Kind::NeedTc => Verdict::TO_TC,
        Kind::Node => Verdict::TO_NODE,
        Kind::NodeByLoopback => Verdict::TO_NODE_BY_LOOPBACK,
        Kind::Stack => Verdict::TRANSMIT,
        Kind::Device if P::HOOK != Hook::Egress && way.ifindex == packet.device() => Verdict::TRANSMIT,
        Kind::Device => Verdict::redirect(way.ifindex),
        Kind::Neighbour => Verdict::neighbour(way.ifindex),
        Kind::Nowhere => Verdict::drop(DropReason::RewriteFailed, crate::verdict::NO_SERVICE),
    }
}

/// Writes the MACs, where the way knows them. Those of `lo` are zero, and it takes only frames that are addressed to
/// it.
#[inline(always)]
pub fn set_macs<P: Packet>(packet: &mut P, way: Way) -> bool {
    if way.kind != Kind::Device && way.kind != Kind::NodeByLoopback {
        return true;
    }
    let Some(ethernet) = packet.get_mut::<Ethernet>(0) else {
        return false;
    };
    ethernet.dst_high = way.hop.mac_high();
    ethernet.dst_low = way.hop.mac_low();
    ethernet.src_high = way.from.mac_high();
    ethernet.src_low = way.from.mac_low();
    true
}

#[inline(always)]
fn rewrite_transport<P: Packet, A: Ip>(packet: &mut P, datagram: &Datagram<A>, flow: &Flow<A>) -> bool {
    let Some(ports) = packet.get_mut::<Ports>(datagram.l4) else {
        return false;
    };
    ports.source = flow.body.to_sport;
    ports.dest = flow.body.to_dport;
    let offset = datagram.l4 + check_offset(datagram.proto());
    packet.fix_checksum(
        offset,
        flow.body.addr_delta,
        flow.body.port_delta,
        datagram.proto() == UDP,
    )
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
    fn write_header<P: Packet>(
        packet: &mut P,
        l3: usize,
        src: Self,
        dst: Self,
        proto: u8,
        length: u16,
    ) -> bool;

    /// Swaps source and destination and sets the time to live.
    fn turn<P: Packet>(packet: &mut P, l3: usize, ttl: u8) -> bool;

    /// Writes the addresses; `hops` takes one from the time to live.
    fn rewrite<P: Packet>(
        packet: &mut P,
        l3: usize,
        src: Self,
        dst: Self,
        addr_delta: u16,
        hops: bool,
    ) -> bool;
}

impl Ip for Addr4 {
    const HEADER: usize = size_of::<Ipv4>();

    #[inline(always)]
    fn rewrite<P: Packet>(
        packet: &mut P,
        l3: usize,
        src: Self,
        dst: Self,
        addr_delta: u16,
        hops: bool,
    ) -> bool {
        let Some(ip) = packet.get_mut::<Ipv4>(l3) else {
            return false;
        };
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
    fn write_header<P: Packet>(
        packet: &mut P,
        l3: usize,
        src: Self,
        dst: Self,
        proto: u8,
        length: u16,
    ) -> bool {
        let Some(ip) = packet.get_mut::<Ipv4>(l3) else {
            return false;
        };
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
        let Some(ip) = packet.get_mut::<Ipv4>(l3) else {
            return false;
        };
        let old = Be16::new((ip.ttl as u16) << 8).0;
        ip.ttl = ttl;
        ip.check = csum::apply(ip.check, csum::word_delta(old, Be16::new((ttl as u16) << 8).0));
        (ip.src, ip.dst) = (ip.dst, ip.src);
        true
    }
}

impl Ip for Addr16 {
    const HEADER: usize = size_of::<Ipv6>();

    #[inline(always)]
    fn rewrite<P: Packet>(packet: &mut P, l3: usize, src: Self, dst: Self, _delta: u16, hops: bool) -> bool {
        let Some(ip) = packet.get_mut::<Ipv6>(l3) else {
            return false;
        };
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
    fn write_header<P: Packet>(
        packet: &mut P,
        l3: usize,
        src: Self,
        dst: Self,
        proto: u8,
        length: u16,
    ) -> bool {
        let Some(ip) = packet.get_mut::<Ipv6>(l3) else {
            return false;
        };
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
        let Some(ip) = packet.get_mut::<Ipv6>(l3) else {
            return false;
        };
        let old = u16::from_ne_bytes([0, ip.hop_limit]);
        ip.hop_limit = ttl;
        (ip.src, ip.dst) = (ip.dst, ip.src);
        packet.adjust_sum(csum::word_delta(old, u16::from_ne_bytes([0, ttl])));
        true
    }
}
