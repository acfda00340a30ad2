//! From frame to datagram: where the headers are and what they say. Nothing is changed and nothing dropped here.

use lb_common::{
    addr::Be16,
    flow::{Address, FlowKey},
    limits::{MAX_IPV6_EXTENSIONS, MAX_VLAN_TAGS},
    maps::FragmentKey,
};

use crate::{
    headers::{
        ETH_QINQ, ETH_VLAN, EXT_DESTINATION, EXT_FRAGMENT, EXT_HOP, EXT_ROUTING, Ethernet, IPV4_FRAGMENT,
        IPV4_OFFSET, Ipv4, Ipv6, Ipv6Extension, Ipv6Fragment, VlanTag,
    },
    packet::Packet,
};

/// Layer 2: what comes next and where.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// EtherType after the tags.
    pub kind: Be16,
    /// Offset of the IP header, bytes.
    pub l3: usize,
}

/// Which part of a datagram a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// The first fragment: it has the ports.
    First,
    /// A later fragment: it has no layer-4 header.
    Later,
}

/// Layer 3 and 4: an IP packet and what of its transport header matters.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<A> {
    /// Source.
    pub src: A,
    /// Destination.
    pub dst: A,
    /// Offset of the IP header, bytes.
    pub l3: usize,
    /// Offset after the IP header and its extensions, bytes.
    pub l4: usize,
    /// Length of the IP packet by its own header, bytes.
    pub length: u32,
    /// Protocol number of what is at `l4`.
    pub proto: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Fragment or not.
    pub part: Part,
    /// Identification, if a fragment.
    pub id: u32,
    /// Source port; of a later fragment, the first one's.
    pub sport: Be16,
    /// Destination port; of a later fragment, the first one's.
    pub dport: Be16,
    /// TCP flags, else 0.
    pub flags: u8,
    /// Length of the transport header, bytes; 0 if the packet has none (later fragments).
    pub header: u8,
}

impl<A: Address> Datagram<A> {
    /// The key of this packet's flow.
    #[inline(always)]
    pub const fn key(&self) -> FlowKey<A> {
        FlowKey { src: self.src, dst: self.dst, sport: self.sport, dport: self.dport, proto: self.proto as u32 }
    }

    /// The key of this datagram's fragments.
    #[inline(always)]
    pub fn fragment_key(&self) -> FragmentKey {
        FragmentKey { src: self.src.wide(), dst: self.dst.wide(), id: self.id, proto: self.proto as u32 }
    }
}

/// Reads the Ethernet header and up to two VLAN tags.
#[inline(always)]
pub fn link<P: Packet>(packet: &P) -> Option<Link> {
    let mut kind = packet.get::<Ethernet>(0)?.kind;
    let mut l3 = size_of::<Ethernet>();
    for _ in 0..MAX_VLAN_TAGS {
        if kind != ETH_VLAN && kind != ETH_QINQ {
            break;
        }
        kind = packet.get::<VlanTag>(l3)?.kind;
        l3 += size_of::<VlanTag>();
    }
    Some(Link { kind, l3 })
}

/// Reads an IPv4 header; `None` if it is not one.
#[inline(always)]
pub fn ipv4<P: Packet>(packet: &P, l3: usize) -> Option<Datagram<lb_common::addr::Addr4>> {
    let ip = packet.get::<Ipv4>(l3)?;
    let header = (ip.version_ihl & 0xf) as usize * 4;
    let length = ip.total_length.get() as u32;
    if ip.version_ihl >> 4 != 4 || header < size_of::<Ipv4>() || length < header as u32 {
        return None;
    }
    let part = if ip.fragment.0 & IPV4_FRAGMENT.0 == 0 {
        Part::Whole
    } else if ip.fragment.0 & IPV4_OFFSET.0 == 0 {
        Part::First
    } else {
        Part::Later
    };
    Some(Datagram {
        src: ip.src,
        dst: ip.dst,
        l3,
        l4: l3 + header,
        length,
        proto: ip.proto,
        ttl: ip.ttl,
        part,
        id: ip.id.0 as u32,
        sport: Be16(0),
        dport: Be16(0),
        flags: 0,
        header: 0,
    })
}

/// Reads an IPv6 header and what extension headers follow; `None` if it is not one or there are too many.
#[inline(always)]
pub fn ipv6<P: Packet>(packet: &P, l3: usize) -> Option<Datagram<lb_common::addr::Addr16>> {
    let ip = packet.get::<Ipv6>(l3)?;
    if ip.version_flow[0] >> 4 != 6 {
        return None;
    }
    let mut datagram = Datagram {
        src: ip.src,
        dst: ip.dst,
        l3,
        l4: l3 + size_of::<Ipv6>(),
        length: ip.payload_length.get() as u32 + size_of::<Ipv6>() as u32,
        proto: ip.next,
        ttl: ip.hop_limit,
        part: Part::Whole,
        id: 0,
        sport: Be16(0),
        dport: Be16(0),
        flags: 0,
        header: 0,
    };
    if is_extension(datagram.proto) {
        skip_extensions(packet, &mut datagram)?;
    }
    Some(datagram)
}

#[inline(always)]
const fn is_extension(next: u8) -> bool {
    matches!(next, EXT_HOP | EXT_ROUTING | EXT_FRAGMENT | EXT_DESTINATION)
}

/// Walks the extension headers: out of the way of the common packet, which has none.
#[inline(always)]
fn skip_extensions<P: Packet, A: Address>(packet: &P, datagram: &mut Datagram<A>) -> Option<()> {
    for _ in 0..MAX_IPV6_EXTENSIONS {
        match datagram.proto {
            EXT_FRAGMENT => {
                let fragment = packet.get::<Ipv6Fragment>(datagram.l4)?;
                let offset = fragment.offset.get();
                datagram.id = fragment.id;
                datagram.proto = fragment.next;
                datagram.l4 += size_of::<Ipv6Fragment>();
                if offset & 0xfff8 != 0 {
                    datagram.part = Part::Later;
                    return Some(());
                }
                // "Atomic" fragments (offset 0, no more to come, RFC 6946) are whole.
                if offset & 1 != 0 {
                    datagram.part = Part::First;
                }
            }
            EXT_HOP | EXT_ROUTING | EXT_DESTINATION => {
                let extension = packet.get::<Ipv6Extension>(datagram.l4)?;
                datagram.proto = extension.next;
                datagram.l4 += (extension.length as usize + 1) * 8;
            }
            _ => return Some(()),
        }
    }
    if is_extension(datagram.proto) { None } else { Some(()) }
}
