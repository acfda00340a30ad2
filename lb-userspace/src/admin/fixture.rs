//! One status and its counters for the tests of admin, metrics and command line: fixed times, every kind of state.

use std::{
    sync::LazyLock,
    time::{Duration, SystemTime},
};

use lb_common::{counter::Counter, counter::DropReason, maps};

use super::api::Reading;
use crate::{
    model::{Attachment, Backend, BackendState, Protocol, Rejection, ServiceAddress},
    route::{Route, RouteSettings, RouteTls},
    status::{
        AttachmentStatus, BackendStatus, Condition, FlowTableStatus, RouteStatus, ServiceStatus,
        SourceStatus, Status,
    },
};

/// The time at which the tests look: 2026-01-01 00:00:00 UTC.
pub static NOW: LazyLock<SystemTime> =
    LazyLock::new(|| SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600));

/// `seconds` before [`NOW`].
pub fn ago(seconds: u64) -> SystemTime {
    *NOW - Duration::from_secs(seconds)
}

fn backend(id: u32, name: &str, address: &str, state: BackendState, since: u64) -> BackendStatus {
    BackendStatus {
        id,
        name: name.into(),
        address: address.parse().unwrap(),
        weight: 1,
        state,
        leaving: false,
        reason: String::new(),
        since: ago(since),
        place: "bridge docker0".into(),
        drain_deadline: None,
        ring_share: 0,
        flows: 0,
        tenths: None,
        conditions: Vec::new(),
    }
}

fn upstream(name: &str, address: &str, state: BackendState, reason: &str) -> Backend {
    Backend {
        address: address.parse().unwrap(),
        weight: 1,
        state,
        reason: reason.into(),
        drain: Duration::from_secs(30),
        name: name.into(),
        check: None,
        attachment: Attachment::Address,
    }
}

/// A route with an alias, of which one upstream is leaving.
fn route() -> RouteStatus {
    RouteStatus {
        route: Route {
            host: "vote.example.com".into(),
            aliases: ["poll.example.com".into()].into(),
            path: "/shop".into(),
            settings: RouteSettings {
                rewrite: true,
                tls: RouteTls {
                    serve: true,
                    only: true,
                    ..RouteTls::default()
                },
                ..RouteSettings::default()
            },
            upstreams: vec![
                upstream("vote-1", "172.17.0.7:80", BackendState::Active, "running"),
                upstream(
                    "vote-2",
                    "172.17.0.8:80",
                    BackendState::Draining,
                    "container stopping",
                ),
            ],
            slow: [].into(),
            remarks: ["balance `uri` is approximated by `round-robin`".into()].into(),
        },
        waiting_for: Some("the L7 shim".into()),
    }
}

/// Two services and a route; the container `web-1` serves both.
pub fn status() -> Status {
    let web = ServiceStatus {
        id: 1,
        name: "web".into(),
        address: ServiceAddress {
            vip: "10.0.0.1".parse().unwrap(),
            port: 80,
            protocol: Protocol::Tcp,
        },
        generation: 4,
        kept_until: None,
        backends: vec![
            BackendStatus {
                ring_share: 6_667,
                weight: 2,
                flows: 120,
                ..backend(11, "web-1", "172.17.0.2:8080", BackendState::Active, 7_260)
            },
            BackendStatus {
                ring_share: 3_333,
                flows: 9,
                tenths: Some(3),
                ..backend(12, "web-2", "172.17.0.3:8080", BackendState::Active, 42)
            },
            BackendStatus {
                leaving: true,
                reason: "container stopping".into(),
                drain_deadline: Some(*NOW + Duration::from_secs(25)),
                flows: 3,
                conditions: vec![Condition {
                    by: "check".into(),
                    fit: false,
                    reason: "http: 503 Service Unavailable".into(),
                    since: ago(5),
                }],
                ..backend(13, "web-3", "172.17.0.4:8080", BackendState::Draining, 5)
            },
        ],
    };
    let dns = ServiceStatus {
        id: 2,
        name: "dns".into(),
        address: ServiceAddress {
            vip: "fd00::1".parse().unwrap(),
            port: 53,
            protocol: Protocol::Udp,
        },
        generation: 1,
        kept_until: None,
        backends: vec![
            BackendStatus {
                reason: "health: starting".into(),
                place: "remote eth1 (neighbour unknown)".into(),
                ..backend(21, "dns-1", "[fd00::5]:53", BackendState::Unready, 100_000)
            },
            BackendStatus {
                ring_share: 10_000,
                ..backend(22, "web-1", "[fd00::6]:53", BackendState::Active, 3)
            },
        ],
    };
    Status {
        version: "0.1.0".into(),
        services: vec![web, dns],
        routes: vec![route()],
        sources: vec![
            SourceStatus {
                name: "docker".into(),
                connected: true,
                last_heard: Some(ago(1)),
                last_full_read: Some(ago(130)),
                fault: None,
                via: None,
                objects: 4,
            },
            SourceStatus {
                name: "file".into(),
                connected: false,
                last_heard: Some(ago(600)),
                last_full_read: Some(ago(600)),
                fault: Some("weir.toml does not parse".into()),
                via: None,
                objects: 1,
            },
        ],
        rejections: vec![Rejection {
            source: "docker".into(),
            object: "container web-9 (3f2a): label weir.service.web.listen".into(),
            fault: "\"80/tpc\" is no port and protocol".into(),
            remedy: "write it as \"80/tcp\" or \"53/udp\"".into(),
        }],
        attachments: vec![AttachmentStatus {
            device: "eth1".into(),
            xdp: "native".into(),
            tc: "tcx".into(),
            why: "[nodes] can bring remote backends".into(),
        }],
        faults: vec!["sysctl net.ipv4.ip_forward is 0: set it to 1".into()],
        ready: true,
        last_commit: Some(ago(42)),
        last_commit_us: 1_250,
        commits: 17,
        checks: crate::health::Report {
            targets: 3,
            running: 1,
            passed: 40,
            failed: 2,
            impossible: 1,
            ejected: 1,
            faults: Vec::new(),
        },
        flow_tables: [("ipv4", 120, 12, 262_144), ("ipv6", 0, 0, 65_536)]
            .map(|(family, established, half_open, rated)| FlowTableStatus {
                family: family.into(),
                established,
                half_open,
                rated,
            })
            .into(),
    }
}

/// Counters that fit [`status`], `more` of everything.
pub fn reading(more: u64) -> Reading {
    let mut reading = Reading::default();
    for (index, counter) in Counter::ALL.iter().enumerate() {
        reading.stats.counters[*counter as usize] = 100 * index as u64 + more;
    }
    reading.drops.reasons[DropReason::NoFlow as usize] = 7 + more;
    for (id, backends) in [(1, vec![11, 12, 13]), (2, vec![21, 22])] {
        let mut service = maps::ServiceStats {
            flows: 50 + more,
            ..maps::ServiceStats::default()
        };
        service.drops[DropReason::AclDenied as usize] = more;
        reading.services.insert(id, service);
        for backend in backends {
            reading.backends.insert(
                backend,
                maps::BackendStats {
                    packets_in: 1_000 + 10 * more,
                    bytes_in: 64_000 + 1_500 * more,
                    packets_out: 2_000 + 20 * more,
                    bytes_out: 128_000 + 30_000 * more,
                    flows: 10 + more,
                    refused: 1,
                    resteered: 2,
                    established: 9 + more,
                },
            );
        }
    }
    reading.flow_capacity = [262_144, 65_536];
    reading
}
