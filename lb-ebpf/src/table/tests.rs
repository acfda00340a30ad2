//! The table's protocol under loom, which runs every interleaving of a few threads.
//!
//! The model's memory gives what the kernel's gives and no more: atomic operations are full barriers, plain reads are
//! ordered by address dependencies alone (they are acquire reads here, since C11 has no dependency that compilers keep),
//! and plain writes by nothing. Buckets are as in the kernel, keys and bodies are one word each.

use std::sync::Arc;

use loom::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
    thread,
};

use super::*;

/// Idle time of flows, ticks; there are 4 ticks a second.
const TIMEOUT: u32 = 100;
const HZ: u32 = 4;

struct Cell {
    head: AtomicU64,
    key: AtomicU64,
    body: AtomicU64,
    partner: AtomicU64,
    seen: AtomicU32,
}

/// A table of as many slots as a test needs; all others are occupied by flows that never end.
struct Table {
    cells: Vec<Cell>,
    counted: AtomicU64,
}

#[derive(Clone, Copy)]
struct View<'t>(&'t Table);

/// Every key lives in the buckets 0 and 1. Two keys of which one is greater by four have the same tag.
fn home(key: u64) -> Home {
    Home {
        buckets: [0, 1],
        tag: (key & 3) << head::TAG_SHIFT,
        hash: 0,
    }
}

const ESTABLISHED: u32 = flow_state::ANSWERED | flow_state::ESTABLISHED;
/// What fills the slots that a test does not use.
const STRANGER: u64 = head::LIVE | ESTABLISHED as u64 | 9 << head::TAG_SHIFT;

/// A flow: its key, its body, the ids of its slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Copied {
    key: u64,
    body: u64,
    slot: u32,
    head: u64,
}

impl Table {
    /// With the first `free` slots free. The model checker knows only the words that are looked at: no more than needed.
    fn new(free: usize) -> Arc<Self> {
        let cell = |index: usize| Cell {
            head: AtomicU64::new(if index < free { 0 } else { STRANGER }),
            key: AtomicU64::new(0),
            body: AtomicU64::new(0),
            partner: AtomicU64::new(u64::MAX),
            seen: AtomicU32::new(0),
        };
        Arc::new(Self {
            cells: (0..free).map(cell).collect(),
            counted: AtomicU64::new(0),
        })
    }
}

/// A slot: one of the table's, or a stranger's, which never changes.
type Slot<'t> = Option<&'t Cell>;

impl<'t> Memory for View<'t> {
    type Key = u64;
    type Body = (u64, u64);
    type Copied = Copied;
    type Bucket = (&'t Table, u32);
    type Cell = Slot<'t>;

    fn bucket(self, index: u32) -> Option<Self::Bucket> {
        Some((self.0, index))
    }
    fn cell(bucket: Self::Bucket, index: usize) -> Self::Cell {
        bucket.0.cells.get(bucket.1 as usize * SLOTS + index)
    }
    fn slot(self, id: u32) -> Option<Self::Cell> {
        Some(self.0.cells.get(id as usize))
    }
    fn overflow(self, _hash: u64) -> u32 {
        2
    }
    fn head(cell: Self::Cell) -> u64 {
        // What is read at an address that depends on it comes after it.
        cell.map_or(STRANGER, |cell| cell.head.load(Ordering::Acquire))
    }
    fn head_after(cell: Self::Cell, _zero: u64) -> u64 {
        Self::head(cell)
    }
    fn compare_exchange(cell: Self::Cell, old: u64, new: u64) -> bool {
        let Some(cell) = cell else { return false };
        fence(Ordering::SeqCst);
        let result = cell
            .head
            .compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok();
        fence(Ordering::SeqCst);
        result
    }
    fn set_bits(cell: Self::Cell, bits: u64) {
        if let Some(cell) = cell {
            fence(Ordering::SeqCst);
            cell.head.fetch_or(bits, Ordering::SeqCst);
            fence(Ordering::SeqCst);
        }
    }
    fn has_key(cell: Self::Cell, key: &u64) -> bool {
        cell.is_some_and(|cell| cell.key.load(Ordering::Acquire) == *key)
    }
    fn copy(cell: Self::Cell, to: &mut Copied) -> u64 {
        if let Some(cell) = cell {
            // Acquire: the head that is read next is read at an address that depends on these.
            to.key = cell.key.load(Ordering::Acquire);
            to.body = cell.body.load(Ordering::Acquire);
        }
        0
    }
    fn name(to: &mut Copied, slot: u32, head: u64) {
        (to.slot, to.head) = (slot, head);
    }
    fn write(cell: Self::Cell, key: &u64, body: &(u64, u64), now: u32) {
        if let Some(cell) = cell {
            cell.key.store(*key, Ordering::Relaxed);
            cell.body.store(body.0, Ordering::Relaxed);
            cell.partner.store(body.1, Ordering::Relaxed);
            cell.seen.store(now, Ordering::Relaxed);
        }
    }
    fn seen_after(cell: Self::Cell, _zero: u64) -> u32 {
        cell.map_or(0, |cell| cell.seen.load(Ordering::Acquire))
    }
    fn partner_after(cell: Self::Cell, _zero: u64) -> (u32, u32) {
        let partner = cell.map_or(u64::MAX, |cell| cell.partner.load(Ordering::Acquire));
        ((partner >> 32) as u32, partner as u32 & 0xff_ffff)
    }
    fn service_after(cell: Self::Cell, _zero: u64) -> u32 {
        u32::from(cell.is_none())
    }
    fn timeout(self, service: u32, _state: u32) -> u32 {
        if service == 0 { TIMEOUT } else { u32::MAX }
    }
    fn ticks_per_second(self) -> u32 {
        HZ
    }
    fn count(self, _service: u32, counts: bool) {
        let by = if counts { 1 } else { u64::MAX };
        self.0.counted.fetch_add(by, Ordering::SeqCst);
    }
    fn evicted(self) {}
    fn evict(self, slot: u32, now: u32) -> bool {
        evict(self, slot, now)
    }
    fn opaque(self, word: u64) -> u64 {
        word
    }
    fn opaque_leaf(self, word: u64) -> u64 {
        word
    }
    fn zero_of(_word: u64) -> u64 {
        0
    }
}

impl View<'_> {
    /// Puts a flow of one slot in, which is its own partner. Its body is ten times its key.
    fn insert(self, key: u64, state: u32, now: u32) -> Claim {
        let claim = claim(self, &home(key), state, &key, now);
        if claim.is_done() {
            let own = u64::from(claim.slot()) << 32 | u64::from(claim.generation());
            write(self, claim, &key, &(key * 10, own), now);
            publish(self, claim);
        }
        claim
    }

    /// Puts a flow of two slots in, keys `key` and `key + 1`.
    fn insert_pair(self, key: u64, state: u32, now: u32) -> Option<[Claim; 2]> {
        let forward = claim(self, &home(key), state, &key, now);
        if !forward.is_done() {
            return None;
        }
        let reverse = claim(self, &home(key + 1), state | flow_state::REVERSE, &(key + 1), now);
        if !reverse.is_done() {
            give_up(self, forward);
            return None;
        }
        let of = |claim: Claim| u64::from(claim.slot()) << 32 | u64::from(claim.generation());
        write(self, reverse, &(key + 1), &((key + 1) * 10, of(forward)), now);
        write(self, forward, &key, &(key * 10, of(reverse)), now);
        publish(self, reverse);
        publish(self, forward);
        Some([forward, reverse])
    }

    fn find(self, key: u64) -> Option<Copied> {
        let mut copied = Copied {
            key: 0,
            body: 0,
            slot: 0,
            head: 0,
        };
        find(self, &home(key), 0, &key, &mut copied)
            .is_live()
            .then_some(copied)
    }

    /// How many slots hold this key, live.
    fn holders(self, key: u64) -> usize {
        let cells = self.0.cells.iter().map(Some);
        cells
            .filter(|cell| head::is_live(Self::head(*cell)) && Self::has_key(*cell, &key))
            .count()
    }

    /// No slot is left pending, and no half of a pair without the other.
    fn check(self) {
        for (id, cell) in self.0.cells.iter().enumerate() {
            let seen = Self::head(Some(cell));
            assert_ne!(seen & head::KIND, head::PENDING, "slot {id} is pending for ever");
            if !head::is_live(seen) {
                continue;
            }
            let (partner, generation) = Self::partner_after(Some(cell), 0);
            let other = Self::head(self.0.cells.get(partner as usize));
            assert!(
                head::is_live(other) && head::generation(other) == generation,
                "slot {id} is half a flow"
            );
        }
    }

    fn set_seen(self, slot: u32, seen: u32) {
        self.0.cells[slot as usize].seen.store(seen, Ordering::Relaxed);
    }
}

/// Explores the interleavings of two threads; those that differ by more than a few preemptions are left out where the
/// number is given.
fn explore(preemptions: Option<usize>, test: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = preemptions;
    model.max_branches = 20_000;
    model.check(test);
}

/// Runs two closures at the same time.
fn both<R: Send + 'static, S: Send + 'static>(
    table: &Arc<Table>,
    one: impl FnOnce(View<'_>) -> R + Send + 'static,
    two: impl FnOnce(View<'_>) -> S + Send + 'static,
) -> (R, S) {
    let other = Arc::clone(table);
    let handle = thread::spawn(move || one(View(&other)));
    let second = two(View(table));
    (handle.join().unwrap(), second)
}

#[test]
fn two_creators_of_one_key_leave_one_flow_at_most() {
    for free in [1, 2] {
        explore(Some(3), move || {
            let table = Table::new(free);
            let (one, two) = both(&table, |t| t.insert(1, 0, 0), |t| t.insert(1, 0, 0));
            let view = View(&table);
            let done = usize::from(one.is_done()) + usize::from(two.is_done());
            assert!(done <= 1, "both created it");
            assert_eq!(view.holders(1), done);
            view.check();
        });
    }
}

#[test]
fn two_creators_of_different_keys_share_no_slot() {
    explore(Some(3), || {
        let table = Table::new(2);
        let (one, two) = both(&table, |t| t.insert(1, 0, 0), |t| t.insert(2, 0, 0));
        if one.is_done() && two.is_done() {
            assert_ne!(one.slot(), two.slot());
        }
        let view = View(&table);
        assert_eq!(view.holders(1), usize::from(one.is_done()));
        assert_eq!(view.holders(2), usize::from(two.is_done()));
        view.check();
    });
}

#[test]
fn a_reader_never_sees_parts_of_two_flows() {
    explore(Some(3), || {
        let table = Table::new(1);
        View(&table).insert(1, 0, 0);
        // The only slot is taken from the first flow, half-open for long, for the second.
        let (found, _) = both(&table, |t| (t.find(1), t.find(2)), |t| t.insert(2, 0, 50));
        for (key, copied) in [(1, found.0), (2, found.1)] {
            if let Some(copied) = copied {
                assert_eq!((copied.key, copied.body), (key, key * 10));
            }
        }
        View(&table).check();
    });
}

#[test]
fn an_established_flow_is_never_evicted_while_it_is_being_established() {
    explore(Some(3), || {
        let table = Table::new(1);
        let flow = View(&table).insert(1, flow_state::ANSWERED, 0);
        let (updated, created) = both(
            &table,
            move |t| update(t, flow.slot(), flow.generation(), flow_state::ESTABLISHED, 0),
            |t| t.insert(2, 0, 50),
        );
        let view = View(&table);
        if updated.is_some() {
            assert!(!created.is_done(), "an established flow was evicted");
            assert_eq!(view.holders(1), 1);
            assert_eq!(table.counted.load(Ordering::SeqCst), 1);
        } else {
            assert_eq!(table.counted.load(Ordering::SeqCst), 0);
        }
        view.check();
    });
}

#[test]
fn two_creators_of_one_key_that_choose_different_slots_leave_one_flow_at_most() {
    explore(Some(3), || {
        let table = Table::new(2);
        let stranger = View(&table).insert(2, ESTABLISHED, 0);
        let (one, two) = both(
            &table,
            |t| t.insert(1, 0, 0),
            move |t| {
                // From now on the first slot is the better one.
                let cell = t.0.cells.get(stranger.slot() as usize);
                let seen = View::head(cell);
                View::compare_exchange(cell, seen, seen & !head::KIND);
                t.insert(1, 0, 0)
            },
        );
        let view = View(&table);
        let done = usize::from(one.is_done()) + usize::from(two.is_done());
        assert!(done <= 1, "both created it");
        assert_eq!(view.holders(1), done);
        view.check();
    });
}

#[test]
fn a_flow_that_wakes_is_not_evicted_for_its_age() {
    explore(Some(3), || {
        let table = Table::new(1);
        let flow = View(&table).insert(1, ESTABLISHED, 0);
        let (woke, created) = both(
            &table,
            move |t| {
                t.set_seen(flow.slot(), 1000);
                wake(t, flow.slot(), flow.generation())
            },
            |t| t.insert(2, ESTABLISHED, 1000),
        );
        assert!(
            !(woke && created.is_done()),
            "a flow whose packet goes on was evicted"
        );
        assert_eq!(View(&table).holders(1), usize::from(woke));
        View(&table).check();
    });
}

#[test]
fn two_evicters_of_the_halves_of_one_flow_end_it_once() {
    explore(Some(2), || {
        let table = Table::new(2);
        View(&table).insert_pair(1, ESTABLISHED, 0).unwrap();
        View(&table).0.counted.store(1, Ordering::SeqCst);
        let (one, two) = both(
            &table,
            |t| t.insert(5, ESTABLISHED, 1000),
            |t| t.insert(6, ESTABLISHED, 1000),
        );
        let view = View(&table);
        assert_eq!(table.counted.load(Ordering::SeqCst), 0, "counted off once");
        assert_eq!(view.holders(1) + view.holders(2), 0);
        assert_eq!(view.holders(5), usize::from(one.is_done()));
        assert_eq!(view.holders(6), usize::from(two.is_done()));
        view.check();
    });
}

#[test]
fn the_sweep_and_a_packet_agree_whether_a_flow_lives() {
    explore(None, || {
        let table = Table::new(2);
        let [flow, _] = View(&table).insert_pair(1, ESTABLISHED, 0).unwrap();
        let (woke, swept) = both(
            &table,
            move |t| {
                t.set_seen(flow.slot(), 1000);
                wake(t, flow.slot(), flow.generation())
            },
            move |t| {
                let cell = t.0.cells.get(flow.slot() as usize);
                let seen = View::head(cell);
                View::seen_after(cell, 0) == 0 && end(t, flow.slot(), seen)
            },
        );
        // Whoever judged by an old head fails; a flow that was ended first is not woken.
        assert_ne!(woke, swept);
        assert_eq!(View(&table).holders(1), usize::from(woke));
        View(&table).check();
    });
}

#[test]
fn the_end_of_a_flow_and_a_new_one_of_the_same_key_do_not_mix() {
    explore(Some(2), || {
        let table = Table::new(2);
        let [flow, _] = View(&table).insert_pair(1, 0, 0).unwrap();
        let (ended, created) = both(
            &table,
            move |t| {
                let seen = View::head(t.0.cells.get(flow.slot() as usize));
                end(t, flow.slot(), seen)
            },
            |t| t.insert_pair(1, 0, 0).is_some(),
        );
        let view = View(&table);
        assert!(ended);
        assert_eq!(view.holders(1), usize::from(created));
        view.check();
    });
}

#[test]
fn a_flow_that_could_not_be_finished_leaves_nothing() {
    explore(Some(2), || {
        // Room for one slot only: the second claim fails, and the first is given up, while another wants it.
        let table = Table::new(1);
        let (pair, other) = both(
            &table,
            |t| t.insert_pair(1, ESTABLISHED, 0).is_some(),
            |t| t.insert(5, ESTABLISHED, 0),
        );
        let view = View(&table);
        assert!(!pair);
        assert_eq!(view.holders(1) + view.holders(2), 0);
        assert_eq!(view.holders(5), usize::from(other.is_done()));
        view.check();
    });
}
