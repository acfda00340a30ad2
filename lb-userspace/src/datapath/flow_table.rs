//! The pinned flow tables in the agent's own memory: read without system calls, changed by the same algorithm and the
//! same atomic operations as in the programs.

use std::{
    io,
    marker::PhantomData,
    num::NonZeroUsize,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use aya::maps::MapData;
use lb_common::{
    flow::{Address, FlowKey},
    maps::{Meta, ServiceFlows, Timeouts},
    slot::{Body, Bucket, Flow, SLOTS, Slot, TableSettings, head},
};
use lb_ebpf::{
    flows::udp_bit,
    table::{
        self, Found, Memory,
        mapped::{Mapped, insert_pair, read_slot},
    },
    tables::FlowTables,
};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::{MapError, batch::Table};

/// An array map with `BPF_F_MMAPABLE`, mapped.
#[derive(Debug)]
pub struct Mapping<V> {
    start: NonNull<V>,
    length: usize,
    values: PhantomData<V>,
}

// SAFETY: shared memory that is only touched by atomic operations and volatile reads, from whichever thread.
unsafe impl<V> Send for Mapping<V> {}
// SAFETY: as above.
unsafe impl<V> Sync for Mapping<V> {}

impl<V> Mapping<V> {
    /// Maps `length` values of a map. `V` is what the map holds, without padding between elements (a multiple of 8 bytes).
    pub fn new(map: BorrowedFd<'_>, length: u32) -> io::Result<Self> {
        const { assert!(size_of::<V>().is_multiple_of(8)) };
        let length = length as usize;
        let bytes = NonZeroUsize::new(length * size_of::<V>()).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping, wherever the kernel puts it.
        let start = unsafe {
            mmap(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                map,
                0,
            )
        }?;
        Ok(Self {
            start: start.cast(),
            length,
            values: PhantomData,
        })
    }

    /// How many values.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// A value, shared with the kernel and all CPUs.
    pub fn get(&self, index: usize) -> Option<NonNull<V>> {
        // SAFETY: inside the mapping.
        (index < self.length).then(|| unsafe { self.start.add(index) })
    }
}

impl<V> Drop for Mapping<V> {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing refers to it any more. A failure leaves it mapped, no more.
        let _ = unsafe { munmap(self.start.cast(), self.length * size_of::<V>()) };
    }
}

/// What a flow table needs besides its slots.
#[derive(Debug)]
pub struct Context {
    /// `TABLE`.
    pub settings: TableSettings,
    /// `TIMEOUTS`.
    pub timeouts: Vec<Timeouts>,
    /// `META.hz`.
    pub ticks_per_second: u32,
}

/// Both tables.
#[derive(Debug)]
pub struct FlowMaps {
    v4: Mapping<Bucket<lb_common::addr::Addr4>>,
    v6: Mapping<Bucket<lb_common::addr::Addr16>>,
    counts: Mapping<ServiceFlows>,
    context: Context,
    evicted: AtomicU64,
}

impl FlowMaps {
    /// Maps the pinned tables in `maps` (`Pins::maps`).
    pub fn open(maps: &Path) -> Result<Self, MapError> {
        let settings = Table::<u32, TableSettings>::open(maps, "TABLE")?
            .get(&0)?
            .unwrap_or_default();
        let timeouts: Table<u32, Timeouts> = Table::open(maps, "TIMEOUTS")?;
        let meta = Table::<u32, Meta>::open(maps, "META")?
            .get(&0)?
            .unwrap_or_default();
        let context = Context {
            settings,
            timeouts: timeouts.range(0, timeouts.capacity)?,
            ticks_per_second: meta.hz,
        };
        Ok(Self {
            v4: pinned(maps, "FLOWS4", settings.buckets4)?,
            v6: pinned(maps, "FLOWS6", settings.buckets6)?,
            counts: pinned(maps, "SERVICE_FLOWS", timeouts.capacity)?,
            context,
            evicted: AtomicU64::new(0),
        })
    }

    /// From maps that are open: `FLOWS4`, `FLOWS6` and `SERVICE_FLOWS`.
    pub fn of([v4, v6, counts]: [BorrowedFd<'_>; 3], services: u32, context: Context) -> io::Result<Self> {
        Ok(Self {
            v4: Mapping::new(v4, context.settings.buckets4)?,
            v6: Mapping::new(v6, context.settings.buckets6)?,
            counts: Mapping::new(counts, services)?,
            context,
            evicted: AtomicU64::new(0),
        })
    }

    /// Settings, timeouts and clock.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Reads the timeouts and the clock anew.
    pub fn refresh(&mut self, maps: &Path) -> Result<(), MapError> {
        let timeouts: Table<u32, Timeouts> = Table::open(maps, "TIMEOUTS")?;
        self.context.timeouts = timeouts.range(0, timeouts.capacity)?;
        let meta = Table::<u32, Meta>::open(maps, "META")?
            .get(&0)?
            .unwrap_or_default();
        self.context.ticks_per_second = meta.hz;
        Ok(())
    }

    /// How many flows were evicted through this mapping.
    pub fn evicted(&self) -> u64 {
        self.evicted.load(Ordering::Relaxed)
    }

    /// Buckets of a family.
    pub fn buckets<A: Address>(&self) -> u32 {
        self.context.settings.buckets::<A>()
    }

    /// Slots of a family.
    pub fn slots<A: Address>(&self) -> u32 {
        self.buckets::<A>() * SLOTS as u32
    }

    fn memory<A: Address>(&self) -> Mapped<A, &Self> {
        Mapped::new(self)
    }

    /// The head of a slot.
    pub fn head<A: Address>(&self, slot: u32) -> Option<u64> {
        Some(Mapped::<A, &Self>::head(self.memory::<A>().slot(slot)?))
    }

    /// A copy of a slot that is not free, if it stays the same while it is copied.
    pub fn read<A: Address>(&self, slot: u32) -> Option<Slot<A>> {
        read_slot(self, slot)
    }

    /// Ends a flow, given its forward slot as it was read. False if it has changed meanwhile.
    pub fn end<A: Address>(&self, slot: u32, seen: u64) -> bool {
        table::end(self.memory::<A>(), slot, seen)
    }

    /// Ends a reverse slot whose flow is gone.
    pub fn end_orphan<A: Address>(&self, slot: u32, seen: u64) -> bool {
        self.memory::<A>()
            .slot(slot)
            .is_some_and(|cell| Mapped::<A, &Self>::compare_exchange(cell, seen, seen & !head::OCCUPIED))
    }

    /// Looks for a key, as the programs do.
    pub fn find<A: Address>(&self, key: &FlowKey<A>) -> (Found, Flow<A>) {
        let home = self.context.settings.home(key);
        let mut flow = Flow::default();
        let found = table::find(
            self.memory::<A>(),
            &home,
            u64::from(udp_bit(key.proto)),
            key,
            &mut flow,
        );
        (found, flow)
    }

    /// Sets bits of the state of a flow, if it is live.
    pub fn advance<A: Address>(&self, key: &FlowKey<A>, set: u32) {
        let (found, flow) = self.find(key);
        if !found.is_live() {
            return;
        }
        let (forward, generation) = flow.forward();
        let _ended = table::update(self.memory::<A>(), forward, generation, set, 0);
        let (reverse, generation) = flow.reverse();
        let _ended = table::update_copy(self.memory::<A>(), reverse, generation, set, 0);
    }

    /// Puts a flow in: keys, bodies and state of both directions; the partners are filled in here. `None` if there is no
    /// room, or the flow is there already.
    pub fn insert<A: Address>(
        &self,
        [forward, reverse]: [(FlowKey<A>, Body<A>); 2],
        state: u32,
        seen: u32,
    ) -> Option<[u32; 2]> {
        insert_pair(self, [forward, reverse], state, seen)
    }
}

fn pinned<V>(maps: &Path, name: &'static str, length: u32) -> Result<Mapping<V>, MapError> {
    let kernel = |operation, source| MapError::Kernel {
        map: name,
        operation,
        source,
    };
    let map = MapData::from_pin(maps.join(name)).map_err(|e| kernel("open", io::Error::other(e)))?;
    Mapping::new(map.fd().as_fd(), length).map_err(|e| kernel("map into memory", e))
}

impl FlowTables for &FlowMaps {
    fn table_settings<'a>(self) -> Option<&'a TableSettings>
    where
        Self: 'a,
    {
        Some(&self.context.settings)
    }

    fn flow_bucket<A: Address>(self, index: u32) -> Option<*mut Bucket<A>> {
        let index = index as usize;
        if A::V6 {
            Some(self.v6.get(index)?.as_ptr().cast())
        } else {
            Some(self.v4.get(index)?.as_ptr().cast())
        }
    }

    unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
        // SAFETY: an aligned word of a mapping, which is only changed by atomic operations, here and in the programs.
        let word = unsafe { AtomicU64::from_ptr(word) };
        match word.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(seen) | Err(seen) => seen,
        }
    }

    unsafe fn fetch_or(word: *mut u64, bits: u64) {
        // SAFETY: as in `compare_exchange`.
        unsafe { AtomicU64::from_ptr(word) }.fetch_or(bits, Ordering::SeqCst);
    }

    fn timeouts<'a>(self, service: u32) -> Option<&'a Timeouts>
    where
        Self: 'a,
    {
        self.context.timeouts.get(service as usize)
    }

    fn ticks_per_second(self) -> u32 {
        self.context.ticks_per_second
    }

    fn count_flow<A: Address>(self, service: u32, counts: bool) {
        if let Some(flows) = self.counts.get(service as usize) {
            // SAFETY: an aligned word of the mapping, which is only changed by atomic operations.
            let count = unsafe {
                AtomicU64::from_ptr((&raw mut (*flows.as_ptr()).families[usize::from(A::V6)]).cast())
            };
            if counts {
                count.fetch_add(1, Ordering::SeqCst);
            } else {
                count.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    fn flow_evicted(self) {
        self.evicted.fetch_add(1, Ordering::Relaxed);
    }
}
