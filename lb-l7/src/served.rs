//! From what the agent tells to what workers serve by: the table, and upstreams that keep their numbers over changes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use lb_route::{BackendState, L7, Route, RouteAddress, RouteSettings, State, WHOLE_HOST};

use crate::{
    balance,
    stats::Shards,
    table::{Table, host},
};

/// How long an upstream is left out after a connection to it failed, milliseconds.
const SHUN_MS: u64 = 2_000;

/// Everything that a worker reads. Replaced as a whole, never changed.
#[derive(Debug)]
pub struct Serving {
    /// Settings.
    pub settings: L7,
    /// Where requests go.
    pub table: Table<Action>,
    /// Where TLS goes that is not ended here, by server name.
    pub passthrough: Table<Arc<Served>>,
    /// The routes in the table.
    pub routes: Vec<Arc<Served>>,
    /// Ids of their upstreams that are active: idle connections to others are let go, as a container that stops may wait for
    /// the last one.
    pub upstreams: HashSet<u64>,
    /// Upstreams that take nothing new, or are gone, since their numbers still count: when, and how long what is upgraded
    /// may go on.
    pub fates: HashMap<u64, Fate>,
}

/// What becomes of the upgraded connections of an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fate {
    /// Since when it drains, milliseconds on the shim's clock.
    pub since_ms: u64,
    /// How long they may go on.
    pub drain: Duration,
}

/// What a host and path lead to.
#[derive(Clone, Debug)]
pub enum Action {
    /// To upstreams of the route at this place of [`Serving::routes`].
    Serve(usize),
    /// To another URL, by a redirect.
    Redirect(Arc<str>),
    /// To the same URL by HTTPS.
    ToHttps,
    /// To the status page.
    StatusPage,
}

/// One route.
#[derive(Debug)]
pub struct Served {
    /// Host and path, for people.
    pub name: String,
    /// Its path prefix, to take off; empty if nothing is taken off.
    pub prefix: Box<str>,
    /// Settings.
    pub settings: RouteSettings,
    /// Upstreams, ordered by address.
    pub targets: Vec<Target>,
    /// Places of upstreams in the order of turns.
    pub schedule: Vec<u16>,
    /// What the route answers by itself.
    pub stats: Arc<Shards>,
}

/// An upstream as a route has it now.
#[derive(Debug)]
pub struct Target {
    /// The upstream.
    pub upstream: Arc<UpstreamEntry>,
    /// What requests are spread by: its weight, in tenths while one of the route's upstreams comes back slowly.
    pub weight: u32,
    /// Its weight.
    pub nominal: u32,
    /// Tenths of its share while it comes back slowly.
    pub tenths: Option<u8>,
    /// Its state.
    pub state: BackendState,
}

/// An upstream of a route, for as long as the route has it.
#[derive(Debug)]
pub struct UpstreamEntry {
    /// Unique among all there ever were.
    pub id: u64,
    /// Where it is.
    pub address: SocketAddr,
    /// Who it is, for people.
    pub name: String,
    /// Its name in cookies.
    pub cookie: u64,
    /// Its numbers.
    pub stats: Arc<Shards>,
    /// Until when it is left out, milliseconds on the shim's clock.
    shunned_until_ms: AtomicU64,
    /// State, and when it last changed.
    pub changed: (BackendState, SystemTime),
}

/// Makes [`Serving`]s and remembers what has to outlive them.
#[derive(Debug)]
pub struct Registry {
    workers: usize,
    next: u64,
    known: BTreeMap<(RouteAddress, SocketAddr), Known>,
    routes: BTreeMap<RouteAddress, Arc<Shards>>,
    fates: HashMap<u64, Fate>,
}

#[derive(Debug)]
struct Known {
    entry: Arc<UpstreamEntry>,
    drain: Duration,
}

// === impl UpstreamEntry ===

impl UpstreamEntry {
    /// Leaves it out for a moment.
    pub fn shun(&self, now_ms: u64) {
        self.shunned_until_ms.store(now_ms + SHUN_MS, Relaxed);
    }

    /// Takes it back.
    pub fn welcome(&self) {
        if self.shunned_until_ms.load(Relaxed) != 0 {
            self.shunned_until_ms.store(0, Relaxed);
        }
    }

    /// Whether it is left out.
    pub fn is_shunned(&self, now_ms: u64) -> bool {
        self.shunned_until_ms.load(Relaxed) > now_ms
    }
}

// === impl Registry ===

impl Registry {
    /// For so many workers.
    pub fn new(workers: usize) -> Self {
        Self {
            workers,
            next: 0,
            known: BTreeMap::new(),
            routes: BTreeMap::new(),
            fates: HashMap::new(),
        }
    }

    /// What is served from now on.
    pub fn serving(&mut self, state: &State, now_ms: u64) -> Serving {
        let mut seen = BTreeSet::new();
        let mut routes = Vec::new();
        let mut entries = Vec::new();
        let mut passthrough = Vec::new();
        for route in state.served() {
            let served = Arc::new(self.served(route, &mut seen, now_ms));
            for host in std::iter::once(&route.host).chain(&route.aliases) {
                if route.settings.tls.passthrough {
                    passthrough.push((host.clone(), WHOLE_HOST.into(), Arc::clone(&served)));
                }
                entries.push((host.clone(), route.path.clone(), Action::Serve(routes.len())));
            }
            for redirect in &route.settings.redirects {
                if let Some((host, path)) = host_and_path(&redirect.from) {
                    entries.push((host, path, Action::Redirect(redirect.to.as_str().into())));
                }
            }
            routes.push(served);
        }
        let settings = &state.settings;
        for host in &settings.redirect_to_https {
            entries.push((host.to_lowercase(), WHOLE_HOST.into(), Action::ToHttps));
        }
        if let Some((host, path)) = settings.status_page.as_ref().and_then(|p| p.split_once('/')) {
            let path = format!("/{}", path.trim_end_matches('/'));
            // The operator's word goes before those of labels.
            entries.insert(0, (host.to_owned(), path, Action::StatusPage));
        }
        self.forget(&seen, now_ms);
        let kept: BTreeSet<RouteAddress> = state.routes.iter().map(Route::address).collect();
        self.routes.retain(|address, _| kept.contains(address));
        Serving {
            settings: settings.clone(),
            table: Table::new(entries),
            passthrough: Table::new(passthrough),
            routes,
            upstreams: self
                .known
                .values()
                .filter(|known| known.entry.changed.0 == BackendState::Active)
                .map(|known| known.entry.id)
                .collect(),
            fates: self.fates.clone(),
        }
    }

    fn served(
        &mut self,
        route: &Route,
        seen: &mut BTreeSet<(RouteAddress, SocketAddr)>,
        now_ms: u64,
    ) -> Served {
        let address = route.address();
        let workers = self.workers;
        let stats = self
            .routes
            .entry(address.clone())
            .or_insert_with(|| Arc::new(Shards::new(workers)));
        let stats = Arc::clone(stats);
        let mut targets = Vec::with_capacity(route.upstreams.len());
        for upstream in &route.upstreams {
            let key = (address.clone(), upstream.address);
            let entry = match self.known.get(&key) {
                Some(known)
                    if known.entry.name == upstream.name && known.entry.changed.0 == upstream.state =>
                {
                    Arc::clone(&known.entry)
                }
                known => {
                    // Another container with the address of an earlier one has numbers and connections of its own.
                    let same = known
                        .filter(|known| known.entry.name == upstream.name)
                        .map(|k| &k.entry);
                    let id = same.map_or(self.next, |entry| entry.id);
                    self.next += u64::from(same.is_none());
                    Arc::new(UpstreamEntry {
                        id,
                        address: upstream.address,
                        name: upstream.name.clone(),
                        cookie: balance::cookie_of(upstream.address),
                        stats: same.map_or_else(|| Arc::new(Shards::new(workers)), |e| Arc::clone(&e.stats)),
                        shunned_until_ms: AtomicU64::new(0),
                        changed: (upstream.state, SystemTime::now()),
                    })
                }
            };
            if upstream.state == BackendState::Draining {
                let fate = Fate {
                    since_ms: now_ms,
                    drain: upstream.drain,
                };
                self.fates.entry(entry.id).or_insert(fate);
            } else {
                self.fates.remove(&entry.id);
            }
            let known = Known {
                entry: Arc::clone(&entry),
                drain: upstream.drain,
            };
            if let Some(old) = self.known.insert(key.clone(), known)
                && old.entry.id != entry.id
            {
                self.fates.entry(old.entry.id).or_insert(Fate {
                    since_ms: now_ms,
                    drain: old.drain,
                });
            }
            seen.insert(key);
            targets.push(Target {
                upstream: entry,
                weight: upstream.weight.saturating_mul(route.share(upstream.address)),
                nominal: upstream.weight,
                tenths: route.slow.get(&upstream.address).copied(),
                state: upstream.state,
            });
        }
        let weights: Vec<u32> = targets
            .iter()
            .map(|t| {
                if t.state == BackendState::Active {
                    t.weight
                } else {
                    0
                }
            })
            .collect();
        let rewritten = route.settings.rewrite && route.path != WHOLE_HOST;
        Served {
            name: address.to_string(),
            prefix: if rewritten {
                route.path.as_str().into()
            } else {
                "".into()
            },
            settings: route.settings.clone(),
            schedule: balance::schedule(&weights),
            targets,
            stats,
        }
    }

    /// Lets upstreams go that no route has any more.
    fn forget(&mut self, seen: &BTreeSet<(RouteAddress, SocketAddr)>, now_ms: u64) {
        let fates = &mut self.fates;
        self.known.retain(|key, known| {
            let stays = seen.contains(key);
            if !stays {
                let fate = Fate {
                    since_ms: now_ms,
                    drain: known.drain,
                };
                fates.entry(known.entry.id).or_insert(fate);
            }
            stays
        });
        let draining: BTreeSet<u64> = self.known.values().map(|known| known.entry.id).collect();
        // Long after its deadline nothing of it is left that would have to be ended.
        fates.retain(|id, fate| {
            let over = fate.since_ms + fate.drain.as_millis() as u64 + 60_000;
            draining.contains(id) || now_ms < over
        });
    }
}

/// `host`, `host/path` or a URL as host and path of the table.
fn host_and_path(from: &str) -> Option<(String, String)> {
    let rest = from.split_once("://").map_or(from, |(_, rest)| rest);
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = host::normal(authority)?.into_owned();
    let path = path.trim_end_matches('/');
    Some((
        host,
        if path.is_empty() {
            WHOLE_HOST.into()
        } else {
            path.into()
        },
    ))
}

#[cfg(test)]
pub(crate) mod tests {
    use lb_route::{Balance, Upstream};

    use super::*;
    use crate::table::Found;

    /// A route with upstreams of these weights and states.
    pub(crate) fn served(balance: Balance, upstreams: &[(u32, &str)]) -> Served {
        let route = Route {
            host: "a".into(),
            aliases: BTreeSet::new(),
            path: "/".into(),
            settings: RouteSettings {
                balance,
                ..RouteSettings::default()
            },
            upstreams: upstreams
                .iter()
                .enumerate()
                .map(|(i, (weight, state))| Upstream {
                    address: SocketAddr::new([10, 0, 0, i as u8].into(), 80),
                    name: format!("c{i}"),
                    weight: *weight,
                    state: serde_json::from_str(&format!("\"{state}\"")).unwrap(),
                    drain: Duration::from_secs(1),
                })
                .collect(),
            slow: BTreeMap::new(),
            remarks: BTreeSet::new(),
        };
        Registry::new(1).served(&route, &mut BTreeSet::new(), 0)
    }

    fn state(text: &str) -> State {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn numbers_outlive_changes_and_not_their_container() {
        let mut registry = Registry::new(1);
        let with = |name: &str, state: &str| {
            self::state(&format!(
                r#"{{"routes":[{{"host":"a","upstreams":[{{"address":"10.0.0.1:80","name":"{name}","state":"{state}","drain_ms":500}}]}}]}}"#
            ))
        };
        let id = |serving: &Serving| serving.routes[0].targets[0].upstream.id;
        let first = registry.serving(&with("one", "active"), 0);
        first.routes[0].targets[0].upstream.stats.of(0).answered(200);
        assert!(first.fates.is_empty());
        let drained = registry.serving(&with("one", "draining"), 10);
        assert_eq!(id(&first), id(&drained));
        assert!(first.upstreams.contains(&id(&first)) && drained.upstreams.is_empty());
        assert_eq!(
            drained.routes[0].targets[0].upstream.stats.sum(|s| &s.answers[1]),
            1
        );
        assert_eq!(
            drained.fates[&id(&first)],
            Fate {
                since_ms: 10,
                drain: Duration::from_millis(500)
            }
        );
        let other = registry.serving(&with("two", "active"), 20);
        assert_ne!(id(&other), id(&first));
        assert_eq!(
            other.fates[&id(&first)].since_ms,
            10,
            "the deadline does not move"
        );
        let gone = registry.serving(&state("{}"), 30);
        assert_eq!(gone.fates.len(), 2);
        assert!(registry.serving(&state("{}"), 10_000_000).fates.is_empty());
    }

    #[test]
    fn an_upstream_that_comes_back_has_tenths_of_its_share() {
        let serving = |slow: &str| {
            let text = format!(
                r#"{{"routes":[{{"host":"a","upstreams":[
                    {{"address":"10.0.0.1:80","weight":2}},{{"address":"10.0.0.2:80"}}]{slow}}}]}}"#
            );
            Registry::new(1).serving(&state(&text), 0)
        };
        let turns = |serving: &Serving, place: u16| {
            let schedule = &serving.routes[0].schedule;
            (schedule.iter().filter(|p| **p == place).count(), schedule.len())
        };
        let slow = serving(r#","slow":{"10.0.0.2:80":3}"#);
        assert_eq!((turns(&slow, 0), turns(&slow, 1)), ((20, 23), (3, 23)));
        let target = &slow.routes[0].targets[1];
        assert_eq!((target.weight, target.nominal, target.tenths), (3, 1, Some(3)));
        let whole = serving("");
        assert_eq!((turns(&whole, 0), turns(&whole, 1)), ((2, 3), (1, 3)));
    }

    #[test]
    fn routes_aliases_redirects_and_pages_are_in_the_table() {
        let state = state(
            r#"{"settings":{"cluster":"east","redirect_to_https":["ucp.example.com"],"status_page":"*/weir"},
               "routes":[
                {"host":"a","aliases":["b"],"upstreams":[],"path":"/x","settings":{"rewrite":true,
                 "redirects":[{"from":"http://old.example.com","to":"https://new.example.com"}]}},
                {"host":"c","upstreams":[],"settings":{"cluster":"west"}},
                {"host":"d","upstreams":[],"settings":{"cluster":"east"}}]}"#,
        );
        let serving = Registry::new(1).serving(&state, 0);
        let found = |host: &str, path: &str| match serving.table.find(host, path) {
            Found::This(Action::Serve(place)) => {
                let route = &serving.routes[*place];
                format!("{} -{}", route.name, route.prefix)
            }
            Found::This(Action::Redirect(to)) => to.to_string(),
            Found::This(Action::ToHttps) => "https".into(),
            Found::This(Action::StatusPage) => "status".into(),
            other => format!("{other:?}"),
        };
        assert_eq!(found("a", "/x/1"), "a/x -/x");
        assert_eq!(found("b", "/x"), "a/x -/x");
        assert_eq!(found("old.example.com", "/1"), "https://new.example.com");
        assert_eq!(found("ucp.example.com", "/"), "https");
        assert_eq!(found("whatever", "/weir"), "status");
        assert_eq!(found("d", "/"), "d/ -");
        assert_eq!(found("c", "/"), "NoHost");
    }
}
