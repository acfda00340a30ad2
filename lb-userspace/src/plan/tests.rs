//! Properties of planning: random histories against the fake maps.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use proptest::prelude::*;

use super::*;
use crate::{
    datapath::{Maps, Place, fake::FakeMaps},
    desired::Wanted,
    model::{Backend, BackendState, Protocol, Service, ServiceSettings},
};

const CAPACITIES: Capacities = Capacities {
    services: 2048,
    backends: 131_072,
    ring_rows: 4096,
    acl: 64,
    flows4: 64,
    flows6: 64,
};

fn policy() -> Policy {
    Policy {
        snat_addresses: vec!["192.0.2.1".parse().unwrap()],
        own_vips: BTreeSet::new(),
        routed_vips: BTreeMap::new(),
        mark: 1,
        snat_port_min: 1,
        snat_port_max: 2,
        event_sample: 0,
        hz: 250,
        default_drain: Duration::from_secs(30),
    }
}

fn address(service: u8) -> ServiceAddress {
    ServiceAddress {
        vip: IpAddr::from([203, 0, 113, service]),
        port: 80,
        protocol: Protocol::Tcp,
    }
}

fn wanted(address: ServiceAddress, backends: impl Iterator<Item = u32>) -> Wanted {
    let backend = |i: u32| Backend {
        address: SocketAddr::new(IpAddr::from((0x0a00_0000 + i).to_be_bytes()), 80),
        weight: 1,
        state: BackendState::Active,
        reason: String::new(),
        drain: Duration::from_secs(2),
        name: i.to_string(),
        check: None,
    };
    let service = Service {
        name: "s".into(),
        address,
        settings: ServiceSettings::default(),
        backends: backends.map(backend).collect(),
        slow: std::collections::BTreeMap::new(),
    };
    Wanted {
        service: Arc::new(service),
        source: "file".into(),
        created: SystemTime::UNIX_EPOCH,
    }
}

fn topology(desired: &Desired) -> Topology {
    let backends = desired.services.values().flat_map(|w| &w.service.backends);
    let places = backends
        .map(|b| (b.address.ip(), Place::Remote { slot: 1, mac: None }))
        .collect();
    Topology {
        places,
        loopback_ifindex: 1,
        ..Topology::default()
    }
}

fn plan_now(
    programmed: &Programmed,
    desired: &Desired,
    topology: &Topology,
    scope: Scope<'_>,
    now: Instant,
) -> Plan {
    let inputs = Inputs {
        desired,
        topology,
        capacities: &CAPACITIES,
        policy: &policy(),
        sweep: &Sweep {
            started: Some(now),
            flows: BTreeMap::new(),
        },
        asked: &BTreeMap::new(),
        may_remove: true,
        unclaimed: &BTreeSet::new(),
        now,
    };
    plan(programmed, &inputs, scope)
}

fn apply(programmed: &mut Programmed, maps: &mut FakeMaps, plan: &Plan, now: Instant) {
    plan.notes.iter().for_each(|note| programmed.note(note));
    for step in &plan.steps {
        maps.apply(&step.op).unwrap();
        programmed.record(&step.op, now);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Applied, a plan leaves nothing to plan; the model is what the maps hold; adopting the maps changes nothing.
    #[test]
    fn a_plan_is_done_once(history in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 3), 1..6)) {
        let mut maps = FakeMaps::new(CAPACITIES);
        let (mut programmed, mut now) = (Programmed::default(), Instant::now());
        for wishes in history {
            now += Duration::from_secs(1);
            let services = wishes.iter().zip(1u8..).filter(|(bits, _)| **bits != 0).map(|(bits, service)| {
                (address(service), wanted(address(service), (0..8).filter(|i| bits >> i & 1 == 1)))
            });
            let desired = Desired { services: services.collect(), ..Desired::default() };
            let topology = topology(&desired);
            let first = plan_now(&programmed, &desired, &topology, Scope::All, now);
            apply(&mut programmed, &mut maps, &first, now);
            let second = plan_now(&programmed, &desired, &topology, Scope::All, now);
            prop_assert_eq!(&second.steps, &vec![]);
            let mut dump = maps.contents();
            let adopted = Programmed::adopt(&dump, now);
            dump.rings.clear();
            prop_assert_eq!(&programmed.dump_without_rings(), &dump);
            // A new agent finds the leaving ones where they were: the only writes it may plan are none.
            let third = plan_now(&adopted, &desired, &topology, Scope::All, now);
            prop_assert_eq!(&third.steps, &vec![]);
        }
        prop_assert_eq!(maps.broken(), Vec::<String>::new());
    }
}

/// One change among 1,000 services of 100 backends touches that service alone; prints how long planning takes.
#[test]
fn one_change_among_many_is_small() {
    let per_service: u32 = 100;
    let all = (0..1000u32).map(|s| {
        let at = ServiceAddress {
            vip: IpAddr::from([203, 0, (s >> 8) as u8, s as u8]),
            port: 80,
            protocol: Protocol::Tcp,
        };
        (at, wanted(at, s * per_service..(s + 1) * per_service))
    });
    let mut desired = Desired {
        services: all.take(if cfg!(debug_assertions) { 50 } else { 1000 }).collect(),
        ..Desired::default()
    };
    let mut topology = topology(&desired);
    let (mut programmed, now) = (Programmed::default(), Instant::now());
    let first = plan_now(&programmed, &desired, &topology, Scope::All, now);
    first.notes.iter().for_each(|note| programmed.note(note));
    first
        .steps
        .iter()
        .for_each(|step| programmed.record(&step.op, now));

    let at = *desired.services.keys().next().unwrap();
    desired.services.insert(at, wanted(at, 1..per_service));
    topology.places.remove(&IpAddr::from([10, 0, 0, 0]));
    let started = Instant::now();
    let change = plan_now(&programmed, &desired, &topology, Scope::Some(&[at].into()), now);
    println!(
        "{} services: planned in {:?}",
        desired.services.len(),
        started.elapsed()
    );
    // The ring, its commit, and the backend that drains.
    assert_eq!(
        change.steps.len(),
        3,
        "{:?}",
        change.steps.iter().map(|s| s.group).collect::<Vec<_>>()
    );
    assert!(change.steps.iter().all(|step| step.group == Group::Service(at)));
}
