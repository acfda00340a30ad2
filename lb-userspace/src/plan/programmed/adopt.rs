//! Reading the maps: the model of what an earlier agent left, and the truth again from time to time.

use std::{collections::BTreeSet, net::IpAddr, time::Instant};

use lb_common::maps::{ACL_DENY, EVERY_SERVICE, NO_RING, backend_state};

use super::{Note, Programmed, ROW_QUARANTINE, Ring, address_of, key_of};
use crate::datapath::Dump;

impl Programmed {
    /// The model of a dump: ids and epochs are kept, dead ids stay in quarantine until a sweep has seen them unused.
    pub fn adopt(dump: &Dump, now: Instant) -> Self {
        let mut this = Self {
            vips: dump.vips.clone(),
            devices: dump.devices.clone(),
            snat: dump.snat_addresses.clone(),
            settings: dump.settings,
            epoch: dump.backends.values().map(|b| b.epoch).max().unwrap_or(0),
            ..Self::default()
        };
        for (key, service) in &dump.services {
            let address = address_of(key);
            this.note(&Note::Service {
                address,
                id: service.id,
            });
            if let Some(entry) = this.services.get_mut(&address) {
                entry.value = Some(*service);
                entry.generation = service.generation;
                entry.timeouts = dump.timeouts.get(&service.id).copied();
                if let Some(ids) = dump.rings.get(&service.ring_row) {
                    entry.ring = Ring::of(ids);
                }
            }
            if service.previous_row != NO_RING {
                this.retired.push((
                    service.previous_row,
                    service.previous_mask + 1,
                    now + ROW_QUARANTINE,
                ));
            }
        }
        for ((service, prefix), action) in &dump.acl {
            match this.entry_by_id(*service) {
                Some(entry) => entry.acl.insert(*prefix, *action),
                None if *service == EVERY_SERVICE => {
                    this.firewall.insert(*prefix);
                    None
                }
                None => this.stray_acl.insert((*service, *prefix), *action),
            };
            this.acl_entries += 1;
        }
        for (id, backend) in &dump.backends {
            this.put_backend(*id, *backend, now);
        }
        this.ours = this.carried();
        this.doubtful = this.only_dead();
        this
    }

    /// Addresses that no record but dead ones has. A filter was written before what needs it and lasts until ids are freed, but
    /// which dead ones are free no map tells.
    fn only_dead(&self) -> BTreeSet<IpAddr> {
        let alive = self
            .slots
            .values()
            .filter(|slot| slot.record.state != backend_state::DEAD);
        let alive: BTreeSet<IpAddr> = alive.map(|slot| slot.address.ip()).collect();
        let known = |ip: &&IpAddr| {
            alive.contains(ip) || self.vips.contains_key(ip) || self.snat.values().any(|snat| snat == *ip)
        };
        self.near.keys().filter(|ip| !known(ip)).copied().collect()
    }

    /// Takes what was read back for the truth, and keeps what only the agent knows: names, deadlines, freed ids.
    pub fn resync(&mut self, dump: &Dump, now: Instant) {
        let mut new = Self::adopt(dump, now);
        new.commits = self.commits;
        new.epoch = new.epoch.max(self.epoch);
        new.about = std::mem::take(&mut self.about);
        // A replaced row starts its quarantine again only where the commit that replaced it was not known of.
        let known: BTreeSet<(u32, u32)> = self
            .services
            .iter()
            .filter_map(|(address, entry)| {
                entry
                    .value
                    .filter(|v| dump.services.get(&key_of(address)) == Some(v))
            })
            .map(|value| (value.previous_row, value.previous_mask + 1))
            .collect();
        new.retired
            .retain(|(first, rows, _)| !known.contains(&(*first, *rows)));
        new.retired.append(&mut self.retired);
        for (address, old) in std::mem::take(&mut self.services) {
            let taken = new
                .service_ids
                .get(&old.id)
                .is_some_and(|holder| *holder != address);
            if !new.services.contains_key(&address) && !taken {
                // Its flows go on: the orphans that it left are its own.
                new.note(&Note::Service { address, id: old.id });
                new.adopt_orphans(old.id);
                new.adopt_stray_acl(old.id);
            }
            if let Some(entry) = new.services.get_mut(&address).filter(|entry| entry.id == old.id) {
                entry.generation = entry.generation.max(old.generation);
                entry.built = old.built;
                if entry.value.is_none() {
                    entry.timeouts = old.timeouts;
                }
            }
        }
        for (id, old) in &self.slots {
            if let Some(slot) = new
                .slots
                .get_mut(id)
                .filter(|s| s.record.epoch == old.record.epoch)
            {
                slot.deadline = old.deadline;
                if slot.record.state == old.record.state {
                    slot.changed = old.changed;
                }
            }
        }
        for (id, old) in &self.free {
            if new.slots.get(id).is_some_and(|s| s.record == *old) {
                new.note(&Note::Free { id: *id });
            }
        }
        // The filter is not part of a dump: what was written to it before is assumed to be still there.
        let sure = |ip: &IpAddr| self.ours.addresses.contains(ip) && !self.doubtful.contains(ip);
        new.doubtful.retain(|ip| !sure(ip));
        let freed = |ip: &IpAddr| new.doubtful.contains(ip) && !new.near.contains_key(ip);
        new.ours.addresses.retain(|ip| !freed(ip));
        new.ours.extend(&self.ours);
        *self = new;
    }

    /// The maps as this model has them, but for the contents of rings.
    pub fn dump_without_rings(&self) -> Dump {
        let mut dump = Dump {
            vips: self.vips.clone(),
            devices: self.devices.clone(),
            snat_addresses: self.snat.clone(),
            settings: self.settings,
            backends: self.free.clone(),
            acl: self.stray_acl.clone(),
            ..Dump::default()
        };
        dump.backends
            .extend(self.slots.iter().map(|(id, slot)| (*id, slot.record)));
        let firewall = self.firewall.iter();
        dump.acl
            .extend(firewall.map(|prefix| ((EVERY_SERVICE, *prefix), ACL_DENY)));
        for (address, entry) in &self.services {
            dump.acl.extend(
                entry
                    .acl
                    .iter()
                    .map(|(prefix, action)| ((entry.id, *prefix), *action)),
            );
            if let Some(service) = entry.value {
                dump.services.insert(key_of(address), service);
                dump.timeouts.extend(entry.timeouts.map(|t| (entry.id, t)));
            }
        }
        dump
    }

    fn adopt_orphans(&mut self, service: u32) {
        let own: Vec<u32> = self
            .orphans
            .iter()
            .copied()
            .filter(|id| self.slots[id].record.service == service)
            .collect();
        for id in own {
            self.orphans.remove(&id);
            let (address, dead) = (
                self.slots[&id].address,
                self.slots[&id].record.state == backend_state::DEAD,
            );
            if let Some(entry) = self.entry_by_id(service) {
                entry.slots.insert(id);
                if !dead {
                    entry.live.insert(address, id);
                }
            }
        }
    }

    fn adopt_stray_acl(&mut self, service: u32) {
        for ((id, prefix), action) in std::mem::take(&mut self.stray_acl) {
            match self.entry_by_id(service).filter(|_| id == service) {
                Some(entry) => drop(entry.acl.insert(prefix, action)),
                None => drop(self.stray_acl.insert((id, prefix), action)),
            }
        }
    }
}
