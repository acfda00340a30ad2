//! The plan of one service, and of backends whose service is gone.

use std::collections::BTreeMap;

use ipnet::IpNet;
use lb_common::maps::backend_state;

use super::{
    Group, Planner,
    backends::Candidate,
    ids::NoRow,
    network,
    programmed::{Entry, Note, key_of},
    raise,
    rings::{RingChange, members, service_value},
    settings::{ACL_FLAGS, flags, longest_first, timeouts},
};
use crate::{datapath::MapOp, desired::Wanted, model::ServiceAddress, ring};

impl Planner<'_> {
    /// Plans one service.
    pub(super) fn service(&mut self, address: ServiceAddress) {
        self.plan.rejections.entry(address).or_default();
        if self.evicted.contains(&address) {
            return;
        }
        match self.inputs.desired.services.get(&address) {
            Some(wanted) => self.wanted(address, wanted),
            None if self.may_be_unwanted(address) => self.unwanted(address),
            None => {}
        }
    }

    /// Whether a service that nobody wishes may go: not with a backend whose source may not have spoken yet.
    fn may_be_unwanted(&self, address: ServiceAddress) -> bool {
        let entry = self.programmed.services.get(&address);
        let mut live = entry.into_iter().flat_map(|entry| entry.live.keys());
        self.inputs.may_remove && live.all(|backend| self.may_go(address, *backend))
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
        if !entry.slots.is_subset(&self.freed) {
            return;
        }
        if entry.value.is_none() && entry.acl.is_empty() {
            self.plan.notes.push(Note::Forget { address });
        } else {
            // Forgotten once this plan's deletions have been made, which the next pass will see.
            self.plan.waiting.insert(address);
            self.wake_at(self.inputs.now);
        }
    }

    /// Takes a remembered service out of the maps, the one that expires first of those that `suit`; whether there was one.
    fn evict(&mut self, suit: impl Fn(&Entry) -> bool) -> bool {
        let remembered = self
            .inputs
            .desired
            .services
            .iter()
            .filter_map(|(address, wanted)| {
                let entry = self.programmed.services.get(address)?;
                let gives_way = !self.evicted.contains(address) && suit(entry);
                // Its id comes back once it has no flows; one that is on its way out already goes on.
                let busy = !entry.slots.is_subset(&self.freed);
                Some((busy, entry.value.is_some(), wanted.kept_until?, *address)).filter(|_| gives_way)
            });
        let Some((.., address)) = remembered.min() else {
            return false;
        };
        self.evicted.insert(address);
        self.unwanted(address);
        true
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
                    // A later pass has the id, unless flows of the evicted service still go on.
                    if wanted.kept_until.is_some() || self.evict(|_| true) {
                        self.plan.waiting.insert(address);
                        return;
                    }
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
        let mut ring = self.ring(address, entry, &members, rows);
        if let (Err(no_row), Some(_)) = (&ring, wanted.kept_until) {
            // What is only remembered takes no row from others: it refuses although some of its backends still drain.
            if let NoRow::Until(at) = no_row {
                self.plan.waiting.insert(address);
                self.wake_at(*at);
            }
            ring = self.ring(address, entry, &[], rows);
        }
        let ring = match ring {
            Ok(ring) => ring,
            Err(no_row) => {
                self.plan.waiting.insert(address);
                if let NoRow::Until(at) = no_row {
                    self.wake_at(at);
                } else if self.evict(Entry::has_ring) {
                    self.wake_at(self.inputs.now);
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
        let flags = flags(&service.settings, self.inputs.policy) | acl_flags;
        let value = service_value(entry, flags, &ring);
        if let RingChange::Put { row, ring } = ring {
            self.push(group, MapOp::PutRing { row, ring });
        }
        let vip = network::vip_value(address.vip, self.inputs);
        self.need.addresses.insert(address.vip);
        self.need.ports.insert((address.protocol, address.port));
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
}
