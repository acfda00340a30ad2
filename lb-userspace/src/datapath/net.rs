//! Follows the network of the node: attaches programs to devices as they come, keeps next hops resolved, announces
//! VIPs, and publishes what the plan needs as one value.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    ops::RangeInclusive,
    time::Duration,
};

use lb_common::maps::Device;
use rtnetlink::Handle;
use tokio::{sync::watch, time};

use super::{
    DeviceInfo, Place, Topology, announce,
    attach::{Attacher, DeviceWish, XdpChoice},
    netlink::{self, Change, Link, Neighbour, NetlinkError, OwnAddress, Route},
    slots::Slots,
    state::StateFile,
    sysctl,
};
use crate::status::AttachmentStatus;

/// Events that come within this time are handled together: a container start makes a dozen of them.
const DEBOUNCE: Duration = Duration::from_millis(10);
/// Everything is looked at anew this often, for events that the kernel lost.
const RESYNC: Duration = Duration::from_secs(30);

/// An interface of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InterfaceName {
    /// The device of the IPv4 default route.
    Auto,
    /// By name.
    Named(String),
}

/// What the configuration says of the network; may change while the agent runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetConfig {
    /// Where clients and remote backends are.
    pub interfaces: Vec<InterfaceName>,
    /// How XDP is attached there.
    pub xdp: XdpChoice,
    /// VIPs to put on interfaces: (interface, VIP).
    pub announce: BTreeSet<(String, IpAddr)>,
    /// VIPs, whoever puts them on interfaces: never sources of translation.
    pub vips: BTreeSet<IpAddr>,
    /// Ports for source translation, kept from the node's own sockets.
    pub snat_ports: Option<RangeInclusive<u16>>,
}

/// What people should know of the network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetReport {
    /// Programs by device.
    pub attachments: Vec<AttachmentStatus>,
    /// What is wrong at the moment.
    pub faults: Vec<String>,
}

/// Everything the task needs.
#[derive(Debug)]
pub struct NetTask {
    /// The loaded programs.
    pub attacher: Attacher,
    /// What to undo on detach.
    pub state: StateFile,
    /// Slots of an earlier agent (`KernelMaps::devices`).
    pub devices: BTreeMap<u16, Device>,
    /// The configuration.
    pub config: watch::Receiver<NetConfig>,
    /// Addresses of backends.
    pub wanted: watch::Receiver<BTreeSet<IpAddr>>,
    /// Where the network goes.
    pub topology: watch::Sender<Topology>,
    /// Where the report goes.
    pub report: watch::Sender<NetReport>,
}

/// One look at the kernel's tables.
struct View {
    links: Vec<Link>,
    addresses: Vec<OwnAddress>,
    neighbours: HashMap<(u32, IpAddr), Neighbour>,
    /// Configured interfaces that exist.
    uplinks: BTreeSet<u32>,
}

/// The task between two looks.
struct Follower {
    task: NetTask,
    handle: Handle,
    slots: Slots,
    /// What each device was last asked to carry, and the fault if it does not.
    carried: BTreeMap<u32, (DeviceWish, Option<String>)>,
    attach_warnings: BTreeMap<u32, Vec<String>>,
    routes: HashMap<IpAddr, Option<Route>>,
    managed: BTreeSet<(u32, IpAddr)>,
}

/// Runs until the channels close. The first [`Topology`] is published after the first look. Works in the network
/// namespace of the thread that polls it first; every worker of the runtime must be in the same one.
pub async fn run(task: NetTask) -> std::io::Result<()> {
    let mut changes = netlink::monitor()?;
    let handle = netlink::connect()?;
    let (mut config, mut wanted) = (task.config.clone(), task.wanted.clone());
    let mut follower = Follower {
        slots: Slots::adopt(&task.devices),
        task,
        handle,
        carried: BTreeMap::new(),
        attach_warnings: BTreeMap::new(),
        routes: HashMap::new(),
        managed: BTreeSet::new(),
    };
    let mut resync = time::interval(RESYNC);
    resync.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = resync.tick() => follower.forget_failures(),
            changed = config.changed() => match changed {
                Ok(()) => follower.forget_failures(),
                Err(_) => return Ok(()),
            },
            changed = wanted.changed() => if changed.is_err() { return Ok(()) },
            change = changes.recv() => {
                let Some(mut change) = change else {
                    return Err(std::io::Error::other("the kernel closed the netlink socket"));
                };
                time::sleep(DEBOUNCE).await;
                while let Ok(next) = changes.try_recv() {
                    if next == Change::Routes {
                        change = next;
                    }
                }
                if change == Change::Routes {
                    follower.routes.clear();
                }
            }
        }
        let (config, wanted) = (
            config.borrow_and_update().clone(),
            wanted.borrow_and_update().clone(),
        );
        if let Err(e) = follower.refresh(&config, &wanted).await {
            tracing::warn!(error = %e, "the network could not be read");
            follower
                .task
                .report
                .send_modify(|report| report.faults = vec![e.to_string()]);
        }
    }
}

impl Follower {
    /// Lets everything that failed be tried again.
    fn forget_failures(&mut self) {
        self.carried.retain(|_, (_, fault)| fault.is_none());
        self.routes.clear();
    }

    async fn look(&self, config: &NetConfig, faults: &mut Vec<String>) -> Result<View, NetlinkError> {
        let links = netlink::links(&self.handle).await?;
        let mut uplinks = BTreeSet::new();
        for name in &config.interfaces {
            let found = match name {
                InterfaceName::Auto => netlink::default_device(&self.handle).await?,
                InterfaceName::Named(name) => links
                    .iter()
                    .find(|link| link.name == *name)
                    .map(|link| link.ifindex),
            };
            match (found, name) {
                (Some(ifindex), _) => {
                    uplinks.insert(ifindex);
                }
                (None, InterfaceName::Auto) => {
                    faults.push("interfaces = \"auto\": there is no IPv4 default route: name the interface".to_owned());
                }
                (None, InterfaceName::Named(name)) => faults.push(format!(
                    "interface {name} does not exist (yet): it is attached when it comes; correct `interfaces` if it never will"
                )),
            }
        }
        Ok(View {
            addresses: netlink::addresses(&self.handle).await?,
            neighbours: netlink::neighbours(&self.handle).await?,
            links,
            uplinks,
        })
    }

    async fn refresh(&mut self, config: &NetConfig, wanted: &BTreeSet<IpAddr>) -> Result<(), NetlinkError> {
        let mut faults = Vec::new();
        let view = self.look(config, &mut faults).await?;
        faults.extend(sysctl::apply(&self.task.state, config.snat_ports.as_ref()));
        faults.extend(
            announce::apply(
                &self.handle,
                &view.links,
                &view.addresses,
                &self.task.state,
                &config.announce,
            )
            .await,
        );
        self.attach(&view, config.xdp);
        for (wish, fault) in self.carried.values() {
            faults.extend(fault.clone());
            faults.extend(
                self.attach_warnings
                    .get(&wish.ifindex)
                    .into_iter()
                    .flatten()
                    .cloned(),
            );
            if view.uplinks.contains(&wish.ifindex) {
                faults.extend(sysctl::rp_filter_warning(&wish.name));
            }
        }
        let mut places = BTreeMap::new();
        let mut hops = BTreeSet::new();
        self.routes.retain(|address, _| wanted.contains(address));
        for address in wanted {
            let (place, hop) = self.place(*address, &view, &mut faults).await?;
            places.insert(*address, place);
            hops.extend(hop);
        }
        faults.extend(self.manage(hops, &view).await);
        let topology = self.topology(&view, config, places);
        self.task
            .topology
            .send_if_modified(|current| replace(current, topology));
        let attachments = self.task.attacher.attached().values().cloned().collect();
        let report = NetReport { attachments, faults };
        self.task.report.send_if_modified(|current| {
            for fault in report
                .faults
                .iter()
                .filter(|fault| !current.faults.contains(fault))
            {
                tracing::warn!("{fault}");
            }
            replace(current, report)
        });
        Ok(())
    }

    /// Brings the programs to where they are wanted and takes them away from where they are not.
    fn attach(&mut self, view: &View, xdp: XdpChoice) {
        let wishes: BTreeMap<u32, DeviceWish> = view
            .links
            .iter()
            .filter_map(|link| {
                let uplink = view.uplinks.contains(&link.ifindex);
                let wish = DeviceWish {
                    ifindex: link.ifindex,
                    name: link.name.clone(),
                    xdp: if uplink && !link.loopback {
                        xdp
                    } else {
                        XdpChoice::Off
                    },
                    egress: !link.loopback,
                };
                (uplink || link.bridge || link.loopback).then_some((link.ifindex, wish))
            })
            .collect();
        let mut unwanted: BTreeSet<u32> = self.task.attacher.pinned_devices().into_iter().collect();
        unwanted.extend(self.carried.keys());
        for ifindex in unwanted
            .into_iter()
            .filter(|ifindex| !wishes.contains_key(ifindex))
        {
            tracing::info!(ifindex, "device is gone or no longer configured");
            self.task.attacher.forget(ifindex);
            self.carried.remove(&ifindex);
            self.attach_warnings.remove(&ifindex);
        }
        self.slots.retain(|ifindex| wishes.contains_key(&ifindex));
        for (ifindex, wish) in wishes {
            if self
                .carried
                .get(&ifindex)
                .is_some_and(|(carried, _)| *carried == wish)
            {
                continue;
            }
            let fault = match self.task.attacher.attach(&wish) {
                Ok(warnings) => {
                    tracing::info!(device = %wish.name, "programs attached");
                    self.attach_warnings.insert(ifindex, warnings);
                    None
                }
                Err(e) => Some(e.to_string()),
            };
            self.carried.insert(ifindex, (wish, fault));
        }
        for (wish, fault) in self.carried.values_mut() {
            let loopback = view
                .links
                .iter()
                .any(|link| link.ifindex == wish.ifindex && link.loopback);
            if !loopback && self.slots.assign(wish.ifindex).is_none() {
                *fault = Some(format!("device {}: no slot is left: too many bridges", wish.name));
            }
        }
    }

    /// Where a backend is, and the neighbour entry that must be kept for it.
    async fn place(
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
        let device = view.links.iter().find(|link| link.ifindex == route.ifindex);
        let Some((slot, device)) = self.slots.get(route.ifindex).zip(device) else {
            // Replies would come in where no program of ours sees them.
            let name = device.map_or("?", |link| link.name.as_str());
            faults.push(format!(
                "backend {address}: its route leaves by {name}, which is not in `interfaces`: add it"
            ));
            return Ok((Place::Unroutable, None));
        };
        // On an uplink that is a bridge there are other machines, not containers of this node.
        let containers = device.bridge && !view.uplinks.contains(&route.ifindex);
        if containers && route.gateway.is_none() {
            return Ok((Place::Bridge { slot }, None));
        }
        // Behind a gateway on a bridge (a container that routes) the way back is that container's affair: the
        // backend is treated as remote, so that source translation brings its replies here.
        let hop = (route.ifindex, route.gateway.unwrap_or(address));
        let mac = view.neighbours.get(&hop).and_then(|neighbour| neighbour.mac);
        Ok((Place::Remote { slot, mac }, Some(hop)))
    }

    /// Has the kernel keep the entries of `hops` fresh, and no others of ours. Packets that XDP sends do not
    /// refresh them, and a plain entry would go stale unnoticed when a MAC moves.
    async fn manage(&mut self, hops: BTreeSet<(u32, IpAddr)>, view: &View) -> Vec<String> {
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

    fn topology(&self, view: &View, config: &NetConfig, places: BTreeMap<IpAddr, Place>) -> Topology {
        let announced = self.task.state.get().addresses;
        // A VIP that we announce is no address of the node's own.
        let own: Vec<&OwnAddress> = view
            .addresses
            .iter()
            .filter(|own| !announced.iter().any(|(_, vip)| *vip == own.address))
            .collect();
        let devices = view
            .links
            .iter()
            .filter_map(|link| {
                let slot = self.slots.get(link.ifindex)?;
                let xdp = self
                    .task
                    .attacher
                    .attached()
                    .get(&link.ifindex)
                    .is_some_and(|a| a.xdp != "-");
                let info = DeviceInfo {
                    name: link.name.clone(),
                    ifindex: link.ifindex,
                    mac: link.mac,
                    mtu: link.mtu,
                    xdp,
                    bridge: link.bridge,
                    addresses: own
                        .iter()
                        .filter(|own| {
                            own.ifindex == link.ifindex
                                && !own.unusable
                                && !link_local(own.address)
                                && !config.vips.contains(&own.address)
                        })
                        .map(|own| own.address)
                        .collect(),
                };
                Some((slot, info))
            })
            .collect();
        let mut node_addresses: Vec<IpAddr> = own.iter().map(|own| own.address).collect();
        node_addresses.sort_unstable();
        node_addresses.dedup();
        let loopback = view.links.iter().find(|link| link.loopback);
        Topology {
            devices,
            places,
            node_addresses,
            loopback_ifindex: loopback.map_or(0, |link| link.ifindex),
        }
    }
}

/// Of one link only: no source for packets that are routed.
fn link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// Replaces a value; whether it changed.
fn replace<T: PartialEq>(current: &mut T, next: T) -> bool {
    let changed = *current != next;
    if changed {
        *current = next;
    }
    changed
}
