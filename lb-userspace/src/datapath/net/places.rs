//! Where backends are, and the neighbour entries that are kept fresh for them.

use std::{collections::BTreeSet, net::IpAddr};

use super::{Follower, View};
use crate::datapath::{
    Place,
    netlink::{self, NetlinkError},
    state::StateFile,
    uplinks::NO_ETHERNET,
};

impl Follower {
    /// Where a backend is, and the neighbour entry that must be kept for it.
    pub(super) async fn place(
        &mut self,
        address: IpAddr,
        view: &View,
        faults: &mut Vec<String>,
    ) -> Result<(Place, Option<(u32, IpAddr)>), NetlinkError> {
        let route = match self.routes.get(&address) {
            Some(route) => *route,
            None => {
                let route = netlink::route(&self.handle, address).await?;
                self.routes.insert(address, route);
                route
            }
        };
        let Some(route) = route else {
            return Ok((Place::Unroutable, None));
        };
        if route.local {
            return Ok((Place::Node, None));
        }
        let device = view.link(route.ifindex);
        let Some((slot, device)) = self.slots.get(route.ifindex).zip(device) else {
            // Replies would come in where no program of ours sees them.
            let name = device.map_or("?", |link| link.name.as_str());
            faults.push(match device {
                Some(link) if !link.serves() => format!(
                    "backend {address}: its route leaves by {name}: {NO_ETHERNET}: give it an address that is reached by an Ethernet \
                     device"
                ),
                _ => format!("backend {address}: its route leaves by {name}, which is not in `interfaces`: add it"),
            });
            return Ok((Place::Unroutable, None));
        };
        if view.has_containers(device) && route.gateway.is_none() {
            return Ok((Place::Bridge { slot }, None));
        }
        // Behind a gateway on a bridge (a container that routes) the way back is that container's affair: the
        // backend is treated as remote, so that source translation brings its replies here.
        let hop = (route.ifindex, route.gateway.unwrap_or(address));
        let mac = view.neighbours.get(&hop).and_then(|neighbour| neighbour.mac);
        // On its own device of such a kind the node reaches its macvlan and ipvlan containers; on the parent it never does.
        let own_link = device.bridge || device.vlan_port;
        let beyond = view.uplinks.devices.contains(&route.ifindex);
        let uplink = beyond && (route.gateway.is_some() || !own_link);
        Ok((Place::Remote { slot, mac, uplink }, Some(hop)))
    }

    /// Has the kernel keep the entries of `hops` fresh, and no others of ours. Packets that XDP sends do not
    /// refresh them, and a plain entry would go stale unnoticed when a MAC moves.
    pub(super) async fn manage(&mut self, hops: BTreeSet<(u32, IpAddr)>, view: &View) -> Vec<String> {
        let mut faults = Vec::new();
        let name = |ifindex: u32| {
            view.links
                .iter()
                .find(|link| link.ifindex == ifindex)
                .map_or(String::new(), |link| link.name.clone())
        };
        let record = |state: &StateFile, add: bool, hop: &(u32, IpAddr)| {
            let entry = (name(hop.0), hop.1);
            state.update(|changes| {
                if add {
                    changes.neighbours.insert(entry);
                } else {
                    changes.neighbours.remove(&entry);
                }
            })
        };
        for hop in &hops {
            match view.neighbours.get(hop) {
                Some(entry) if entry.managed || entry.permanent => continue,
                _ => {}
            }
            faults.extend(
                record(&self.task.state, true, hop)
                    .err()
                    .map(|e| format!("state file: {e}")),
            );
            self.managed.insert(*hop);
            let result = netlink::manage_neighbour(&self.handle, hop.0, hop.1).await;
            faults.extend(result.err().map(|e| format!("device {}: {e}", name(hop.0))));
        }
        let ours: BTreeSet<_> = self.task.state.get().neighbours;
        for link in &view.links {
            let of_link = ours.iter().filter(|(device, _)| *device == link.name);
            self.managed
                .extend(of_link.map(|(_, address)| (link.ifindex, *address)));
        }
        for hop in self.managed.difference(&hops).copied().collect::<Vec<_>>() {
            self.managed.remove(&hop);
            let result = netlink::remove_neighbour(&self.handle, hop.0, hop.1).await;
            faults.extend(result.err().map(|e| e.to_string()));
            faults.extend(
                record(&self.task.state, false, &hop)
                    .err()
                    .map(|e| format!("state file: {e}")),
            );
        }
        faults
    }
}
