//! Everything that was heard becomes one desired state. Pure: no I/O, no clock.
//!
//! Objects with the same [`ServiceAddress`] form one service. Where their settings contradict each other the operator's
//! file wins over labels, then the oldest object, then the smaller id. The loser's backends do *not* join: they were
//! meant for other rules (an allow list, say), and a label author must not be able to change, or slip behind, the rules
//! of a service that was there first.
//!
//! An update touches only the services it speaks of, so that one change among 100,000 backends stays cheap.

mod drains;
mod health;
mod remembered;
mod routes;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::SystemTime,
};

pub use drains::{Drains, DrainsError, names};
pub use health::TargetChanges;
use health::{Candidate, Health};
use remembered::RememberedServices;
pub use remembered::{Remembered, Retention};
use routes::Routes;

use crate::{
    health::{Key, Verdict},
    model::{Backend, BackendState, Rejection, Service, ServiceAddress, ServiceWish},
    route::Route,
    source::{Freshness, Message, Object, SourceId, Update, nodes},
    status::{Condition, SourceStatus},
};

/// The source whose word is the operator's: it wins over every other, however old those are.
pub const OPERATOR_SOURCE: &str = "file";

/// What shall be programmed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Desired {
    /// Services by address.
    pub services: BTreeMap<ServiceAddress, Wanted>,
    /// What was refused, by service address.
    pub contradictions: BTreeMap<ServiceAddress, Vec<Rejection>>,
}

/// A service and its age.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// The service. The same allocation as long as nothing about it changes.
    pub service: Arc<Service>,
    /// Source of the object whose settings it has.
    pub source: String,
    /// When that object was created: the newest service is the first to be refused when a limit is reached.
    pub created: SystemTime,
    /// It has no container any more and is forgotten then: the first to give way when ids or rows run out.
    pub kept_until: Option<SystemTime>,
}

/// Everything heard, and the desired state it makes.
#[derive(Debug, Default)]
pub struct Heard {
    sources: BTreeMap<SourceId, Source>,
    by_service: BTreeMap<ServiceAddress, BTreeSet<(SourceId, String)>>,
    routes: Routes,
    drains: Drains,
    health: Health,
    remembered: RememberedServices,
    dirty: BTreeSet<ServiceAddress>,
    desired: Desired,
    /// Services of the desired state by the addresses of their backends.
    addresses: BTreeMap<IpAddr, BTreeSet<ServiceAddress>>,
    /// Addresses that came or went since they were last asked for.
    touched: BTreeSet<IpAddr>,
    /// Counts the changes of objects.
    version: u64,
}

#[derive(Debug, Default)]
struct Source {
    objects: BTreeMap<String, Object>,
    /// Objects that come with rejections of their own.
    rejected: BTreeSet<String>,
    freshness: Option<Freshness>,
    read: bool,
}

/// A service and its backends before their health is looked at.
struct Merged {
    service: Service,
    /// In the order of their addresses.
    candidates: Vec<Candidate>,
    /// The names of their sources.
    sources: Vec<String>,
    source: String,
    created: SystemTime,
    kept_until: Option<SystemTime>,
}

// === impl Heard ===

impl Heard {
    /// Takes in one message.
    pub fn absorb(&mut self, message: Message) {
        let Message { source: id, update } = message;
        let update = match update {
            // Health is no source: it has no objects, and its silence means nothing.
            Update::Verdicts(verdicts) => return verdicts.into_iter().for_each(|verdict| self.hear(verdict)),
            update => update,
        };
        let mut changed = Vec::new();
        let source = self.sources.entry(id.clone()).or_default();
        match update {
            Update::Reset(objects) => {
                source.read = true;
                let objects: BTreeMap<String, Object> =
                    objects.into_iter().map(|o| (o.id.clone(), o)).collect();
                let gone: Vec<String> = source
                    .objects
                    .keys()
                    .filter(|id| !objects.contains_key(*id))
                    .cloned()
                    .collect();
                changed.extend(
                    gone.iter()
                        .filter_map(|id| source.remove(id))
                        .map(|old| (Some(old), None)),
                );
                changed.extend(objects.into_values().filter_map(|o| source.put(o)));
            }
            Update::Put(object) => changed.extend(source.put(object)),
            Update::Remove(id) => changed.extend(source.remove(&id).map(|old| (Some(old), None))),
            Update::Freshness(freshness) => source.freshness = Some(freshness),
            Update::End => {
                let objects = std::mem::take(&mut source.objects).into_values();
                changed.extend(objects.map(|old| (Some(old), None)));
                self.sources.remove(&id);
            }
            // Taken in above.
            Update::Verdicts(_) => {}
        }
        self.version += changed.len() as u64;
        for (old, new) in changed {
            for (object, present) in [(old, false), (new, true)] {
                let Some(object) = object else { continue };
                self.routes.note(&id, &object, present);
                for wish in &object.services {
                    let holders = self.by_service.entry(wish.address).or_default();
                    let key = (id.clone(), object.id.clone());
                    if present {
                        holders.insert(key)
                    } else {
                        holders.remove(&key)
                    };
                    self.dirty.insert(wish.address);
                }
            }
        }
    }

    /// Takes in what a source wished when it was last heard, by the agent before this one: it stands until the source
    /// speaks, and does not mean that it has been read.
    pub fn recall(&mut self, source: &SourceId, objects: Vec<Object>) {
        let update = Update::Reset(objects);
        self.absorb(Message {
            source: source.clone(),
            update,
        });
        if let Some(source) = self.sources.get_mut(source) {
            source.read = false;
        }
    }

    /// The objects of the sources, for the next agent; not those of nodes, which have a file of their own.
    pub fn wishes(&self) -> BTreeMap<SourceId, Vec<Object>> {
        let others = self.sources.iter().filter(|(id, _)| !nodes::is_node(id));
        others
            .map(|(id, source)| (id.clone(), source.objects.values().cloned().collect()))
            .collect()
    }

    /// The services that have no containers any more, for the next agent.
    pub fn remembered(&self) -> Vec<Remembered> {
        self.remembered.all().cloned().collect()
    }

    /// Sets for how long services from labels outlive their last container.
    pub fn set_retention(&mut self, retention: Retention, today: SystemTime) {
        let forgotten = self.remembered.set_retention(retention, today);
        self.forgotten(forgotten);
        // Those that stay do so for another time.
        self.dirty
            .extend(self.remembered.all().map(|service| service.address));
    }

    /// Takes over the services that the agent before this one remembered.
    pub fn restore_remembered(&mut self, services: Vec<Remembered>, today: SystemTime) {
        self.dirty.extend(self.remembered.restore(services, today));
    }

    /// When the next remembered service is forgotten: the desired state has to be refreshed then.
    pub fn next_expiry(&self) -> Option<SystemTime> {
        self.remembered.next_expiry()
    }

    fn forgotten(&mut self, services: Vec<ServiceAddress>) {
        self.version += services.len() as u64;
        self.dirty.extend(services);
    }

    /// A number that is another one whenever [`Heard::wishes`] or [`Heard::remembered`] are others.
    pub fn version(&self) -> u64 {
        self.version
    }

    fn hear(&mut self, verdict: Verdict) {
        let Key { service, backend } = verdict.key;
        let Some(service) = service else {
            if self.health.absorb(verdict, || None) {
                self.routes.touch_upstream(backend);
            }
            return;
        };
        let services = &self.desired.services;
        let name = || {
            let backends = &services.get(&service)?.service.backends;
            let index = backends.binary_search_by_key(&backend, |b| b.address).ok()?;
            Some(backends[index].name.clone())
        };
        if self.health.absorb(verdict, name) {
            self.dirty.insert(service);
        }
    }

    /// Remembers whether a backend that is found in the maps takes new flows: until its check has spoken, it stays so.
    pub fn adopt(&mut self, service: ServiceAddress, backend: SocketAddr, serves: bool) {
        let service = Some(service);
        self.health.adopt(Key { service, backend }, serves);
    }

    /// The wait for the first lists is over: upstreams that come now were not there when the agent started.
    pub fn settle(&mut self) {
        self.health.settle();
    }

    /// Every source has been read: what was found in the maps means nothing for backends that come later.
    pub fn forget_adopted(&mut self) {
        self.health.forget_adopted();
    }

    /// Whom to check from now on, and whom no more, since the last call.
    pub fn take_target_changes(&mut self) -> TargetChanges {
        self.health.take_changes()
    }

    /// Everybody's word about a backend; empty where its source is the only judge.
    pub fn conditions(&self, service: ServiceAddress, backend: SocketAddr) -> &[Condition] {
        let service = Some(service);
        self.health.conditions(&Key { service, backend })
    }

    /// Sets what the operator has drained; every service is looked at again.
    pub fn set_drains(&mut self, drains: Drains) {
        if drains != self.drains {
            self.drains = drains;
            self.dirty.extend(self.by_service.keys());
            self.routes.touch();
        }
    }

    /// What the operator has drained.
    pub fn drains(&self) -> &Drains {
        &self.drains
    }

    /// Whether anything waits for [`Heard::refresh`].
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty() || self.routes.is_dirty()
    }

    /// Brings the desired state up to date and returns the services that changed. `today` is now.
    pub fn refresh(&mut self, today: SystemTime) -> BTreeSet<ServiceAddress> {
        let (mut routes, mut health) = (std::mem::take(&mut self.routes), std::mem::take(&mut self.health));
        routes.refresh(&self.sources, &mut health, today, |host, upstream, source| {
            self.candidate(host, upstream, source)
        });
        (self.routes, self.health) = (routes, health);
        let mut changed = BTreeSet::new();
        let expired = self.remembered.expire(today);
        self.forgotten(expired);
        for address in std::mem::take(&mut self.dirty) {
            let (merged, contradictions) = self.merge(address);
            let merged = self.or_remembered(address, merged, today);
            let wanted = self.judged(address, merged, today);
            if contradictions.is_empty() {
                self.desired.contradictions.remove(&address);
            } else {
                self.desired.contradictions.insert(address, contradictions);
            }
            let old = self.desired.services.get(&address);
            if old == wanted.as_ref() {
                continue;
            }
            changed.insert(address);
            for ip in old
                .iter()
                .flat_map(|w| &w.service.backends)
                .map(|b| b.address.ip())
            {
                if let Some(services) = self.addresses.get_mut(&ip) {
                    services.remove(&address);
                    if services.is_empty() {
                        self.addresses.remove(&ip);
                        self.touched.insert(ip);
                    }
                }
            }
            for backend in wanted.iter().flat_map(|w| &w.service.backends) {
                let ip = backend.address.ip();
                let services = self.addresses.entry(ip).or_default();
                if services.is_empty() {
                    self.touched.insert(ip);
                }
                services.insert(address);
            }
            match wanted {
                Some(wanted) => self.desired.services.insert(address, wanted),
                None => self.desired.services.remove(&address),
            };
        }
        changed
    }

    /// The routes as of the last [`Heard::refresh`], in the order of host and path. The same allocation as long as nothing
    /// about them changes.
    pub fn routes(&self) -> Arc<Vec<Route>> {
        self.routes.told()
    }

    /// The desired state as of the last [`Heard::refresh`].
    pub fn desired(&self) -> &Desired {
        &self.desired
    }

    /// Whether a desired backend has this address.
    pub fn has_backend_at(&self, ip: IpAddr) -> bool {
        self.addresses.contains_key(&ip)
    }

    /// Backend addresses that may have come or gone since the last call.
    pub fn take_touched(&mut self) -> BTreeSet<IpAddr> {
        std::mem::take(&mut self.touched)
    }

    /// Services with a backend of this address.
    pub fn services_at(&self, ip: IpAddr) -> impl Iterator<Item = ServiceAddress> {
        self.addresses.get(&ip).into_iter().flatten().copied()
    }

    /// Whether this source has sent its complete list once.
    pub fn has_read(&self, source: &SourceId) -> bool {
        self.sources.get(source).is_some_and(|s| s.read)
    }

    /// Everything refused, by sources and by contradiction, in order and without repetition.
    pub fn rejections(&self) -> BTreeSet<Rejection> {
        let own = self
            .sources
            .values()
            .flat_map(|s| s.rejected.iter().filter_map(|id| s.objects.get(id)));
        own.flat_map(|o| &o.rejections)
            .chain(self.desired.contradictions.values().flatten())
            .chain(self.routes.contradictions())
            .cloned()
            .collect()
    }

    /// The sources, in name order.
    pub fn sources(&self) -> Vec<SourceStatus> {
        let status = |(id, source): (&SourceId, &Source)| SourceStatus {
            name: id.0.clone(),
            connected: source.freshness.as_ref().map_or(source.read, |f| f.connected),
            last_heard: source.freshness.as_ref().and_then(|f| f.last_heard),
            last_full_read: source.freshness.as_ref().and_then(|f| f.last_full_read),
            fault: source.freshness.as_ref().and_then(|f| f.fault.clone()),
            via: source.freshness.as_ref().and_then(|f| f.via.clone()),
            objects: source.objects.len(),
        };
        self.sources.iter().map(status).collect()
    }

    /// The service as its containers make it, else as it is remembered.
    fn or_remembered(
        &mut self,
        address: ServiceAddress,
        merged: Option<Merged>,
        today: SystemTime,
    ) -> Option<Merged> {
        if merged.is_some() {
            self.version += u64::from(self.remembered.forget(&address));
            return merged;
        }
        self.by_service.remove(&address);
        let last = self.desired.services.get(&address);
        let (remembered, new) = self.remembered.keep(address, last, today);
        self.version += u64::from(new);
        let mut merged = Merged::from(remembered?);
        merged.kept_until = self.remembered.expiry(&address);
        Some(merged)
    }

    /// A service with the health of its backends.
    fn judged(
        &mut self,
        address: ServiceAddress,
        merged: Option<Merged>,
        today: SystemTime,
    ) -> Option<Wanted> {
        let old = self.desired.services.get(&address).map(|w| &w.service);
        let Some(merged) = merged else {
            self.health.track(Some(address), &[], None, None);
            return None;
        };
        let Merged {
            mut service,
            candidates,
            sources,
            source,
            created,
            kept_until,
        } = merged;
        let settings = &service.settings;
        self.health.track(
            Some(address),
            &candidates,
            settings.passive.as_ref(),
            old.map(|old| &**old),
        );
        let policy = settings.when_unhealthy;
        (service.backends, service.slow) =
            self.health
                .judge(Some(address), candidates, &sources, policy, today);
        let service = match old {
            Some(old) if **old == service => Arc::clone(old),
            _ => Arc::new(service),
        };
        Some(Wanted {
            service,
            source,
            created,
            kept_until,
        })
    }

    /// All wishes for one address as one service.
    fn merge(&self, address: ServiceAddress) -> (Option<Merged>, Vec<Rejection>) {
        let holders = self.by_service.get(&address).into_iter().flatten();
        let mut wishes: Vec<(&SourceId, &Object, &ServiceWish)> = holders
            .filter_map(|(source, id)| Some((source, self.sources.get(source)?.objects.get(id)?)))
            .flat_map(|(source, object)| object.services.iter().map(move |wish| (source, object, wish)))
            .filter(|(.., wish)| wish.address == address)
            .collect();
        // Stable: two wishes of one object stay in the order it made them.
        wishes.sort_by_key(|(source, object, _)| {
            (source.0 != OPERATOR_SOURCE, object.created, &object.id, *source)
        });
        let Some(&(first_source, first, owner)) = wishes.first() else {
            return (None, Vec::new());
        };

        let mut rejections = Vec::new();
        let mut candidates: BTreeMap<_, Candidate> = BTreeMap::new();
        let mut sources: Vec<String> = Vec::new();
        for (source, object, wish) in wishes {
            if wish.settings != owner.settings {
                rejections.push(Rejection {
                    source: source.0.clone(),
                    object: format!("{}: service {}", object.name, wish.name),
                    fault: format!("its settings contradict those that {} gave {address}", first.name),
                    remedy: format!("give it the settings of {} or another address", first.name),
                });
                continue;
            }
            let index = sources
                .iter()
                .position(|name| *name == source.0)
                .unwrap_or_else(|| {
                    sources.push(source.0.clone());
                    sources.len() - 1
                });
            for backend in &wish.backends {
                let candidate = self.candidate(&owner.name, backend, index);
                let known = candidates
                    .entry(backend.address)
                    .or_insert_with(|| candidate.clone());
                // An address that was taken over by a new container serves, although the old one is still leaving.
                if candidate.backend.state < known.backend.state {
                    *known = candidate;
                }
            }
        }
        let service = Service {
            name: owner.name.clone(),
            address,
            settings: owner.settings.clone(),
            backends: Vec::new(),
            slow: BTreeMap::new(),
        };
        let merged = Merged {
            service,
            candidates: candidates.into_values().collect(),
            sources,
            source: first_source.0.clone(),
            created: first.created,
            kept_until: None,
        };
        (Some(merged), rejections)
    }

    /// A backend with the operator's drain and a weight of 0 made part of its state.
    fn candidate(&self, service: &str, backend: &Backend, source: usize) -> Candidate {
        let mut candidate = Candidate {
            backend: backend.clone(),
            source,
            wished: None,
        };
        let backend = &mut candidate.backend;
        if backend.state != BackendState::Active {
            return candidate;
        }
        if let Some(time) = self.drains.of(service, backend) {
            backend.state = BackendState::Draining;
            backend.drain = time.unwrap_or(backend.drain);
            let reason = std::mem::replace(&mut backend.reason, "drained by operator".into());
            candidate.wished = Some((BackendState::Active, reason));
        } else if backend.weight == 0 {
            backend.state = BackendState::Draining;
            backend.reason = "weight 0".into();
        }
        candidate
    }
}

// === impl Merged ===

impl From<&Remembered> for Merged {
    fn from(remembered: &Remembered) -> Self {
        Self {
            service: Service {
                name: remembered.name.clone(),
                address: remembered.address,
                settings: remembered.settings.clone(),
                backends: Vec::new(),
                slow: BTreeMap::new(),
            },
            candidates: Vec::new(),
            sources: Vec::new(),
            source: remembered.source.clone(),
            created: remembered.created,
            kept_until: None,
        }
    }
}

// === impl Source ===

/// An object before and after an update.
type Change = (Option<Object>, Option<Object>);

impl Source {
    fn put(&mut self, object: Object) -> Option<Change> {
        if self.objects.get(&object.id) == Some(&object) {
            return None;
        }
        if object.rejections.is_empty() {
            self.rejected.remove(&object.id);
        } else {
            self.rejected.insert(object.id.clone());
        }
        let old = self.objects.insert(object.id.clone(), object.clone());
        Some((old, Some(object)))
    }

    fn remove(&mut self, id: &str) -> Option<Object> {
        self.rejected.remove(id);
        self.objects.remove(id)
    }
}

#[cfg(test)]
mod tests;
