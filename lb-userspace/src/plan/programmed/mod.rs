//! The model of what is in the maps, and what the agent remembers beside it. Changed only by a successful write, by a
//! note that follows from no write, or by reading everything back.

mod adopt;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use lb_common::maps::{self, EVERY_SERVICE, NO_RING, backend_flags, backend_state};

use crate::{
    datapath::{Filter, MapOp},
    model::{BackendState, Protocol, ServiceAddress},
    ring::{self, Member},
};

/// A replaced ring may still be read by packets in flight: its rows are left alone for so long.
pub const ROW_QUARANTINE: Duration = Duration::from_secs(1);

/// What is in the maps, with the agent's own bookkeeping.
#[derive(Clone, Debug, Default)]
pub struct Programmed {
    /// Services in `SERVICES`, and gone ones whose flows still go on.
    pub services: BTreeMap<ServiceAddress, Entry>,
    /// Backend ids in use: alive, or dead with flows that may still refer to them.
    pub slots: BTreeMap<u32, Slot>,
    /// What people are told of a backend, by id.
    pub about: HashMap<u32, About>,
    /// Slots that are not `ACTIVE`: each waits for a deadline, a sweep, or a return.
    pub(super) unsettled: BTreeSet<u32>,
    /// Slots whose service is not known any more (it was removed before the agent was restarted).
    pub(super) orphans: BTreeSet<u32>,
    /// Records of ids that may be used again.
    free: BTreeMap<u32, maps::Backend>,
    /// Service id → address, for every entry of `services`.
    service_ids: BTreeMap<u32, ServiceAddress>,
    /// Rows of replaced rings: first row, rows, free from.
    retired: Vec<(u32, u32, Instant)>,
    /// Rings that were written and not committed yet, by first row.
    written: HashMap<u32, Ring>,
    /// Allow and deny entries of services that are not known any more.
    pub(super) stray_acl: BTreeMap<(u32, IpNet), u32>,
    /// The deny list for all services, in `ACL`.
    pub(super) firewall: BTreeSet<IpNet>,
    pub(super) vips: BTreeMap<IpAddr, maps::Vip>,
    pub(super) devices: BTreeMap<u16, maps::Device>,
    pub(super) snat: BTreeMap<u16, IpAddr>,
    pub(super) settings: maps::Settings,
    /// Contents of `OURS`.
    pub(super) ours: Filter,
    /// Addresses of `ours` that may be missing in the map: those of dead records only, which may have been freed.
    pub(super) doubtful: BTreeSet<IpAddr>,
    /// How many slots have each LOCAL or NODE address.
    pub(super) near: BTreeMap<IpAddr, usize>,
    /// The epoch given out last.
    pub(super) epoch: u32,
    /// `ACL` entries in the map.
    acl_entries: usize,
    /// Ring commits so far.
    pub commits: u64,
}

/// One service in the maps.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Id.
    pub id: u32,
    /// Value in `SERVICES`; `None` while it is not there (not yet, or only its flows are left).
    pub value: Option<maps::Service>,
    /// Generation of the last commit, kept while the service is away.
    pub generation: u32,
    pub(super) timeouts: Option<maps::Timeouts>,
    pub(super) acl: BTreeMap<IpNet, u32>,
    /// The committed ring.
    pub ring: Ring,
    /// What the last built ring was made of, and its digest: spares building it again.
    pub(super) built: Option<(Arc<[Member]>, u64)>,
    /// Backends that are not dead.
    pub live: BTreeMap<SocketAddr, u32>,
    /// All slots, dead ones too.
    pub(super) slots: BTreeSet<u32>,
}

/// A ring without its entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    /// [`ring::digest`]; 0 for no ring.
    pub digest: u64,
    /// Entries by backend id.
    pub counts: BTreeMap<u32, u32>,
}

/// One backend id in use.
#[derive(Clone, Debug)]
pub struct Slot {
    /// The record in `BACKENDS`.
    pub record: maps::Backend,
    /// Its address and port.
    pub address: SocketAddr,
    /// End of draining.
    pub deadline: Option<Instant>,
    /// When the record last became what it is: `DRAINING`, `DEAD` or `ACTIVE`.
    pub changed: Instant,
}

/// What people are told of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// Name.
    pub name: String,
    /// Weight.
    pub weight: u32,
    /// State as wished.
    pub state: BackendState,
    /// Why.
    pub reason: String,
    /// Drain time.
    pub drain: Duration,
    /// No longer wished for.
    pub leaving: bool,
    /// Since when it is in that state.
    pub since: Instant,
}

/// Something to remember that no map holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Note {
    /// A service was given an id.
    Service { address: ServiceAddress, id: u32 },
    /// A service is gone and so are its flows.
    Forget { address: ServiceAddress },
    /// What people are told of a backend.
    About { id: u32, about: About },
    /// A backend's drain ends then, or has no end.
    Deadline { id: u32, deadline: Option<Instant> },
    /// These members make a ring of this digest.
    Built {
        address: ServiceAddress,
        members: Arc<[Member]>,
        digest: u64,
    },
    /// No flow refers to this dead id any more.
    Free { id: u32 },
}

// === impl Programmed ===

impl Programmed {
    /// Records a write that has succeeded.
    pub fn record(&mut self, op: &MapOp, now: Instant) {
        match op {
            MapOp::PutDevice { slot, device } if device.ifindex == 0 => drop(self.devices.remove(slot)),
            MapOp::PutDevice { slot, device } => drop(self.devices.insert(*slot, *device)),
            MapOp::PutSnatAddress { index, address } => drop(self.snat.insert(*index, *address)),
            MapOp::PutBackend { id, backend } => self.put_backend(*id, *backend, now),
            MapOp::PutTimeouts { service, timeouts } => {
                if let Some(entry) = self.entry_by_id(*service) {
                    entry.timeouts = Some(*timeouts);
                }
            }
            MapOp::PutAcl {
                service: EVERY_SERVICE,
                prefix,
                ..
            } => self.acl_entries += usize::from(self.firewall.insert(*prefix)),
            MapOp::DelAcl {
                service: EVERY_SERVICE,
                prefix,
            } => self.acl_entries -= usize::from(self.firewall.remove(prefix)),
            MapOp::PutAcl {
                service,
                prefix,
                action,
            } => {
                let old = self
                    .entry_by_id(*service)
                    .and_then(|entry| entry.acl.insert(*prefix, *action));
                self.acl_entries += usize::from(old.is_none());
            }
            MapOp::DelAcl { service, prefix } => {
                let old = self
                    .entry_by_id(*service)
                    .and_then(|entry| entry.acl.remove(prefix));
                let old = old.or_else(|| self.stray_acl.remove(&(*service, *prefix)));
                self.acl_entries -= usize::from(old.is_some());
            }
            MapOp::PutRing { row, ring } => drop(self.written.insert(*row, Ring::of(ring))),
            MapOp::PutOurs { filter } => {
                self.ours = filter.clone();
                self.doubtful.clear();
            }
            MapOp::PutVip { vip, value } => drop(self.vips.insert(*vip, *value)),
            MapOp::DelVip { vip } => drop(self.vips.remove(vip)),
            MapOp::PutService { key, service } => self.put_service(&address_of(key), Some(*service), now),
            MapOp::DelService { key } => self.put_service(&address_of(key), None, now),
            MapOp::PutSettings { settings } => self.settings = *settings,
        }
    }

    /// Remembers something that no map holds.
    pub fn note(&mut self, note: &Note) {
        match note {
            Note::Service { address, id } => {
                self.service_ids.insert(*id, *address);
                self.services.insert(*address, Entry::new(*id));
            }
            Note::Forget { address } => {
                if let Some(entry) = self.services.remove(address) {
                    self.service_ids.remove(&entry.id);
                    for prefix in entry.acl {
                        self.stray_acl.insert((entry.id, prefix.0), prefix.1);
                    }
                }
            }
            Note::About { id, about } => drop(self.about.insert(*id, about.clone())),
            Note::Deadline { id, deadline } => {
                if let Some(slot) = self.slots.get_mut(id) {
                    slot.deadline = *deadline;
                }
            }
            Note::Built {
                address,
                members,
                digest,
            } => {
                if let Some(entry) = self.services.get_mut(address) {
                    entry.built = Some((Arc::clone(members), *digest));
                }
            }
            Note::Free { id } => {
                if let Some(slot) = self.slots.remove(id) {
                    self.unsettled.remove(id);
                    self.orphans.remove(id);
                    self.about.remove(id);
                    self.count_near(&slot.record, false);
                    if let Some(entry) = self.entry_by_id(slot.record.service) {
                        entry.slots.remove(id);
                    }
                    self.free.insert(*id, slot.record);
                }
            }
        }
    }

    /// Slots that take no new flows, or none any more.
    pub fn waiting_slots(&self) -> impl Iterator<Item = (u32, &Slot)> {
        self.unsettled
            .iter()
            .filter_map(|id| Some((*id, self.slots.get(id)?)))
    }

    /// Whether a service id may be given to somebody else: no entry and no slot has it.
    pub(super) fn is_free_service(&self, id: u32) -> bool {
        !self.service_ids.contains_key(&id)
            && !self
                .orphans
                .iter()
                .any(|orphan| self.slots[orphan].record.service == id)
            && !self.stray_acl.keys().any(|(service, _)| *service == id)
    }

    /// Address of a service by its id.
    pub fn service_address(&self, id: u32) -> Option<ServiceAddress> {
        self.service_ids.get(&id).copied()
    }

    /// `ACL` entries in the map.
    pub(super) fn acl_entries(&self) -> usize {
        self.acl_entries
    }

    /// Rows that rings are in (`until` is `None`) or were in shortly ago: first row, rows, free from.
    pub(super) fn rows(&self, now: Instant) -> impl Iterator<Item = (u32, u32, Option<Instant>)> {
        let current = self.services.values().filter_map(|entry| entry.value);
        let current = current
            .filter(|s| s.ring_row != NO_RING)
            .map(|s| (s.ring_row, s.ring_mask + 1, None));
        let retired = self.retired.iter().filter(move |(.., until)| *until > now);
        current.chain(retired.map(|(row, rows, until)| (*row, *rows, Some(*until))))
    }

    /// What packets of ours can carry.
    pub(super) fn carried(&self) -> Filter {
        let addresses = self.vips.keys().chain(self.snat.values());
        Filter {
            addresses: addresses.chain(self.near.keys()).copied().collect(),
            ports: self.services.keys().map(|a| (a.protocol, a.port)).collect(),
        }
    }

    /// Whether `OURS` is known to have all of it.
    pub(super) fn filters(&self, need: &Filter) -> bool {
        need.is_subset(&self.ours) && need.addresses.is_disjoint(&self.doubtful)
    }

    fn entry_by_id(&mut self, id: u32) -> Option<&mut Entry> {
        self.services.get_mut(self.service_ids.get(&id)?)
    }

    fn put_backend(&mut self, id: u32, record: maps::Backend, now: Instant) {
        self.epoch = self.epoch.max(record.epoch);
        let address = SocketAddr::new(record.addr.into(), record.port.get());
        let mut slot = Slot {
            record,
            address,
            deadline: None,
            changed: now,
        };
        if let Some(old) = self.slots.remove(&id) {
            self.count_near(&old.record, false);
            if old.record.epoch == record.epoch {
                slot.deadline = old.deadline;
                if old.record.state == record.state {
                    slot.changed = old.changed;
                }
            }
        }
        self.free.remove(&id);
        self.count_near(&record, true);
        let dead = record.state == backend_state::DEAD;
        if record.state == backend_state::ACTIVE {
            slot.deadline = None;
            self.unsettled.remove(&id);
        } else {
            self.unsettled.insert(id);
        }
        match self.entry_by_id(record.service) {
            Some(entry) => {
                entry.slots.insert(id);
                if !dead {
                    entry.live.insert(address, id);
                } else if entry.live.get(&address) == Some(&id) {
                    entry.live.remove(&address);
                }
            }
            None => drop(self.orphans.insert(id)),
        }
        self.slots.insert(id, slot);
    }

    fn put_service(&mut self, address: &ServiceAddress, value: Option<maps::Service>, now: Instant) {
        let Some(entry) = self.services.get_mut(address) else {
            return;
        };
        let row = |s: Option<maps::Service>| {
            s.filter(|s| s.ring_row != NO_RING)
                .map(|s| (s.ring_row, s.ring_mask + 1))
        };
        let (old, new) = (row(entry.value), row(value));
        if old != new {
            self.retired.retain(|(.., until)| *until > now);
            self.retired
                .extend(old.map(|(first, rows)| (first, rows, now + ROW_QUARANTINE)));
            let ring = new
                .and_then(|(first, _)| self.written.remove(&first))
                .unwrap_or_default();
            let old = std::mem::replace(&mut entry.ring, ring);
            // A drainer that was in the ring could take new flows until now: only later sweeps tell of it.
            for id in old.counts.keys().filter(|id| !entry.ring.counts.contains_key(id)) {
                if let Some(slot) = self.slots.get_mut(id) {
                    slot.changed = now;
                }
            }
        }
        entry.value = value;
        if let Some(value) = value {
            self.commits += u64::from(value.generation != entry.generation);
            entry.generation = value.generation;
        }
    }

    fn count_near(&mut self, record: &maps::Backend, present: bool) {
        if !is_near(record) {
            return;
        }
        let ip = record.addr.into();
        let count = self.near.entry(ip).or_default();
        *count = if present {
            *count + 1
        } else {
            count.saturating_sub(1)
        };
        if *count == 0 {
            self.near.remove(&ip);
        }
    }
}

// === impl Entry ===

impl Entry {
    /// Whether rows of `RINGS` are its own.
    pub(super) fn has_ring(&self) -> bool {
        self.value.is_some_and(|value| value.ring_row != NO_RING)
    }

    pub(super) fn new(id: u32) -> Self {
        Self {
            id,
            value: None,
            generation: 0,
            timeouts: None,
            acl: BTreeMap::new(),
            ring: Ring::default(),
            built: None,
            live: BTreeMap::new(),
            slots: BTreeSet::new(),
        }
    }
}

// === impl Ring ===

impl Ring {
    fn of(ids: &[u32]) -> Self {
        Self {
            digest: ring::digest(ids),
            counts: ring::counts(ids),
        }
    }
}

/// Whether packets carry this backend's address on this node's own side.
pub(super) fn is_near(record: &maps::Backend) -> bool {
    record.flags & (backend_flags::LOCAL | backend_flags::NODE) != 0
}

/// The map key of a service.
pub fn key_of(address: &ServiceAddress) -> maps::ServiceKey {
    maps::ServiceKey {
        vip: address.vip.into(),
        port: lb_common::addr::Be16::new(address.port),
        proto: address.protocol.number(),
    }
}

/// The service of a map key.
pub fn address_of(key: &maps::ServiceKey) -> ServiceAddress {
    ServiceAddress {
        vip: key.vip.into(),
        port: key.port.get(),
        protocol: if key.proto == Protocol::Udp.number() {
            Protocol::Udp
        } else {
            Protocol::Tcp
        },
    }
}
