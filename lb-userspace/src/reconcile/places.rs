//! Where backends are: what is asked of the follower of the network, and what it answers.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Instant,
};

use super::Reconciler;
use crate::{
    datapath::{Place, Topology},
    model::ServiceAddress,
};

impl Reconciler {
    /// Takes in how the network is now. Only what differs is copied: there may be 100,000 places, and each new backend
    /// makes a new topology.
    pub fn set_topology(&mut self, new: &Topology) {
        let old = &mut self.topology;
        if (old.loopback_ifindex, &old.devices, &old.node_addresses)
            != (new.loopback_ifindex, &new.devices, &new.node_addresses)
        {
            old.loopback_ifindex = new.loopback_ifindex;
            old.devices.clone_from(&new.devices);
            old.node_addresses.clone_from(&new.node_addresses);
            self.all_dirty = true;
        }
        for ip in differing(&old.places, &new.places) {
            match new.places.get(&ip) {
                Some(place) => {
                    self.asked.remove(&ip);
                    old.places.insert(ip, place.clone())
                }
                None => old.places.remove(&ip),
            };
            self.dirty.extend(self.heard.services_at(ip));
        }
    }

    /// Addresses that the topology shall find the place of from now on (`true`), or need not any more (`false`), since
    /// the last call: those of desired backends, and of backends whose flows still go on.
    pub fn place_changes(&mut self) -> Vec<(IpAddr, bool)> {
        let waiting: BTreeSet<IpAddr> = self
            .programmed
            .waiting_slots()
            .map(|(_, slot)| slot.address.ip())
            .collect();
        let mut touched = self.heard.take_touched();
        touched.extend(self.waiting_places.symmetric_difference(&waiting));
        let wanted = |ip: IpAddr| (ip, self.heard.has_backend_at(ip) || waiting.contains(&ip));
        let changes = touched.into_iter().map(wanted).collect();
        self.waiting_places = waiting;
        changes
    }

    /// New backends wait for their place, but not for ever.
    pub(super) fn ask_for_places(&mut self, changed: &BTreeSet<ServiceAddress>, now: Instant) {
        let until = now + self.options.place_wait;
        let services = &self.heard.desired().services;
        let backends = changed
            .iter()
            .filter_map(|a| services.get(a))
            .flat_map(|w| &w.service.backends);
        for ip in backends
            .map(|b| b.address.ip())
            .filter(|ip| !self.topology.places.contains_key(ip))
        {
            self.asked.entry(ip).or_insert(until);
        }
        if !changed.is_empty() {
            self.asked
                .retain(|ip, _| self.heard.services_at(*ip).next().is_some());
        }
    }
}

/// Addresses whose place is not the same in both: one walk along both.
fn differing(old: &BTreeMap<IpAddr, Place>, new: &BTreeMap<IpAddr, Place>) -> Vec<IpAddr> {
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    let mut differing = Vec::new();
    loop {
        let order = match (old.peek(), new.peek()) {
            (Some((a, _)), Some((b, _))) => a.cmp(b),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return differing,
        };
        let before = if order.is_le() { old.next() } else { None };
        let after = if order.is_ge() { new.next() } else { None };
        if before != after {
            differing.extend(before.or(after).map(|(ip, _)| *ip));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differing_places_are_found() {
        let places = |places: &[(u8, Place)]| -> BTreeMap<IpAddr, Place> {
            let place = |(host, place): &(u8, Place)| (IpAddr::from([10, 0, 0, *host]), place.clone());
            places.iter().map(place).collect()
        };
        let bridge = |slot| Place::Bridge { slot };
        let old = places(&[(1, Place::Node), (2, bridge(1)), (3, bridge(1)), (9, Place::Node)]);
        let new = places(&[
            (2, bridge(1)),
            (3, bridge(2)),
            (4, Place::Unroutable),
            (9, Place::Node),
        ]);
        let hosts = [1, 3, 4].map(|host| IpAddr::from([10, 0, 0, host]));
        assert_eq!(differing(&old, &new), hosts);
        assert_eq!(differing(&new, &old), hosts);
        assert_eq!(differing(&old, &old), Vec::<IpAddr>::new());
    }
}
