//! The Internet checksum from scratch (RFC 1071): never incremental, so that it checks the core's incremental ones.

use std::net::IpAddr;

/// Adds the 16-bit big-endian words of `bytes` to a running sum; an odd last byte is padded with zero.
pub fn add(mut sum: u64, bytes: &[u8]) -> u64 {
    for pair in bytes.chunks(2) {
        sum += u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u64::from(*b));
    }
    sum
}

/// Folds a running sum to 16 bits.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The checksum of a header whose checksum field is zero.
pub fn of(bytes: &[u8]) -> u16 {
    !fold(add(0, bytes))
}

/// Running sum of the pseudo header (RFC 793, RFC 8200 §8.1).
pub fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, length: usize) -> u64 {
    let mut sum = u64::from(protocol) + length as u64;
    for addr in [src, dst] {
        sum = match addr {
            IpAddr::V4(v4) => add(sum, &v4.octets()),
            IpAddr::V6(v6) => add(sum, &v6.octets()),
        };
    }
    sum
}

/// The checksum of a layer-4 segment whose checksum field is zero.
pub fn segment(src: IpAddr, dst: IpAddr, protocol: u8, bytes: &[u8]) -> u16 {
    !fold(add(pseudo(src, dst, protocol, bytes.len()), bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_1071_example() {
        assert_eq!(
            fold(add(0, &[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])),
            0xddf2
        );
    }

    #[test]
    fn a_header_from_the_wire() {
        // IPv4 header of a captured packet; its checksum field is 0xb861.
        let mut header = [
            0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0x00, 0x01, 0xc0,
            0xa8, 0x00, 0xc7,
        ];
        assert_eq!(of(&header), 0xb861);
        header[10..12].copy_from_slice(&0xb861u16.to_be_bytes());
        assert_eq!(of(&header), 0);
    }
}
