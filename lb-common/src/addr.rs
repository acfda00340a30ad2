//! Addresses, ports and MACs as they lie in packets and maps: network byte order in the type.
//!
//! Words instead of byte arrays: the BPF back end loads a `[u8; 4]` byte by byte.

/// A 16-bit big-endian number (port, length, EtherType). The inner value is the raw memory word.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Be16(pub u16);

impl Be16 {
    /// From host order.
    #[inline(always)]
    pub const fn new(host: u16) -> Self {
        Self(host.to_be())
    }
    /// To host order.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }
}

/// An IPv4 address: the raw memory word, network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Addr4(pub u32);

/// An IPv6 address, or an IPv4-mapped one (`::ffff:a.b.c.d`): raw memory words, network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Addr16(pub [u32; 4]);

/// The `::ffff:0:0/96` prefix word of an IPv4-mapped address.
const MAPPED: u32 = 0xffff_u32.to_be();

impl Addr4 {
    /// As an IPv4-mapped IPv6 address, the form of every map key that is not a flow.
    #[inline(always)]
    pub const fn mapped(self) -> Addr16 {
        Addr16([0, 0, MAPPED, self.0])
    }
    /// From the four bytes in network order.
    pub const fn from_octets(octets: [u8; 4]) -> Self {
        Self(u32::from_ne_bytes(octets))
    }
    /// The four bytes in network order.
    pub const fn octets(self) -> [u8; 4] {
        self.0.to_ne_bytes()
    }
}

impl Addr16 {
    /// The IPv4 address, if this is an IPv4-mapped one.
    #[inline(always)]
    pub const fn to_v4(self) -> Option<Addr4> {
        if self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED {
            Some(Addr4(self.0[3]))
        } else {
            None
        }
    }
    /// From the sixteen bytes in network order.
    pub const fn from_octets(o: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }
    /// The sixteen bytes in network order.
    pub const fn octets(self) -> [u8; 16] {
        let (a, b, c, d) = (
            self.0[0].to_ne_bytes(),
            self.0[1].to_ne_bytes(),
            self.0[2].to_ne_bytes(),
            self.0[3].to_ne_bytes(),
        );
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3],
        ]
    }
}

impl From<core::net::IpAddr> for Addr16 {
    fn from(ip: core::net::IpAddr) -> Self {
        match ip {
            core::net::IpAddr::V4(v4) => Addr4::from_octets(v4.octets()).mapped(),
            core::net::IpAddr::V6(v6) => Self::from_octets(v6.octets()),
        }
    }
}

impl From<Addr16> for core::net::IpAddr {
    fn from(addr: Addr16) -> Self {
        match addr.to_v4() {
            Some(v4) => Self::V4(v4.octets().into()),
            None => Self::V6(addr.octets().into()),
        }
    }
}

/// The next hop of a frame: destination MAC and device slot in one word, so that no read can tear.
///
/// Memory order: six MAC bytes as on the wire, then the slot of `DEVICES` (host order). All zero: unknown.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Hop(pub u64);

impl Hop {
    /// Nothing known: the kernel's neighbour table decides (`bpf_redirect_neigh`).
    pub const UNKNOWN: Self = Self(0);
    /// Mask of the MAC bytes in the raw word.
    const MAC_MASK: u64 = u64::from_ne_bytes([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]);

    /// From a MAC as on the wire and a slot of `DEVICES`.
    pub const fn new(mac: [u8; 6], slot: u16) -> Self {
        let s = slot.to_ne_bytes();
        Self(u64::from_ne_bytes([
            mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], s[0], s[1],
        ]))
    }
    /// From the raw words of a MAC in a frame (bytes 0–3 and 4–5) and a slot.
    #[inline(always)]
    pub const fn from_words(high: u32, low: u16, slot: u16) -> Self {
        if cfg!(target_endian = "little") {
            Self(high as u64 | (low as u64) << 32 | (slot as u64) << 48)
        } else {
            Self((high as u64) << 32 | (low as u64) << 16 | slot as u64)
        }
    }
    /// Bytes 0–3 of the MAC as a raw word.
    #[inline(always)]
    pub const fn mac_high(self) -> u32 {
        if cfg!(target_endian = "little") {
            self.0 as u32
        } else {
            (self.0 >> 32) as u32
        }
    }
    /// Bytes 4–5 of the MAC as a raw word.
    #[inline(always)]
    pub const fn mac_low(self) -> u16 {
        if cfg!(target_endian = "little") {
            (self.0 >> 32) as u16
        } else {
            (self.0 >> 16) as u16
        }
    }
    /// The slot of `DEVICES`.
    #[inline(always)]
    pub const fn slot(self) -> u16 {
        if cfg!(target_endian = "little") {
            (self.0 >> 48) as u16
        } else {
            self.0 as u16
        }
    }
    /// The MAC as on the wire.
    pub const fn mac(self) -> [u8; 6] {
        let b = self.0.to_ne_bytes();
        [b[0], b[1], b[2], b[3], b[4], b[5]]
    }
    /// Whether both name the same MAC, whatever the slot.
    #[inline(always)]
    pub const fn same_mac(self, other: Self) -> bool {
        (self.0 ^ other.0) & Self::MAC_MASK == 0
    }
    /// Whether a MAC is known.
    #[inline(always)]
    pub const fn has_mac(self) -> bool {
        self.0 & Self::MAC_MASK != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hop_round_trips() {
        let hop = Hop::new([2, 4, 6, 8, 10, 12], 513);
        assert_eq!(hop.mac(), [2, 4, 6, 8, 10, 12]);
        assert_eq!(hop.slot(), 513);
        assert_eq!(hop, Hop::from_words(hop.mac_high(), hop.mac_low(), 513));
        assert!(hop.same_mac(Hop::new([2, 4, 6, 8, 10, 12], 7)));
        assert!(!hop.same_mac(Hop::new([2, 4, 6, 8, 10, 13], 513)));
        assert!(!Hop::new([0; 6], 3).has_mac());
    }

    #[test]
    fn mapped_addresses_round_trip() {
        for text in ["10.1.2.3", "2001:db8::1", "::1", "0.0.0.0", "::"] {
            let ip: core::net::IpAddr = text.parse().unwrap();
            assert_eq!(core::net::IpAddr::from(Addr16::from(ip)), ip);
        }
    }
}
