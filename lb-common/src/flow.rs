//! The 5-tuple and its hash, used by both sides.

use crate::addr::{Addr4, Addr16, Be16};

/// The address of one family as a flow sees it.
pub trait Address: Copy + Default + PartialEq + Eq + core::fmt::Debug + 'static {
    /// Fills a slot of the flow table to a power of two.
    type Pad: Copy + Default + PartialEq + Eq + core::fmt::Debug + 'static;
    /// All zero.
    const ZERO: Self;
    /// Whether this is IPv6: chooses `FLOWS6`.
    const V6: bool;
    /// Folds the address into a hash state.
    fn mix(self, state: u32) -> u32;
    /// Sum of the address's 16-bit words in memory order, folded to less than 2^18 (RFC 1071).
    fn sum(self) -> u32;
    /// Products of NH with two words of a key, for the hash of the flow table.
    fn nh(self, first: u64, second: u64) -> u64;
    /// An address whose first word is `word`: room for a number where no address is needed.
    fn from_word(word: u32) -> Self;
    /// The first word.
    fn word(self) -> u32;
    /// Whether there is this address at a place that others may change meanwhile.
    ///
    /// # Safety
    /// `at` may be read.
    unsafe fn equals_at(at: *const Self, address: &Self) -> bool;
    /// As the 16-byte form of the map keys.
    fn wide(self) -> Addr16;
    /// From the 16-byte form; the caller knows the family.
    fn from_wide(wide: Addr16) -> Self;
}

/// Key of `FLOWS4` and `FLOWS6`: one direction of one connection, as the packet carries it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Source port.
    pub sport: Be16,
    /// Destination port.
    pub dport: Be16,
    /// IP protocol number (6 or 17), a whole word so that no padding hides in the key.
    pub proto: u32,
}

/// Key of an IPv4 flow.
pub type FlowKey4 = FlowKey<Addr4>;
/// Key of an IPv6 flow.
pub type FlowKey6 = FlowKey<Addr16>;

const _: () = assert!(size_of::<FlowKey4>() == 16);
const _: () = assert!(size_of::<FlowKey6>() == 40);

impl<A: Address> FlowKey<A> {
    /// The other direction of the same tuple.
    #[inline(always)]
    pub const fn reversed(&self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
            proto: self.proto,
        }
    }

    /// The ring hash of a flow. All nodes agree on it: it depends on the packet alone.
    #[inline(always)]
    pub fn hash(&self) -> u32 {
        let state = self.dst.mix(self.src.mix(SEED ^ self.proto));
        finish(step(state, (self.sport.0 as u32) << 16 | self.dport.0 as u32))
    }
}

/// The ring hash of a client, for services with client-IP affinity.
#[inline(always)]
pub fn hash_client<A: Address>(client: A) -> u32 {
    finish(client.mix(SEED))
}

/// The ring hash of try number `attempt` (0 is the first) of a flow whose hash is `hash`.
#[inline(always)]
pub const fn hash_attempt(hash: u32, attempt: u32) -> u32 {
    if attempt == 0 {
        hash
    } else {
        finish(step(hash, attempt))
    }
}

/// Where the hash state starts.
const SEED: u32 = 0x5745_4952;

/// One 32-bit word into the state: the round of MurmurHash3 (public domain, A. Appleby).
#[inline(always)]
const fn step(state: u32, word: u32) -> u32 {
    let k = word
        .wrapping_mul(0xcc9e_2d51)
        .rotate_left(15)
        .wrapping_mul(0x1b87_3593);
    (state ^ k)
        .rotate_left(13)
        .wrapping_mul(5)
        .wrapping_add(0xe654_6b64)
}

/// The finalizer of MurmurHash3: every input bit reaches every output bit.
#[inline(always)]
const fn finish(mut h: u32) -> u32 {
    h ^= h >> 16;
    h = h.wrapping_mul(0x85eb_ca6b);
    h ^= h >> 13;
    h = h.wrapping_mul(0xc2b2_ae35);
    h ^ (h >> 16)
}

/// The bit of the port filter in `OURS` that stands for a port of TCP (6) or UDP (17): word index and mask.
#[inline(always)]
pub const fn port_bit(proto: u32, port: Be16) -> (u32, u64) {
    // The bit order follows the port's memory word: no swap per packet. UDP's number alone has bit 4.
    let bit = (proto >> 4 & 1) << 16 | port.0 as u32;
    (bit >> 6, 1 << (bit & 63))
}

/// The bit of the address filter in `OURS` that stands for an address: word index and mask.
#[inline(always)]
pub fn ours_bit<A: Address>(addr: A) -> (u32, u64) {
    // One multiplication is enough for a filter, and every packet pays for it.
    let h = addr.fold().wrapping_mul(0x9e37_79b1) >> (32 - crate::limits::OURS_BITS);
    (h >> 6, 1 << (h & 63))
}

/// The bit of the filter of routed VIPs in `OURS` that stands for an address: word index and mask.
#[inline(always)]
pub fn routed_bit<A: Address>(addr: A) -> (u32, u64) {
    let h = addr.fold().wrapping_mul(0x9e37_79b1) >> (32 - crate::limits::ROUTED_BITS);
    (h >> 6, 1 << (h & 63))
}

/// Folding for [`ours_bit`], apart from [`Address`] so that only this module sees it.
trait Fold {
    fn fold(self) -> u32;
}

impl<A: Address> Fold for A {
    #[inline(always)]
    fn fold(self) -> u32 {
        let w = self.wide().0;
        w[0] ^ w[1].rotate_left(8) ^ w[2].rotate_left(16) ^ w[3]
    }
}

// === impl Address ===

impl Address for Addr4 {
    type Pad = [u32; 0];
    const ZERO: Self = Self(0);
    const V6: bool = false;
    #[inline(always)]
    fn mix(self, state: u32) -> u32 {
        step(state, self.0)
    }
    #[inline(always)]
    fn sum(self) -> u32 {
        (self.0 & 0xffff) + (self.0 >> 16)
    }
    #[inline(always)]
    fn nh(self, first: u64, second: u64) -> u64 {
        // Half a product: the other half is a word of the key, so that it is not the address alone that is squared.
        (self.0.wrapping_add(first as u32) as u64).wrapping_mul(second)
    }
    #[inline(always)]
    unsafe fn equals_at(at: *const Self, address: &Self) -> bool {
        // SAFETY: by the contract.
        unsafe { at.read_volatile().0 == address.0 }
    }
    #[inline(always)]
    fn from_word(word: u32) -> Self {
        Self(word)
    }
    #[inline(always)]
    fn word(self) -> u32 {
        self.0
    }
    #[inline(always)]
    fn wide(self) -> Addr16 {
        self.mapped()
    }
    #[inline(always)]
    fn from_wide(wide: Addr16) -> Self {
        Self(wide.0[3])
    }
}

impl Address for Addr16 {
    type Pad = [u32; 4];
    const ZERO: Self = Self([0; 4]);
    const V6: bool = true;
    #[inline(always)]
    fn mix(self, state: u32) -> u32 {
        step(
            step(step(step(state, self.0[0]), self.0[1]), self.0[2]),
            self.0[3],
        )
    }
    #[inline(always)]
    fn sum(self) -> u32 {
        // Whole words first: carries out of the lower halves land in the upper ones, where folding wants them.
        let w = self.0;
        let sum = w[0] as u64 + w[1] as u64 + w[2] as u64 + w[3] as u64;
        ((sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32)) as u32
    }
    #[inline(always)]
    fn nh(self, first: u64, second: u64) -> u64 {
        let w = self.0;
        crate::slot::nh(w[0] as u64 | (w[1] as u64) << 32, first)
            .wrapping_add(crate::slot::nh(w[2] as u64 | (w[3] as u64) << 32, second))
    }
    #[inline(always)]
    unsafe fn equals_at(at: *const Self, address: &Self) -> bool {
        let (at, address) = (at.cast::<u64>(), core::ptr::from_ref(address).cast::<u64>());
        // SAFETY: by the contract; words of eight bytes, which every machine that BPF runs on reads at multiples of four.
        unsafe {
            at.read_volatile() == address.read_unaligned()
                && at.add(1).read_volatile() == address.add(1).read_unaligned()
        }
    }
    #[inline(always)]
    fn from_word(word: u32) -> Self {
        Self([word, 0, 0, 0])
    }
    #[inline(always)]
    fn word(self) -> u32 {
        self.0[0]
    }
    #[inline(always)]
    fn wide(self) -> Addr16 {
        self
    }
    #[inline(always)]
    fn from_wide(wide: Addr16) -> Self {
        wide
    }
}
