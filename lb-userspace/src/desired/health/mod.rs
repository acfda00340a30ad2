//! What is known of the backends' health, and what it makes of their state. Pure.
//!
//! A backend takes new flows when everybody who judges it agrees: its source (Docker's state and HEALTHCHECK), the active
//! check, the datapath's counters, and the operator. A judge that has not spoken yet changes nothing for a backend that
//! serves already, and keeps a new one waiting.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::SystemTime,
};

use crate::{
    health::{Before, By, Key, Target, Targets, Verdict, WHOLE},
    model::{Backend, BackendState, Passive, Service, ServiceAddress, UnhealthyPolicy},
    status::Condition,
};

/// The name of the active check among the conditions.
const CHECK: &str = "check";
/// The name of passive ejection among the conditions.
const PASSIVE: &str = "passive";
/// The name of the operator among the conditions.
const OPERATOR: &str = "operator";

/// Whom to check from now on, and whom no more, since the last call.
#[derive(Debug, Default, PartialEq)]
pub struct TargetChanges {
    active: BTreeMap<Key, Option<Target>>,
    passive: BTreeMap<ServiceAddress, Option<Passive>>,
}

/// Everything known, by backend.
#[derive(Debug, Default)]
pub(super) struct Health {
    known: BTreeMap<Key, Known>,
    passive: BTreeMap<ServiceAddress, Passive>,
    /// What the maps held when the agent started: whether the backend took new flows.
    adopted: BTreeMap<Key, bool>,
    /// The time of first lists is over: upstreams that come now were not there when the agent started.
    settled: bool,
    generation: u64,
    changes: TargetChanges,
}

/// One backend with a check or a verdict.
#[derive(Debug, Default)]
struct Known {
    /// Whom the verdicts are about: the address alone may have a new user.
    name: String,
    target: Option<Target>,
    check: Option<Verdict>,
    passive: Option<Verdict>,
    conditions: Vec<Condition>,
}

/// A backend of a service before its health is looked at.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Candidate {
    /// As its source and the operator wish it.
    pub backend: Backend,
    /// Its source, as an index.
    pub source: usize,
    /// As the source alone wishes it, where the operator drains it.
    pub wished: Option<(BackendState, String)>,
}

// === impl Health ===

impl Health {
    /// Remembers whether a backend that is found in the maps takes new flows.
    pub fn adopt(&mut self, key: Key, serves: bool) {
        self.adopted.insert(key, serves);
    }

    /// What was found in the maps means nothing for backends that come later.
    pub fn forget_adopted(&mut self) {
        self.adopted.clear();
    }

    /// What routes wish from now on was not there when the agent started.
    pub fn settle(&mut self) {
        self.settled = true;
    }

    /// Takes in a verdict. True if it is about somebody who is there.
    pub fn absorb(&mut self, verdict: Verdict, name: impl FnOnce() -> Option<String>) -> bool {
        match verdict.by {
            By::Check => {
                let known = self.known.get_mut(&verdict.key).filter(|known| {
                    known.target.as_ref().map(|target| target.generation) == Some(verdict.generation)
                });
                let Some(known) = known else { return false };
                known.check = Some(verdict);
            }
            By::Passive => {
                let Some(name) = name().filter(|_| {
                    let service = verdict.key.service;
                    service.is_some_and(|service| self.passive.contains_key(&service))
                }) else {
                    return false;
                };
                let known = self.known.entry(verdict.key).or_default();
                known.name = name;
                known.passive = Some(verdict);
            }
        }
        true
    }

    /// Takes in who is in a service now, or with `None` in the routes, in the order of their addresses; `old` is the
    /// service as it was.
    pub fn track(
        &mut self,
        service: Option<ServiceAddress>,
        candidates: &[Candidate],
        passive: Option<&Passive>,
        old: Option<&Service>,
    ) {
        if let Some(address) = service
            && self.passive.get(&address) != passive
        {
            match passive {
                Some(passive) => drop(self.passive.insert(address, passive.clone())),
                None => drop(self.passive.remove(&address)),
            }
            self.changes.passive.insert(address, passive.cloned());
        }
        let absent = |key: &Key| {
            candidates
                .binary_search_by_key(&key.backend, |c| c.backend.address)
                .is_err()
        };
        let gone: Vec<Key> = self.of(service).filter(absent).collect();
        for Candidate { backend, .. } in candidates {
            let key = Key {
                service,
                backend: backend.address,
            };
            self.track_one(key, backend, passive.is_some(), old);
        }
        for key in gone {
            if self
                .known
                .remove(&key)
                .is_some_and(|known| known.target.is_some())
            {
                self.changes.active.insert(key, None);
            }
        }
    }

    fn track_one(&mut self, key: Key, backend: &Backend, passive: bool, old: Option<&Service>) {
        let known = self.known.get_mut(&key);
        if known.is_none() && backend.check.is_none() {
            return;
        }
        let same = known.as_ref().is_some_and(|known| known.name == backend.name);
        let known = self.known.entry(key).or_default();
        if !same {
            *known = Known {
                name: backend.name.clone(),
                // Its successor is told to the checks below; without one, that there is none.
                target: known.target.take().filter(|_| backend.check.is_none()),
                ..Known::default()
            };
        }
        if !passive {
            known.passive = None;
        }
        let target = match (&backend.check, &known.target) {
            (None, None) => return,
            (None, Some(_)) => None,
            (Some(check), Some(target)) if target.check == *check => return,
            // The same backend, checked otherwise: what is known of it stands until that says something else.
            (Some(check), Some(target)) => Some(Target {
                check: check.clone(),
                ..target.clone()
            }),
            (Some(check), None) => {
                let served = old
                    .and_then(|old| {
                        let index = old.backends.binary_search_by_key(&key.backend, |b| b.address);
                        old.backends.get(index.ok()?)
                    })
                    .filter(|was| was.name == backend.name)
                    .map(|was| was.state == BackendState::Active);
                // Told once: whoever has that address later is somebody else.
                // No map tells of upstreams: those of the first lists are taken to serve, as they will if this is a restart.
                let upstream = || (key.service.is_none() && !self.settled).then_some(true);
                let adopted = self.adopted.remove(&key).or_else(upstream);
                self.generation += 1;
                Some(Target {
                    generation: self.generation,
                    check: check.clone(),
                    before: match served.or(adopted) {
                        Some(true) => Before::Served,
                        Some(false) => Before::Waited,
                        None => Before::New,
                    },
                })
            }
        };
        if target.is_none() {
            known.check = None;
        }
        known.target.clone_from(&target);
        self.changes.active.insert(key, target);
    }

    /// The state of a service's backends, or of upstreams, with everybody's word, and the shares of those that have come back, tenths by
    /// address. `sources` are the names that the candidates mean; `today` is now.
    pub fn judge(
        &mut self,
        service: Option<ServiceAddress>,
        candidates: Vec<Candidate>,
        sources: &[String],
        policy: UnhealthyPolicy,
        today: SystemTime,
    ) -> (Vec<Backend>, BTreeMap<SocketAddr, u8>) {
        let mut slow = BTreeMap::new();
        // Backends that nobody but their health keeps from serving, and whether any of them has no verdict yet.
        let (mut unfit, mut open, mut active) = (Vec::new(), false, false);
        let mut backends: Vec<Backend> = Vec::with_capacity(candidates.len());
        for candidate in candidates {
            let key = Key {
                service,
                backend: candidate.backend.address,
            };
            let Candidate {
                mut backend,
                source,
                wished,
            } = candidate;
            let source = sources.get(source).map_or("", String::as_str);
            let drained = wished.is_some();
            match self.known.get_mut(&key) {
                Some(known) => {
                    let fit = known.judge(&mut backend, source, wished, today);
                    if fit == Some(false) {
                        unfit.push(backends.len());
                        open |= known.is_open();
                    } else if let Some(tenths) = known.tenths().filter(|_| fit == Some(true)) {
                        slow.insert(key.backend, tenths);
                    }
                }
                None if drained => {
                    // Only to tell since when; it goes when the drain does.
                    let known = self.known.entry(key).or_default();
                    known.name.clone_from(&backend.name);
                    known.judge(&mut backend, source, wished, today);
                }
                None => {}
            }
            active |= backend.state == BackendState::Active;
            backends.push(backend);
        }
        if policy == UnhealthyPolicy::ServeAll && !active && !open {
            for index in unfit {
                let backend = &mut backends[index];
                backend.state = BackendState::Active;
                backend.reason = format!("all are unfit, so all serve ({})", backend.reason);
            }
        }
        (backends, slow)
    }

    /// Everybody's word about a backend; empty where its source is the only judge.
    pub fn conditions(&self, key: &Key) -> &[Condition] {
        self.known.get(key).map_or(&[], |known| &known.conditions)
    }

    /// Whom to check from now on, and whom no more, since the last call.
    pub fn take_changes(&mut self) -> TargetChanges {
        std::mem::take(&mut self.changes)
    }

    /// Backends of a service, or upstreams, of which something is known.
    fn of(&self, service: Option<ServiceAddress>) -> impl Iterator<Item = Key> {
        // Sorts before every backend of the service.
        let backend = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        let from = self.known.range(Key { service, backend }..);
        from.map(|(key, _)| *key)
            .take_while(move |key| key.service == service)
    }
}

// === impl Known ===

impl Known {
    /// Makes health a part of the state. `None`: something else keeps the backend from serving.
    fn judge(
        &mut self,
        backend: &mut Backend,
        source: &str,
        wished: Option<(BackendState, String)>,
        today: SystemTime,
    ) -> Option<bool> {
        let drained = wished.is_some();
        let (state, reason) = wished.unwrap_or_else(|| (backend.state, backend.reason.clone()));
        let mut conditions = vec![(source, state == BackendState::Active, reason, None)];
        if drained {
            conditions.push((OPERATOR, false, backend.reason.clone(), None));
        }
        if let Some(target) = &self.target {
            conditions.push(match (&self.check, target.before) {
                (Some(verdict), _) => (CHECK, verdict.fit, verdict.reason.clone(), Some(verdict.since)),
                (None, Before::Served) => (CHECK, true, "no result yet".into(), None),
                (None, Before::New | Before::Waited) => (CHECK, false, "no result yet".into(), None),
            });
        }
        if let Some(verdict) = &self.passive {
            conditions.push((PASSIVE, verdict.fit, verdict.reason.clone(), Some(verdict.since)));
        }
        let old = std::mem::take(&mut self.conditions);
        let since = |by: &str, fit: bool, reason: &str| {
            let same = |c: &&Condition| c.by == by && c.fit == fit && c.reason == reason;
            old.iter().find(same).map_or(today, |c| c.since)
        };
        self.conditions = conditions
            .into_iter()
            .map(|(by, fit, reason, known)| Condition {
                by: by.into(),
                fit,
                since: known.unwrap_or_else(|| since(by, fit, &reason)),
                reason,
            })
            .collect();
        if backend.state != BackendState::Active {
            return None;
        }
        let health = self
            .conditions
            .iter()
            .filter(|c| c.by == CHECK || c.by == PASSIVE);
        let said = |fit: bool| {
            health
                .clone()
                .filter(move |c| c.fit == fit)
                .map(|c| format!("{}: {}", c.by, c.reason))
        };
        let against: Vec<String> = said(false).collect();
        let fit = against.is_empty();
        if fit {
            // Its source's word first, which may be nothing.
            let own = Some(std::mem::take(&mut backend.reason)).filter(|reason| !reason.is_empty());
            backend.reason = own.into_iter().chain(said(true)).collect::<Vec<_>>().join("; ");
        } else {
            backend.state = BackendState::Unready;
            backend.reason = against.join("; ");
        }
        Some(fit)
    }

    /// A check that has not decided yet.
    fn is_open(&self) -> bool {
        self.target.is_some() && self.check.is_none()
    }

    /// The share of a backend that has come back, if it is not whole.
    fn tenths(&self) -> Option<u8> {
        self.check
            .as_ref()
            .map(|verdict| verdict.tenths)
            .filter(|tenths| *tenths < WHOLE)
    }
}

// === impl TargetChanges ===

impl TargetChanges {
    /// Makes the changes. False if there were none.
    pub fn apply(self, targets: &mut Targets) -> bool {
        let any = self != Self::default();
        for (key, target) in self.active {
            match target {
                Some(target) => drop(targets.active.insert(key, target)),
                None => drop(targets.active.remove(&key)),
            }
        }
        for (address, passive) in self.passive {
            match passive {
                Some(passive) => drop(targets.passive.insert(address, passive)),
                None => drop(targets.passive.remove(&address)),
            }
        }
        any
    }
}

#[cfg(test)]
mod tests;
