//! What the programs count, summed over CPUs.

use std::{collections::BTreeMap, path::Path};

use lb_common::{
    counter::{COUNTER_SLOTS, DROP_SLOTS},
    maps::{BackendStats, Drops, ServiceStats, Stats},
};

use super::{MapError, batch::PerCpuTable};

/// Ids read by one call.
const BLOCK: u32 = 4096;

/// Reader of the pinned counters.
#[derive(Debug)]
pub struct Counters {
    stats: PerCpuTable<Stats>,
    drops: PerCpuTable<Drops>,
    backends: PerCpuTable<BackendStats>,
    services: PerCpuTable<ServiceStats>,
}

impl Counters {
    /// Opens the pins in `maps` (`Pins::maps`).
    pub fn open(maps: &Path) -> Result<Self, MapError> {
        Ok(Self {
            stats: PerCpuTable::open(maps, "STATS")?,
            drops: PerCpuTable::open(maps, "DROPS")?,
            backends: PerCpuTable::open(maps, "BACKEND_STATS")?,
            services: PerCpuTable::open(maps, "SERVICE_STATS")?,
        })
    }

    /// `STATS`, by [`Counter`](lb_common::counter::Counter).
    pub fn stats(&self) -> Result<[u64; COUNTER_SLOTS], MapError> {
        let mut sum = [0; COUNTER_SLOTS];
        for cpu in self.stats.range(0, 1)?.into_iter().flatten() {
            add(&mut sum, &cpu.counters);
        }
        Ok(sum)
    }

    /// `DROPS`, by [`DropReason`](lb_common::counter::DropReason).
    pub fn drops(&self) -> Result<[u64; DROP_SLOTS], MapError> {
        let mut sum = [0; DROP_SLOTS];
        for cpu in self.drops.range(0, 1)?.into_iter().flatten() {
            add(&mut sum, &cpu.reasons);
        }
        Ok(sum)
    }

    /// `BACKEND_STATS` of the given ids; ids out of range are left out.
    pub fn backends(&self, ids: &[u32]) -> Result<BTreeMap<u32, BackendStats>, MapError> {
        collect(&self.backends, ids, |sum: &mut BackendStats, cpu| {
            sum.packets_in += cpu.packets_in;
            sum.bytes_in += cpu.bytes_in;
            sum.packets_out += cpu.packets_out;
            sum.bytes_out += cpu.bytes_out;
            sum.flows += cpu.flows;
            sum.refused += cpu.refused;
            sum.resteered += cpu.resteered;
            sum.established += cpu.established;
        })
    }

    /// `SERVICE_STATS` of the given ids; ids out of range are left out.
    pub fn services(&self, ids: &[u32]) -> Result<BTreeMap<u32, ServiceStats>, MapError> {
        collect(&self.services, ids, |sum: &mut ServiceStats, cpu| {
            sum.flows += cpu.flows;
            add(&mut sum.drops, &cpu.drops);
        })
    }
}

fn add<const N: usize>(sum: &mut [u64; N], values: &[u64; N]) {
    for (to, from) in sum.iter_mut().zip(values) {
        *to += from;
    }
}

/// Reads the blocks that hold a wanted id, each by one call.
fn collect<V: aya::Pod + Default>(
    table: &PerCpuTable<V>,
    ids: &[u32],
    add: impl Fn(&mut V, &V),
) -> Result<BTreeMap<u32, V>, MapError> {
    let mut blocks: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for id in ids.iter().copied().filter(|id| *id < table.capacity()) {
        blocks.entry(id / BLOCK).or_default().push(id);
    }
    let mut found = BTreeMap::new();
    for wanted in blocks.values() {
        let first = wanted.iter().copied().min().unwrap_or(0);
        let last = wanted.iter().copied().max().unwrap_or(0);
        let values = table.range(first, last - first + 1)?;
        for id in wanted {
            let mut sum = V::default();
            for cpu in values.get((id - first) as usize).into_iter().flatten() {
                add(&mut sum, cpu);
            }
            found.insert(*id, sum);
        }
    }
    Ok(found)
}
