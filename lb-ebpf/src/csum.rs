//! One's complement checksum arithmetic (RFC 1071, RFC 1624) on raw 16-bit memory words.
//!
//! Sums of memory words are the same in either byte order as long as nothing mixes them with numbers, so nothing
//! here converts. A *delta* is the folded sum of new words plus complements of the old ones.

use lb_common::addr::Be16;
use lb_common::flow::Address;

/// Folds a sum of 16-bit words. Correct for any 32-bit sum.
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// A checksum field after a delta (RFC 1624, equation 3).
#[inline(always)]
pub const fn apply(check: u16, delta: u32) -> u16 {
    !fold(!check as u32 + fold(delta) as u32)
}

/// Unfolded sum of up to 2^16 words.
#[inline(always)]
pub fn sum(words: &[u16]) -> u32 {
    words.iter().map(|word| *word as u32).sum()
}

/// Delta of one 16-bit word.
#[inline(always)]
pub const fn word_delta(old: u16, new: u16) -> u32 {
    !old as u32 + new as u32
}

/// Delta of one 32-bit word.
#[inline(always)]
pub const fn dword_delta(old: u32, new: u32) -> u32 {
    let inverted = !old;
    (inverted & 0xffff) + (inverted >> 16) + (new & 0xffff) + (new >> 16)
}

/// Delta of a pair of addresses.
#[inline(always)]
pub fn addr_delta<A: Address>(old: (A, A), new: (A, A)) -> u16 {
    let gone = !fold(old.0.sum() + old.1.sum());
    fold(gone as u32 + new.0.sum() + new.1.sum())
}

/// Delta of a pair of ports.
#[inline(always)]
pub fn port_delta(old: (Be16, Be16), new: (Be16, Be16)) -> u16 {
    fold(word_delta(old.0.0, new.0.0) + word_delta(old.1.0, new.1.0))
}

/// Delta of the word that holds TTL and protocol when the TTL falls by one.
pub const TTL_DELTA: u32 = !u16::from_ne_bytes([1, 0]) as u32;

/// Delta of the word that holds next header and hop limit when the latter falls by one.
pub const HOP_DELTA: u32 = !u16::from_ne_bytes([0, 1]) as u32;

/// Unfolded sum of the pseudo-header of TCP, UDP and ICMPv6 (RFC 9293 §3.1, RFC 8200 §8.1).
#[inline(always)]
pub fn pseudo_sum<A: Address>(src: A, dst: A, proto: u8, length: u16) -> u32 {
    src.sum() + dst.sum() + Be16::new(proto as u16).0 as u32 + Be16::new(length).0 as u32
}
