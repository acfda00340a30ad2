//! What to write, and in which order, to turn what is programmed into what is desired. Pure: values in, a value out.
//!
//! Order: the `OURS` filter with everything old and new; devices, SNAT addresses, settings; then every service by
//! itself (backends → timeouts → ACL → ring → VIP → the `SERVICES` commit → what only the old ring needed); last what
//! nothing refers to any more. So a ring never names a backend that is absent or dead, and each step of the way is a
//! state that may stay: a crash between two writes harms nothing. A failing service stops only itself.

mod backends;
mod ids;
mod network;
pub mod preview;
mod programmed;
mod rings;
mod service;
mod settings;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

pub use programmed::{About, Entry, Note, Programmed, ROW_QUARANTINE, Ring, Slot, address_of, key_of};

use crate::{
    datapath::{Capacities, Filter, MapOp, Topology},
    desired::{Desired, Retention},
    model::{Rejection, ServiceAddress},
};
use ids::{BackendIds, Rows, ServiceIds};
use ipnet::IpNet;
use network::SnatRanges;

/// What the configuration says about programming.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Source addresses for remote backends; a family without one uses the addresses of the device.
    pub snat_addresses: Vec<IpAddr>,
    /// VIPs that this node announces itself: it answers their echo although they are addresses of the node.
    pub own_vips: BTreeSet<IpAddr>,
    /// First port for SNAT.
    pub snat_port_min: u16,
    /// Last port for SNAT, inclusive.
    pub snat_port_max: u16,
    /// One of so many new flows is told to the event ring; 0 is off.
    pub event_sample: u32,
    /// Ticks of the flow clock per second (`META.hz`).
    pub hz: u32,
    /// Drain time of backends of which nothing else is known (found after a restart, wished by nobody).
    pub default_drain: Duration,
    /// How long services from labels outlive their last container.
    pub retention: Retention,
    /// Clients that no service admits.
    pub firewall: BTreeSet<IpNet>,
}

/// Live flows by backend id, counted by one sweep of the flow tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    /// When it started; `None` before the first.
    pub started: Option<Instant>,
    /// Flows by backend id; ids without flows are left out.
    pub flows: BTreeMap<u32, u64>,
}

/// All that a plan depends on beside what is programmed.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// What shall be.
    pub desired: &'a Desired,
    /// The network.
    pub topology: &'a Topology,
    /// Sizes of the maps.
    pub capacities: &'a Capacities,
    /// The configuration.
    pub policy: &'a Policy,
    /// The last complete sweep.
    pub sweep: &'a Sweep,
    /// Addresses whose place was asked for and is not known: how long to wait for it.
    pub asked: &'a BTreeMap<IpAddr, Instant>,
    /// Every source has been read (or waited for long enough): what nobody wishes may go.
    pub may_remove: bool,
    /// Backends that served before this agent did, and that nobody has wished for since: they stay even then, while some
    /// source has not been read.
    pub unclaimed: &'a BTreeSet<(ServiceAddress, SocketAddr)>,
    /// Now.
    pub now: Instant,
}

/// Which services to look at.
#[derive(Clone, Copy, Debug)]
pub enum Scope<'a> {
    /// All, desired and programmed.
    All,
    /// These, and those whose backends wait for something.
    Some(&'a BTreeSet<ServiceAddress>),
}

/// One write, and what to leave out when it fails.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Whom it is for.
    pub group: Group,
    /// The write.
    pub op: MapOp,
}

/// Writes that stand or fall together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// All services need it: when it fails nothing after it is done.
    Shared,
    /// The deny list for all services: when it fails, the services go on without the rest of it.
    Firewall,
    /// One service: when it fails, the service's later writes are left out.
    Service(ServiceAddress),
    /// A backend whose service is not known any more.
    Orphan(u32),
    /// Removal of what nothing refers to: left out when anything has failed.
    Last,
}

/// The result of planning.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// To be remembered before the first step: true whether the steps succeed or not.
    pub notes: Vec<Note>,
    /// Writes, in order.
    pub steps: Vec<Step>,
    /// For every service that was looked at: what of it was refused.
    pub rejections: BTreeMap<ServiceAddress, Vec<Rejection>>,
    /// Services to look at again by the next pass, since something they need is not there yet.
    pub waiting: BTreeSet<ServiceAddress>,
    /// When there is something to do again without any event.
    pub next_deadline: Option<Instant>,
}

/// Plans. What is in the maps already is not written again: after all steps have succeeded and been recorded, the same
/// inputs give no step.
pub fn plan(programmed: &Programmed, inputs: &Inputs<'_>, scope: Scope<'_>) -> Plan {
    let (ranges, snat_ops) = network::snat_ranges(programmed, inputs);
    let mut planner = Planner {
        programmed,
        inputs,
        backend_ids: BackendIds::new(programmed, inputs.capacities.backends),
        service_ids: ServiceIds::new(programmed, inputs.capacities.services),
        rows: None,
        ranges,
        need: Filter::default(),
        unneeded: BTreeMap::new(),
        freed: BTreeSet::new(),
        evicted: BTreeSet::new(),
        acl_puts: 0,
        plan: Plan::default(),
    };
    planner.free_unused();
    for address in planner.order(scope) {
        planner.service(address);
    }
    planner.orphans();
    planner.finish(snat_ops)
}

struct Planner<'a> {
    programmed: &'a Programmed,
    inputs: &'a Inputs<'a>,
    backend_ids: BackendIds<'a>,
    service_ids: ServiceIds<'a>,
    rows: Option<Rows>,
    ranges: SnatRanges,
    /// What packets will carry because of this plan.
    need: Filter,
    /// How many records with a LOCAL or NODE address this plan takes away.
    unneeded: BTreeMap<IpAddr, usize>,
    /// Ids that this plan frees.
    freed: BTreeSet<u32>,
    /// Remembered services that give way to others.
    evicted: BTreeSet<ServiceAddress>,
    acl_puts: usize,
    plan: Plan,
}

// === impl Planner ===

impl Planner<'_> {
    /// Services in the order of planning: those in the maps first, so that they never lose a place to a new one; then
    /// the new ones by age, so that it is the newest that meets a limit. Those that are only remembered come last.
    fn order(&self, scope: Scope<'_>) -> Vec<ServiceAddress> {
        let mut all: BTreeSet<ServiceAddress> = match scope {
            Scope::All => self
                .programmed
                .services
                .keys()
                .chain(self.inputs.desired.services.keys())
                .copied()
                .collect(),
            Scope::Some(some) => some.clone(),
        };
        let unsettled = self
            .programmed
            .unsettled
            .iter()
            .filter_map(|id| self.programmed.slots.get(id));
        all.extend(unsettled.filter_map(|slot| self.programmed.service_address(slot.record.service)));
        let mut all: Vec<ServiceAddress> = all.into_iter().collect();
        all.sort_by_key(|address| {
            let new = !self.programmed.services.contains_key(address);
            let wanted = self.inputs.desired.services.get(address);
            let remembered = wanted.is_some_and(|wanted| wanted.kept_until.is_some());
            let created = wanted.map(|wanted| wanted.created);
            (remembered, new, created.filter(|_| new), *address)
        });
        all
    }

    /// Frees dead ids that a sweep has found without flows. It must have started after the id was dead: an earlier one
    /// may have passed a flow's place before the flow was there.
    fn free_unused(&mut self) {
        for id in &self.programmed.unsettled {
            let Some(slot) = self.programmed.slots.get(id) else {
                continue;
            };
            if slot.record.state == lb_common::maps::backend_state::DEAD
                && self.swept_empty(*id, slot.changed)
            {
                if programmed::is_near(&slot.record) {
                    *self.unneeded.entry(slot.record.addr.into()).or_default() += 1;
                }
                self.freed.insert(*id);
                self.plan.notes.push(Note::Free { id: *id });
            }
        }
    }

    /// Whether a sweep that started after `since` has found no flow of this backend.
    fn swept_empty(&self, id: u32, since: Instant) -> bool {
        let sweep = self.inputs.sweep;
        sweep.started.is_some_and(|started| started > since)
            && sweep.flows.get(&id).is_none_or(|flows| *flows == 0)
    }

    /// Adds what concerns no single service, in front and at the end.
    fn finish(mut self, snat_ops: Vec<MapOp>) -> Plan {
        for op in &snat_ops {
            if let MapOp::PutSnatAddress { address, .. } = op {
                self.need.addresses.insert(*address);
            }
        }
        // First of all: what any other map holds is in `OURS`, also when the agent stops between two writes.
        let mut shared = Vec::new();
        if !self.programmed.filters(&self.need) {
            let mut filter = self.programmed.ours.clone();
            filter.extend(&self.need);
            shared.push(MapOp::PutOurs { filter });
        }
        shared.extend(network::device_ops(self.programmed, self.inputs));
        shared.extend(snat_ops);
        let (firewall_puts, firewall_deletions) = network::firewall_ops(self.programmed, self.inputs);
        let shared = shared.into_iter().map(|op| (Group::Shared, op));
        let firewall = firewall_puts.into_iter().map(|op| (Group::Firewall, op));
        let first = shared.chain(firewall).map(|(group, op)| Step { group, op });
        self.plan.steps.splice(0..0, first);

        let mut last: Vec<MapOp> = firewall_deletions;
        if self.inputs.may_remove {
            let stray = self.programmed.stray_acl.keys();
            last.extend(stray.map(|(service, prefix)| MapOp::DelAcl {
                service: *service,
                prefix: *prefix,
            }));
            let unused = self.unused_vips();
            last.extend(unused.iter().map(|vip| MapOp::DelVip { vip: *vip }));
            last.extend(self.shrunken_ours(&unused));
        }
        last.extend(network::gone_devices(self.programmed, self.inputs.topology));
        self.plan.steps.extend(last.into_iter().map(|op| Step {
            group: Group::Last,
            op,
        }));
        self.plan
    }

    /// VIPs that no service has, neither wished for nor with flows that still go on.
    fn unused_vips(&self) -> BTreeSet<IpAddr> {
        let mut unused: BTreeSet<IpAddr> = self.programmed.vips.keys().copied().collect();
        if !self.programmed.orphans.is_empty() {
            // Which VIP their flows came by is not known: none goes before they have.
            return BTreeSet::new();
        }
        for address in self.kept_services() {
            unused.remove(&address.vip);
        }
        unused
    }

    /// Services that are wished for or have flows that still go on.
    fn kept_services(&self) -> impl Iterator<Item = &ServiceAddress> {
        let forgotten: BTreeSet<&ServiceAddress> = self
            .plan
            .notes
            .iter()
            .filter_map(|note| match note {
                Note::Forget { address } => Some(address),
                _ => None,
            })
            .collect();
        let programmed = self.programmed.services.keys();
        let kept = programmed.filter(move |address| !forgotten.contains(address));
        kept.chain(self.inputs.desired.services.keys())
    }

    /// Takes out of `OURS` what nothing needs any more. A bit too many costs a lookup, a bit too few a connection.
    fn shrunken_ours(&self, unused_vips: &BTreeSet<IpAddr>) -> Option<MapOp> {
        let mut filter = self.programmed.ours.clone();
        filter.extend(&self.need);
        let before = filter.clone();
        filter.ports = self.kept_services().map(|a| (a.protocol, a.port)).collect();
        for ip in unused_vips.iter().chain(self.unneeded.keys()) {
            let near = self.programmed.near.get(ip).copied().unwrap_or(0);
            let near = near > self.unneeded.get(ip).copied().unwrap_or(0);
            let vip = self.programmed.vips.contains_key(ip) && !unused_vips.contains(ip);
            let snat = self.programmed.snat.values().any(|address| address == ip);
            if !near && !vip && !snat && !self.need.addresses.contains(ip) {
                filter.addresses.remove(ip);
            }
        }
        (filter != before).then_some(MapOp::PutOurs { filter })
    }

    fn push(&mut self, group: Group, op: MapOp) {
        self.plan.steps.push(Step { group, op });
    }

    fn wake_at(&mut self, at: Instant) {
        self.plan.next_deadline = Some(self.plan.next_deadline.map_or(at, |next| next.min(at)));
    }

    fn reject(&mut self, address: ServiceAddress, what: &str, fault: String, remedy: String) {
        let wanted = self.inputs.desired.services.get(&address);
        let rejection = Rejection {
            source: wanted.map_or_else(String::new, |w| w.source.clone()),
            object: match (wanted, what) {
                (Some(w), "") => format!("service {} ({address})", w.service.name),
                (Some(w), what) => format!("service {} ({address}): {what}", w.service.name),
                (None, what) => format!("service {address}: {what}"),
            },
            fault,
            remedy,
        };
        self.plan.rejections.entry(address).or_default().push(rejection);
    }
}

/// What to do about a map that is too small.
fn raise(setting: &str) -> String {
    format!(
        "raise `limits.{setting}` and run `weir detach` before the next start, or remove what is not needed"
    )
}
