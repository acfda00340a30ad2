//! The plan of one service, and of backends whose service is gone.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use ipnet::IpNet;
use lb_common::{
    addr::Be16,
    maps::{self, ACL_ALLOW, ACL_DENY, NO_RING, backend_state, service_flags},
};

use super::{
    Group, Planner, acl_room,
    ids::{NoRow, Rows},
    longest_first,
    network::{self, NoSnat, Reach},
    programmed::{About, Entry, Note, is_near, key_of},
};
use crate::{
    datapath::{MapOp, Place},
    desired::Wanted,
    model::{Backend, BackendState, EmptyPolicy, Service, ServiceAddress, ServiceSettings, SnatMode},
    ring::{self, Member},
};

/// What becomes of one backend.
struct Candidate {
    id: u32,
    record: maps::Backend,
    about: About,
    deadline: Option<Instant>,
    /// May serve new flows when no active backend is left.
    drainer: bool,
}

/// The ring a service shall have.
enum RingChange {
    /// The committed one.
    Keep,
    /// None: no backend takes new flows.
    Clear,
    /// A new one.
    Put { row: u32, ring: Vec<u32> },
}

impl Planner<'_> {
    /// Plans one service.
    pub(super) fn service(&mut self, address: ServiceAddress) {
        self.plan.rejections.entry(address).or_default();
        match self.inputs.desired.services.get(&address) {
            Some(wanted) => self.wanted(address, wanted),
            None if self.inputs.may_remove => self.unwanted(address),
            None => {}
        }
    }

    /// A service that nobody wishes any more: no new flows at once, old ones go on until they end or the deadline.
    fn unwanted(&mut self, address: ServiceAddress) {
        let Some(entry) = self.programmed.services.get(&address) else {
            return;
        };
        let group = Group::Service(address);
        if entry.value.is_some() {
            self.push(
                group,
                MapOp::DelService {
                    key: key_of(&address),
                },
            );
        }
        self.delete_acl(group, entry, &BTreeMap::new());
        let mut candidates: Vec<Candidate> = entry.live.values().map(|id| self.leaving(*id)).collect();
        self.expire(&mut candidates, |id| entry.ring.counts.contains_key(&id));
        self.demote(group, &candidates, |_| false);
        self.describe(&candidates);
        let freed = |id: &u32| self.plan.notes.contains(&Note::Free { id: *id });
        if entry.value.is_none() && entry.acl.is_empty() && entry.slots.iter().all(freed) {
            self.plan.notes.push(Note::Forget { address });
        }
    }

    /// Backends whose service is not known any more drain by themselves.
    pub(super) fn orphans(&mut self) {
        if !self.inputs.may_remove {
            return;
        }
        let orphans: Vec<u32> = self.programmed.orphans.iter().copied().collect();
        for id in orphans {
            if self.programmed.slots[&id].record.state == backend_state::DEAD {
                continue;
            }
            let mut candidates = [self.leaving(id)];
            self.expire(&mut candidates, |_| false);
            self.demote(Group::Orphan(id), &candidates, |_| false);
            self.describe(&candidates);
        }
    }

    fn wanted(&mut self, address: ServiceAddress, wanted: &Wanted) {
        let service = &*wanted.service;
        let fresh;
        let entry = match self.programmed.services.get(&address) {
            Some(entry) => entry,
            None => {
                let Some(id) = self.service_ids.take() else {
                    let fault = format!("all {} service ids are in use", self.inputs.capacities.services);
                    self.reject(address, "", fault, raise("services"));
                    self.plan.waiting.insert(address);
                    return;
                };
                fresh = Entry::new(id);
                &fresh
            }
        };
        let new = entry.value.is_none();

        let mut candidates = self.candidates(entry, service);
        let (acl, acl_flags) = match self.acl(address, entry, &service.settings) {
            Some(acl) => acl,
            // The whole service would be open to clients that its list refuses.
            None if new => {
                self.plan.waiting.insert(address);
                return;
            }
            None => (entry.acl.clone(), entry.value.map_or(0, |v| v.flags & ACL_FLAGS)),
        };

        self.expire(&mut candidates, |id| entry.ring.counts.contains_key(&id));
        let members = members(&candidates, service.settings.when_empty);
        let rows = ring::rows_for(self.listed(entry, service));
        let ring = match self.ring(address, entry, &members, rows) {
            Ok(ring) => ring,
            Err(no_row) => {
                self.plan.waiting.insert(address);
                if let NoRow::Until(at) = no_row {
                    self.wake_at(at);
                } else {
                    let fault = format!("all {} ring rows are in use", self.inputs.capacities.ring_rows);
                    self.reject(address, "", fault, raise("ring_rows"));
                }
                if !new {
                    // The ring stays as it is, so what it names stays as it is.
                    self.promote(Group::Service(address), &candidates);
                    self.demote(Group::Service(address), &candidates, |id| {
                        entry.ring.counts.contains_key(&id)
                    });
                    self.note_service(address, entry);
                    self.describe(&candidates);
                }
                return;
            }
        };

        let group = Group::Service(address);
        self.note_service(address, entry);
        self.promote(group, &candidates);
        let timeouts = timeouts(&service.settings, self.inputs.policy.hz);
        if entry.timeouts != Some(timeouts) {
            self.push(
                group,
                MapOp::PutTimeouts {
                    service: entry.id,
                    timeouts,
                },
            );
        }
        let mut puts: Vec<(IpNet, u32)> = acl.iter().map(|(p, a)| (*p, *a)).collect();
        puts.retain(|(prefix, action)| entry.acl.get(prefix) != Some(action));
        longest_first(&mut puts);
        for (prefix, action) in puts {
            self.push(
                group,
                MapOp::PutAcl {
                    service: entry.id,
                    prefix,
                    action,
                },
            );
        }
        let flags = flags(&service.settings) | acl_flags;
        let value = service_value(entry, flags, &ring);
        if let RingChange::Put { row, ring } = ring {
            self.push(group, MapOp::PutRing { row, ring });
        }
        let vip = network::vip_value(address.vip, self.inputs);
        self.need.insert(address.vip);
        if self.programmed.vips.get(&address.vip) != Some(&vip) {
            self.push(
                group,
                MapOp::PutVip {
                    vip: address.vip,
                    value: vip,
                },
            );
        }
        if entry.value != Some(value) {
            self.push(
                group,
                MapOp::PutService {
                    key: key_of(&address),
                    service: value,
                },
            );
        }
        self.delete_acl(group, entry, &acl);
        self.demote(group, &candidates, |_| false);
        self.describe(&candidates);
    }

    fn note_service(&mut self, address: ServiceAddress, entry: &Entry) {
        if !self.programmed.services.contains_key(&address) {
            // In front of the notes about its backends and rings.
            self.plan.notes.insert(
                0,
                Note::Service {
                    address,
                    id: entry.id,
                },
            );
        }
    }

    /// What becomes of every backend that is wished for or still there.
    fn candidates(&mut self, entry: &Entry, service: &Service) -> Vec<Candidate> {
        let mut candidates = Vec::with_capacity(service.backends.len());
        let mut full = 0;
        for backend in &service.backends {
            let live = entry.live.get(&backend.address).copied();
            let reach = self.reach(service, backend, live);
            let reachable = matches!(reach, Reached::At(_) | Reached::AsBefore);
            let serves = backend.state == BackendState::Active && reachable;
            if live.is_none() && !serves {
                // It has no flows to keep: no id before it serves.
                continue;
            }
            let Some(id) = live.or_else(|| self.backend_ids.take()) else {
                full += 1;
                continue;
            };
            candidates.push(self.candidate(entry.id, id, backend, serves, reach));
        }
        if full > 0 {
            let fault = format!(
                "{full} of its backends do not fit: all {} ids are in use",
                self.inputs.capacities.backends
            );
            self.reject(service.address, "", fault, raise("backends"));
            self.plan.waiting.insert(service.address);
        }
        let wished = |address| {
            service
                .backends
                .binary_search_by_key(address, |b| b.address)
                .is_ok()
        };
        let gone: Vec<u32> = entry
            .live
            .iter()
            .filter(|(a, _)| !wished(a))
            .map(|(_, id)| *id)
            .collect();
        if self.inputs.may_remove {
            candidates.extend(gone.into_iter().map(|id| self.leaving(id)));
        } else {
            // Its source may not have spoken yet: it keeps its share, in the measure of those that are known.
            let measure = candidates
                .iter()
                .find_map(|c| Some((c.about.weight, *entry.ring.counts.get(&c.id)?)));
            candidates.extend(gone.into_iter().map(|id| self.kept(id, entry, measure)));
        }
        candidates
    }

    fn candidate(&self, service: u32, id: u32, backend: &Backend, serves: bool, reach: Reached) -> Candidate {
        let slot = self.programmed.slots.get(&id);
        let reason = match reach {
            Reached::Unroutable => "no route".into(),
            Reached::NoSnat => "no SNAT address of its family".into(),
            _ => backend.reason.clone(),
        };
        let draining = backend.state == BackendState::Draining;
        let mut record = slot.map(|s| s.record).unwrap_or(maps::Backend {
            addr: backend.address.ip().into(),
            port: Be16::new(backend.address.port()),
            epoch: self.programmed.epoch.wrapping_add(1).max(1),
            service,
            ..maps::Backend::default()
        });
        record.state = if serves {
            backend_state::ACTIVE
        } else {
            backend_state::DRAINING
        };
        if let Reached::At(Reach { hop, flags, snat }) = reach {
            record.hop = hop;
            record.flags = flags;
            (record.snat_first, record.snat_count) = snat;
        }
        let about = self.since(
            id,
            About {
                name: backend.name.clone(),
                weight: backend.weight,
                state: backend.state,
                reason,
                drain: backend.drain,
                leaving: false,
                since: self.inputs.now,
            },
        );
        let deadline = draining.then(|| {
            // A drain time that changed meanwhile counts from now.
            let known = self.programmed.about.get(&id);
            let known = known.is_none_or(|about| about.drain == backend.drain);
            slot.and_then(|s| s.deadline)
                .filter(|_| known)
                .unwrap_or(self.inputs.now + backend.drain)
        });
        Candidate {
            id,
            record,
            about,
            deadline,
            drainer: draining && !matches!(reach, Reached::Unroutable),
        }
    }

    /// A backend that is there and wished by nobody.
    fn leaving(&self, id: u32) -> Candidate {
        let slot = &self.programmed.slots[&id];
        let known = self.programmed.about.get(&id);
        let drain = known.map_or(self.inputs.policy.default_drain, |about| about.drain);
        let about = self.since(
            id,
            About {
                name: known.map_or_else(|| slot.address.to_string(), |about| about.name.clone()),
                weight: known.map_or(1, |about| about.weight),
                state: BackendState::Draining,
                reason: "removed".into(),
                drain,
                leaving: true,
                since: self.inputs.now,
            },
        );
        let record = maps::Backend {
            state: backend_state::DRAINING,
            ..slot.record
        };
        let deadline = Some(slot.deadline.unwrap_or(self.inputs.now + drain));
        Candidate {
            id,
            record,
            about,
            deadline,
            drainer: true,
        }
    }

    /// A backend that is there and may yet be wished for: it stays as it is.
    fn kept(&self, id: u32, entry: &Entry, measure: Option<(u32, u32)>) -> Candidate {
        let slot = &self.programmed.slots[&id];
        let active = slot.record.state == backend_state::ACTIVE;
        let share = entry.ring.counts.get(&id).copied().unwrap_or(0);
        let weight = match (self.programmed.about.get(&id), measure) {
            (Some(about), _) => about.weight,
            (None, Some((weight, of))) if of > 0 => {
                let weight = (u64::from(share) * u64::from(weight) + u64::from(of) / 2) / u64::from(of);
                u32::try_from(weight).unwrap_or(u32::MAX)
            }
            _ => 1,
        };
        let about = self.since(
            id,
            About {
                name: self
                    .programmed
                    .about
                    .get(&id)
                    .map_or_else(|| slot.address.to_string(), |a| a.name.clone()),
                weight: weight.max(1),
                state: if active {
                    BackendState::Active
                } else {
                    BackendState::Draining
                },
                reason: "waiting for its source".into(),
                drain: self.inputs.policy.default_drain,
                leaving: false,
                since: self.inputs.now,
            },
        );
        Candidate {
            id,
            record: slot.record,
            about,
            deadline: slot.deadline,
            drainer: !active,
        }
    }

    /// Keeps the time of an unchanged state.
    fn since(&self, id: u32, mut about: About) -> About {
        if let Some(old) = self
            .programmed
            .about
            .get(&id)
            .filter(|_| self.programmed.slots.contains_key(&id))
            && old.state == about.state
            && old.leaving == about.leaving
            && old.reason == about.reason
        {
            about.since = old.since;
        }
        about
    }

    /// Turns backends dead whose draining is over: by the deadline, or because a sweep found no flow of a leaving one.
    /// `in_use` tells which may still get new flows although they drain.
    fn expire(&mut self, candidates: &mut [Candidate], in_use: impl Fn(u32) -> bool) {
        for c in candidates {
            let Some(deadline) = c.deadline.filter(|_| c.record.state == backend_state::DRAINING) else {
                continue;
            };
            let Some(slot) = self.programmed.slots.get(&c.id) else {
                continue;
            };
            let drained =
                slot.record.state == backend_state::DRAINING && self.swept_empty(c.id, slot.changed);
            if deadline <= self.inputs.now || (c.about.leaving && drained && !in_use(c.id)) {
                c.record.state = backend_state::DEAD;
            } else {
                self.wake_at(deadline);
            }
        }
    }

    /// Writes that a new ring needs: new backends, returning ones, changed ways.
    fn promote(&mut self, group: Group, candidates: &[Candidate]) {
        for c in candidates {
            let old = self.programmed.slots.get(&c.id).map(|slot| slot.record);
            let now = match old {
                // The way is brought up to date now, the state when the ring no longer names it.
                Some(old) if c.record.state != backend_state::ACTIVE => maps::Backend {
                    state: old.state,
                    ..c.record
                },
                _ => c.record,
            };
            if is_near(&now) {
                self.need.insert(now.addr.into());
            }
            if let Some(old) = old.filter(|old| is_near(old) && !is_near(&now)) {
                *self.unneeded.entry(old.addr.into()).or_default() += 1;
            }
            if old != Some(now) {
                self.push(
                    group,
                    MapOp::PutBackend {
                        id: c.id,
                        backend: now,
                    },
                );
            }
        }
    }

    /// Writes that only the old ring forbade: draining and dead, but for those that `keep` names.
    fn demote(&mut self, group: Group, candidates: &[Candidate], keep: impl Fn(u32) -> bool) {
        for c in candidates
            .iter()
            .filter(|c| c.record.state != backend_state::ACTIVE && !keep(c.id))
        {
            if self
                .programmed
                .slots
                .get(&c.id)
                .is_some_and(|slot| slot.record.state != c.record.state)
            {
                self.push(
                    group,
                    MapOp::PutBackend {
                        id: c.id,
                        backend: c.record,
                    },
                );
            }
        }
    }

    /// Notes what people are told and when draining ends.
    fn describe(&mut self, candidates: &[Candidate]) {
        for c in candidates {
            if self.programmed.about.get(&c.id) != Some(&c.about) {
                self.plan.notes.push(Note::About {
                    id: c.id,
                    about: c.about.clone(),
                });
            }
            let known = self.programmed.slots.get(&c.id);
            if known.is_some_and(|slot| slot.deadline != c.deadline) {
                self.plan.notes.push(Note::Deadline {
                    id: c.id,
                    deadline: c.deadline,
                });
            }
        }
    }

    fn reach(&mut self, service: &Service, backend: &Backend, live: Option<u32>) -> Reached {
        let ip = backend.address.ip();
        let Some(place) = self.inputs.topology.places.get(&ip) else {
            return match self.inputs.asked.get(&ip).copied() {
                // Fail-static: what is in the maps stays right until something better is known.
                _ if live.is_some() => Reached::AsBefore,
                Some(until) if until > self.inputs.now => {
                    self.wake_at(until);
                    self.plan.waiting.insert(service.address);
                    Reached::NotYet
                }
                _ => {
                    self.plan.waiting.insert(service.address);
                    Reached::Unroutable
                }
            };
        };
        if *place == Place::Unroutable {
            return Reached::Unroutable;
        }
        match network::reach(place, ip.is_ipv6(), service.settings.snat, &self.ranges) {
            Ok(reach) => Reached::At(reach),
            Err(NoSnat) => {
                let family = if ip.is_ipv6() { "IPv6" } else { "IPv4" };
                let fault = format!(
                    "backend {} needs source translation and the node has no {family} address for it",
                    backend.address
                );
                let remedy = format!("add an {family} address to `snat.addresses` or to the device");
                self.reject(service.address, &backend.name, fault, remedy);
                Reached::NoSnat
            }
        }
    }

    /// How many backends the service lists, in whatever state: the measure of its ring. While sources are waited for,
    /// those that served before count too.
    fn listed(&self, entry: &Entry, service: &Service) -> usize {
        let wished = service.backends.len();
        if self.inputs.may_remove {
            return wished;
        }
        let unheard = entry.live.iter().filter(|(address, id)| {
            self.programmed.slots[id].record.state == backend_state::ACTIVE
                && service
                    .backends
                    .binary_search_by_key(address, |b| &b.address)
                    .is_err()
        });
        wished + unheard.count()
    }

    /// The ring for these members, if it is another than the committed one.
    fn ring(
        &mut self,
        address: ServiceAddress,
        entry: &Entry,
        members: &[Member],
        rows: u32,
    ) -> Result<RingChange, NoRow> {
        let current = entry.value.filter(|value| value.ring_row != NO_RING);
        if members.is_empty() {
            return Ok(if current.is_some() {
                RingChange::Clear
            } else {
                RingChange::Keep
            });
        }
        if let (Some((built, digest)), Some(current)) = (&entry.built, current)
            && **built == *members
            && current.ring_mask + 1 == rows
            && *digest == entry.ring.digest
        {
            return Ok(RingChange::Keep);
        }
        let Some(ring) = ring::build(members, rows) else {
            return Ok(RingChange::Keep);
        };
        let digest = ring::digest(&ring);
        let built = Note::Built {
            address,
            members: Arc::from(members),
            digest,
        };
        if current.is_some() && digest == entry.ring.digest {
            self.plan.notes.push(built);
            return Ok(RingChange::Keep);
        }
        let (programmed, inputs) = (self.programmed, self.inputs);
        let free = self
            .rows
            .get_or_insert_with(|| Rows::new(programmed, inputs.capacities.ring_rows, inputs.now));
        let row = free.take(rows, current.is_none())?;
        self.plan.notes.push(built);
        Ok(RingChange::Put { row, ring })
    }

    /// The entries and flags of the allow and deny lists; `None` (and a rejection) when they do not fit.
    fn acl(
        &mut self,
        address: ServiceAddress,
        entry: &Entry,
        settings: &ServiceSettings,
    ) -> Option<(BTreeMap<IpNet, u32>, u32)> {
        let mut acl: BTreeMap<IpNet, u32> = settings.allow.iter().map(|p| (p.trunc(), ACL_ALLOW)).collect();
        acl.extend(settings.deny.iter().map(|p| (p.trunc(), ACL_DENY)));
        let new = acl
            .keys()
            .filter(|prefix| !entry.acl.contains_key(*prefix))
            .count();
        let used = self.programmed.acl_entries() + self.acl_puts;
        if new > acl_room(self.inputs.capacities, used) {
            let fault = format!(
                "its {new} new allow and deny prefixes do not fit: {used} of {} are in use",
                self.inputs.capacities.acl
            );
            self.reject(address, "", fault, raise("acl"));
            return None;
        }
        self.acl_puts += new;
        let mut flags = 0;
        if !acl.is_empty() {
            flags |= service_flags::ACL;
        }
        if !settings.allow.is_empty() {
            flags |= service_flags::ACL_DEFAULT_DENY;
        }
        Some((acl, flags))
    }

    /// Removes entries that are not wished for, shortest prefix first, after the commit: see [`longest_first`].
    fn delete_acl(&mut self, group: Group, entry: &Entry, wished: &BTreeMap<IpNet, u32>) {
        let mut gone: Vec<(IpNet, u32)> = entry.acl.iter().map(|(p, a)| (*p, *a)).collect();
        gone.retain(|(prefix, _)| !wished.contains_key(prefix));
        longest_first(&mut gone);
        for (prefix, _) in gone.into_iter().rev() {
            self.push(
                group,
                MapOp::DelAcl {
                    service: entry.id,
                    prefix,
                },
            );
        }
    }
}

/// How far the question "where is this backend" has got.
enum Reached {
    At(Reach),
    AsBefore,
    NotYet,
    Unroutable,
    NoSnat,
}

const ACL_FLAGS: u32 = service_flags::ACL | service_flags::ACL_DEFAULT_DENY;

/// Who is in the ring: the active ones, or by policy those that drain, never one that is about to be dead.
fn members(candidates: &[Candidate], when_empty: EmptyPolicy) -> Vec<Member> {
    let member = |c: &Candidate| Member {
        address: std::net::SocketAddr::new(c.record.addr.into(), c.record.port.get()),
        weight: c.about.weight.max(1),
        id: c.id,
    };
    let in_state = |state| candidates.iter().filter(move |c| c.record.state == state);
    let mut members: Vec<Member> = in_state(backend_state::ACTIVE).map(member).collect();
    if members.is_empty() && when_empty == EmptyPolicy::DrainersThenRefuse {
        let known = in_state(backend_state::DRAINING).filter(|c| c.drainer);
        members.extend(known.map(member));
    }
    members.sort_unstable();
    members
}

fn service_value(entry: &Entry, flags: u32, ring: &RingChange) -> maps::Service {
    let old = entry.value.unwrap_or(maps::Service {
        id: entry.id,
        generation: entry.generation,
        ring_row: NO_RING,
        previous_row: NO_RING,
        ..maps::Service::default()
    });
    let (ring_row, ring_mask) = match ring {
        RingChange::Keep => return maps::Service { flags, ..old },
        RingChange::Clear => (NO_RING, 0),
        RingChange::Put { row, ring } => (*row, (ring.len() / lb_common::limits::RING_ROW) as u32 - 1),
    };
    maps::Service {
        flags,
        generation: old.generation.wrapping_add(1),
        ring_row,
        ring_mask,
        previous_row: old.ring_row,
        previous_mask: old.ring_mask,
        ..old
    }
}

fn flags(settings: &ServiceSettings) -> u32 {
    let mut flags = match settings.snat {
        SnatMode::Auto => 0,
        SnatMode::Always => service_flags::SNAT_ALWAYS,
        SnatMode::Never => service_flags::SNAT_NEVER,
    };
    let on = [
        (settings.client_ip_affinity, service_flags::AFFINITY),
        (settings.reset_unknown, service_flags::RESET_UNKNOWN),
        (
            settings.when_empty != EmptyPolicy::Drop,
            service_flags::REFUSE_WHEN_EMPTY,
        ),
    ];
    for (_, flag) in on.into_iter().filter(|(on, _)| *on) {
        flags |= flag;
    }
    flags
}

/// Timeouts in ticks of the flow clock, at least one.
fn timeouts(settings: &ServiceSettings, hz: u32) -> maps::Timeouts {
    let ticks = |d: std::time::Duration| {
        let ticks = d.as_millis() * u128::from(hz) / 1000;
        u32::try_from(ticks)
            .unwrap_or(i32::MAX as u32)
            .clamp(1, i32::MAX as u32)
    };
    let t = settings.timeouts;
    maps::Timeouts {
        established: ticks(t.tcp_established),
        syn: ticks(t.tcp_syn),
        closing: ticks(t.tcp_closing),
        udp: ticks(t.udp),
    }
}

fn raise(setting: &str) -> String {
    format!(
        "raise `limits.{setting}` and run `weir detach` before the next start, or remove what is not needed"
    )
}
