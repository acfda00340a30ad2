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
    model::{Attachment, Backend, BackendState, Protocol, Service, ServiceSettings},
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
        snat_port_min: 1,
        snat_port_max: 2,
        event_sample: 0,
        hz: 250,
        default_drain: Duration::from_secs(30),
        retention: Retention::default(),
        firewall: BTreeSet::new(),
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
        attachment: Attachment::Address,
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
        kept_until: None,
    }
}

fn topology(desired: &Desired) -> Topology {
    let backends = desired.services.values().flat_map(|w| &w.service.backends);
    let places = backends
        .map(|b| {
            (
                b.address.ip(),
                Place::Remote {
                    slot: 1,
                    mac: None,
                    uplink: true,
                },
            )
        })
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

/// Plans until nothing waits, a quarantine's time between two passes.
fn settle(programmed: &mut Programmed, desired: &Desired, capacities: &Capacities) -> Vec<Rejection> {
    let topology = topology(desired);
    let mut now = Instant::now();
    let mut rejections = Vec::new();
    for _ in 0..8 {
        now += Duration::from_secs(2);
        let inputs = Inputs {
            desired,
            topology: &topology,
            capacities,
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
        let plan = plan(programmed, &inputs, Scope::All);
        plan.notes.iter().for_each(|note| programmed.note(note));
        plan.steps
            .iter()
            .for_each(|step| programmed.record(&step.op, now));
        rejections = plan.rejections.into_values().flatten().collect();
    }
    rejections
}

/// Services that are in the maps.
fn served(programmed: &Programmed) -> Vec<ServiceAddress> {
    let services = programmed.services.iter();
    let there = services.filter(|(_, entry)| entry.value.is_some());
    there.map(|(address, _)| *address).collect()
}

#[test]
fn remembered_services_give_way_when_ids_run_out() {
    let remembered = |service: u8, until: u64| Wanted {
        kept_until: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(until)),
        ..wanted(address(service), 0..0)
    };
    let full = Capacities {
        services: 4,
        ..CAPACITIES
    };
    let mut programmed = Programmed::default();
    let mut desired = Desired {
        services: [
            (address(1), wanted(address(1), 0..1)),
            (address(2), remembered(2, 900)),
            (address(3), remembered(3, 300)),
        ]
        .into(),
        ..Desired::default()
    };
    assert_eq!(settle(&mut programmed, &desired, &full), []);
    assert_eq!(served(&programmed), [1, 2, 3].map(address));
    // The first to be forgotten anyway goes first, and does not come back.
    desired.services.insert(address(4), wanted(address(4), 1..2));
    assert_eq!(settle(&mut programmed, &desired, &full), []);
    assert_eq!(served(&programmed), [1, 2, 4].map(address));
    desired.services.insert(address(5), wanted(address(5), 2..3));
    assert_eq!(settle(&mut programmed, &desired, &full), []);
    assert_eq!(served(&programmed), [1, 4, 5].map(address));
    // Then nobody gives way.
    desired.services.insert(address(6), wanted(address(6), 3..4));
    assert_eq!(settle(&mut programmed, &desired, &full).len(), 1);
    assert_eq!(served(&programmed), [1, 4, 5].map(address));
}

#[test]
fn remembered_services_give_way_when_rows_run_out() {
    // Two rings, and one row for changes: the second is that of a drainer of a remembered service.
    let full = Capacities {
        ring_rows: 3,
        ..CAPACITIES
    };
    let mut programmed = Programmed::default();
    let mut desired = Desired {
        services: [
            (address(1), wanted(address(1), 0..1)),
            (address(2), wanted(address(2), 1..2)),
        ]
        .into(),
        ..Desired::default()
    };
    assert_eq!(settle(&mut programmed, &desired, &full), []);
    let mut draining = wanted(address(2), 1..2);
    let service = Arc::make_mut(&mut draining.service);
    service.backends[0].state = BackendState::Draining;
    service.backends[0].drain = Duration::from_secs(3600);
    draining.kept_until = Some(SystemTime::UNIX_EPOCH);
    desired.services.insert(address(2), draining);
    desired.services.insert(address(3), wanted(address(3), 2..3));
    assert_eq!(settle(&mut programmed, &desired, &full), []);
    assert!(programmed.services[&address(3)].has_ring());
}

#[test]
fn a_container_is_reached_on_its_bridge_or_not_at_all() {
    let mut wanted = wanted(address(1), 1..2);
    let service = Arc::make_mut(&mut wanted.service);
    service.backends[0].attachment = Attachment::Container;
    let ip = service.backends[0].address.ip();
    let mut desired = Desired {
        services: [(address(1), wanted)].into(),
        ..Desired::default()
    };
    let place = |place| Topology {
        places: [(ip, place)].into(),
        devices: [(
            2,
            crate::datapath::DeviceInfo {
                name: "docker0".into(),
                ifindex: 7,
                mac: [2; 6],
                mtu: 1500,
                xdp: crate::datapath::XdpSend::default(),
                bridge: true,
                addresses: vec![[172, 17, 0, 1].into()],
            },
        )]
        .into(),
        loopback_ifindex: 1,
        ..Topology::default()
    };
    let record = |plan: &Plan| {
        plan.steps.iter().find_map(|step| match &step.op {
            MapOp::PutBackend { backend, .. } => {
                Some((backend.flags, backend.hop.slot(), backend.snat_count))
            }
            _ => None,
        })
    };
    let plan = |desired: &Desired, topology: &Topology| {
        plan_now(
            &Programmed::default(),
            desired,
            topology,
            Scope::All,
            Instant::now(),
        )
    };
    let (uplink, slot) = (true, 2);
    let outside = plan(
        &desired,
        &place(Place::Remote {
            slot,
            mac: None,
            uplink,
        }),
    );
    assert_eq!(record(&outside), None);
    let rejection = outside.rejections[&address(1)][0].to_string();
    assert!(
        rejection.contains("leaves the node by docker0") && rejection.contains("label `network`"),
        "{rejection}"
    );
    // By a device of the node's own that leads there.
    let own = plan(
        &desired,
        &place(Place::Remote {
            slot,
            mac: None,
            uplink: false,
        }),
    );
    assert_eq!(record(&own), Some((0, 2, 1)));

    let on_bridge = place(Place::Bridge { slot });
    let local = lb_common::maps::backend_flags::LOCAL;
    assert_eq!(record(&plan(&desired, &on_bridge)), Some((local, 2, 1)));
    let isolated = desired.services.get_mut(&address(1)).unwrap();
    Arc::make_mut(&mut isolated.service).backends[0].attachment = Attachment::IsolatedContainer;
    assert_eq!(
        record(&plan(&desired, &on_bridge)),
        Some((0, 2, 1)),
        "its source is translated"
    );
    let mut bare = on_bridge.clone();
    bare.devices.get_mut(&2).unwrap().addresses.clear();
    let refused = plan(&desired, &bare);
    assert_eq!(record(&refused), None);
    let rejection = refused.rejections[&address(1)][0].to_string();
    assert!(rejection.contains("needs source translation"), "{rejection}");
}

#[test]
fn the_firewall_is_there_before_services_ask_it_and_goes_after() {
    let deny = |prefixes: &[&str]| {
        prefixes
            .iter()
            .map(|p| p.parse().unwrap())
            .collect::<BTreeSet<IpNet>>()
    };
    let desired = Desired {
        services: [(address(1), wanted(address(1), 0..1))].into(),
        ..Desired::default()
    };
    let topology = topology(&desired);
    let (mut programmed, mut maps, now) = (Programmed::default(), FakeMaps::new(CAPACITIES), Instant::now());
    let mut with = |firewall: BTreeSet<IpNet>| {
        let policy = Policy { firewall, ..policy() };
        let inputs = Inputs {
            desired: &desired,
            topology: &topology,
            capacities: &CAPACITIES,
            policy: &policy,
            sweep: &Sweep::default(),
            asked: &BTreeMap::new(),
            may_remove: true,
            unclaimed: &BTreeSet::new(),
            now,
        };
        let plan = plan(&programmed, &inputs, Scope::All);
        apply(&mut programmed, &mut maps, &plan, now);
        // A new agent finds nothing to do.
        assert_eq!(
            super::plan(&Programmed::adopt(&maps.contents(), now), &inputs, Scope::All).steps,
            []
        );
        let word = |step: &Step| match &step.op {
            MapOp::PutAcl {
                service: 0, prefix, ..
            } => Some(format!("+{prefix}")),
            MapOp::DelAcl { service: 0, prefix } => Some(format!("-{prefix}")),
            MapOp::PutService { service, .. } => {
                let asks = service.flags & lb_common::maps::service_flags::FIREWALL != 0;
                Some(if asks { "asks" } else { "does not ask" }.to_owned())
            }
            _ => None,
        };
        plan.steps.iter().filter_map(word).collect::<Vec<_>>()
    };
    assert_eq!(with(BTreeSet::new()), ["does not ask"]);
    assert_eq!(with(deny(&["10.0.0.0/8"])), ["+10.0.0.0/8", "asks"]);
    assert_eq!(
        with(deny(&["10.9.0.0/16", "fd00::/8"])),
        ["+10.9.0.0/16", "+fd00::/8", "-10.0.0.0/8"]
    );
    assert_eq!(
        with(BTreeSet::new()),
        ["does not ask", "-10.9.0.0/16", "-fd00::/8"]
    );
}

/// An address whose backend was freed is in no filter, though its dead record is still there for the next agent to read.
#[test]
fn a_container_with_the_address_of_a_freed_one_answers() {
    let (ip, mut now) = (IpAddr::from([10, 0, 0, 1]), Instant::now());
    let topology = Topology {
        places: [(ip, Place::Bridge { slot: 2 })].into(),
        loopback_ifindex: 1,
        ..Topology::default()
    };
    let with = |backends: std::ops::Range<u32>| Desired {
        services: [(address(1), wanted(address(1), backends))].into(),
        ..Desired::default()
    };
    let (one, none) = (with(1..2), with(0..0));
    for restarted in [false, true] {
        let (mut maps, mut programmed) = (FakeMaps::new(CAPACITIES), Programmed::default());
        for desired in [&one, &none, &none, &none] {
            now += Duration::from_secs(60);
            let plan = plan_now(&programmed, desired, &topology, Scope::All, now);
            apply(&mut programmed, &mut maps, &plan, now);
        }
        assert!(!programmed.ours.addresses.contains(&ip), "it is not freed");
        match restarted {
            true => programmed = Programmed::adopt(&maps.contents(), now),
            false => programmed.resync(&maps.contents(), now),
        }
        let plan = plan_now(&programmed, &one, &topology, Scope::All, now);
        apply(&mut programmed, &mut maps, &plan, now);
        assert_eq!(maps.broken(), [""; 0]);
    }
}
