//! Protocol headers as they lie in a frame, and their numbers.

use lb_common::{
    addr::{Addr4, Addr16, Be16},
    flow::{FlowKey4, FlowKey6},
};

use crate::packet::Header;

/// EtherType IPv4.
pub const ETH_IPV4: Be16 = Be16::new(0x0800);
/// EtherType IPv6.
pub const ETH_IPV6: Be16 = Be16::new(0x86dd);

/// IP protocol ICMP.
pub const ICMP: u8 = 1;
/// IP protocol TCP.
pub const TCP: u8 = 6;
/// IP protocol UDP.
pub const UDP: u8 = 17;
/// IP protocol ICMPv6.
pub const ICMPV6: u8 = 58;
/// IPv6 extension header: hop-by-hop options.
pub const EXT_HOP: u8 = 0;
/// IPv6 extension header: routing.
pub const EXT_ROUTING: u8 = 43;
/// IPv6 extension header: fragment.
pub const EXT_FRAGMENT: u8 = 44;
/// IPv6 extension header: destination options.
pub const EXT_DESTINATION: u8 = 60;

/// Ethernet II header. MACs are raw words; two-byte alignment is all a frame promises.
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct Ethernet {
    /// Destination MAC, bytes 0–3.
    pub dst_high: u32,
    /// Destination MAC, bytes 4–5.
    pub dst_low: u16,
    /// Source MAC, bytes 0–3.
    pub src_high: u32,
    /// Source MAC, bytes 4–5.
    pub src_low: u16,
    /// EtherType.
    pub kind: Be16,
}

/// IPv4 header without options (RFC 791).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ipv4 {
    /// Version (4 bits) and header length in words.
    pub version_ihl: u8,
    /// Type of service.
    pub tos: u8,
    /// Length of header and payload, bytes.
    pub total_length: Be16,
    /// Identification.
    pub id: Be16,
    /// Flags and fragment offset.
    pub fragment: Be16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol.
    pub proto: u8,
    /// Header checksum, raw.
    pub check: u16,
    /// Source.
    pub src: Addr4,
    /// Destination.
    pub dst: Addr4,
}

/// "Don't fragment".
pub const IPV4_DF: Be16 = Be16::new(0x4000);
/// "More fragments" or an offset: the packet is a fragment.
pub const IPV4_FRAGMENT: Be16 = Be16::new(0x3fff);
/// Fragment offset: not the first one.
pub const IPV4_OFFSET: Be16 = Be16::new(0x1fff);

/// IPv6 header (RFC 8200).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ipv6 {
    /// Version, traffic class, flow label: raw bytes.
    pub version_flow: [u8; 4],
    /// Length after this header, bytes.
    pub payload_length: Be16,
    /// Next header.
    pub next: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source.
    pub src: Addr16,
    /// Destination.
    pub dst: Addr16,
}

/// IPv6 fragment extension header.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ipv6Fragment {
    /// Next header.
    pub next: u8,
    /// Reserved.
    pub reserved: u8,
    /// Offset (13 bits), reserved, M flag.
    pub offset: Be16,
    /// Identification, raw.
    pub id: u32,
}

/// First two bytes of the other IPv6 extension headers.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ipv6Extension {
    /// Next header.
    pub next: u8,
    /// Length in 8-byte units, without the first.
    pub length: u8,
}

/// Ports: the start of TCP and UDP.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    /// Source port.
    pub source: Be16,
    /// Destination port.
    pub dest: Be16,
}

/// TCP header without options (RFC 9293).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tcp {
    /// Ports.
    pub ports: Ports,
    /// Sequence number, raw big-endian.
    pub seq: u32,
    /// Acknowledgement number, raw big-endian.
    pub ack: u32,
    /// Data offset (upper 4 bits, words).
    pub offset: u8,
    /// Flags.
    pub flags: u8,
    /// Window.
    pub window: Be16,
    /// Checksum, raw.
    pub check: u16,
    /// Urgent pointer.
    pub urgent: Be16,
}

/// FIN flag.
pub const TCP_FIN: u8 = 0x01;
/// SYN flag.
pub const TCP_SYN: u8 = 0x02;
/// RST flag.
pub const TCP_RST: u8 = 0x04;
/// ACK flag.
pub const TCP_ACK: u8 = 0x10;

/// UDP header (RFC 768).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Udp {
    /// Ports.
    pub ports: Ports,
    /// Length of header and payload, bytes.
    pub length: Be16,
    /// Checksum, raw; 0: none (IPv4 only).
    pub check: u16,
}

/// ICMP and ICMPv6 header.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Icmp {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// Checksum, raw.
    pub check: u16,
    /// Rest of the header: id and sequence, MTU, …
    pub rest: u32,
}

/// ICMP echo reply.
pub const ICMP_ECHO_REPLY: u8 = 0;
/// ICMP destination unreachable.
pub const ICMP_UNREACHABLE: u8 = 3;
/// ICMP source quench (historic).
pub const ICMP_QUENCH: u8 = 4;
/// ICMP echo request.
pub const ICMP_ECHO: u8 = 8;
/// ICMP time exceeded.
pub const ICMP_TIME_EXCEEDED: u8 = 11;
/// ICMP parameter problem.
pub const ICMP_PARAMETER: u8 = 12;
/// ICMP code of `ICMP_UNREACHABLE`: fragmentation needed and DF set.
pub const ICMP_CODE_TOO_BIG: u8 = 4;
/// ICMP code of `ICMP_UNREACHABLE`: port.
pub const ICMP_CODE_PORT: u8 = 3;
/// ICMPv6 time exceeded.
pub const ICMPV6_TIME_EXCEEDED: u8 = 3;
/// ICMPv6 code of `ICMPV6_UNREACHABLE`: port.
pub const ICMPV6_CODE_PORT: u8 = 4;
/// First of the messages of neighbour discovery.
pub const ICMPV6_DISCOVERY_FIRST: u8 = 133;
/// Last of the messages of neighbour discovery.
pub const ICMPV6_DISCOVERY_LAST: u8 = 137;
/// ICMPv6 destination unreachable.
pub const ICMPV6_UNREACHABLE: u8 = 1;
/// ICMPv6 packet too big.
pub const ICMPV6_TOO_BIG: u8 = 2;
/// ICMPv6 parameter problem: the last of the errors that quote a packet.
pub const ICMPV6_PARAMETER: u8 = 4;
/// ICMPv6 echo request.
pub const ICMPV6_ECHO: u8 = 128;
/// ICMPv6 echo reply.
pub const ICMPV6_ECHO_REPLY: u8 = 129;

macro_rules! headers {
    ($($type:ty),+) => {
        // SAFETY: `repr(C)` over integers: every bit pattern is a value, no padding.
        $(unsafe impl Header for $type {})+
    };
}
headers!(
    Ethernet,
    Ipv4,
    Ipv6,
    Ipv6Fragment,
    Ipv6Extension,
    Ports,
    Tcp,
    Udp,
    Icmp,
    FlowKey4,
    FlowKey6,
    u16,
    u32
);

const _: () = {
    assert!(size_of::<Ethernet>() == 14);
    assert!(size_of::<Ipv4>() == 20);
    assert!(size_of::<Ipv6>() == 40);
    assert!(size_of::<Tcp>() == 20);
    assert!(size_of::<Udp>() == 8);
    assert!(size_of::<Icmp>() == 8);
};
