//! Wishes for routes become routes, as wishes for services become services: wishes for one host and path form one
//! upstream set, the oldest object's settings win, and who contradicts them does not join.
//!
//! Each name of a route is merged by itself, so that an alias which two containers share has the upstreams of both.
//! Names that come out alike are told as one route with aliases.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::SystemTime,
};

use super::{
    OPERATOR_SOURCE, Source,
    health::{Candidate, Health},
};
use crate::{
    model::{Backend, Rejection, UnhealthyPolicy},
    route::{Route, RouteAddress, RouteSettings, RouteWish},
    source::{Object, SourceId},
};

/// The routes of everything heard.
#[derive(Debug, Default)]
pub(super) struct Routes {
    by_address: BTreeMap<RouteAddress, BTreeSet<(SourceId, String)>>,
    dirty: BTreeSet<RouteAddress>,
    names: BTreeMap<RouteAddress, Name>,
    contradictions: BTreeMap<RouteAddress, Vec<Rejection>>,
    told: Arc<Vec<Route>>,
}

/// One name of a route, merged.
#[derive(Clone, Debug, PartialEq)]
struct Name {
    /// The host that it is an alias of, or itself.
    of: String,
    settings: RouteSettings,
    /// The upstreams before their health is looked at, in the order of their addresses, and the names of their sources.
    candidates: Vec<Candidate>,
    sources: Vec<String>,
    upstreams: Vec<Backend>,
    /// Upstreams that have come back, and tenths of their share.
    slow: BTreeMap<SocketAddr, u8>,
    remarks: BTreeSet<String>,
}

// === impl Routes ===

impl Routes {
    /// Takes in that an object wishes its routes, or no longer does.
    pub(super) fn note(&mut self, source: &SourceId, object: &Object, present: bool) {
        for wish in &object.routes {
            let holders = self.by_address.entry(wish.address.clone()).or_default();
            let key = (source.clone(), object.id.clone());
            if present {
                holders.insert(key)
            } else {
                holders.remove(&key)
            };
            self.dirty.insert(wish.address.clone());
        }
    }

    /// Has every route looked at again.
    pub(super) fn touch(&mut self) {
        self.dirty.extend(self.by_address.keys().cloned());
    }

    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Has the routes judged anew that lead to an upstream.
    pub(super) fn touch_upstream(&mut self, upstream: SocketAddr) {
        let leads_there = |name: &Name| {
            let found = name
                .candidates
                .binary_search_by_key(&upstream, |c| c.backend.address);
            found.is_ok()
        };
        let routes = self.names.iter().filter(|(_, name)| leads_there(name));
        self.dirty.extend(routes.map(|(address, _)| address.clone()));
    }

    /// Brings the routes up to date; `candidate` makes the operator's word part of an upstream of a host. `today` is now.
    pub(super) fn refresh(
        &mut self,
        sources: &BTreeMap<SourceId, Source>,
        health: &mut Health,
        today: SystemTime,
        candidate: impl Fn(&str, &Backend, usize) -> Candidate,
    ) {
        if self.dirty.is_empty() {
            return;
        }
        let dirty = std::mem::take(&mut self.dirty);
        let mut merged: BTreeMap<RouteAddress, Option<Name>> = BTreeMap::new();
        for address in dirty {
            let (name, contradictions) = self.merge(&address, sources, &candidate);
            if contradictions.is_empty() {
                self.contradictions.remove(&address);
            } else {
                self.contradictions.insert(address.clone(), contradictions);
            }
            merged.insert(address, name);
        }
        let changes = |(address, name): (&RouteAddress, &Option<Name>)| {
            let known = self.names.get(address).map(|known| &known.candidates);
            known != name.as_ref().map(|name| &name.candidates)
        };
        if merged.iter().any(changes) {
            let untouched = self
                .names
                .iter()
                .filter(|(address, _)| !merged.contains_key(address));
            let mut all: BTreeMap<SocketAddr, &Candidate> = BTreeMap::new();
            let names = untouched.map(|(_, name)| name).chain(merged.values().flatten());
            for candidate in names.flat_map(|name| &name.candidates) {
                let known = all.entry(candidate.backend.address).or_insert(candidate);
                if candidate.backend.state < known.backend.state {
                    *known = candidate;
                }
            }
            let all: Vec<Candidate> = all.into_values().cloned().collect();
            health.track(None, &all, None, None);
        }
        let mut changed = false;
        for (address, name) in merged {
            let name = name.map(|mut name| {
                let candidates = name.candidates.clone();
                let policy = UnhealthyPolicy::default();
                (name.upstreams, name.slow) = health.judge(None, candidates, &name.sources, policy, today);
                name
            });
            changed |= self.names.get(&address) != name.as_ref();
            match name {
                Some(name) => self.names.insert(address, name),
                None => {
                    self.by_address.remove(&address);
                    self.names.remove(&address)
                }
            };
        }
        if changed {
            self.told = Arc::new(self.grouped());
        }
    }

    /// The routes, in the order of host and path.
    pub(super) fn told(&self) -> Arc<Vec<Route>> {
        Arc::clone(&self.told)
    }

    /// What was refused because it contradicts an older object.
    pub(super) fn contradictions(&self) -> impl Iterator<Item = &Rejection> {
        self.contradictions.values().flatten()
    }

    /// All wishes for one name, before health is looked at.
    fn merge(
        &self,
        address: &RouteAddress,
        sources: &BTreeMap<SourceId, Source>,
        candidate: &impl Fn(&str, &Backend, usize) -> Candidate,
    ) -> (Option<Name>, Vec<Rejection>) {
        let holders = self.by_address.get(address).into_iter().flatten();
        let mut wishes: Vec<(&SourceId, &Object, &RouteWish)> = holders
            .filter_map(|(source, id)| Some((source, sources.get(source)?.objects.get(id)?)))
            .flat_map(|(source, object)| object.routes.iter().map(move |wish| (source, object, wish)))
            .filter(|(.., wish)| wish.address == *address)
            .collect();
        wishes.sort_by_key(|(source, object, _)| {
            (source.0 != OPERATOR_SOURCE, object.created, &object.id, *source)
        });
        let Some(&(_, first, owner)) = wishes.first() else {
            return (None, Vec::new());
        };
        let mut rejections = Vec::new();
        let mut candidates: BTreeMap<SocketAddr, Candidate> = BTreeMap::new();
        let mut names: Vec<String> = Vec::new();
        let mut remarks = BTreeSet::new();
        for (source, object, wish) in wishes {
            let differ = wish.settings.differences(&owner.settings);
            if !differ.is_empty() {
                rejections.push(Rejection {
                    source: source.0.clone(),
                    object: format!("{}: route {address}", object.name),
                    fault: format!(
                        "its settings contradict those that {} gave {address} in {}",
                        first.name,
                        differ.join(", ")
                    ),
                    remedy: format!("give it the labels of {} or another host", first.name),
                });
                continue;
            }
            remarks.extend(wish.remarks.iter().cloned());
            let index = names
                .iter()
                .position(|name| *name == source.0)
                .unwrap_or_else(|| {
                    names.push(source.0.clone());
                    names.len() - 1
                });
            let candidate = candidate(&owner.of, &wish.upstream, index);
            let known = candidates
                .entry(wish.upstream.address)
                .or_insert_with(|| candidate.clone());
            // An address that was taken over by a new container serves, although the old one is still leaving.
            if candidate.backend.state < known.backend.state {
                *known = candidate;
            }
        }
        let name = Name {
            of: owner.of.clone(),
            settings: owner.settings.clone(),
            candidates: candidates.into_values().collect(),
            sources: names,
            upstreams: Vec::new(),
            slow: BTreeMap::new(),
            remarks,
        };
        (Some(name), rejections)
    }

    fn grouped(&self) -> Vec<Route> {
        let mut routes: BTreeMap<(&str, &str), Vec<Route>> = BTreeMap::new();
        // The host itself comes before its aliases.
        let (own, aliases): (Vec<_>, Vec<_>) = self
            .names
            .iter()
            .partition(|(address, name)| address.host == name.of);
        for (address, name) in own.into_iter().chain(aliases) {
            let alike = routes.entry((&name.of, &address.path)).or_default();
            let same = alike
                .iter_mut()
                .find(|route| route.settings == name.settings && route.upstreams == name.upstreams);
            match same {
                Some(route) => {
                    route.aliases.insert(address.host.clone());
                    route.remarks.extend(name.remarks.iter().cloned());
                }
                None => alike.push(Route {
                    host: address.host.clone(),
                    aliases: BTreeSet::new(),
                    path: address.path.clone(),
                    settings: name.settings.clone(),
                    upstreams: name.upstreams.clone(),
                    slow: name.slow.clone(),
                    remarks: name.remarks.clone(),
                }),
            }
        }
        let mut all: Vec<Route> = routes.into_values().flatten().collect();
        all.sort_by(|a, b| (&a.host, &a.path).cmp(&(&b.host, &b.path)));
        all
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::{
        desired::{Drains, Heard},
        model::{Attachment, BackendState},
        route::Balance,
        source::{Message, Update},
    };

    /// A container `age` seconds old at the epoch, with these names of a route; the first is the host.
    fn container(age: u8, balance: Balance, names: &[&str]) -> Object {
        let wish = |name: &&str| RouteWish {
            address: RouteAddress {
                host: (*name).into(),
                path: "/".into(),
            },
            of: names[0].into(),
            settings: RouteSettings {
                balance,
                ..RouteSettings::default()
            },
            remarks: vec![format!("remark of {age}")],
            upstream: Backend {
                address: ([10, 0, 0, age], 80).into(),
                weight: 1,
                state: BackendState::Active,
                reason: "running".into(),
                drain: Duration::from_secs(30),
                name: format!("c{age}"),
                check: None,
                attachment: Attachment::Address,
            },
        };
        Object {
            id: format!("id{age}"),
            name: format!("c{age}"),
            created: SystemTime::UNIX_EPOCH + Duration::from_secs(age.into()),
            services: Vec::new(),
            routes: names.iter().map(wish).collect(),
            rejections: Vec::new(),
        }
    }

    fn hear(heard: &mut Heard, update: Update) {
        heard.absorb(Message {
            source: SourceId("docker".into()),
            update,
        });
        heard.refresh(SystemTime::UNIX_EPOCH);
    }

    /// `host(alias,alias): upstream upstream` of every route.
    fn shown(heard: &Heard) -> Vec<String> {
        let route = |route: &Route| {
            let aliases: Vec<&str> = route.aliases.iter().map(String::as_str).collect();
            let upstreams: Vec<&str> = route.upstreams.iter().map(|u| u.name.as_str()).collect();
            format!("{}({}): {}", route.host, aliases.join(","), upstreams.join(" "))
        };
        heard.routes().iter().map(route).collect()
    }

    const RR: Balance = Balance::RoundRobin;

    #[test]
    fn containers_of_one_host_are_one_upstream_set_and_leave_it() {
        let mut heard = Heard::default();
        hear(
            &mut heard,
            Update::Reset(vec![container(2, RR, &["vote", "poll"])]),
        );
        hear(&mut heard, Update::Put(container(1, RR, &["vote", "poll"])));
        assert_eq!(shown(&heard), ["vote(poll): c1 c2"]);
        assert_eq!(heard.routes()[0].remarks.len(), 2);
        assert!(!heard.is_dirty());
        hear(&mut heard, Update::Remove("id1".into()));
        assert_eq!(shown(&heard), ["vote(poll): c2"]);
        hear(&mut heard, Update::Put(container(2, RR, &["vote"])));
        assert_eq!(shown(&heard), ["vote(): c2"]);
        hear(&mut heard, Update::Reset(Vec::new()));
        assert_eq!(shown(&heard), [""; 0]);
        assert!(heard.routes.by_address.is_empty());
    }

    #[test]
    fn what_is_heard_again_is_the_same_allocation() {
        let mut heard = Heard::default();
        hear(&mut heard, Update::Put(container(1, RR, &["vote"])));
        let before = heard.routes();
        hear(&mut heard, Update::Reset(vec![container(1, RR, &["vote"])]));
        assert!(Arc::ptr_eq(&before, &heard.routes()));
    }

    #[test]
    fn of_two_that_contradict_each_other_the_younger_is_named_and_left_out() {
        let objects = [
            container(1, RR, &["vote"]),
            container(2, Balance::ClientIp, &["vote", "poll"]),
            container(3, RR, &["vote"]),
        ];
        let mut forward = Heard::default();
        let mut backward = Heard::default();
        for object in &objects {
            hear(&mut forward, Update::Put(object.clone()));
        }
        for object in objects.iter().rev() {
            hear(&mut backward, Update::Put(object.clone()));
        }
        assert_eq!(shown(&forward), ["poll(): c2", "vote(): c1 c3"]);
        assert_eq!(shown(&backward), shown(&forward));
        let rejections = forward.rejections();
        assert_eq!(rejections, backward.rejections());
        assert_eq!(rejections.len(), 1);
        let text = rejections.first().unwrap().to_string();
        assert!(
            text.contains("its settings contradict those that c1 gave vote/ in balance"),
            "{text}"
        );
        // When the older ones go, it is heard.
        hear(&mut forward, Update::Reset(vec![objects[1].clone()]));
        assert_eq!(shown(&forward), ["vote(poll): c2"]);
        assert!(forward.rejections().is_empty());
    }

    #[test]
    fn an_alias_that_two_routes_share_has_the_upstreams_of_both() {
        let mut heard = Heard::default();
        hear(&mut heard, Update::Put(container(1, RR, &["a", "all"])));
        hear(&mut heard, Update::Put(container(2, RR, &["b", "all"])));
        assert_eq!(shown(&heard), ["a(): c1", "all(): c1 c2", "b(): c2"]);
    }

    #[test]
    fn the_operators_drain_holds_for_routes() {
        let mut heard = Heard::default();
        hear(&mut heard, Update::Put(container(1, RR, &["vote"])));
        heard.set_drains(Drains([("c1".into(), None)].into()));
        assert!(heard.is_dirty());
        heard.refresh(SystemTime::UNIX_EPOCH);
        let upstream = heard.routes()[0].upstreams[0].clone();
        assert_eq!(
            (upstream.state, upstream.reason.as_str()),
            (BackendState::Draining, "drained by operator")
        );
    }
}
