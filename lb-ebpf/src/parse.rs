//! From frame to datagram: where the headers are and what they say. Nothing is changed and nothing dropped here.

use lb_common::{
    addr::Be16,
    flow::{Address, FlowKey},
    limits::MAX_IPV6_EXTENSIONS,
    maps::FragmentKey,
};

use crate::{
    headers::{
        EXT_DESTINATION, EXT_FRAGMENT, EXT_HOP, EXT_ROUTING, Ethernet, IPV4_FRAGMENT, IPV4_OFFSET, Ipv4,
        Ipv6, Ipv6Extension, Ipv6Fragment,
    },
    packet::Packet,
};

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
    /// The key of its flow: addresses and protocol, and once the transport header is read the ports. Those of a later
    /// fragment are the first one's.
    pub key: FlowKey<A>,
    /// Offset of the IP header, bytes.
    pub l3: usize,
    /// Offset after the IP header and its extensions, bytes.
    pub l4: usize,
    /// Length of the IP packet by its own header, bytes.
    pub length: u32,
    /// Identification, if a fragment.
    pub id: u32,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Fragment or not.
    pub part: Part,
    /// TCP flags, else 0.
    pub flags: u8,
    /// Length of the transport header, bytes; 0 if the packet has none (later fragments).
    pub header: u8,
}

impl<A: Address> Datagram<A> {
    /// The protocol number.
    #[inline(always)]
    pub const fn proto(&self) -> u8 {
        self.key.proto as u8
    }

    /// The key of this datagram's fragments.
    #[inline(always)]
    pub fn fragment_key(&self) -> FragmentKey {
        FragmentKey {
            src: self.key.src.wide(),
            dst: self.key.dst.wide(),
            id: self.id,
            proto: self.key.proto,
        }
    }
}

/// Offset of the IP header: a frame with a VLAN tag is none of ours.
pub const L3: usize = size_of::<Ethernet>();

/// Reads the Ethernet header: what comes next.
///
/// A VLAN's frames are taken by the VLAN's own device, where they have no tag. Met with one on a trunk (or tagged on a
/// device without that VLAN) they are another network's, and pass.
#[inline(always)]
pub fn link<P: Packet>(packet: &P) -> Option<Be16> {
    packet.get::<Ethernet>(0).map(|ethernet| ethernet.kind)
}

/// Reads an IPv4 header; `None` if it is not one.
#[inline(always)]
pub fn ipv4<P: Packet>(packet: &P, l3: usize) -> Option<Datagram<lb_common::addr::Addr4>> {
    let ip = packet.get::<Ipv4>(l3)?;
    let header = (ip.version_ihl & 0xf) as usize * 4;
    let mut length = ip.total_length.get() as u32;
    if length == 0 && packet.segment_size() != 0 {
        // BIG TCP: longer than the field can tell.
        length = packet.length().wrapping_sub(l3) as u32;
    }
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
        key: FlowKey {
            src: ip.src,
            dst: ip.dst,
            sport: Be16(0),
            dport: Be16(0),
            proto: ip.proto as u32,
        },
        l3,
        l4: l3 + header,
        length,
        id: ip.id.0 as u32,
        ttl: ip.ttl,
        part,
        flags: 0,
        header: 0,
    })
}

/// Reads an IPv6 header, but for its extension headers ([`extensions`]); `None` if it is not one.
#[inline(always)]
pub fn ipv6<P: Packet>(packet: &P, l3: usize) -> Option<Datagram<lb_common::addr::Addr16>> {
    let ip = packet.get::<Ipv6>(l3)?;
    if ip.version_flow[0] >> 4 != 6 {
        return None;
    }
    let mut length = ip.payload_length.get() as u32 + size_of::<Ipv6>() as u32;
    if ip.payload_length.0 == 0 && packet.segment_size() != 0 {
        length = packet.length().wrapping_sub(l3) as u32;
    }
    Some(Datagram {
        key: FlowKey {
            src: ip.src,
            dst: ip.dst,
            sport: Be16(0),
            dport: Be16(0),
            proto: ip.next as u32,
        },
        l3,
        l4: l3 + size_of::<Ipv6>(),
        length,
        id: 0,
        ttl: ip.hop_limit,
        part: Part::Whole,
        flags: 0,
        header: 0,
    })
}

#[inline(always)]
const fn is_extension(next: u8) -> bool {
    matches!(next, EXT_HOP | EXT_ROUTING | EXT_FRAGMENT | EXT_DESTINATION)
}

/// Reads a field back from memory even where the compiler knows its value: the verifier then takes it for any value,
/// and the six rounds of [`extensions`] cost it six rounds instead of 3^6 paths.
#[inline(always)]
fn reread<T: Copy>(field: &T) -> T {
    // SAFETY: a reference is valid to read from.
    unsafe { core::ptr::read_volatile(field) }
}

/// Walks the extension headers of a datagram that lies in map memory. False if there are too many or one is cut off.
#[inline(always)]
pub fn extensions<P: Packet, A: Address>(packet: &P, datagram: &mut Datagram<A>) -> bool {
    if !A::V6 || !is_extension(datagram.proto()) {
        true
    } else {
        skip_extensions(packet, datagram)
    }
}

#[inline(never)]
fn skip_extensions<P: Packet, A: Address>(packet: &P, datagram: &mut Datagram<A>) -> bool {
    for _ in 0..MAX_IPV6_EXTENSIONS {
        let (proto, l4) = (reread(&datagram.key.proto) as u8, reread(&datagram.l4));
        if proto == EXT_FRAGMENT {
            let Some(fragment) = packet.get::<Ipv6Fragment>(l4) else {
                return false;
            };
            let offset = fragment.offset.get();
            datagram.id = fragment.id;
            datagram.key.proto = fragment.next as u32;
            datagram.l4 = l4 + size_of::<Ipv6Fragment>();
            if offset & 0xfff8 != 0 {
                datagram.part = Part::Later;
                return true;
            }
            // "Atomic" fragments (offset 0, no more to come, RFC 6946) are whole.
            if offset & 1 != 0 {
                datagram.part = Part::First;
            }
        } else if is_extension(proto) {
            let Some(extension) = packet.get::<Ipv6Extension>(l4) else {
                return false;
            };
            datagram.key.proto = extension.next as u32;
            datagram.l4 = l4 + (extension.length as usize + 1) * 8;
        } else {
            return true;
        }
    }
    !is_extension(reread(&datagram.key.proto) as u8)
}
