//! The ring of one service: Maglev (Eisenbud et al., NSDI 2016) with weights. Pure.
//!
//! A ring is built over backend *addresses*; ids come in only afterwards. So every node that wishes the same builds the
//! same ring, bit by bit, whatever order it heard things in. Tables are powers of two with odd skips: a permutation as
//! with a prime, and the kernel's index is a mask that the verifier can follow.
//!
//! The size of a ring follows from how many backends the service *lists*, in whatever state they are, see [`rows_for`]. A
//! ring of another size is another shuffle, so draining, health and weights must not change it; only scaling past a
//! boundary does. There is no hysteresis on purpose: it would make the size depend on what a node has seen before, and a
//! node that started later would send the flows of the others elsewhere. Flows that a node knows are not touched by a
//! new ring anyway.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use lb_common::limits::{MAX_BACKENDS, RING_ROW, RING_ROWS_BY_BACKENDS};

/// A backend's share of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Member {
    /// Address and port: the identity that the permutation is made of.
    pub address: SocketAddr,
    /// Relative share; 0 never appears.
    pub weight: u32,
    /// What is written into the ring.
    pub id: u32,
}

/// Rows of `RINGS` that the ring of a service takes which lists so many backends: a power of two.
pub fn rows_for(backends: usize) -> u32 {
    let fitting = RING_ROWS_BY_BACKENDS.iter().filter(|(from, _)| backends >= *from);
    fitting.fold(1, |_, (_, rows)| *rows)
}

/// Builds a ring of so many rows of ids (a power of two), or `None` when no member has a weight.
///
/// An address that occurs twice counts once, by its first occurrence in (address, weight, id) order.
pub fn build(members: &[Member], rows: u32) -> Option<Vec<u32>> {
    debug_assert!(rows.is_power_of_two(), "the kernel's index is a mask");
    let mut members: Vec<Member> = members.iter().copied().filter(|m| m.weight > 0).collect();
    members.sort_unstable();
    members.dedup_by_key(|m| m.address);
    let heaviest = u64::from(members.iter().map(|m| m.weight).max()?);
    let size = rows as usize * RING_ROW;

    let mut turns: Vec<Turn> = members.iter().map(|m| Turn::new(m.address)).collect();
    let mut ring = vec![0u32; size];
    let mut taken = vec![false; size];
    let mut left = size;
    for round in 1u64.. {
        for (member, turn) in members.iter().zip(&mut turns) {
            // A member of weight w gets w turns in every `heaviest` rounds, spread evenly.
            if round * u64::from(member.weight) < turn.due {
                continue;
            }
            turn.due += heaviest;
            let slot = turn.next_free(&taken);
            taken[slot] = true;
            ring[slot] = member.id;
            left -= 1;
            if left == 0 {
                return Some(ring);
            }
        }
    }
    None
}

/// Tells two rings apart without keeping either. Never 0.
pub fn digest(ring: &[u32]) -> u64 {
    // Each step is a bijection of the state, so that rings which differ in one entry always differ here.
    let digest = ring.iter().fold(ring.len() as u64, |state, id| {
        (state ^ u64::from(*id))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(23)
    });
    digest.max(1)
}

/// Entries of a ring by id.
pub fn counts(ring: &[u32]) -> BTreeMap<u32, u32> {
    // Ids are small: counting in a table is many times faster than in a tree, and every commit of a ring counts it.
    let end = ring.iter().max().map_or(0, |max| max.saturating_add(1));
    let mut table = vec![0u32; end.min(MAX_BACKENDS) as usize];
    let mut strange = BTreeMap::new();
    for id in ring {
        match table.get_mut(*id as usize) {
            Some(count) => *count += 1,
            // Only a ring that somebody else wrote has such ids.
            None => *strange.entry(*id).or_default() += 1,
        }
    }
    let used = (0u32..).zip(table).filter(|(_, count)| *count > 0);
    used.chain(strange).collect()
}

/// The two ids with the most entries, those with more first; 0 where there are fewer.
pub fn leaders(ring: &[u32]) -> [u32; 2] {
    let mut leaders = [(0, 0); 2];
    for (id, count) in counts(ring) {
        if count > leaders[0].1 {
            leaders = [(id, count), leaders[0]];
        } else if count > leaders[1].1 {
            leaders[1] = (id, count);
        }
    }
    leaders.map(|(id, _)| id)
}

/// Where one member stands in its permutation of the table.
struct Turn {
    /// Next entry to try, modulo the table.
    at: usize,
    /// Step: odd, so that every entry is visited once.
    skip: usize,
    /// Weighted round from which it has a turn again.
    due: u64,
}

// === impl Turn ===

impl Turn {
    fn new(address: SocketAddr) -> Self {
        let (high, low) = hash(address);
        Self {
            at: high as usize,
            skip: low as usize | 1,
            due: 0,
        }
    }

    fn next_free(&mut self, taken: &[bool]) -> usize {
        let mask = taken.len() - 1;
        loop {
            let slot = self.at & mask;
            self.at = self.at.wrapping_add(self.skip);
            if !taken[slot] {
                return slot;
            }
        }
    }
}

/// Two independent 64-bit hashes of an address, the same on every machine and release: never change it, since nodes of
/// different releases must agree.
fn hash(address: SocketAddr) -> (u64, u64) {
    let octets = match address.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    let ip = u128::from_be_bytes(octets);
    let mut state = mix((ip >> 64) as u64 ^ 0x5745_4952_5249_4e47);
    state = mix(state ^ ip as u64);
    state = mix(state ^ u64::from(address.port()));
    (state, mix(state ^ 0x9e37_79b9_7f4a_7c15))
}

/// The finalizer of SplitMix64 (public domain, S. Vigna) after one golden-ratio step.
const fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn members(count: usize, seed: u32) -> Vec<Member> {
        (0..count as u32)
            .map(|i| Member {
                address: SocketAddr::new(IpAddr::from((seed.wrapping_mul(7919) + i).to_be_bytes()), 8080),
                weight: 1,
                id: i + 1,
            })
            .collect()
    }

    fn sized(members: &[Member]) -> Option<Vec<u32>> {
        build(members, rows_for(members.len()))
    }

    #[test]
    fn no_weight_no_ring() {
        assert_eq!(build(&[], 1), None);
        let mut one = members(1, 1);
        one[0].weight = 0;
        assert_eq!(build(&one, 1), None);
    }

    #[test]
    fn a_ring_grows_by_its_backends() {
        let rows = [0, 1, 31, 32, 127, 128, 5000].map(rows_for);
        assert_eq!(rows, [1, 1, 1, 2, 2, 4, 4]);
        for rows in [1, 2, 4] {
            let ring = build(&members(40, 3), rows).unwrap();
            assert_eq!(ring.len(), RING_ROW * rows as usize);
            assert_eq!(counts(&ring).len(), 40);
        }
    }

    #[test]
    fn leaders_have_the_most_entries() {
        let mut all = members(5, 1);
        all[3].weight = 9;
        all[1].weight = 4;
        assert_eq!(leaders(&build(&all, 1).unwrap()), [4, 2]);
        assert_eq!(leaders(&build(&members(1, 1), 1).unwrap()), [1, 0]);
        assert_eq!(leaders(&[]), [0, 0]);
    }

    #[test]
    fn a_digest_tells_rings_apart() {
        let ring = build(&members(5, 1), 1).unwrap();
        let mut other = ring.clone();
        other.swap(0, 1);
        assert_ne!(ring, other);
        assert_ne!(digest(&ring), digest(&other));
        assert_ne!(digest(&[]), 0);
    }

    /// The hash is a contract between nodes of different releases: these values may never change.
    #[test]
    fn the_ring_is_the_same_in_every_release() {
        let ring = build(&members(5, 1), 1).unwrap();
        assert_eq!(&ring[..16], RELEASED, "{:?}", &ring[..16]);
    }
    const RELEASED: &[u32] = &[1, 3, 3, 2, 1, 4, 2, 4, 3, 4, 3, 4, 1, 4, 1, 1];

    /// The promise of [`RING_ROWS_BY_BACKENDS`]; the size stays, since the removed one is still listed while it drains.
    #[test]
    fn removing_one_of_n_moves_few_survivors() {
        for count in [2, 10, 31, 32, 64, 100, 127, 128, 256, 500] {
            let (mut moved, mut survivors) = (0, 0);
            for seed in [11, 77, 4242] {
                let all = members(count, seed);
                let before = sized(&all).unwrap();
                let after = build(&all[1..], rows_for(count)).unwrap();
                let kept = before.iter().zip(&after).filter(|(b, _)| **b != all[0].id);
                for (before, after) in kept {
                    survivors += 1;
                    moved += usize::from(before != after);
                }
            }
            assert!(moved * 100 <= survivors, "{count}: {moved} of {survivors} moved");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Every share is within 2 % (and two entries, for rounding) of its weight.
        #[test]
        fn shares_follow_weights(weights in proptest::collection::vec(0u32..10, 1..100), seed: u16) {
            let mut all = members(weights.len(), seed.into());
            for (member, weight) in all.iter_mut().zip(&weights) {
                member.weight = *weight;
            }
            let sum: u32 = weights.iter().sum();
            let Some(ring) = sized(&all) else { prop_assert_eq!(sum, 0); return Ok(()) };
            let shares = counts(&ring);
            for member in &all {
                let share = shares.get(&member.id).copied().unwrap_or(0) as f64;
                let ideal = ring.len() as f64 * f64::from(member.weight) / f64::from(sum);
                if member.weight == 0 {
                    prop_assert_eq!(share, 0.0);
                } else {
                    prop_assert!((share - ideal).abs() <= 2.0 + ideal * 0.02, "{} for {}", share, ideal);
                }
            }
        }

        /// Neither the order of the members nor their ids decide where an address lies.
        #[test]
        fn order_and_ids_do_not_matter(count in 1usize..40, seed: u16, shift in 1u32..1000) {
            let all = members(count, seed.into());
            let mut other: Vec<Member> = all.iter().rev().copied().collect();
            for member in &mut other {
                member.id += shift;
            }
            let expected: Vec<u32> = sized(&all).unwrap().iter().map(|id| id + shift).collect();
            prop_assert_eq!(sized(&other).unwrap(), expected);
        }
    }
}
