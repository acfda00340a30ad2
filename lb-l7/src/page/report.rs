//! The numbers of now.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::SystemTime,
};

use lb_route::BackendState;
use serde::Serialize;

use crate::{
    acme::{Trouble, Wanted},
    listen::PlaceReport,
    served::{Served, Serving, Target},
    stats::{BOUNDS_US, CLASSES, Shards},
    worker::Shared,
};

/// Everything that a status page tells.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of the shim.
    pub version: &'static str,
    /// When it began to serve.
    pub since: SystemTime,
    /// Where it listens, or cannot.
    pub places: Vec<PlaceReport>,
    /// Client connections.
    pub clients: Clients,
    /// Answers by class to requests that no route took: 1xx to 5xx.
    pub unrouted: [u64; CLASSES],
    /// Lines of the access log that could not be written.
    pub log_lines_lost: u64,
    /// The routes.
    pub routes: Vec<RouteReport>,
    /// Certificates of ACME.
    pub certificates: Vec<CertificateReport>,
}

/// A certificate that the shim gets by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CertificateReport {
    /// Its host; empty: what concerns the orders of all of them.
    pub host: String,
    /// Until when it is good; `None`: there is none yet.
    pub until: Option<SystemTime>,
    /// Orders that failed.
    pub failures: u64,
    /// Why the last one failed; `None`: it did not.
    pub fault: Option<String>,
}

/// Client connections.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Clients {
    /// Open now.
    pub open: u64,
    /// Made so far.
    pub total: u64,
    /// At a time at most.
    pub limit: u32,
}

/// One route.
#[derive(Clone, Debug, Serialize)]
pub struct RouteReport {
    /// Host and path.
    pub name: String,
    /// How requests are spread.
    pub balance: String,
    /// What it answered by itself.
    pub own: Numbers,
    /// Its upstreams.
    pub upstreams: Vec<UpstreamReport>,
}

/// One upstream of a route.
#[derive(Clone, Debug, Serialize)]
pub struct UpstreamReport {
    /// Container.
    pub name: String,
    /// Where it is.
    pub address: SocketAddr,
    /// State.
    pub state: BackendState,
    /// Since when.
    pub changed: SystemTime,
    /// It could not be reached a moment ago, and is left out for a moment.
    pub shunned: bool,
    /// Weight.
    pub weight: u32,
    /// Tenths of its share while it comes back slowly, 1 to 9; absent otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenths: Option<u8>,
    /// Its numbers.
    pub numbers: Numbers,
}

/// Numbers since the shim began.
#[derive(Clone, Debug, Serialize)]
pub struct Numbers {
    /// Requests under way, upgraded connections too.
    pub active: u64,
    /// The most that each worker had at a time, added up.
    pub active_max: u64,
    /// Answers.
    pub requests: u64,
    /// Answers by class, 1xx to 5xx.
    pub answers: [u64; CLASSES],
    /// Bytes of bodies from clients.
    pub bytes_in: u64,
    /// Bytes of bodies to clients.
    pub bytes_out: u64,
    /// Connections made.
    pub connections: u64,
    /// Connections that could not be made.
    pub connect_errors: u64,
    /// Requests that failed after they were sent, and answers that broke off.
    pub errors: u64,
    /// Requests taken away to another upstream.
    pub retries: u64,
    /// Answers by time; the places of [`BOUNDS_US`], and one for everything slower.
    pub latency: Vec<u64>,
    /// Sum of those times, microseconds.
    pub latency_us: u64,
}

// === impl Report ===

impl Report {
    /// As of now.
    pub fn new(shared: &Shared, serving: &Serving) -> Self {
        let now = shared.clock.coarse_ms();
        let routes = serving.routes.iter().map(|route| RouteReport::new(route, now));
        let sum = |class: usize| shared.unrouted.sum(|s| &s.answers[class]);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            since: shared.since,
            places: shared.listening.borrow().clone(),
            clients: Clients {
                open: shared.clients.sum(|s| &s.active),
                total: shared.clients.sum(|s| &s.connections),
                limit: serving.settings.max_connections,
            },
            unrouted: std::array::from_fn(sum),
            log_lines_lost: shared.log.lost(),
            routes: routes.collect(),
            certificates: CertificateReport::all(&shared.tls.borrow().acme, shared.acme.troubles()),
        }
    }
}

impl CertificateReport {
    /// Those that are wanted, those that are there, and those that failed, by host.
    fn all(wanted: &Wanted, mut troubles: BTreeMap<String, Trouble>) -> Vec<Self> {
        let hosts: BTreeSet<String> = wanted
            .hosts
            .iter()
            .chain(wanted.issued.keys())
            .chain(troubles.keys())
            .cloned()
            .collect();
        let report = |host: String| {
            let Trouble { failures, fault } = troubles.remove(&host).unwrap_or_default();
            Self {
                until: wanted.issued.get(&host).copied(),
                host,
                failures,
                fault,
            }
        };
        hosts.into_iter().map(report).collect()
    }
}

impl RouteReport {
    fn new(route: &Served, now_ms: u64) -> Self {
        let upstream = |target: &Target| UpstreamReport {
            name: target.upstream.name.clone(),
            address: target.upstream.address,
            state: target.state,
            changed: target.upstream.changed.1,
            shunned: target.upstream.is_shunned(now_ms),
            weight: target.nominal,
            tenths: target.tenths,
            numbers: Numbers::new(&target.upstream.stats),
        };
        Self {
            name: route.name.clone(),
            balance: route.settings.balance.to_string(),
            own: Numbers::new(&route.stats),
            upstreams: route.targets.iter().map(upstream).collect(),
        }
    }
}

impl Numbers {
    fn new(shards: &Shards) -> Self {
        let answers = std::array::from_fn(|class| shards.sum(|s| &s.answers[class]));
        let latency = (0..=BOUNDS_US.len()).map(|place| shards.sum(|s| &s.latency[place]));
        Self {
            active: shards.sum(|s| &s.active),
            active_max: shards.sum(|s| &s.active_max),
            requests: answers.iter().sum(),
            answers,
            bytes_in: shards.sum(|s| &s.bytes_in),
            bytes_out: shards.sum(|s| &s.bytes_out),
            connections: shards.sum(|s| &s.connections),
            connect_errors: shards.sum(|s| &s.connect_errors),
            errors: shards.sum(|s| &s.errors),
            retries: shards.sum(|s| &s.retries),
            latency: latency.collect(),
            latency_us: shards.sum(|s| &s.latency_us),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::served::{Registry, tests::served};

    /// A report with one route and two upstreams, some numbers moved.
    pub(in crate::page) fn report() -> Report {
        let route = served(lb_route::Balance::RoundRobin, &[(1, "active"), (2, "draining")]);
        let shard = route.targets[0].upstream.stats.of(0);
        shard.begin();
        shard.answered(200);
        shard.answered(503);
        shard.took(800);
        shard.took(7_000_000);
        shard.bytes_out.add(4096);
        shard.retries.add(3);
        let serving = Registry::new(1).serving(&lb_route::State::default(), 0);
        let mut route = RouteReport::new(&route, 0);
        route.upstreams[1].name = "<b>\"x\\".into();
        Report {
            version: "1",
            since: SystemTime::now() - Duration::from_secs(90),
            places: vec![
                PlaceReport {
                    address: "[::]:80".parse().unwrap(),
                    tls: false,
                    by_systemd: true,
                    fault: None,
                },
                PlaceReport {
                    address: "[::]:443".parse().unwrap(),
                    tls: true,
                    by_systemd: false,
                    fault: Some("cannot listen on [::]:443: it is <taken>".into()),
                },
            ],
            clients: Clients {
                open: 2,
                total: 9,
                limit: serving.settings.max_connections,
            },
            unrouted: [0, 0, 0, 1, 0],
            log_lines_lost: 0,
            routes: vec![route],
            certificates: CertificateReport::all(
                &Wanted {
                    hosts: BTreeSet::from(["bad.test".into(), "new.test".into()]),
                    issued: BTreeMap::from([(
                        "a.test".into(),
                        SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000),
                    )]),
                    ..Wanted::default()
                },
                BTreeMap::from([(
                    "bad.test".into(),
                    Trouble {
                        failures: 2,
                        fault: Some("no <answer>".into()),
                    },
                )]),
            ),
        }
    }

    #[test]
    fn numbers_are_summed_over_workers_and_classes() {
        let report = report();
        let numbers = &report.routes[0].upstreams[0].numbers;
        assert_eq!(
            (numbers.requests, numbers.answers, numbers.active),
            (2, [0, 1, 0, 0, 1], 1)
        );
        assert_eq!((numbers.latency[1], numbers.latency[BOUNDS_US.len()]), (1, 1));
        let certificates = report.certificates.iter();
        let shown: Vec<_> = certificates
            .map(|c| (c.host.as_str(), c.until.is_some(), c.failures))
            .collect();
        assert_eq!(
            shown,
            [
                ("a.test", true, 0),
                ("bad.test", false, 2),
                ("new.test", false, 0)
            ]
        );
    }
}
