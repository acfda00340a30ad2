//! Loading, adoption and the maps.

use std::{collections::BTreeMap, net::IpAddr};

use lb_common::{
    addr::{Addr4, Addr16, Be16, Hop},
    flow::{Address, FlowKey},
    limits::RING_ROW,
    maps::{self as m, ABI_VERSION, Meta, SCHEMA, flow_state},
    slot::head,
};
use lb_ebpf::table::{Memory as _, mapped::Mapped};
use lb_tests::{slots, world::Conn};
use weir::{
    datapath::{
        Dump, Filter, MapError, MapOp, Maps as _,
        access::AccessLists,
        batch::Table,
        bpf::KernelMaps,
        counters::Counters,
        flow_table::FlowMaps,
        flows::{self, FlowFilter},
        load::{LoadError, Sizes, load},
        preflight::preflight,
        sweep::Sweeper,
    },
    model::Protocol,
};

use crate::{netns::Netns, object, sizes};

#[test]
fn maps_are_made_adopted_and_refused() {
    let ns = Netns::new();
    preflight(&ns.pin).unwrap();
    assert!(matches!(load(&[], &ns.pin, &sizes()), Err(LoadError::NotBuilt)));
    let first = load(object(), &ns.pin, &sizes()).unwrap();
    assert!(
        !first.adopted && first.warnings.is_empty(),
        "{:?}",
        first.warnings
    );
    let pins = first.pins.clone();
    let key = m::ServiceKey {
        port: Be16::new(80),
        proto: 6,
        ..Default::default()
    };
    let mut maps = KernelMaps::open(&pins.maps()).unwrap();
    maps.apply(&MapOp::PutService {
        key,
        service: m::Service {
            id: 3,
            ring_row: m::NO_RING,
            previous_row: m::NO_RING,
            ..Default::default()
        },
    })
    .unwrap();
    drop((first, maps));
    // Other limits: the pinned sizes stay, and people are told.
    let mut other = sizes();
    other.limits.backends = 10_000;
    let second = load(object(), &ns.pin, &other).unwrap();
    assert!(second.adopted);
    assert!(
        second
            .warnings
            .iter()
            .any(|w| w.contains("BACKENDS") && w.contains("weir detach")),
        "{:?}",
        second.warnings
    );
    let maps = KernelMaps::open(&pins.maps()).unwrap();
    assert_eq!(maps.dump().unwrap().services[&key].id, 3);
    assert_eq!(maps.capacities(), sizes().limits);
    // Maps of another layout are refused, and left alone.
    let meta: Table<u32, Meta> = Table::open(&pins.maps(), "META").unwrap();
    let stamp = meta.get(&0).unwrap().unwrap();
    assert_eq!((stamp.schema, stamp.abi), (SCHEMA, ABI_VERSION));
    meta.put(
        &0,
        &Meta {
            abi: ABI_VERSION + 1,
            ..stamp
        },
    )
    .unwrap();
    let refusal = load(object(), &ns.pin, &sizes()).unwrap_err().to_string();
    assert!(refusal.contains("weir detach"), "{refusal}");
    assert_eq!(maps.dump().unwrap().services.len(), 1);
    // A foreign map under one of our names, too.
    meta.put(&0, &stamp).unwrap();
    std::fs::remove_file(pins.maps().join("VIPS")).unwrap();
    std::fs::rename(pins.maps().join("DEVICE_SLOTS"), pins.maps().join("VIPS")).unwrap();
    let refusal = load(object(), &ns.pin, &sizes()).unwrap_err().to_string();
    assert!(refusal.contains("VIPS"), "{refusal}");
    // A set without its stamp is the rest of a start cut short: made anew.
    meta.put(&0, &Meta::default()).unwrap();
    assert!(!load(object(), &ns.pin, &sizes()).unwrap().adopted);
    let fresh = KernelMaps::open(&pins.maps()).unwrap();
    assert_eq!(fresh.dump().unwrap(), Dump::default());
}

#[test]
fn every_operation_is_read_back() {
    let ns = Netns::new();
    preflight(&ns.pin).unwrap();
    let loaded = load(object(), &ns.pin, &sizes()).unwrap();
    let mut maps = KernelMaps::open(&loaded.pins.maps()).unwrap();
    let vip: IpAddr = "192.0.2.7".parse().unwrap();
    let vip6: IpAddr = "2001:db8::7".parse().unwrap();
    let key = m::ServiceKey {
        vip: vip.into(),
        port: Be16::new(80),
        proto: 6,
    };
    let service = m::Service {
        id: 5,
        ring_row: 4,
        ring_mask: 3,
        previous_row: 0,
        previous_mask: 0,
        alternates: [3, 9],
        ..Default::default()
    };
    let timeouts = m::Timeouts {
        established: 1,
        syn: 2,
        closing: 3,
        udp: 4,
    };
    let backend = m::Backend {
        hop: Hop::new([2, 0, 0, 0, 0, 1], 9),
        epoch: 1,
        service: 5,
        ..Default::default()
    };
    let device = m::Device {
        ifindex: 70,
        mtu: 1500,
        ..Default::default()
    };
    let large: Vec<u32> = (0..4 * RING_ROW as u32).collect();
    let settings = m::Settings {
        snat_port_min: 1,
        ..Default::default()
    };
    let (v4, v6) = ("10.0.0.0/8".parse().unwrap(), "2001:db8::/32".parse().unwrap());
    let ops = [
        MapOp::PutDevice { slot: 9, device },
        MapOp::PutSnatAddress {
            index: 3,
            address: vip6,
        },
        MapOp::PutBackend { id: 1, backend },
        MapOp::PutBackend { id: 8500, backend },
        MapOp::PutTimeouts { service: 5, timeouts },
        MapOp::PutAcl {
            service: 5,
            prefix: v4,
            action: m::ACL_ALLOW,
        },
        MapOp::PutAcl {
            service: 5,
            prefix: v6,
            action: m::ACL_DENY,
        },
        MapOp::PutRing {
            row: 4,
            ring: large.clone(),
        },
        MapOp::PutRing {
            row: 0,
            ring: vec![1; RING_ROW],
        },
        MapOp::PutOurs {
            filter: Filter {
                addresses: [vip].into(),
                ports: [(Protocol::Tcp, 80)].into(),
                routed: [vip].into(),
            },
        },
        MapOp::PutVip {
            vip,
            value: m::Vip { flags: 1 },
        },
        MapOp::PutService { key, service },
        MapOp::PutSettings { settings },
    ];
    // Twice is once.
    for op in ops.iter().chain(&ops) {
        maps.apply(op).unwrap();
    }
    let expected = Dump {
        services: [(key, service)].into(),
        backends: [(1, backend), (8500, backend)].into(),
        rings: [(4, large), (0, vec![1; RING_ROW])].into(),
        timeouts: [(5, timeouts)].into(),
        acl: [((5, v4), m::ACL_ALLOW), ((5, v6), m::ACL_DENY)].into(),
        vips: [(vip, m::Vip { flags: 1 })].into(),
        devices: [(9, device)].into(),
        snat_addresses: [(3, vip6)].into(),
        settings,
    };
    assert_eq!(maps.dump().unwrap(), expected);
    // A slot that changes its device takes its index entry along.
    maps.apply(&MapOp::PutDevice {
        slot: 9,
        device: m::Device {
            ifindex: 71,
            ..device
        },
    })
    .unwrap();
    let slots: Table<u32, u32> = Table::open(&loaded.pins.maps(), "DEVICE_SLOTS").unwrap();
    assert_eq!(
        (slots.get(&70).unwrap(), slots.get(&71).unwrap()),
        (None, Some(9))
    );
    for op in [
        MapOp::DelService { key },
        MapOp::DelVip { vip },
        MapOp::DelAcl {
            service: 5,
            prefix: v4,
        },
        MapOp::DelAcl {
            service: 5,
            prefix: v6,
        },
    ] {
        maps.apply(&op).unwrap();
        maps.apply(&op).unwrap();
    }
    let dump = maps.dump().unwrap();
    assert!(dump.services.is_empty() && dump.vips.is_empty() && dump.acl.is_empty() && dump.rings.is_empty());
    // A full map says which setting to raise.
    let full = (0..200).find_map(|port| {
        maps.apply(&MapOp::PutService {
            key: m::ServiceKey {
                port: Be16::new(port),
                ..key
            },
            service,
        })
        .err()
    });
    assert!(
        matches!(
            full,
            Some(MapError::Full {
                map: "SERVICES",
                capacity: 64,
                setting: "services"
            })
        ),
        "{full:?}"
    );
    let counters = Counters::open(&loaded.pins.maps()).unwrap();
    assert_eq!(counters.backends(&[1, 8500, 8999, 70_000]).unwrap().len(), 3);
    assert!(
        counters
            .stats()
            .unwrap()
            .iter()
            .chain(&counters.drops().unwrap())
            .all(|count| *count == 0)
    );
    assert_eq!(counters.services(&[5]).unwrap()[&5], m::ServiceStats::default());
}

/// Connection number `n` of IPv4 or IPv6.
fn connection(n: u32, v6: bool) -> Conn {
    let port = (1024 + n % 60_000) as u16;
    let (client, vip, backend): (IpAddr, IpAddr, IpAddr) = if v6 {
        let address = |last: u32| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, (last >> 16) as u16, last as u16]);
        (address(0x1_0000 + n / 60_000), address(2), address(3))
    } else {
        (
            (0x0a00_0000 + n / 60_000).to_be_bytes().into(),
            [192, 0, 2, 1].into(),
            [172, 17, 0, 2].into(),
        )
    };
    Conn {
        proto: 6,
        client: (client, port),
        vip: (vip, 80),
        backend: (backend, 8080),
        source: (client, port),
        id: 1 + n % 7,
        epoch: 1,
        service: 1,
        state: flow_state::ANSWERED | flow_state::ESTABLISHED,
        hop: Hop::UNKNOWN,
    }
}

/// Sets when a slot was last heard of.
fn set_seen<A: Address>(flows: &FlowMaps, slot: u32, seen: u32) {
    let cell = Mapped::<A, &FlowMaps>::new(flows).slot(slot).unwrap();
    // SAFETY: a slot of the table, which no program uses.
    unsafe { (&raw mut (*cell.as_ptr()).seen).write_volatile(seen) }
}

fn timeouts(ticks: u32) -> MapOp {
    let timeouts = m::Timeouts {
        established: ticks,
        syn: ticks,
        closing: ticks,
        udp: ticks,
    };
    MapOp::PutTimeouts { service: 1, timeouts }
}

#[test]
fn half_a_million_flows_are_swept() {
    const FLOWS: u32 = 500_000;
    let ns = Netns::new();
    preflight(&ns.pin).unwrap();
    let limits = weir::datapath::Capacities {
        flows4: FLOWS,
        ..sizes().limits
    };
    let loaded = load(object(), &ns.pin, &Sizes { limits, ..sizes() }).unwrap();
    let sweeper = Sweeper::open(&loaded.pins).unwrap();
    assert!([100, 250, 300, 1000].contains(&sweeper.hz().unwrap()));
    let mut maps = KernelMaps::open(&loaded.pins.maps()).unwrap();
    maps.apply(&timeouts(100_000)).unwrap();
    let flows = FlowMaps::open(&loaded.pins.maps()).unwrap();
    let now = sweeper.now().unwrap();
    let old = now.wrapping_sub(200_000);
    let mut expected = BTreeMap::new();
    for n in 0..FLOWS {
        let [_, reverse] =
            slots::insert(&flows, &connection(n, false), if n % 5 == 0 { old } else { now }).unwrap();
        if n % 10 == 0 {
            // The client is silent, but the backend still sends: alive.
            set_seen::<Addr4>(&flows, reverse, now);
        }
        if n % 5 != 0 || n % 10 == 0 {
            *expected.entry(1 + n % 7).or_insert(0_u64) += 1;
        }
    }
    let began = std::time::Instant::now();
    let report = sweeper.sweep(None).unwrap();
    eprintln!(
        "sweep of {FLOWS} flows: {:?}, {} expired",
        began.elapsed(),
        report.expired
    );
    // Some had to give way to others before.
    assert_eq!(report.expired + flows.evicted(), u64::from(FLOWS / 10));
    assert!(flows.evicted() < u64::from(FLOWS / 1000), "{}", flows.evicted());
    assert_eq!(report.flows_by_backend, expected);
    assert_eq!(report.flows_by_service, [(1, report.total)].into());
    assert_eq!(
        (report.established, report.half_open),
        ([report.total, 0], [0, 0])
    );
    let live = (0..flows.slots::<Addr4>()).filter(|id| flows.head::<Addr4>(*id).is_some_and(head::is_live));
    assert_eq!(live.count(), 2 * (FLOWS - FLOWS / 10) as usize);
    // Nothing more to do the second time.
    let again = sweeper.sweep(None).unwrap();
    assert_eq!((again.expired, again.total), (0, report.total));
    let filter = FlowFilter {
        backend: Some(2),
        ..Default::default()
    };
    let (lines, count) = flows::list(&loaded.pins, &filter, 3).unwrap();
    assert_eq!((lines.len(), count), (3, expected[&2]));
    assert!(
        lines
            .iter()
            .all(|l| l.state == "established" && l.vip == "192.0.2.1:80".parse().unwrap()),
        "{lines:?}"
    );
}

#[test]
fn ipv6_flows_and_orphans_expire() {
    let ns = Netns::new();
    preflight(&ns.pin).unwrap();
    let loaded = load(object(), &ns.pin, &sizes()).unwrap();
    let sweeper = Sweeper::open(&loaded.pins).unwrap();
    let mut maps = KernelMaps::open(&loaded.pins.maps()).unwrap();
    maps.apply(&timeouts(1000)).unwrap();
    let flows = FlowMaps::open(&loaded.pins.maps()).unwrap();
    let old = sweeper.now().unwrap().wrapping_sub(5000);
    for n in 0..100 {
        let [forward, _] = slots::insert(&flows, &connection(n, true), old).unwrap();
        if n % 2 == 0 {
            // Its other half is left alone, as by somebody who was killed between the two.
            let cell = Mapped::<Addr16, &FlowMaps>::new(&flows).slot(forward).unwrap();
            let seen = flows.head::<Addr16>(forward).unwrap();
            assert!(Mapped::<Addr16, &FlowMaps>::compare_exchange(
                cell,
                seen,
                seen & !head::OCCUPIED
            ));
        }
    }
    let report = sweeper.sweep(None).unwrap();
    assert_eq!((report.expired, report.total), (100, 0));
    let mut left =
        (0..flows.slots::<Addr16>()).filter(|id| flows.head::<Addr16>(*id).is_some_and(head::is_live));
    assert_eq!(left.next(), None);
}

#[test]
fn flows_of_denied_clients_end_and_no_others() {
    let ns = Netns::new();
    preflight(&ns.pin).unwrap();
    let loaded = load(object(), &ns.pin, &sizes()).unwrap();
    let sweeper = Sweeper::open(&loaded.pins).unwrap();
    let mut maps = KernelMaps::open(&loaded.pins.maps()).unwrap();
    maps.apply(&timeouts(100_000)).unwrap();
    let flows = FlowMaps::open(&loaded.pins.maps()).unwrap();
    let now = sweeper.now().unwrap();
    let of = |n: u32, v6: bool, last: u8| {
        let conn = connection(n, v6);
        let address: IpAddr = match v6 {
            false => [10, 0, 0, last].into(),
            true => [0x2001, 0xdb8, 0, 0, 0, 0, 1, u16::from(last)].into(),
        };
        Conn {
            client: (address, conn.client.1),
            source: (address, conn.client.1),
            ..conn
        }
    };
    for n in 0..60 {
        slots::insert(&flows, &of(n, n % 2 == 0, (n % 3) as u8), now).unwrap();
    }
    let nets = ["10.0.0.1/32", "2001:db8::1:2/128"].map(|net| net.parse().unwrap());
    let lists = AccessLists::new(1, nets.iter());
    let report = sweeper.sweep(Some(&lists)).unwrap();
    assert_eq!((report.denied, report.expired, report.total), (20, 0, 40));
    assert_eq!(report.established, [20, 20]);
    for (v6, last, there) in [
        (false, 1, false),
        (false, 2, true),
        (true, 2, false),
        (true, 1, true),
    ] {
        let count = (0..60).filter(|n| (n % 2 == 0) == v6 && (n % 3) as u8 == last);
        for n in count {
            let conn = of(n, v6, last);
            let found = if v6 {
                found::<Addr16>(&flows, &conn)
            } else {
                found::<Addr4>(&flows, &conn)
            };
            assert_eq!(found, [there; 2], "{conn:?}");
        }
    }
    assert_eq!(sweeper.sweep(None).unwrap().denied, 0);
}

/// Whether the slots of both directions are live.
fn found<A: Address>(flows: &FlowMaps, conn: &Conn) -> [bool; 2] {
    let key = |(src, sport): (IpAddr, u16), (dst, dport): (IpAddr, u16)| FlowKey {
        src: A::from_wide(Addr16::from(src)),
        dst: A::from_wide(Addr16::from(dst)),
        sport: Be16::new(sport),
        dport: Be16::new(dport),
        proto: conn.proto.into(),
    };
    [key(conn.client, conn.vip), key(conn.backend, conn.source)].map(|key| flows.find(&key).0.is_live())
}
