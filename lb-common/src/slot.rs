//! The flow table's memory: slots, buckets, and the word that says what a slot holds. The algorithm over them is
//! `lb_ebpf::table`.
//!
//! A table is an array map of buckets, [`SLOTS`] slots each. A slot is one direction of a flow. Its first word, the head,
//! changes by atomic operations only; everything else is written while the slot is pending, and only the fields that say
//! so change later.

use core::mem::offset_of;

use crate::{
    addr::{Addr4, Addr16, Be16, Hop},
    flow::{Address, FlowKey},
    maps::flow_state,
};

/// Slots in one bucket.
pub const SLOTS: usize = 4;
/// Buckets that are searched together when both buckets of a key are full of established flows.
pub const OVERFLOW_BUCKETS: u32 = 4;
/// Words of the key of the table's hash.
pub const SECRET_WORDS: usize = 8;

/// Fields of the head word: tag (bits 48–63), generation (24–47), state (0–23).
///
/// The tag is 16 bits of the key's hash. The generation is raised each time the slot is claimed, so that a reference to a
/// slot can tell whether it still holds the same flow.
pub mod head {
    /// Shift of the tag.
    pub const TAG_SHIFT: u32 = 48;
    /// Shift of the generation.
    pub const GENERATION_SHIFT: u32 = 24;
    /// Mask of the generation, in place.
    pub const GENERATION: u64 = 0xff_ffff << GENERATION_SHIFT;
    /// Mask of the state.
    pub const STATE: u64 = 0xff_ffff;

    /// Mask of the slot's kind.
    pub const KIND: u64 = 0b11;
    /// Kind: nothing here.
    pub const FREE: u64 = 0b00;
    /// Kind: claimed, and being written.
    pub const PENDING: u64 = 0b01;
    /// Kind: a flow that has ended. It tells late packets so until its slot is needed.
    pub const ENDED: u64 = 0b10;
    /// Kind: a flow.
    pub const LIVE: u64 = 0b11;
    /// Set in the kinds that may not be claimed.
    pub const OCCUPIED: u64 = 0b01;
    /// What [`PENDING`] lacks to be [`LIVE`].
    pub const PUBLISH: u64 = 0b10;

    /// In the first slot of a bucket: keys whose first bucket this is may be in their overflow buckets. Belongs to the
    /// bucket and not to the flow in the slot.
    pub const OVERFLOW: u64 = 1 << 5;
    /// One step of the counter that is raised when an idle flow wakes, so that whoever takes it for expired learns of it.
    pub const WAKE: u64 = 1 << 20;
    /// Mask of that counter.
    pub const WAKES: u64 = 0xf << 20;
    /// Mask of the bits that are `flow_state`'s.
    pub const FLOW_STATE: u64 = STATE & !(KIND | OVERFLOW | WAKES);

    /// Whether both heads are of one generation.
    #[inline(always)]
    pub const fn same_generation(a: u64, b: u64) -> bool {
        (a ^ b) & GENERATION == 0
    }

    /// The generation as [`super::Body::partner_generation`] stores it.
    #[inline(always)]
    pub const fn generation(head: u64) -> u32 {
        ((head & GENERATION) >> GENERATION_SHIFT) as u32
    }

    /// The generation after that of `head`, in place.
    #[inline(always)]
    pub const fn next_generation(head: u64) -> u64 {
        head.wrapping_add(1 << GENERATION_SHIFT) & GENERATION
    }

    /// The [`flow_state`](crate::maps::flow_state) bits.
    #[inline(always)]
    pub const fn flow_state(head: u64) -> u32 {
        (head & FLOW_STATE) as u32
    }

    /// Whether a head is a live flow.
    #[inline(always)]
    pub const fn is_live(head: u64) -> bool {
        head & KIND == LIVE
    }
}

/// How a flow's packets are forwarded: the value of [`Body::mode`](super::Body::mode).
pub mod mode {
    /// To a container of this node or to its own process: the destination is translated.
    pub const LOCAL: u8 = 0;
    /// To another machine: destination and source are translated.
    pub const NAT: u8 = 1;
    /// To another machine, with the client's address kept: only the destination is translated.
    pub const NAT_KEEP_SOURCE: u8 = 2;
    /// Reserved: in a tunnel, whose endpoint's id is in `to_src`.
    pub const TUNNEL: u8 = 3;
}

/// Bits of a backend id in [`Body::backend`]; the rest is its epoch.
pub const BACKEND_BITS: u32 = 17;
/// Mask of the epoch that a slot keeps.
pub const EPOCH_MASK: u32 = (1 << (32 - BACKEND_BITS)) - 1;

const _: () = assert!(crate::limits::MAX_BACKENDS <= 1 << BACKEND_BITS);

/// What a slot holds besides its head, its key and its stamp. Written while the slot is pending; what changes while the
/// flow lives says so.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Body<A: Address> {
    /// Forward: the client's next hop as last seen. Reverse: where replies go. Changes by compare-and-exchange.
    pub hop: Hop,
    /// Source address after translation.
    pub to_src: A,
    /// Reverse: the client, whom replies go to. Forward: its first word is the flow clock when the flow was created (where
    /// packets go is in the backend's record).
    pub to_dst: A,
    /// Source port after translation.
    pub to_sport: Be16,
    /// Reverse: the client's port. Forward: low 16 bits of the number that the client has to acknowledge (the backend's
    /// SYN or FIN), host order; changes.
    pub to_dport: Be16,
    /// One's complement difference that the new addresses make (RFC 1624), folded.
    pub addr_delta: u16,
    /// One's complement difference that the new ports make, folded.
    pub port_delta: u16,
    /// Backend id (low [`BACKEND_BITS`] bits) and the low bits of its epoch.
    pub backend: u32,
    /// Service id.
    pub service: u16,
    /// Forward: low 16 bits of the number that the backend has to acknowledge (the client's FIN), host order; changes.
    pub backend_ack: u16,
    /// Slot of the other direction.
    pub partner: u32,
    /// Generation of the other direction (low 24 bits) and [`mode`].
    pub partner_generation: u32,
}

/// One direction of one flow: 64 bytes for IPv4, 128 for IPv6.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot<A: Address> {
    /// See [`head`].
    pub head: u64,
    /// Source address in the packet. With the next three the key; the protocol is in the head.
    pub src: A,
    /// Destination address in the packet.
    pub dst: A,
    /// Source port in the packet.
    pub sport: Be16,
    /// Destination port in the packet.
    pub dport: Be16,
    /// Flow clock when a packet of this direction was last seen, at most [`crate::limits::STAMP_TICKS`] old. Changes.
    pub seen: u32,
    /// The rest.
    pub body: Body<A>,
    /// To 64 or 128 bytes.
    pub _pad: A::Pad,
}

/// One direction of a flow as a look-up finds it: a copy, which stays whole whatever becomes of the slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow<A: Address> {
    /// The slot's body.
    pub body: Body<A>,
    /// Its head.
    pub head: u64,
    /// Its stamp.
    pub seen: u32,
    /// Its id.
    pub slot: u32,
}

/// One element of a flow table's map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket<A: Address> {
    /// The slots.
    pub slots: [Slot<A>; SLOTS],
}

/// Value of `FLOWS4`.
pub type Bucket4 = Bucket<Addr4>;
/// Value of `FLOWS6`.
pub type Bucket6 = Bucket<Addr16>;

const _: () = {
    assert!(size_of::<Slot<Addr4>>() == 64);
    assert!(size_of::<Slot<Addr16>>() == 128);
    assert!(size_of::<Bucket4>() == 256);
    assert!(size_of::<Bucket6>() == 512);
    assert!(size_of::<Body<Addr4>>() == 40 && offset_of!(Slot<Addr4>, body) == 24);
    assert!(size_of::<Body<Addr16>>() == 64 && offset_of!(Slot<Addr16>, body) == 48);
};

/// What a table's hash is made of: the only value of `TABLE`. Chosen at random when the maps are made.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableSettings {
    /// Key of the hash.
    pub secret: [u64; SECRET_WORDS],
    /// Buckets of `FLOWS4`, a multiple of [`OVERFLOW_BUCKETS`].
    pub buckets4: u32,
    /// Buckets of `FLOWS6`, likewise.
    pub buckets6: u32,
}

/// Where a key may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Home {
    /// Its two buckets.
    pub buckets: [u32; 2],
    /// The tag in its place in the head.
    pub tag: u64,
    /// The whole hash.
    pub hash: u64,
}

impl TableSettings {
    /// Buckets of the table of a family.
    #[inline(always)]
    pub const fn buckets<A: Address>(&self) -> u32 {
        if A::V6 { self.buckets6 } else { self.buckets4 }
    }

    /// Where a key may be.
    #[inline(always)]
    pub fn home<A: Address>(&self, key: &FlowKey<A>) -> Home {
        let hash = hash(&self.secret, key);
        let buckets = self.buckets::<A>() as u64;
        Home {
            buckets: [
                (((hash & 0xffff_ffff) * buckets) >> 32) as u32,
                (((hash >> 32) * buckets) >> 32) as u32,
            ],
            tag: hash.wrapping_mul(TAG_FACTOR) & !(u64::MAX >> 16),
            hash,
        }
    }

    /// The first of the [`OVERFLOW_BUCKETS`] that a key may be in when both of its own were full.
    #[inline(always)]
    pub const fn overflow<A: Address>(&self, hash: u64) -> u32 {
        let groups = (self.buckets::<A>() / OVERFLOW_BUCKETS) as u64;
        (((hash.wrapping_mul(OVERFLOW_FACTOR) >> 32) * groups) >> 32) as u32 * OVERFLOW_BUCKETS
    }
}

/// Odd factors that make further hashes of one: the golden ratio's, and one of MurmurHash3's finalizer.
const TAG_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
const OVERFLOW_FACTOR: u64 = 0xff51_afd7_ed55_8ccd;

/// Keyed hash of a flow key: NH (Black et al., UMAC, 1999), whose collisions nobody can foresee who does not know the key,
/// and two rounds of mixing.
#[inline(always)]
fn hash<A: Address>(secret: &[u64; SECRET_WORDS], key: &FlowKey<A>) -> u64 {
    let ports = ((key.sport.0 as u64) << 16) | key.dport.0 as u64 | ((key.proto as u64) << 32);
    let mut sum = nh(ports, secret[0]).wrapping_add(key.src.nh(secret[1], secret[2]));
    sum = sum.wrapping_add(key.dst.nh(secret[3], secret[4]));
    sum ^= sum >> 32;
    sum = sum.wrapping_mul(secret[5] | 1);
    sum ^= sum >> 29;
    sum = sum.wrapping_mul(MIX);
    sum ^ (sum >> 32)
}

/// Factor of the second round (SplitMix64).
const MIX: u64 = 0xbf58_476d_1ce4_e5b9;

/// One product of NH: both halves of a word plus the halves of a key word.
#[inline(always)]
pub(crate) const fn nh(word: u64, key: u64) -> u64 {
    let low = (word as u32).wrapping_add(key as u32) as u64;
    let high = ((word >> 32) as u32).wrapping_add((key >> 32) as u32) as u64;
    low.wrapping_mul(high)
}

impl<A: Address> Body<A> {
    /// Backend id.
    #[inline(always)]
    pub const fn backend_id(&self) -> u32 {
        self.backend & ((1 << BACKEND_BITS) - 1)
    }
    /// Epoch of the backend, as far as a slot keeps it.
    #[inline(always)]
    pub const fn epoch(&self) -> u32 {
        self.backend >> BACKEND_BITS
    }
    /// The word of a backend id and an epoch.
    #[inline(always)]
    pub const fn backend_word(id: u32, epoch: u32) -> u32 {
        (id & ((1 << BACKEND_BITS) - 1)) | (epoch << BACKEND_BITS)
    }
    /// Generation of the other direction.
    #[inline(always)]
    pub const fn partner_generation(&self) -> u32 {
        self.partner_generation & 0xff_ffff
    }
    /// Forwarding mode.
    #[inline(always)]
    pub const fn mode(&self) -> u8 {
        (self.partner_generation >> 24) as u8
    }
}

impl<A: Address> Slot<A> {
    /// The key.
    pub const fn key(&self) -> FlowKey<A> {
        FlowKey {
            src: self.src,
            dst: self.dst,
            sport: self.sport,
            dport: self.dport,
            proto: if self.head & flow_state::UDP as u64 != 0 {
                17
            } else {
                6
            },
        }
    }
}

impl<A: Address> Flow<A> {
    /// [`flow_state`] bits.
    #[inline(always)]
    pub const fn state(&self) -> u32 {
        head::flow_state(self.head)
    }
    /// Whether it translates replies.
    #[inline(always)]
    pub const fn is_reverse(&self) -> bool {
        self.state() & flow_state::REVERSE != 0
    }
    /// Backend id.
    #[inline(always)]
    pub const fn backend(&self) -> u32 {
        self.body.backend_id()
    }
    /// Service id.
    #[inline(always)]
    pub const fn service(&self) -> u32 {
        self.body.service as u32
    }
    /// The flow's forward slot and its generation.
    #[inline(always)]
    pub const fn forward(&self) -> (u32, u32) {
        if self.is_reverse() {
            (self.body.partner, self.body.partner_generation())
        } else {
            (self.slot, head::generation(self.head))
        }
    }
    /// The flow's reverse slot and its generation.
    #[inline(always)]
    pub const fn reverse(&self) -> (u32, u32) {
        if self.is_reverse() {
            (self.slot, head::generation(self.head))
        } else {
            (self.body.partner, self.body.partner_generation())
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::collections::HashSet;

    use super::*;

    fn settings(buckets: u32) -> TableSettings {
        TableSettings {
            secret: core::array::from_fn(|i| 0x1234_5678_9abc_def1_u64.wrapping_mul(i as u64 * 2 + 3)),
            buckets4: buckets,
            buckets6: buckets,
        }
    }

    fn key(n: u32) -> FlowKey<Addr4> {
        FlowKey {
            src: Addr4(n.to_be()),
            dst: Addr4(0x0a00_0001),
            sport: Be16::new(n as u16),
            dport: Be16::new(80),
            proto: 6,
        }
    }

    #[test]
    fn every_bucket_is_inside_the_table() {
        for buckets in [4, 12, 1000, 1 << 20] {
            let settings = settings(buckets);
            for n in 0..2000 {
                let home = settings.home(&key(n));
                assert!(home.buckets.iter().all(|bucket| *bucket < buckets));
                let overflow = settings.overflow::<Addr4>(home.hash);
                assert!(overflow.is_multiple_of(OVERFLOW_BUCKETS) && overflow + OVERFLOW_BUCKETS <= buckets);
                assert_eq!(home.tag & (u64::MAX >> 16), 0);
            }
        }
    }

    #[test]
    fn keys_that_differ_by_one_bit_are_spread() {
        let settings = settings(1 << 12);
        let homes: HashSet<[u32; 2]> = (0..4096).map(|n| settings.home(&key(n)).buckets).collect();
        assert!(homes.len() > 4080, "{}", homes.len());
        let first: HashSet<u32> = (0..4096).map(|n| settings.home(&key(n)).buckets[0]).collect();
        // Of 4,096 random choices among 4,096, 63 % are different.
        assert!((2450..2730).contains(&first.len()), "{}", first.len());
    }

    #[test]
    fn the_protocol_and_the_direction_are_part_of_the_key() {
        let settings = settings(1 << 16);
        let tcp = key(7);
        let udp = FlowKey { proto: 17, ..tcp };
        assert_ne!(settings.home(&tcp), settings.home(&udp));
        assert_ne!(settings.home(&tcp), settings.home(&tcp.reversed()));
    }

    #[test]
    fn backend_and_epoch_share_a_word() {
        let body = Body::<Addr4> {
            backend: Body::<Addr4>::backend_word(crate::limits::MAX_BACKENDS - 1, 0x1_7fff),
            ..Body::default()
        };
        assert_eq!(body.backend_id(), crate::limits::MAX_BACKENDS - 1);
        assert_eq!(body.epoch(), EPOCH_MASK);
    }
}
