//! Maps in memory, for tests: they keep what they are given, check after every write that no packet could go astray, and
//! fail where they are told to.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use lb_common::{
    limits::RING_ROW,
    maps::{self, NO_RING, backend_flags, backend_state},
};

use super::{Capacities, Dump, Filter, MapError, MapOp, Maps};
use crate::{plan::address_of, ring};

/// Maps in memory. Clones share them, so that a test can look while a reconciler owns one.
#[derive(Clone, Debug)]
pub struct FakeMaps {
    inner: Arc<Mutex<Inner>>,
}

/// When a write fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Without having changed anything.
    Before,
    /// After it has been done, as when the answer is lost.
    After,
}

#[derive(Debug)]
struct Inner {
    capacities: Capacities,
    dump: Dump,
    /// Rows, and the ids in each.
    rows: BTreeMap<u32, (Arc<[u32]>, BTreeSet<u32>)>,
    ours: Filter,
    writes: u64,
    faults: BTreeMap<u64, Fault>,
    log: Vec<MapOp>,
    broken: Vec<String>,
    /// Look for what must be true after every write.
    checks: bool,
}

// === impl FakeMaps ===

impl FakeMaps {
    /// Empty maps of these sizes.
    pub fn new(capacities: Capacities) -> Self {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                capacities,
                dump: Dump::default(),
                rows: BTreeMap::new(),
                ours: Filter::default(),
                writes: 0,
                faults: BTreeMap::new(),
                log: Vec::new(),
                broken: Vec::new(),
                checks: true,
            })),
        }
    }

    /// The same without the checks, for tests of time: they look at everything after every write.
    pub fn unchecked(capacities: Capacities) -> Self {
        let this = Self::new(capacities);
        this.with(|inner| inner.checks = false);
        this
    }

    /// Makes write number `write` (from 0, failed ones count) fail once.
    pub fn fail(&self, write: u64, fault: Fault) {
        self.with(|inner| inner.faults.insert(write, fault));
    }

    /// Writes so far, failed ones too.
    pub fn writes(&self) -> u64 {
        self.with(|inner| inner.writes)
    }

    /// The writes since the last call that succeeded.
    pub fn take_log(&self) -> Vec<MapOp> {
        self.with(|inner| std::mem::take(&mut inner.log))
    }

    /// What was wrong after any write since the start; empty when nothing was.
    pub fn broken(&self) -> Vec<String> {
        self.with(|inner| inner.broken.clone())
    }

    /// The maps as they are.
    pub fn contents(&self) -> Dump {
        self.with(|inner| inner.dump())
    }

    fn with<T>(&self, f: impl FnOnce(&mut Inner) -> T) -> T {
        // A test that panicked while it held the lock has failed already; the maps are still worth showing.
        f(&mut self
            .inner
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

impl Maps for FakeMaps {
    fn apply(&mut self, op: &MapOp) -> Result<(), MapError> {
        self.with(|inner| {
            let fault = inner.faults.remove(&inner.writes);
            inner.writes += 1;
            if fault != Some(Fault::Before) {
                inner.apply(op)?;
                if inner.checks {
                    inner.check(op);
                }
            }
            match fault {
                Some(_) => Err(MapError::Kernel {
                    map: "FAKE",
                    operation: "write",
                    source: std::io::Error::other("injected"),
                }),
                None => {
                    inner.log.push(op.clone());
                    Ok(())
                }
            }
        })
    }

    fn dump(&self) -> Result<Dump, MapError> {
        Ok(self.contents())
    }

    fn capacities(&self) -> Capacities {
        self.with(|inner| inner.capacities)
    }
}

// === impl Inner ===

impl Inner {
    fn apply(&mut self, op: &MapOp) -> Result<(), MapError> {
        let dump = &mut self.dump;
        let full = |map, capacity, setting| {
            Err(MapError::Full {
                map,
                capacity,
                setting,
            })
        };
        match op.clone() {
            MapOp::PutDevice { slot, device } if device.ifindex == 0 => drop(dump.devices.remove(&slot)),
            MapOp::PutDevice { slot, device } => drop(dump.devices.insert(slot, device)),
            MapOp::PutSnatAddress { index, address } => drop(dump.snat_addresses.insert(index, address)),
            MapOp::PutBackend { id, .. } if id == 0 || id >= self.capacities.backends => {
                return full("BACKENDS", self.capacities.backends, "backends");
            }
            MapOp::PutBackend { id, backend } => drop(dump.backends.insert(id, backend)),
            MapOp::PutTimeouts { service, .. } if service >= self.capacities.services => {
                return full("TIMEOUTS", self.capacities.services, "services");
            }
            MapOp::PutTimeouts { service, timeouts } => drop(dump.timeouts.insert(service, timeouts)),
            MapOp::PutAcl {
                service,
                prefix,
                action,
            } => {
                dump.acl.insert((service, prefix), action);
                if dump.acl.len() > self.capacities.acl as usize {
                    dump.acl.remove(&(service, prefix));
                    return full("ACL", self.capacities.acl, "acl");
                }
            }
            MapOp::DelAcl { service, prefix } => drop(dump.acl.remove(&(service, prefix))),
            MapOp::PutRing { row, ring } => {
                let rows = ring.len() / RING_ROW;
                if row as usize + rows > self.capacities.ring_rows as usize {
                    return full("RINGS", self.capacities.ring_rows, "ring_rows");
                }
                for (i, chunk) in ring.chunks(RING_ROW).enumerate() {
                    let ids = ring::counts(chunk).into_keys().collect();
                    self.rows.insert(row + i as u32, (chunk.into(), ids));
                }
            }
            MapOp::PutOurs { filter } => self.ours = filter,
            MapOp::PutVip { vip, value } => drop(dump.vips.insert(vip, value)),
            MapOp::DelVip { vip } => drop(dump.vips.remove(&vip)),
            MapOp::PutService { key, service } => drop(dump.services.insert(key, service)),
            MapOp::DelService { key } => drop(dump.services.remove(&key)),
            MapOp::PutSettings { settings } => dump.settings = settings,
        }
        Ok(())
    }

    fn ring(&self, service: &maps::Service) -> Option<Vec<u32>> {
        let rows = service.ring_row..=service.ring_row.checked_add(service.ring_mask)?;
        let mut ring = Vec::new();
        for row in rows {
            ring.extend_from_slice(&self.rows.get(&row)?.0);
        }
        Some(ring)
    }

    fn dump(&self) -> Dump {
        let mut dump = self.dump.clone();
        let ids: BTreeSet<u32> = dump.services.values().map(|s| s.id).collect();
        dump.timeouts.retain(|id, _| ids.contains(id));
        for service in self.dump.services.values() {
            dump.rings
                .extend(self.ring(service).map(|ring| (service.ring_row, ring)));
        }
        dump
    }

    /// What must be true between any two writes.
    fn check(&mut self, op: &MapOp) {
        let mut broken = Vec::new();
        let mut used = BTreeSet::new();
        for (key, service) in &self.dump.services {
            if !self.dump.timeouts.contains_key(&service.id) {
                broken.push(format!("service {} has no timeouts", service.id));
            }
            if !self.dump.vips.contains_key(&key.vip.into()) || !self.ours.carries(&address_of(key)) {
                broken.push(format!(
                    "the VIP of service {} is not in VIPS, or it and its port not in OURS",
                    service.id
                ));
            }
            if service.ring_row == NO_RING {
                continue;
            }
            for row in service.ring_row..=service.ring_row + service.ring_mask {
                if !used.insert(row) {
                    broken.push(format!("row {row} has two rings"));
                }
            }
            // Only writes that can change it are worth walking through the ring for.
            let touches = match op {
                MapOp::PutBackend { .. } | MapOp::PutRing { .. } => true,
                MapOp::PutService { key: written, .. } => written == key,
                _ => false,
            };
            let mut rows =
                (service.ring_row..=service.ring_row + service.ring_mask).map(|row| self.rows.get(&row));
            let Some(ids) = touches.then(|| {
                rows.try_fold(BTreeSet::new(), |mut ids, row| {
                    ids.extend(&row?.1);
                    Some(ids)
                })
            }) else {
                continue;
            };
            let Some(ids) = ids else {
                broken.push(format!("the ring of service {} was never written", service.id));
                continue;
            };
            for id in ids {
                match self.dump.backends.get(&id) {
                    Some(b) if b.state != backend_state::DEAD && b.service == service.id => {}
                    other => broken.push(format!(
                        "the ring of service {} names backend {id}: {other:?}",
                        service.id
                    )),
                }
            }
        }
        for (id, backend) in &self.dump.backends {
            let near =
                backend.flags & (backend_flags::LOCAL | backend_flags::NODE | backend_flags::DIRECT) != 0;
            if near
                && backend.state != backend_state::DEAD
                && !self.ours.addresses.contains(&backend.addr.into())
            {
                broken.push(format!("backend {id} is near and not in OURS"));
            }
        }
        self.broken.extend(
            broken
                .into_iter()
                .map(|fault| format!("after {}: {fault}", name(op))),
        );
    }
}

fn name(op: &MapOp) -> String {
    match op {
        MapOp::PutRing { row, .. } => format!("PutRing at {row}"),
        other => format!("{other:?}"),
    }
}
