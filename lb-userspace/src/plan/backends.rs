//! What becomes of the backends of one service: who serves, who drains, who is dead.

use std::{net::SocketAddr, time::Instant};

use lb_common::{
    addr::Be16,
    maps::{self, backend_state},
};

use super::{
    Group, Planner,
    network::{self, NoSnat, Reach},
    programmed::{About, Entry, Note, is_near},
    raise,
};
use crate::{
    datapath::{MapOp, Place},
    health::WHOLE,
    model::{Backend, BackendState, Service, ServiceAddress},
};

/// What becomes of one backend.
pub(super) struct Candidate {
    pub id: u32,
    pub record: maps::Backend,
    pub about: About,
    pub deadline: Option<Instant>,
    /// May serve new flows when no active backend is left.
    pub drainer: bool,
    /// Tenths of its share.
    pub tenths: u8,
}

/// How far the question "where is this backend" has got.
enum Reached {
    At(Reach),
    AsBefore,
    NotYet,
    Unroutable,
    /// The route to a container of this node leaves the node.
    Outside,
    NoSnat,
}

impl Planner<'_> {
    /// What becomes of every backend that is wished for or still there.
    pub(super) fn candidates(&mut self, entry: &Entry, service: &Service) -> Vec<Candidate> {
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
            let mut candidate = self.candidate(entry.id, id, backend, serves, reach);
            candidate.tenths = service.slow.get(&backend.address).copied().unwrap_or(WHOLE);
            candidates.push(candidate);
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
        let measure = candidates
            .iter()
            .find_map(|c| Some((c.about.weight, *entry.ring.counts.get(&c.id)?)));
        let gone = entry.live.iter().filter(|(a, _)| !wished(a));
        let gone: Vec<Candidate> = gone
            .map(|(backend, id)| match self.may_go(service.address, *backend) {
                true => self.leaving(*id),
                // Its source may not have spoken yet: it keeps its share, in the measure of those that are known.
                false => self.kept(*id, entry, measure),
            })
            .collect();
        candidates.extend(gone);
        candidates
    }

    /// Whether a backend that nobody wishes may leave.
    pub(super) fn may_go(&self, service: ServiceAddress, backend: SocketAddr) -> bool {
        self.inputs.may_remove && !self.inputs.unclaimed.contains(&(service, backend))
    }

    fn candidate(&self, service: u32, id: u32, backend: &Backend, serves: bool, reach: Reached) -> Candidate {
        let slot = self.programmed.slots.get(&id);
        let reason = match reach {
            Reached::Unroutable => "no route".into(),
            Reached::Outside => "its route leaves this node".into(),
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
            drainer: draining && !matches!(reach, Reached::Unroutable | Reached::Outside),
            tenths: WHOLE,
        }
    }

    /// A backend that is there and wished by nobody.
    pub(super) fn leaving(&self, id: u32) -> Candidate {
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
            tenths: WHOLE,
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
            tenths: WHOLE,
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
    pub(super) fn expire(&mut self, candidates: &mut [Candidate], in_use: impl Fn(u32) -> bool) {
        if !self.inputs.may_remove {
            // Whoever wishes it back may not have spoken yet.
            return;
        }
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
    pub(super) fn promote(&mut self, group: Group, candidates: &[Candidate]) {
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
                self.need.addresses.insert(now.addr.into());
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
    pub(super) fn demote(&mut self, group: Group, candidates: &[Candidate], keep: impl Fn(u32) -> bool) {
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
    pub(super) fn describe(&mut self, candidates: &[Candidate]) {
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
        let attachment = backend.attachment;
        if let Place::Remote {
            uplink: true, slot, ..
        } = place
            && !attachment.is_address()
        {
            let device = self.inputs.topology.devices.get(slot);
            let device = device.map_or("?", |device| device.name.as_str());
            let fault = format!(
                "{ip} is a container of this node, and its route leaves the node by {device}: its network is no bridge of \
                 this node, or one without an address of the node"
            );
            let remedy =
                "connect the container to a bridge network and set the label `network` to it; networks of \
                          macvlan and ipvlan need a device of their kind on the node, named in `interfaces`"
                    .into();
            self.reject(service.address, &backend.name, fault, remedy);
            return Reached::Outside;
        }
        let mode = service.settings.snat;
        match network::reach(place, ip.is_ipv6(), mode, attachment, &self.ranges) {
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
}
