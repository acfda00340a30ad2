//! The reconciler's state as people and machines read it.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant, SystemTime},
};

use lb_common::maps::backend_state;

use super::{Reconciler, pressure};
use crate::{
    datapath::Place,
    health::Report,
    model::{Backend, BackendState, ServiceAddress},
    plan::{About, Entry},
    status::{AttachmentStatus, BackendStatus, RouteStatus, ServiceStatus, Status},
};

/// Routes are kept, and told to whoever serves HTTP by them; the agent itself has no L7 part.
const ROUTES_WAIT_FOR: &str = "the L7 shim";

/// What other parts of the agent add to the status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Programs by device.
    pub attachments: Vec<AttachmentStatus>,
    /// Faults of those parts: a missing sysctl, a failing sweep.
    pub faults: Vec<String>,
    /// Every interface of the configuration has its programs.
    pub attached: bool,
}

impl Reconciler {
    /// The state as of the last pass. Times that the agent knows as instants are told as times of day.
    pub fn status(&self, surroundings: &Surroundings, checks: &Report, now: Instant) -> Status {
        let today = SystemTime::now();
        let at = |instant: Instant| match instant.checked_duration_since(now) {
            Some(ahead) => today + ahead,
            None => today - now.saturating_duration_since(instant),
        };
        let services = self.programmed.services.iter().map(|(address, entry)| {
            let wanted = self.heard.desired().services.get(address);
            let entries: u64 = entry.ring.counts.values().map(|count| u64::from(*count)).sum();
            let mut backends: Vec<BackendStatus> = entry
                .live
                .values()
                .map(|id| {
                    let backend = self.backend(*id, entry, entries, &at);
                    let slow = wanted.and_then(|w| w.service.slow.get(&backend.address));
                    BackendStatus {
                        tenths: slow.copied(),
                        conditions: self.heard.conditions(*address, backend.address).to_vec(),
                        ..backend
                    }
                })
                .collect();
            let known: BTreeSet<_> = entry.live.keys().collect();
            let absent = wanted
                .iter()
                .flat_map(|w| &w.service.backends)
                .filter(|b| !known.contains(&b.address));
            backends.extend(absent.map(|backend| self.absent(*address, backend, today)));
            backends.sort_by_key(|backend| backend.address);
            ServiceStatus {
                id: entry.id,
                name: wanted.map_or_else(|| "(removed)".into(), |w| w.service.name.clone()),
                address: *address,
                generation: entry.generation,
                backends,
                kept_until: wanted.and_then(|w| w.kept_until),
            }
        });
        let routes = self.heard.routes();
        let routes = routes.iter().map(|route| RouteStatus {
            route: route.clone(),
            waiting_for: Some(ROUTES_WAIT_FOR.into()),
        });
        let mut rejections = self.heard.rejections();
        rejections.extend(self.rejections.values().flatten().cloned());
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            services: services.collect(),
            routes: routes.collect(),
            sources: self.heard.sources(),
            rejections: rejections.into_iter().collect(),
            attachments: surroundings.attachments.clone(),
            faults: self
                .faults
                .iter()
                .chain(self.pressure.faults())
                .chain(&surroundings.faults)
                .chain(&checks.faults)
                .cloned()
                .collect(),
            ready: self.settled && self.faults.is_empty() && surroundings.attached,
            last_commit: self.last_commit,
            last_commit_us: self.last_commit_us,
            commits: self.programmed.commits,
            checks: checks.clone(),
            flow_tables: match self.sweep.started {
                Some(_) => pressure::tables(&self.sweep, self.rated_flows()),
                None => Vec::new(),
            },
        }
    }

    fn backend(
        &self,
        id: u32,
        entry: &Entry,
        entries: u64,
        at: &dyn Fn(Instant) -> SystemTime,
    ) -> BackendStatus {
        let slot = &self.programmed.slots[&id];
        let unknown;
        let about = match self.programmed.about.get(&id) {
            Some(about) => about,
            None => {
                let active = slot.record.state == backend_state::ACTIVE;
                unknown = About {
                    name: slot.address.to_string(),
                    weight: 1,
                    state: if active {
                        BackendState::Active
                    } else {
                        BackendState::Draining
                    },
                    reason: "found in the maps".into(),
                    drain: Duration::ZERO,
                    leaving: false,
                    since: slot.changed,
                };
                &unknown
            }
        };
        let count = u64::from(entry.ring.counts.get(&id).copied().unwrap_or(0));
        BackendStatus {
            id,
            name: about.name.clone(),
            address: slot.address,
            weight: about.weight,
            state: about.state,
            leaving: about.leaving,
            reason: about.reason.clone(),
            since: at(about.since),
            place: self.place(slot.address.ip()),
            drain_deadline: slot.deadline.map(at),
            ring_share: (count * 10_000).checked_div(entries).unwrap_or(0) as u32,
            flows: self.sweep.flows.get(&id).copied().unwrap_or(0),
            tenths: None,
            conditions: Vec::new(),
        }
    }

    /// A backend that is wished for and has no id: it does not serve, and has no flows.
    fn absent(&self, service: ServiceAddress, backend: &Backend, today: SystemTime) -> BackendStatus {
        let place = self.place(backend.address.ip());
        let reason = match backend.state {
            BackendState::Active if self.asked.contains_key(&backend.address.ip()) => {
                "waiting for its place".into()
            }
            BackendState::Active => "not programmed: see its place and the rejections".into(),
            _ => backend.reason.clone(),
        };
        BackendStatus {
            id: 0,
            name: backend.name.clone(),
            address: backend.address,
            weight: backend.weight,
            state: backend.state,
            leaving: false,
            reason,
            since: today,
            place,
            drain_deadline: None,
            ring_share: 0,
            flows: 0,
            tenths: None,
            conditions: self.heard.conditions(service, backend.address).to_vec(),
        }
    }

    fn place(&self, ip: std::net::IpAddr) -> String {
        let device = |slot: &u16| {
            self.topology
                .devices
                .get(slot)
                .map_or("?", |device| device.name.as_str())
        };
        match self.topology.places.get(&ip) {
            None => "not known yet".into(),
            Some(Place::Node) => "node".into(),
            Some(Place::Bridge { slot }) => format!("bridge {}", device(slot)),
            Some(Place::Remote {
                slot, mac: Some(_), ..
            }) => format!("remote {}", device(slot)),
            Some(Place::Remote { slot, mac: None, .. }) => {
                format!("remote {} (neighbour unknown)", device(slot))
            }
            Some(Place::Unroutable) => "no route".into(),
        }
    }
}
