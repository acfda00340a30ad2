//! The flow table: a hash table of buckets that any CPU reads and writes without locks.
//!
//! The protocol, in words of [`lb_common::slot`]:
//! - A key has two buckets. A slot is claimed (free or ended → pending) by compare-and-exchange on its head, filled, and
//!   published (pending → live). Nobody else writes a pending slot.
//! - After a claim the key's buckets are searched again: whoever finds the same key live, or a pending slot of the same tag,
//!   gives its claim up. So no key is live twice.
//! - The forward slot's head alone says what a flow is. A flow ends by one compare-and-exchange on it (live → ended);
//!   whoever succeeds ends the reverse slot too. A change of state is a compare-and-exchange on the same word, so it fails
//!   if the flow has ended, and an end fails if the state has changed meanwhile.
//! - A packet of a flow that was idle for half a second or more raises the wake counter in that head before it goes on: who
//!   has judged the flow expired by its stamps then fails to end it.
//! - A reader copies a slot and looks at its head again: another generation means that the copy is of two flows.
//! - If both buckets are full of flows that may not be evicted, the key goes to its overflow buckets; its first bucket is
//!   marked before, so that a search knows where to go on.
//!
//! Generic over the memory, so that the kernel, the host's model and loom (`table::tests`) run the same code. Atomic
//! operations are full barriers; plain reads are ordered only by address dependencies ([`Memory::head_after`]).

pub mod mapped;
#[cfg(test)]
mod tests;

use lb_common::{
    maps::flow_state,
    slot::{Home, OVERFLOW_BUCKETS, SLOTS, head},
};

/// Memory of one table.
pub trait Memory: Copy {
    /// A slot's key.
    type Key;
    /// What a slot holds besides its head, as its creator writes it.
    type Body;
    /// A copy of a slot.
    type Copied;
    /// A bucket that is there.
    type Bucket: Copy;
    /// A slot that is there.
    type Cell: Copy;

    /// The bucket of an index.
    fn bucket(self, index: u32) -> Option<Self::Bucket>;
    /// A slot of a bucket; `index` is less than [`SLOTS`].
    fn cell(bucket: Self::Bucket, index: usize) -> Self::Cell;
    /// The slot of an id: bucket times [`SLOTS`] plus index.
    fn slot(self, id: u32) -> Option<Self::Cell>;
    /// The first of the overflow buckets of a hash.
    fn overflow(self, hash: u64) -> u32;

    /// The head.
    fn head(cell: Self::Cell) -> u64;
    /// The head, read after what `zero` was made of.
    fn head_after(cell: Self::Cell, zero: u64) -> u64;
    /// Replaces the head if it is `old`. A full barrier.
    fn compare_exchange(cell: Self::Cell, old: u64, new: u64) -> bool;
    /// Sets bits of the head. A full barrier.
    fn set_bits(cell: Self::Cell, bits: u64);
    /// Whether the slot has this key.
    fn has_key(cell: Self::Cell, key: &Self::Key) -> bool;
    /// Copies a slot; a zero that depends on all that was read.
    fn copy(cell: Self::Cell, to: &mut Self::Copied) -> u64;
    /// Notes in a copy which slot it is of, and what its head was.
    fn name(to: &mut Self::Copied, slot: u32, head: u64);
    /// Writes all but the head of a pending slot.
    fn write(cell: Self::Cell, key: &Self::Key, body: &Self::Body, now: u32);
    /// When the slot was last seen, read after `zero`.
    fn seen_after(cell: Self::Cell, zero: u64) -> u32;
    /// Slot and generation of the other direction, read after `zero`.
    fn partner_after(cell: Self::Cell, zero: u64) -> (u32, u32);
    /// Service id, read after `zero`.
    fn service_after(cell: Self::Cell, zero: u64) -> u32;
    /// Idle time that a flow of a service is allowed in a state, ticks.
    fn timeout(self, service: u32, state: u32) -> u32;
    /// Ticks of the flow clock per second.
    fn ticks_per_second(self) -> u32;
    /// A flow of a service counts towards its share of the table from now on, or no longer.
    fn count(self, service: u32, counts: bool);
    /// A flow was evicted.
    fn evicted(self);
    /// [`evict`]. In the kernel a global function.
    fn evict(self, slot: u32, now: u32) -> bool;
    /// A zero that the compiler does not know to be one: what is read at an address plus this is read after `word`.
    fn zero_of(word: u64) -> u64;
    /// The same word, of which the verifier knows nothing any more.
    fn opaque(self, word: u64) -> u64;
    /// The same where the stack is too deep for one more call.
    fn opaque_leaf(self, word: u64) -> u64;
}

/// The bits of a head that a look-up compares.
const MATCH: u64 = !(u64::MAX >> 16) | flow_state::UDP as u64 | head::KIND;

/// What a look-up found: nothing, or a slot that is live or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found(u64);

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim(u64);

// === impl Found ===

impl Found {
    /// No slot has the key.
    pub const NONE: Self = Self(0);
    const LIVE: u64 = 1 << 32;
    const ENDED: u64 = 2 << 32;

    /// Whether a live flow was found.
    #[inline(always)]
    pub const fn is_live(self) -> bool {
        self.0 & Self::LIVE != 0
    }
    /// Whether a flow was found that has ended.
    #[inline(always)]
    pub const fn is_ended(self) -> bool {
        self.0 & Self::ENDED != 0
    }
    /// The slot.
    #[inline(always)]
    pub const fn slot(self) -> u32 {
        self.0 as u32
    }
}

// === impl Claim ===

impl Claim {
    const DONE: u64 = 1 << 56;
    /// There is no room for it.
    pub const FULL: Self = Self(3 << 56);
    /// Another CPU was quicker; the same again may succeed.
    pub const RACED: Self = Self(4 << 56);

    #[inline(always)]
    const fn done(slot: u32, head: u64) -> Self {
        Self(Self::DONE | (head::generation(head) as u64) << 32 | slot as u64)
    }
    /// A flow of this key is there already, in this slot.
    #[inline(always)]
    pub const fn taken(slot: u32) -> Self {
        Self(2 << 56 | slot as u64)
    }
    /// Whether a flow of this key is there already.
    #[inline(always)]
    pub const fn is_taken(self) -> bool {
        self.0 >> 56 == 2
    }
    /// From the raw word of [`Claim::raw`].
    #[inline(always)]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }
    /// One word, as functions that are kept out of line return it.
    #[inline(always)]
    pub const fn raw(self) -> u64 {
        self.0
    }
    /// Whether a slot is claimed.
    #[inline(always)]
    pub const fn is_done(self) -> bool {
        self.0 >> 56 == 1
    }
    /// The slot.
    #[inline(always)]
    pub const fn slot(self) -> u32 {
        self.0 as u32
    }
    /// Its generation.
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32 & 0xff_ffff
    }
}

/// Looks for a key. `want` is its tag with `flow_state::UDP` if it is UDP. What is found is copied.
#[inline(always)]
pub fn find<M: Memory>(memory: M, home: &Home, udp: u64, key: &M::Key, to: &mut M::Copied) -> Found {
    let want = home.tag | udp | head::LIVE;
    let mut first = 0;
    for which in 0..2 {
        let Some(bucket) = memory.bucket(home.buckets[which]) else {
            return Found::NONE;
        };
        for index in 0..SLOTS {
            let cell = M::cell(bucket, index);
            let seen = M::head(cell);
            if which == 0 && index == 0 {
                first = seen;
            }
            if (seen ^ want) & MATCH & !head::OCCUPIED == 0 && M::has_key(cell, key) {
                return take(
                    memory,
                    home.buckets[which] * SLOTS as u32 + index as u32,
                    seen,
                    to,
                );
            }
        }
    }
    if first & head::OVERFLOW == 0 {
        return Found::NONE;
    }
    find_in_overflow(memory, home, udp, key, to)
}

/// [`find`] where a key's own buckets were full once.
#[inline(never)]
fn find_in_overflow<M: Memory>(memory: M, home: &Home, udp: u64, key: &M::Key, to: &mut M::Copied) -> Found {
    let want = home.tag | udp | head::LIVE;
    let base = memory.overflow(home.hash) * SLOTS as u32;
    for offset in 0..OVERFLOW_BUCKETS * SLOTS as u32 {
        let Some(cell) = memory.slot(base + offset) else {
            return Found::NONE;
        };
        let seen = M::head(cell);
        if (seen ^ want) & MATCH & !head::OCCUPIED == 0 && M::has_key(cell, key) {
            return take(memory, base + offset, seen, to);
        }
    }
    Found::NONE
}

/// Copies a slot whose head was `seen` when its key was compared.
#[inline(always)]
fn take<M: Memory>(memory: M, slot: u32, seen: u64, to: &mut M::Copied) -> Found {
    let Some(cell) = memory.slot(slot) else {
        return Found::NONE;
    };
    let zero = M::copy(cell, to);
    let now = M::head_after(cell, zero);
    if !head::same_generation(now, seen) {
        // It was claimed for another flow meanwhile: this one has ended.
        return Found::NONE;
    }
    M::name(to, slot, now);
    let kind = if head::is_live(now) {
        Found::LIVE
    } else {
        Found::ENDED
    };
    Found(kind | slot as u64)
}

/// What a bucket holds, from the point of view of a key that wants to go in. One word, as functions that are kept out of
/// line return it: so the verifier walks what follows once, and not for each combination of four slots.
#[derive(Clone, Copy)]
struct Scan(u64);

impl Scan {
    const PRESENT_SHIFT: u32 = 4;
    const TWINS_SHIFT: u32 = 8;
    const OVERFLOW_SHIFT: u32 = 12;
    const ENDED_SHIFT: u32 = 16;
    const LIVE_SHIFT: u32 = 20;

    /// A bit for each slot that may not be claimed.
    #[inline(always)]
    const fn occupied(self) -> u64 {
        self.0 & 15
    }
    /// A bit for each slot that is not free.
    #[inline(always)]
    const fn present(self) -> u64 {
        self.0 >> Self::PRESENT_SHIFT & 15
    }
    /// A bit for each kind of slot that has the key, or may have it.
    #[inline(always)]
    const fn twins(self) -> u64 {
        self.0 >> Self::TWINS_SHIFT & 15
    }
    /// Index of the slot of a flow of this key that has ended.
    #[inline(always)]
    const fn ended(self) -> u32 {
        (self.0 >> Self::ENDED_SHIFT & 3) as u32
    }
    /// Index of the slot of a live flow of this key.
    #[inline(always)]
    const fn live(self) -> u32 {
        (self.0 >> Self::LIVE_SHIFT & 3) as u32
    }
    /// Whether the overflow mark is set.
    #[inline(always)]
    const fn overflows(self) -> bool {
        self.0 >> Self::OVERFLOW_SHIFT & 1 != 0
    }
}

/// [`Scan::twins`]: a live flow.
const LIVE_TWIN: u64 = 1 << head::LIVE;
/// [`Scan::twins`]: a pending slot of the same tag.
const PENDING_TWIN: u64 = 1 << head::PENDING;
/// [`Scan::twins`]: a flow that has ended.
const ENDED_TWIN: u64 = 1 << head::ENDED;
/// A live flow in an overflow slot, whose id is in the high 32 bits.
const OVERFLOW_TWIN: u64 = 1 << 8;
/// No slot: the last one would need a bucket number of 30 bits.
pub const NO_SLOT: u32 = u32::MAX;

#[inline(never)]
fn scan<M: Memory>(memory: M, bucket: u32, want: u64, key: &M::Key, own: u32) -> u64 {
    let Some(cells) = memory.bucket(bucket) else {
        // As if another were at it: nothing is claimed.
        return PENDING_TWIN << Scan::TWINS_SHIFT;
    };
    let mut found = 0;
    for index in 0..SLOTS {
        let cell = M::cell(cells, index);
        let seen = M::head(cell);
        if index == 0 {
            found |= (seen & head::OVERFLOW) << (Scan::OVERFLOW_SHIFT - head::OVERFLOW.trailing_zeros());
        }
        found |= (seen & 1) << index;
        found |= ((seen | seen >> 1) & 1) << (index as u32 + Scan::PRESENT_SHIFT);
        if (seen ^ want) & MATCH & !head::KIND == 0 && bucket * SLOTS as u32 + index as u32 != own {
            found = memory.opaque_leaf(found | twin::<M>(cell, seen, key, index as u64));
        }
    }
    memory.opaque_leaf(found)
}

/// What a slot of the right tag adds to a [`Scan`].
#[inline(always)]
fn twin<M: Memory>(cell: M::Cell, seen: u64, key: &M::Key, index: u64) -> u64 {
    let kind = twin_kind::<M>(cell, seen, key);
    // Kinds are two bits: an ended flow's index goes below that of a live one.
    let shift = if kind == head::LIVE {
        Scan::LIVE_SHIFT
    } else {
        Scan::ENDED_SHIFT
    };
    let index = if kind & head::PUBLISH != 0 {
        index << shift
    } else {
        0
    };
    1 << (kind + Scan::TWINS_SHIFT as u64) | index
}

/// The kind of a slot of the right tag if it has the key or, being pending, may have it; else that of a free one.
#[inline(always)]
fn twin_kind<M: Memory>(cell: M::Cell, seen: u64, key: &M::Key) -> u64 {
    let kind = seen & head::KIND;
    if kind == head::PENDING || (kind != head::FREE && M::has_key(cell, key)) {
        kind
    } else {
        head::FREE
    }
}

/// For each mask of four bits the index of its first clear bit, two bits each.
const FIRST_CLEAR: u64 = {
    let mut table = 0;
    let mut mask = 0;
    while mask < 15 {
        let mut index = 0;
        while mask >> index & 1 != 0 {
            index += 1;
        }
        table |= index << (mask * 2);
        mask += 1;
    }
    table
};

#[inline(always)]
const fn first_clear(mask: u64) -> u32 {
    (FIRST_CLEAR >> ((mask & 15) * 2) & 3) as u32
}

#[inline(always)]
const fn ones(mask: u64) -> u64 {
    (mask & 1) + (mask >> 1 & 1) + (mask >> 2 & 1) + (mask >> 3 & 1)
}

/// Claims a slot for a key that must not be there. `state` is what the head says of the flow from the start.
///
/// The programs take its steps one by one: [`place`], [`make_room`] if there is no place, [`occupy`].
pub fn claim<M: Memory>(memory: M, home: &Home, state: u32, key: &M::Key, now: u32) -> Claim {
    let place = place(memory, home, state, key);
    if place == Claim::FULL {
        match make_room(memory, home, now) {
            NO_SLOT => Claim::FULL,
            slot => occupy(memory, home, state, key, slot),
        }
    } else if place.is_done() {
        occupy(memory, home, state, key, place.slot())
    } else {
        place
    }
}

/// Looks for a place for a key that must not be there: done, with a slot that may be claimed; [`Claim::taken`], by the slot
/// of a live flow; [`Claim::RACED`], if another CPU may be putting in the same; [`Claim::FULL`], if both buckets are.
#[inline(always)]
pub fn place<M: Memory>(memory: M, home: &Home, state: u32, key: &M::Key) -> Claim {
    let want = home.tag | (state & flow_state::UDP) as u64;
    let one = Scan(scan(memory, home.buckets[0], want, key, NO_SLOT));
    let two = Scan(scan(memory, home.buckets[1], want, key, NO_SLOT));
    let twins = one.twins() | two.twins();
    if twins & LIVE_TWIN != 0 {
        let first = one.twins() & LIVE_TWIN != 0;
        let (bucket, index) = if first {
            (home.buckets[0], one.live())
        } else {
            (home.buckets[1], two.live())
        };
        return Claim::taken(bucket * SLOTS as u32 + index);
    }
    if twins & PENDING_TWIN != 0 {
        return Claim::RACED;
    }
    let slot = if one.twins() & ENDED_TWIN != 0 {
        // So that no key is in two slots.
        home.buckets[0] * SLOTS as u32 + one.ended()
    } else if two.twins() & ENDED_TWIN != 0 {
        home.buckets[1] * SLOTS as u32 + two.ended()
    } else if one.occupied() & two.occupied() == 15 {
        return Claim::FULL;
    } else {
        // The emptier bucket, but the first as long as it has two slots to spare: look-ups begin there.
        let (left, right) = (ones(one.occupied()), ones(two.occupied()));
        let (bucket, scan) = if left > 2 && left > right {
            (home.buckets[1], two)
        } else {
            (home.buckets[0], one)
        };
        // Free slots first: an ended flow goes on telling late packets so.
        let mask = if scan.present() == 15 {
            scan.occupied()
        } else {
            scan.present()
        };
        bucket * SLOTS as u32 + first_clear(mask)
    };
    Claim::done(memory.opaque(slot as u64) as u32, 0)
}

/// Takes a slot that may be claimed, and makes sure that nobody else takes another for the same key.
#[inline(always)]
pub fn occupy<M: Memory>(memory: M, home: &Home, state: u32, key: &M::Key, slot: u32) -> Claim {
    let Some(cell) = memory.slot(slot) else {
        return Claim::FULL;
    };
    let old = M::head(cell);
    if old & head::OCCUPIED != 0 {
        return Claim::RACED;
    }
    let new = old & head::OVERFLOW | home.tag | head::next_generation(old) | state as u64 | head::PENDING;
    if !M::compare_exchange(cell, old, new) {
        return Claim::RACED;
    }
    // After the claim, which is a full barrier: of two that claim at once, one at least sees the other.
    if !has_namesake(memory, home, state, slot) {
        return Claim::done(slot, new);
    }
    let twins = twins(memory, home, state, key, slot);
    if twins & (LIVE_TWIN | PENDING_TWIN) == 0 {
        return Claim::done(slot, new);
    }
    release(memory, slot, new);
    // A live twin is found by the next try, unless it is in the overflow buckets.
    if twins & OVERFLOW_TWIN != 0 {
        Claim::taken((twins >> 32) as u32)
    } else {
        Claim::RACED
    }
}

/// Whether any slot beside `own` has the tag, or there may be one in the overflow buckets: nearly always not, which is told
/// without looking at keys.
#[inline(always)]
fn has_namesake<M: Memory>(memory: M, home: &Home, state: u32, own: u32) -> bool {
    let want = home.tag | (state & flow_state::UDP) as u64;
    for which in 0..2 {
        let Some(bucket) = memory.bucket(home.buckets[which]) else {
            return true;
        };
        for index in 0..SLOTS {
            let seen = M::head(M::cell(bucket, index));
            if which == 0 && index == 0 && seen & head::OVERFLOW != 0 {
                return true;
            }
            if (seen ^ want) & MATCH & !head::KIND == 0
                && home.buckets[which] * SLOTS as u32 + index as u32 != own
            {
                return true;
            }
        }
    }
    false
}

/// The kinds of the slots beside `own` that have the key, or may have it.
#[inline(always)]
fn twins<M: Memory>(memory: M, home: &Home, state: u32, key: &M::Key, own: u32) -> u64 {
    let want = home.tag | (state & flow_state::UDP) as u64;
    let one = Scan(scan(memory, home.buckets[0], want, key, own));
    let two = Scan(scan(memory, home.buckets[1], want, key, own));
    let twins = one.twins() | two.twins();
    if !one.overflows() {
        return twins;
    }
    twins | twins_in_overflow(memory, home, want, key, own)
}

#[inline(never)]
fn twins_in_overflow<M: Memory>(memory: M, home: &Home, want: u64, key: &M::Key, own: u32) -> u64 {
    let base = memory.overflow(home.hash);
    let mut twins = 0;
    for offset in 0..OVERFLOW_BUCKETS {
        let found = Scan(scan(memory, base + offset, want, key, own));
        let live = if found.twins() & LIVE_TWIN != 0 {
            let slot = (base + offset) * SLOTS as u32 + found.live();
            OVERFLOW_TWIN | (slot as u64) << 32
        } else {
            0
        };
        twins = memory.opaque(twins | found.twins() | live);
    }
    twins
}

/// Writes a claimed slot. Not yet visible to look-ups.
#[inline(always)]
pub fn write<M: Memory>(memory: M, claim: Claim, key: &M::Key, body: &M::Body, now: u32) {
    if let Some(cell) = memory.slot(claim.slot()) {
        M::write(cell, key, body, now);
    }
}

/// Makes a claimed and written slot visible.
#[inline(always)]
pub fn publish<M: Memory>(memory: M, claim: Claim) {
    if let Some(cell) = memory.slot(claim.slot()) {
        M::set_bits(cell, head::PUBLISH);
    }
}

/// Gives a claim up.
#[inline(always)]
pub fn give_up<M: Memory>(memory: M, claim: Claim) {
    if let Some(cell) = memory.slot(claim.slot()) {
        release(memory, claim.slot(), M::head(cell));
    }
}

/// Frees a pending slot of ours. Only the overflow mark can change meanwhile.
#[inline(always)]
fn release<M: Memory>(memory: M, slot: u32, own: u64) {
    let Some(cell) = memory.slot(slot) else { return };
    let freed = |old: u64| old & (head::GENERATION | head::OVERFLOW);
    if !M::compare_exchange(cell, own, freed(own)) {
        let marked = own | head::OVERFLOW;
        M::compare_exchange(cell, marked, freed(marked));
    }
}

/// Changes the state of a flow: `slot` is its forward slot, of this generation. The state before, or `None` if the flow
/// has ended.
#[inline(always)]
pub fn update<M: Memory>(memory: M, slot: u32, generation: u32, set: u32, clear: u32) -> Option<u32> {
    let cell = memory.slot(slot)?;
    for _ in 0..UPDATES {
        let old = M::head(cell);
        if head::generation(old) != generation || !head::is_live(old) {
            return None;
        }
        let new = old & !(clear as u64) | set as u64;
        if new == old {
            return Some(head::flow_state(old));
        }
        let service = M::service_after(cell, M::zero_of(old));
        if M::compare_exchange(cell, old, new) {
            let (before, after) = (counts(old), counts(new));
            if before != after {
                memory.count(service, after);
            }
            return Some(head::flow_state(old));
        }
    }
    None
}

/// [`update`] for the copy of the state in a reverse slot.
#[inline(always)]
pub fn update_copy<M: Memory>(memory: M, slot: u32, generation: u32, set: u32, clear: u32) -> Option<()> {
    let cell = memory.slot(slot)?;
    for _ in 0..2 {
        let old = M::head(cell);
        if head::generation(old) != generation || !head::is_live(old) {
            return None;
        }
        let new = old & !(clear as u64) | set as u64;
        if new == old || M::compare_exchange(cell, old, new) {
            return Some(());
        }
    }
    None
}

/// Whether a forward slot counts towards its service's share.
#[inline(always)]
const fn counts(seen: u64) -> bool {
    flow_state::is_counted(head::flow_state(seen))
}

/// How often [`update`] tries: packets of both directions and the overflow mark change one head at once.
const UPDATES: usize = 4;

/// Tells whoever has judged a flow by its stamps that a packet of it came. False if the flow has ended.
#[inline(always)]
pub fn wake<M: Memory>(memory: M, slot: u32, generation: u32) -> bool {
    let Some(cell) = memory.slot(slot) else {
        return false;
    };
    for _ in 0..UPDATES {
        let old = M::head(cell);
        if head::generation(old) != generation || !head::is_live(old) {
            return false;
        }
        let new = old & !head::WAKES | old.wrapping_add(head::WAKE) & head::WAKES;
        if M::compare_exchange(cell, old, new) {
            return true;
        }
    }
    false
}

/// Ends a flow, given its forward slot, if the head is still `seen`. Its slots go on telling packets that it has ended.
#[inline(always)]
pub fn end<M: Memory>(memory: M, slot: u32, seen: u64) -> bool {
    let Some(cell) = memory.slot(slot) else {
        return false;
    };
    let (partner, generation) = M::partner_after(cell, M::zero_of(seen));
    let service = M::service_after(cell, M::zero_of(seen));
    if !M::compare_exchange(cell, seen, seen & !head::OCCUPIED) {
        return false;
    }
    if counts(seen) {
        memory.count(service, false);
    }
    end_half(memory, partner, generation);
    true
}

/// Ends the reverse slot of a flow whose forward slot has ended.
#[inline(always)]
fn end_half<M: Memory>(memory: M, slot: u32, generation: u32) {
    let Some(cell) = memory.slot(slot) else { return };
    for _ in 0..UPDATES {
        let old = M::head(cell);
        if head::generation(old) != generation || !head::is_live(old) {
            return;
        }
        if M::compare_exchange(cell, old, old & !head::OCCUPIED) {
            return;
        }
    }
}

// === eviction ===

/// What may be evicted, best first.
pub mod class {
    /// Idle for longer than it may be.
    pub const EXPIRED: u64 = 4;
    /// Closed by both sides.
    pub const CLOSED: u64 = 3;
    /// Half-open, for longer than a handshake takes.
    pub const HALF_OPEN: u64 = 2;
    /// Half-open since a moment ago.
    pub const FRESH: u64 = 1;
}

/// Bits of an age in a rank.
const AGE_BITS: u32 = 29;

/// The [`class`] of a slot by what it says itself; 0 if it may not be evicted.
#[inline(always)]
pub fn class_of_slot<M: Memory>(memory: M, slot: u32, now: u32) -> u64 {
    match memory.slot(slot) {
        Some(cell) => rank(memory, cell, M::head(cell), now) >> AGE_BITS,
        None => 0,
    }
}

/// How gladly a slot is evicted, by what it says itself: its class, then its age. 0: not at all.
#[inline(always)]
fn rank<M: Memory>(memory: M, cell: M::Cell, seen: u64, now: u32) -> u64 {
    if !head::is_live(seen) {
        return 0;
    }
    let age = age(now, M::seen_after(cell, M::zero_of(seen)));
    let state = head::flow_state(seen);
    let service = M::service_after(cell, M::zero_of(seen));
    let class = if age > memory.timeout(service, state) {
        class::EXPIRED
    } else if flow_state::is_closed(state) {
        class::CLOSED
    } else if state & flow_state::ESTABLISHED != 0 {
        return 0;
    } else if age > memory.ticks_per_second() / 4 {
        class::HALF_OPEN
    } else {
        class::FRESH
    };
    class << AGE_BITS | (age as u64 & ((1 << AGE_BITS) - 1))
}

/// Ticks since a stamp; one that another CPU wrote after `now` was read is no time ago.
#[inline(always)]
pub const fn age(now: u32, stamp: u32) -> u32 {
    let age = now.wrapping_sub(stamp);
    if age < 1 << 31 { age } else { 0 }
}

/// Finds or makes a slot that may be claimed, when all slots of both buckets are occupied: evicts, or else goes to the
/// overflow buckets. [`NO_SLOT`] if all is full of established flows.
#[inline(never)]
pub fn make_room<M: Memory>(memory: M, home: &Home, now: u32) -> u32 {
    let best = best_of(memory, home.buckets[0], home.buckets[1], now);
    if class_of(best) >= class::HALF_OPEN && memory.evict(best as u32, now) {
        return best as u32;
    }
    let slot = overflow_room(memory, home, now);
    if slot != NO_SLOT {
        return slot;
    }
    // A half-open flow of a moment ago is better than none at all.
    if class_of(best) == class::FRESH && memory.evict(best as u32, now) {
        return best as u32;
    }
    NO_SLOT
}

/// The class of a candidate: rank in the high, slot in the low 32 bits.
#[inline(always)]
const fn class_of(candidate: u64) -> u64 {
    candidate >> (32 + AGE_BITS)
}

/// The best candidate of two buckets.
#[inline(always)]
fn best_of<M: Memory>(memory: M, one: u32, two: u32, now: u32) -> u64 {
    let mut best = 0;
    for n in 0..2 * SLOTS as u32 {
        let bucket = if n < SLOTS as u32 { one } else { two };
        let slot = bucket * SLOTS as u32 + n % SLOTS as u32;
        if let Some(cell) = memory.slot(slot) {
            let rank = memory.opaque(rank(memory, cell, M::head(cell), now));
            let candidate = rank << 32 | slot as u64;
            best = memory.opaque(best.max(candidate));
        }
    }
    best
}

/// A slot in the overflow buckets, which the first bucket is marked for.
#[inline(always)]
fn overflow_room<M: Memory>(memory: M, home: &Home, now: u32) -> u32 {
    let base = memory.overflow(home.hash) * SLOTS as u32;
    let mut best = 0;
    for offset in 0..OVERFLOW_BUCKETS * SLOTS as u32 {
        if let Some(cell) = memory.slot(base + offset) {
            let seen = M::head(cell);
            let rank = memory.opaque(if seen & head::OCCUPIED == 0 {
                (class::EXPIRED + 1) << AGE_BITS
            } else {
                rank(memory, cell, seen, now)
            });
            let candidate = rank << 32 | (base + offset) as u64;
            best = memory.opaque(best.max(candidate));
        }
    }
    let slot = best as u32;
    if class_of(best) < class::HALF_OPEN || !memory.evict(slot, now) {
        return NO_SLOT;
    }
    // Marked before it is claimed: who then does not see the mark has claimed before, and is seen.
    match memory.slot(home.buckets[0] * SLOTS as u32) {
        Some(first) => {
            M::set_bits(first, head::OVERFLOW);
            slot
        }
        None => NO_SLOT,
    }
}

/// Ends the flow that a slot belongs to, if its forward slot and both stamps agree that it may go. The slot may then be
/// claimed.
#[inline(always)]
pub fn evict<M: Memory>(memory: M, slot: u32, now: u32) -> bool {
    let Some(cell) = memory.slot(slot) else {
        return false;
    };
    let seen = M::head(cell);
    if !head::is_live(seen) {
        return seen & head::OCCUPIED == 0;
    }
    let (partner, generation) = M::partner_after(cell, M::zero_of(seen));
    let Some(other) = memory.slot(partner) else {
        return false;
    };
    let other_seen = M::head(other);
    let whole = head::is_live(other_seen) && head::generation(other_seen) == generation;
    if head::flow_state(seen) & flow_state::REVERSE == 0 {
        let other_age = if whole {
            age(now, M::seen_after(other, M::zero_of(other_seen)))
        } else {
            u32::MAX >> 1
        };
        let own_age = age(now, M::seen_after(cell, M::zero_of(seen)));
        return may_go(memory, cell, seen, own_age.min(other_age)) && evicted(memory, slot, seen);
    }
    if !whole {
        // Its flow has ended, or was never finished: a reverse slot alone is nothing. A pending forward slot has the
        // generation that was asked for, so it is not taken for one that is gone.
        let pending = other_seen & head::KIND == head::PENDING && head::generation(other_seen) == generation;
        return !pending && M::compare_exchange(cell, seen, seen & !head::OCCUPIED);
    }
    let other_age = age(now, M::seen_after(other, M::zero_of(other_seen)));
    let own_age = age(now, M::seen_after(cell, M::zero_of(seen)));
    may_go(memory, other, other_seen, own_age.min(other_age)) && evicted(memory, partner, other_seen)
}

/// Ends a flow that was evicted.
#[inline(always)]
fn evicted<M: Memory>(memory: M, slot: u32, seen: u64) -> bool {
    let ended = end(memory, slot, seen);
    if ended {
        memory.evicted();
    }
    ended
}

/// Whether a flow may be evicted: `seen` is the head of its forward slot, `idle` how long both directions were silent.
#[inline(always)]
fn may_go<M: Memory>(memory: M, forward: M::Cell, seen: u64, idle: u32) -> bool {
    let state = head::flow_state(seen);
    state & flow_state::ESTABLISHED == 0
        || flow_state::is_closed(state)
        || idle > memory.timeout(M::service_after(forward, M::zero_of(seen)), state)
}
