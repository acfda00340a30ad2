//! Packets by their fields, for what goes in and for what is expected out.
//!
//! ```
//! use lb_tests::packet::{eth, flag};
//! let syn = eth([2; 6], [4; 6]).ip("192.0.2.1", "198.51.100.1").tcp(40_000, 80, flag::SYN);
//! assert_eq!(syn.build().len(), 14 + 20 + 20);
//! ```
//! Every checksum is computed from scratch when the packet is built.

use std::net::IpAddr;

pub mod checksum;
mod diff;
mod wire;

pub use diff::diff;

/// A hardware address.
pub type Mac = [u8; 6];

/// TCP flags.
pub mod flag {
    /// No more data from the sender.
    pub const FIN: u8 = 1;
    /// Synchronize sequence numbers.
    pub const SYN: u8 = 2;
    /// Reset.
    pub const RST: u8 = 4;
    /// Push.
    pub const PSH: u8 = 8;
    /// The acknowledgment field counts.
    pub const ACK: u8 = 16;
    /// Congestion experienced echo; with [`CWR`] on a SYN it asks for ECN.
    pub const ECE: u8 = 64;
    /// Congestion window reduced.
    pub const CWR: u8 = 128;
    /// The answer to a SYN.
    pub const SYN_ACK: u8 = SYN | ACK;
    /// The end of one direction.
    pub const FIN_ACK: u8 = FIN | ACK;
    /// The answer to something unwanted.
    pub const RST_ACK: u8 = RST | ACK;
}

/// Anything that names an address.
pub trait ToIp {
    /// The address.
    fn ip(self) -> IpAddr;
}

impl ToIp for IpAddr {
    fn ip(self) -> IpAddr {
        self
    }
}

impl ToIp for &str {
    fn ip(self) -> IpAddr {
        self.parse().unwrap_or_else(|e| panic!("{self}: {e}"))
    }
}

/// How the layer-4 checksum comes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checksum {
    Right,
    /// Right XOR this.
    Wrong(u16),
    /// The pseudo-header sum alone, as a stack leaves it for the hardware to complete.
    Partial,
    /// UDP over IPv4 without a checksum.
    Absent,
}

#[derive(Clone, Debug)]
struct Ip {
    src: IpAddr,
    dst: IpAddr,
    ttl: u8,
    tos: u8,
    id: u32,
    dont_fragment: bool,
    options: Vec<u8>,
    /// IPv6 extension headers: their number and their bytes from the third on.
    extensions: Vec<(u8, Vec<u8>)>,
    /// Bytes of the layer-4 data that this fragment carries.
    fragment: Option<(usize, usize)>,
    header_words: Option<u8>,
    total_length: Option<u16>,
    protocol: Option<u8>,
}

#[derive(Clone, Debug)]
enum L4 {
    None,
    Tcp {
        sport: u16,
        dport: u16,
        seq: u32,
        ack: u32,
        flags: u8,
        window: u16,
        options: Vec<u8>,
        header_words: Option<u8>,
    },
    Udp {
        sport: u16,
        dport: u16,
        length: Option<u16>,
    },
    Icmp {
        kind: u8,
        code: u8,
        rest: u32,
    },
}

/// A packet, from Ethernet to payload.
#[derive(Clone, Debug)]
pub struct Packet {
    from: Mac,
    to: Mac,
    tags: Vec<(u16, u16)>,
    ethertype: u16,
    ip: Option<Ip>,
    l4: L4,
    payload: Vec<u8>,
    checksum: Checksum,
    cut: Option<usize>,
}

/// A frame from one MAC to another.
pub fn eth(from: Mac, to: Mac) -> Packet {
    Packet {
        from,
        to,
        tags: Vec::new(),
        ethertype: 0,
        ip: None,
        l4: L4::None,
        payload: Vec::new(),
        checksum: Checksum::Right,
        cut: None,
    }
}

// === impl Packet: layer 2 ===

impl Packet {
    /// Other MACs.
    pub fn eth(mut self, from: Mac, to: Mac) -> Self {
        (self.from, self.to) = (from, to);
        self
    }
    /// An 802.1Q tag inside those there are already.
    pub fn vlan(mut self, id: u16) -> Self {
        self.tags.push((0x8100, id));
        self
    }
    /// An 802.1ad tag inside those there are already.
    pub fn qinq(mut self, id: u16) -> Self {
        self.tags.push((0x88a8, id));
        self
    }
    /// Anything but IP: an EtherType and what follows.
    pub fn raw(mut self, ethertype: u16, bytes: &[u8]) -> Self {
        self.ethertype = ethertype;
        self.payload = bytes.to_vec();
        self
    }
    /// An ARP request of `src` for `dst`.
    pub fn arp(self, src: [u8; 4], dst: [u8; 4]) -> Self {
        let mut body = vec![0, 1, 8, 0, 6, 4, 0, 1];
        body.extend(self.from);
        body.extend(src);
        body.extend([0; 6]);
        body.extend(dst);
        self.raw(0x0806, &body)
    }
    /// Keeps only the first `length` bytes of the frame.
    pub fn cut(mut self, length: usize) -> Self {
        self.cut = Some(length);
        self
    }
}

// === impl Packet: layer 3 ===

impl Packet {
    /// IPv4 or IPv6 by the addresses; TTL or hop limit 64, IPv4 identification 0x1234, DF set.
    pub fn ip(mut self, src: impl ToIp, dst: impl ToIp) -> Self {
        let (src, dst) = (src.ip(), dst.ip());
        assert_eq!(
            src.is_ipv4(),
            dst.is_ipv4(),
            "{src} and {dst} are of two families"
        );
        self.ethertype = if src.is_ipv4() { 0x0800 } else { 0x86dd };
        self.ip = Some(Ip {
            src,
            dst,
            ttl: 64,
            tos: 0,
            id: 0x1234,
            dont_fragment: true,
            options: Vec::new(),
            extensions: Vec::new(),
            fragment: None,
            header_words: None,
            total_length: None,
            protocol: None,
        });
        self
    }
    fn with_ip(mut self, change: impl FnOnce(&mut Ip)) -> Self {
        change(self.ip.as_mut().expect("an IP header before its fields"));
        self
    }
    /// Same packet between other addresses.
    pub fn addresses(self, src: impl ToIp, dst: impl ToIp) -> Self {
        self.with_ip(|ip| (ip.src, ip.dst) = (src.ip(), dst.ip()))
    }
    /// Time to live, or hop limit.
    pub fn ttl(self, ttl: u8) -> Self {
        self.with_ip(|ip| ip.ttl = ttl)
    }
    /// Type of service, or traffic class.
    pub fn tos(self, tos: u8) -> Self {
        self.with_ip(|ip| ip.tos = tos)
    }
    /// Identification: 16 bits in IPv4, 32 in the fragment header of IPv6.
    pub fn id(self, id: u32) -> Self {
        self.with_ip(|ip| ip.id = id)
    }
    /// Clears DF (IPv4).
    pub fn may_fragment(self) -> Self {
        self.with_ip(|ip| ip.dont_fragment = false)
    }
    /// IPv4 options; a multiple of four bytes.
    pub fn options(self, options: &[u8]) -> Self {
        assert_eq!(options.len() % 4, 0, "options fill whole words");
        self.with_ip(|ip| ip.options = options.to_vec())
    }
    /// An IPv6 extension header of `8 * units` bytes after those there are already (0 hop-by-hop, 43 routing,
    /// 60 destination options), filled by one PadN option.
    pub fn extension(self, number: u8, units: usize) -> Self {
        let mut body = vec![0; 8 * units - 2];
        if number != 43 {
            body[0] = 1;
            body[1] = (8 * units - 4) as u8;
        }
        self.with_ip(|ip| ip.extensions.push((number, body)))
    }
    /// The fragment that carries bytes `from..to` of the layer-4 data (header included); more follow if there is more.
    pub fn fragment(self, from: usize, to: usize) -> Self {
        assert_eq!(from % 8, 0, "fragments start at a multiple of eight");
        self.with_ip(|ip| {
            ip.dont_fragment = false;
            ip.fragment = Some((from, to));
        })
    }
    /// Lies about the IPv4 header length (in words).
    pub fn header_words(self, words: u8) -> Self {
        self.with_ip(|ip| ip.header_words = Some(words))
    }
    /// Lies about the total length (IPv4) or payload length (IPv6).
    pub fn total_length(self, bytes: u16) -> Self {
        self.with_ip(|ip| ip.total_length = Some(bytes))
    }
    /// Another protocol number (IPv4) or final next header (IPv6) than the one of layer 4.
    pub fn protocol(self, number: u8) -> Self {
        self.with_ip(|ip| ip.protocol = Some(number))
    }
}

// === impl Packet: layer 4 ===

impl Packet {
    /// A TCP segment: sequence 1000, acknowledgment 2000 if ACK is set, window 65,000.
    pub fn tcp(mut self, sport: u16, dport: u16, flags: u8) -> Self {
        let ack = if flags & flag::ACK != 0 { 2000 } else { 0 };
        self.l4 = L4::Tcp {
            sport,
            dport,
            seq: 1000,
            ack,
            flags,
            window: 65_000,
            options: Vec::new(),
            header_words: None,
        };
        self
    }
    /// A UDP datagram.
    pub fn udp(mut self, sport: u16, dport: u16) -> Self {
        self.l4 = L4::Udp {
            sport,
            dport,
            length: None,
        };
        self
    }
    /// Same packet between other ports.
    pub fn ports(mut self, src: u16, dst: u16) -> Self {
        match &mut self.l4 {
            L4::Tcp { sport, dport, .. } | L4::Udp { sport, dport, .. } => (*sport, *dport) = (src, dst),
            _ => panic!("no ports in {:?}", self.l4),
        }
        self
    }
    /// TCP sequence and acknowledgment numbers.
    pub fn seq(mut self, sequence: u32, acknowledgment: u32) -> Self {
        let L4::Tcp { seq, ack, .. } = &mut self.l4 else {
            panic!("not TCP")
        };
        (*seq, *ack) = (sequence, acknowledgment);
        self
    }
    /// TCP window.
    pub fn window(mut self, size: u16) -> Self {
        let L4::Tcp { window, .. } = &mut self.l4 else {
            panic!("not TCP")
        };
        *window = size;
        self
    }
    /// TCP options; a multiple of four bytes.
    pub fn tcp_options(mut self, bytes: &[u8]) -> Self {
        let L4::Tcp { options, .. } = &mut self.l4 else {
            panic!("not TCP")
        };
        *options = bytes.to_vec();
        self
    }
    /// Lies about the TCP data offset (in words).
    pub fn data_offset(mut self, words: u8) -> Self {
        let L4::Tcp { header_words, .. } = &mut self.l4 else {
            panic!("not TCP")
        };
        *header_words = Some(words);
        self
    }
    /// Lies about the UDP length.
    pub fn udp_length(mut self, bytes: u16) -> Self {
        let L4::Udp { length, .. } = &mut self.l4 else {
            panic!("not UDP")
        };
        *length = Some(bytes);
        self
    }
    /// Data after the layer-4 header.
    pub fn payload(mut self, bytes: &[u8]) -> Self {
        self.payload = bytes.to_vec();
        self
    }
    /// UDP over IPv4 without a checksum.
    pub fn no_checksum(mut self) -> Self {
        self.checksum = Checksum::Absent;
        self
    }
    /// A layer-4 checksum that is off by `xor`.
    pub fn wrong_checksum(mut self, xor: u16) -> Self {
        self.checksum = Checksum::Wrong(xor);
        self
    }
    /// Only the pseudo-header sum, as a stack leaves it for the hardware.
    pub fn partial_checksum(mut self) -> Self {
        self.checksum = Checksum::Partial;
        self
    }
    /// Any ICMP or ICMPv6 message (by the family of the IP header); `rest` is the second word of the header.
    pub fn icmp(mut self, kind: u8, code: u8, rest: u32) -> Self {
        self.l4 = L4::Icmp { kind, code, rest };
        self
    }
    /// An echo request.
    pub fn echo_request(self, id: u16, sequence: u16) -> Self {
        let kind = if self.is_v4() { 8 } else { 128 };
        self.icmp(kind, 0, u32::from(id) << 16 | u32::from(sequence))
    }
    /// An echo reply.
    pub fn echo_reply(self, id: u16, sequence: u16) -> Self {
        let kind = if self.is_v4() { 0 } else { 129 };
        self.icmp(kind, 0, u32::from(id) << 16 | u32::from(sequence))
    }
    /// "Fragmentation needed" or "packet too big" about `about`, quoting `l4` bytes beyond its IP header.
    pub fn too_big(self, mtu: u16, about: &Self, l4: usize) -> Self {
        let (kind, code) = if self.is_v4() { (3, 4) } else { (2, 0) };
        self.icmp(kind, code, mtu.into()).quote(about, l4)
    }
    /// "Port unreachable" about `about`, quoting `l4` bytes beyond its IP header.
    pub fn port_unreachable(self, about: &Self, l4: usize) -> Self {
        let (kind, code) = if self.is_v4() { (3, 3) } else { (1, 4) };
        self.icmp(kind, code, 0).quote(about, l4)
    }
    /// "Time exceeded" about `about`, quoting `l4` bytes beyond its IP header.
    pub fn time_exceeded(self, about: &Self, l4: usize) -> Self {
        let kind = if self.is_v4() { 11 } else { 3 };
        self.icmp(kind, 0, 0).quote(about, l4)
    }
    /// Quotes a packet: its IP header and at most `l4` bytes more.
    pub fn quote(self, about: &Self, l4: usize) -> Self {
        let bytes = about.ip_bytes();
        let end = (about.ip_header_length() + l4).min(bytes.len());
        self.payload(&bytes[..end])
    }
}
