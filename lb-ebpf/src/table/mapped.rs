//! The flow table's memory as it lies in the maps `FLOWS4` and `FLOWS6`.

use core::{marker::PhantomData, ptr::addr_of_mut};

use lb_common::{
    flow::{Address, FlowKey},
    limits::{RESET_IDLE_S, SLOTS_MASK},
    maps::{Timeouts, flow_state},
    slot::{Body, Bucket, Flow, SLOTS, Slot, TableSettings, head},
};

use super::{Claim, Memory};
use crate::tables::FlowTables;

/// The table of a family.
pub struct Mapped<A, T> {
    /// The maps.
    pub tables: T,
    family: PhantomData<A>,
}

/// A bucket that is there.
#[derive(Debug)]
pub struct BucketRef<A: Address>(*mut Bucket<A>);

/// A slot that is there: its memory is readable and writable, by anybody at any time.
#[derive(Debug)]
pub struct SlotRef<A: Address>(*mut Slot<A>);

impl<A: Address> Clone for BucketRef<A> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<A: Address> Copy for BucketRef<A> {}

impl<A: Address> Clone for SlotRef<A> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<A: Address> Copy for SlotRef<A> {}

impl<A: Address> SlotRef<A> {
    /// Where it is.
    #[inline(always)]
    pub const fn as_ptr(self) -> *mut Slot<A> {
        self.0
    }
}

impl<A, T: Copy> Clone for Mapped<A, T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<A, T: Copy> Copy for Mapped<A, T> {}

impl<A: Address, T: FlowTables> Mapped<A, T> {
    /// The table of a family in these maps.
    #[inline(always)]
    pub const fn new(tables: T) -> Self {
        Self {
            tables,
            family: PhantomData,
        }
    }
}

/// Idle time that a flow is allowed in a state, ticks. A service that has no idle times is not known to the reader (yet): then
/// nothing expires.
#[inline(always)]
pub const fn timeout(timeouts: &Timeouts, state: u32, ticks_per_second: u32) -> u32 {
    let configured = if state & flow_state::UDP != 0 {
        timeouts.udp
    } else if flow_state::is_closed(state) {
        timeouts.closing
    } else if state & flow_state::ESTABLISHED == 0 {
        timeouts.syn
    } else {
        timeouts.established
    };
    if configured == 0 {
        return u32::MAX;
    }
    let after_reset = RESET_IDLE_S * ticks_per_second;
    if state & flow_state::RESET != 0 && state & flow_state::ESTABLISHED != 0 && after_reset < configured {
        after_reset
    } else {
        configured
    }
}

impl<A: Address, T: FlowTables> Memory for Mapped<A, T> {
    type Key = FlowKey<A>;
    type Body = Body<A>;
    type Copied = Flow<A>;
    type Bucket = BucketRef<A>;
    type Cell = SlotRef<A>;

    #[inline(always)]
    fn bucket(self, index: u32) -> Option<Self::Bucket> {
        self.tables.flow_bucket(index).map(BucketRef)
    }

    #[inline(always)]
    fn cell(bucket: Self::Bucket, index: usize) -> Self::Cell {
        // SAFETY: the bucket is there, and it has `SLOTS` slots.
        SlotRef(unsafe { addr_of_mut!((*bucket.0).slots).cast::<Slot<A>>().add(index) })
    }

    #[inline(always)]
    fn slot(self, id: u32) -> Option<Self::Cell> {
        let bucket = self.bucket(id / SLOTS as u32)?;
        // Hidden from the compiler, which would put the mask before the bucket's look-up, where the verifier forgets it.
        let index = T::hide(id as u64) as u32 & SLOTS_MASK;
        Some(Self::cell(bucket, index as usize))
    }

    #[inline(always)]
    fn overflow(self, hash: u64) -> u32 {
        self.tables
            .table_settings()
            .map_or(u32::MAX, |settings: &TableSettings| settings.overflow::<A>(hash))
    }

    #[inline(always)]
    fn head(cell: Self::Cell) -> u64 {
        // SAFETY: a slot that is there; any word is a head.
        unsafe { addr_of_mut!((*cell.0).head).read_volatile() }
    }

    #[inline(always)]
    fn head_after(cell: Self::Cell, zero: u64) -> u64 {
        // SAFETY: as in `head`; `zero` is 0.
        unsafe {
            addr_of_mut!((*cell.0).head)
                .byte_add(zero as usize)
                .read_volatile()
        }
    }

    #[inline(always)]
    fn compare_exchange(cell: Self::Cell, old: u64, new: u64) -> bool {
        // SAFETY: an aligned word of a slot that is there.
        unsafe { T::compare_exchange(addr_of_mut!((*cell.0).head), old, new) == old }
    }

    #[inline(always)]
    fn set_bits(cell: Self::Cell, bits: u64) {
        // SAFETY: as in `compare_exchange`.
        unsafe { T::fetch_or(addr_of_mut!((*cell.0).head), bits) };
    }

    #[inline(always)]
    fn has_key(cell: Self::Cell, key: &FlowKey<A>) -> bool {
        // SAFETY: a slot that is there; words that change under the reader are old or new ones.
        unsafe {
            let ports = addr_of_mut!((*cell.0).sport).cast::<u32>().read_volatile();
            ports == core::ptr::from_ref(&key.sport).cast::<u32>().read()
                && A::equals_at(addr_of_mut!((*cell.0).src), &key.src)
                && A::equals_at(addr_of_mut!((*cell.0).dst), &key.dst)
        }
    }

    #[inline(always)]
    fn copy(cell: Self::Cell, to: &mut Flow<A>) -> u64 {
        // SAFETY: the body is whole words, in a slot that is there and in `to` alike.
        unsafe {
            let from = addr_of_mut!((*cell.0).body).cast::<u64>();
            let words = core::ptr::from_mut(&mut to.body).cast::<u64>();
            let mut all = 0;
            for index in 0..size_of::<Body<A>>() / 8 {
                let word = from.add(index).read_volatile();
                words.add(index).write(word);
                all |= word;
            }
            let seen = addr_of_mut!((*cell.0).seen).read_volatile();
            to.seen = seen;
            Self::zero_of(all | seen as u64)
        }
    }

    #[inline(always)]
    fn name(to: &mut Flow<A>, slot: u32, head: u64) {
        to.slot = slot;
        to.head = head;
    }

    #[inline(always)]
    fn write(cell: Self::Cell, key: &FlowKey<A>, body: &Self::Body, now: u32) {
        // SAFETY: a slot that is there, which is pending and ours; the head stays as it is.
        unsafe {
            addr_of_mut!((*cell.0).src).write_volatile(key.src);
            addr_of_mut!((*cell.0).dst).write_volatile(key.dst);
            addr_of_mut!((*cell.0).sport).write_volatile(key.sport);
            addr_of_mut!((*cell.0).dport).write_volatile(key.dport);
            addr_of_mut!((*cell.0).seen).write_volatile(now);
            let to = addr_of_mut!((*cell.0).body).cast::<u64>();
            let words = core::ptr::from_ref(body).cast::<u64>();
            for index in 0..size_of::<Self::Body>() / 8 {
                to.add(index).write_volatile(words.add(index).read());
            }
        }
    }

    #[inline(always)]
    fn seen_after(cell: Self::Cell, zero: u64) -> u32 {
        // SAFETY: a slot that is there; `zero` is 0.
        unsafe {
            addr_of_mut!((*cell.0).seen)
                .byte_add(zero as usize)
                .read_volatile()
        }
    }

    #[inline(always)]
    fn partner_after(cell: Self::Cell, zero: u64) -> (u32, u32) {
        // SAFETY: as in `seen_after`.
        unsafe {
            let at = addr_of_mut!((*cell.0).body.partner).byte_add(zero as usize);
            (at.read_volatile(), at.add(1).read_volatile() & 0xff_ffff)
        }
    }

    #[inline(always)]
    fn service_after(cell: Self::Cell, zero: u64) -> u32 {
        // SAFETY: as in `seen_after`.
        unsafe {
            addr_of_mut!((*cell.0).body.service)
                .byte_add(zero as usize)
                .read_volatile() as u32
        }
    }

    #[inline(always)]
    fn timeout(self, service: u32, state: u32) -> u32 {
        self.tables.timeouts(service).map_or(u32::MAX, |timeouts| {
            timeout(timeouts, state, self.tables.ticks_per_second())
        })
    }

    #[inline(always)]
    fn ticks_per_second(self) -> u32 {
        self.tables.ticks_per_second()
    }

    #[inline(always)]
    fn count(self, service: u32, counts: bool) {
        self.tables.count_flow::<A>(service, counts);
    }

    #[inline(always)]
    fn evicted(self) {
        self.tables.flow_evicted();
    }

    #[inline(always)]
    fn evict(self, slot: u32, now: u32) -> bool {
        self.tables.evict::<A>(slot, now) != 0
    }

    #[inline(always)]
    fn zero_of(word: u64) -> u64 {
        // Both hidden: of a word and 0 the compiler would know the result.
        T::hide(word) & T::hide(0)
    }

    #[inline(always)]
    fn opaque_leaf(self, word: u64) -> u64 {
        self.tables.opaque_leaf(word)
    }

    #[inline(always)]
    fn opaque(self, word: u64) -> u64 {
        self.tables.opaque(word)
    }
}

/// Puts a flow in: keys, bodies and state of both directions; the partners are filled in here. `None` if there is no room,
/// or the flow is there already.
pub fn insert_pair<A: Address, T: FlowTables>(
    tables: T,
    [forward, reverse]: [(FlowKey<A>, Body<A>); 2],
    state: u32,
    seen: u32,
) -> Option<[u32; 2]> {
    let memory = Mapped::<A, T>::new(tables);
    let settings = tables.table_settings()?;
    let state = state | crate::flows::udp_bit(forward.0.proto);
    let claim = |key: &FlowKey<A>, state: u32| {
        let home = settings.home(key);
        let claim = (0..8)
            .map(|_| super::claim(memory, &home, state, key, seen))
            .find(|claim| *claim != Claim::RACED)?;
        claim.is_done().then_some(claim)
    };
    let first = claim(&forward.0, state)?;
    let Some(second) = claim(&reverse.0, state | flow_state::REVERSE) else {
        super::give_up(memory, first);
        return None;
    };
    let with_partner = |body: Body<A>, other: Claim| Body {
        partner: other.slot(),
        partner_generation: body.partner_generation & !0xff_ffff | other.generation(),
        ..body
    };
    super::write(memory, second, &reverse.0, &with_partner(reverse.1, first), seen);
    super::write(memory, first, &forward.0, &with_partner(forward.1, second), seen);
    super::publish(memory, second);
    super::publish(memory, first);
    if flow_state::is_counted(state) {
        tables.count_flow::<A>(forward.1.service as u32, true);
    }
    Some([first.slot(), second.slot()])
}

/// A copy of a slot that holds a flow, live or ended, if it stays the same while it is copied.
pub fn read_slot<A: Address, T: FlowTables>(tables: T, id: u32) -> Option<Slot<A>> {
    let cell = Mapped::<A, T>::new(tables).slot(id)?;
    let before = Mapped::<A, T>::head(cell);
    if before & head::KIND == head::FREE || before & head::KIND == head::PENDING {
        return None;
    }
    // SAFETY: a slot that is there; what changes under the copy is found out below.
    let mut copy = unsafe { cell.0.read_volatile() };
    core::sync::atomic::fence(core::sync::atomic::Ordering::Acquire);
    let after = Mapped::<A, T>::head(cell);
    copy.head = after;
    (head::same_generation(before, after) && after & head::KIND != head::PENDING).then_some(copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_times_follow_the_state() {
        const HZ: u32 = 250;
        let timeouts = Timeouts {
            established: 7_800 * HZ,
            syn: 60 * HZ,
            closing: 60 * HZ,
            udp: 300 * HZ,
        };
        let of = |state| timeout(&timeouts, state, HZ) / HZ;
        let established = flow_state::ANSWERED | flow_state::ESTABLISHED;
        assert_eq!(of(0), 60);
        assert_eq!(of(flow_state::ANSWERED), 60);
        assert_eq!(of(established), 7_800);
        assert_eq!(
            of(established | flow_state::FIN_CLIENT),
            7_800,
            "a forged FIN shortens nothing"
        );
        assert_eq!(of(established | flow_state::RESET_CLIENT), 120);
        assert_eq!(of(established | flow_state::FINS | flow_state::CLOSED), 60);
        assert_eq!(of(flow_state::UDP), 300);
        assert_eq!(timeout(&Timeouts::default(), established, HZ), u32::MAX);
    }
}
