//! Attachment, topology, announcement and detach in a namespace with an uplink and bridges.

use std::{collections::BTreeSet, net::IpAddr};

use weir::datapath::{
    MapOp, Maps as _, Place, Topology,
    attach::{TcChoice, XdpChoice},
    bpf::KernelMaps,
    detach::detach,
    net::NetConfig,
    uplinks::InterfaceName,
    xdp::RemoteBackends,
};

use crate::{
    agent::Agent,
    netns::{Netns, run},
};

/// A node with `up0` (10.9.0.1/24, fd09::1/64) wired to a peer namespace that holds .2 and ::2.
fn node_and_peer() -> (Netns, Netns) {
    let (node, peer) = (Netns::new(), Netns::new());
    run(&format!(
        "ip -n {} link add up0 type veth peer name p0 netns {}",
        node.name, peer.name
    ));
    for (ns, device, last) in [(&node, "up0", 1), (&peer, "p0", 2)] {
        ns.ip(&format!("addr add 10.9.0.{last}/24 dev {device}"));
        ns.ip(&format!("addr add fd09::{last}/64 dev {device} nodad"));
        ns.ip(&format!("link set {device} up"));
    }
    node.ip("route add 10.20.0.0/16 via 10.9.0.2");
    // A veth takes frames from XDP while its other end looks for them.
    run(&format!("ip netns exec {} ethtool -K p0 gro on", peer.name));
    (node, peer)
}

fn config(announce: &[(&str, &str)]) -> NetConfig {
    NetConfig {
        interfaces: vec![InterfaceName::Named("up0".into())],
        xdp: XdpChoice::Auto,
        remote: RemoteBackends {
            source: Some("a test".into()),
            ..RemoteBackends::default()
        },
        announce: announce
            .iter()
            .map(|(device, vip)| ((*device).into(), vip.parse().unwrap()))
            .collect(),
        vips: announce.iter().map(|(_, vip)| vip.parse().unwrap()).collect(),
        snat_ports: Some(16384..=32767),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn slot(topology: &Topology, name: &str) -> Option<u16> {
    topology
        .devices
        .iter()
        .find(|(_, device)| device.name == name)
        .map(|(slot, _)| *slot)
}

#[test]
fn the_network_is_followed_adopted_and_left_as_it_was() {
    let (node, peer) = node_and_peer();
    let before = (
        node.output("ip -o addr"),
        node.output("cat /proc/sys/net/ipv4/ip_local_reserved_ports"),
    );
    let peer_mac = peer
        .output("cat /proc/self/net/dev") // the device exists
        .contains("p0")
        .then(|| peer.output("ip -o link show p0"))
        .unwrap();
    let (pin, state) = (node.pin.clone(), node.state.clone());
    let name = node.name.clone();
    let wanted = [
        "10.9.0.2",
        "fd09::2",
        "10.20.1.1",
        "172.30.0.5",
        "10.9.0.1",
        "198.51.100.1",
    ];
    let slots = {
        let (pin, state, name) = (pin.clone(), state.clone(), name.clone());
        node.block_on(async move {
            let announce = [("up0", "192.0.2.80"), ("up0", "2001:db8::80")];
            let mut agent = Agent::start(&pin, &state, config(&announce), &wanted, TcChoice::Auto);
            assert!(!agent.adopted);
            let resolved = |t: &Topology, a: &str| {
                matches!(t.places.get(&ip(a)), Some(Place::Remote { mac: Some(_), .. }))
            };
            let topology = agent
                .until("neighbours are resolved", |t| {
                    resolved(t, "10.9.0.2") && resolved(t, "fd09::2") && resolved(t, "10.20.1.1")
                })
                .await;
            let Some(Place::Remote { mac: Some(mac), .. }) = topology.places.get(&ip("10.9.0.2")) else {
                panic!()
            };
            let text = mac.map(|byte| format!("{byte:02x}")).join(":");
            assert!(peer_mac.contains(&text), "{text} is not the peer's: {peer_mac}");
            assert_eq!(topology.places[&ip("10.9.0.1")], Place::Node);
            assert_eq!(topology.places[&ip("198.51.100.1")], Place::Unroutable);
            assert_eq!(topology.places[&ip("172.30.0.5")], Place::Unroutable);
            let up0 = &topology.devices[&slot(&topology, "up0").unwrap()];
            assert!(up0.xdp.back && !up0.bridge && up0.mtu == 1500);
            assert_eq!(
                BTreeSet::from_iter(up0.addresses.clone()),
                [ip("10.9.0.1"), ip("fd09::1")].into()
            );
            // A bridge that comes later is attached and found.
            run(&format!("ip -n {name} link add docker9 type bridge"));
            run(&format!("ip -n {name} addr add 172.30.0.1/16 dev docker9"));
            run(&format!("ip -n {name} link set docker9 up"));
            let topology = agent
                .until("the bridge is found", |t| {
                    matches!(t.places[&ip("172.30.0.5")], Place::Bridge { .. })
                })
                .await;
            let bridge = slot(&topology, "docker9").unwrap();
            assert!(topology.devices[&bridge].bridge && !topology.devices[&bridge].xdp.back);
            let report = agent
                .until_report("three devices", |r| r.attachments.len() == 3)
                .await;
            assert!(
                report.faults.iter().all(|f| !f.contains("could not")),
                "{:?}",
                report.faults
            );
            let of = |name: &str| {
                report
                    .attachments
                    .iter()
                    .find(|a| a.device == name)
                    .unwrap()
                    .clone()
            };
            assert_eq!((of("up0").xdp.as_str(), of("up0").tc.as_str()), ("native", "tcx"));
            assert_eq!((of("lo").xdp.as_str(), of("docker9").xdp.as_str()), ("-", "-"));
            agent.kill().await;
            (slot(&topology, "up0"), topology.devices[&bridge].ifindex)
        })
    };
    // The agent is gone, everything it made is still there.
    let addresses = node.output("ip -o addr");
    assert!(
        addresses.contains("192.0.2.80/32") && addresses.contains("2001:db8::80/128"),
        "{addresses}"
    );
    assert!(node.output("ip -d link show up0").contains("prog/xdp"));
    assert!(
        node.output("cat /proc/sys/net/ipv4/ip_local_reserved_ports")
            .contains("16384-32767")
    );
    let links = || std::fs::read_dir(pin.join("v2/links")).unwrap().count();
    // And the tracepoint's.
    assert_eq!(links(), 3 + 2 + 1 + 1);
    let program_before = node.output("ip -d link show up0");
    // The next one takes over, in place; one VIP is no longer wanted, the bridge goes.
    {
        let (pin, state, name) = (pin.clone(), state.clone(), name.clone());
        node.block_on(async move {
            let both = [("up0", "192.0.2.80"), ("up0", "2001:db8::80")];
            let mut agent = Agent::start(&pin, &state, config(&both), &[], TcChoice::Auto);
            assert!(agent.adopted);
            agent.wanted.send(["10.9.0.2".parse().unwrap()].into()).unwrap();
            agent
                .until("a new backend is placed", |t| t.places.len() == 1)
                .await;
            agent.config.send(config(&[("up0", "192.0.2.80")])).unwrap();
            let topology = agent.until("up0 is back", |t| slot(t, "docker9").is_some()).await;
            assert_eq!(slot(&topology, "up0"), slots.0);
            run(&format!("ip -n {name} link del docker9"));
            agent
                .until("the bridge is gone", |t| slot(t, "docker9").is_none())
                .await;
            agent
                .until_report("and forgotten", |r| r.attachments.len() == 2)
                .await;
            agent.kill().await;
        });
    }
    assert_ne!(
        node.output("ip -d link show up0"),
        program_before,
        "the program was replaced"
    );
    assert_eq!(links(), 3 + 1 + 1);
    let addresses = node.output("ip -o addr");
    assert!(
        addresses.contains("192.0.2.80/32") && !addresses.contains("2001:db8::80"),
        "{addresses}"
    );
    // Detach leaves the node as it was.
    let (pin_in, state_in) = (pin.clone(), state.clone());
    let report = node.block_on(async move {
        let mut maps = KernelMaps::open(&pin_in.join("v2/maps")).unwrap();
        for vip in ["198.51.100.10", "2001:db8::10", "192.0.2.80", "10.9.0.1"].map(ip) {
            let value = lb_common::maps::Vip::default();
            maps.apply(&MapOp::PutVip { vip, value }).unwrap();
        }
        drop(maps);
        let configured = [ip("198.51.100.11"), ip("192.0.2.80")].into();
        detach(&pin_in, &state_in, &configured).await.unwrap()
    });
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    // The node's own address and the announced VIP are nobody's affair.
    let routed = ["198.51.100.10", "198.51.100.11", "2001:db8::10"].map(ip);
    assert_eq!(report.routed, routed.into());
    let advice = report.advice().join("\n");
    assert!(
        advice.contains("`ip route add unreachable 198.51.100.10/32`"),
        "{advice}"
    );
    assert!(
        advice.contains("`ip -6 route add unreachable 2001:db8::10/128`"),
        "{advice}"
    );
    assert!(!node.output("ip -d link show up0").contains("prog/xdp"));
    assert!(!pin.exists() && !state.exists());
    assert_eq!(
        node.output("cat /proc/sys/net/ipv4/ip_local_reserved_ports"),
        before.1
    );
    assert_eq!(
        node.output("cat /proc/sys/net/ipv4/conf/lo/accept_local").trim(),
        "0"
    );
    assert!(!node.output("ip neigh").contains("managed"));
    assert!(!node.output("ip -o addr").contains("192.0.2.80"));
    assert!(before.0.contains("10.9.0.1"));
}

#[test]
fn filters_serve_where_tcx_does_not_exist() {
    let (node, _peer) = node_and_peer();
    let (pin, state) = (node.pin.clone(), node.state.clone());
    // Somebody else's qdisc on one of the devices stays.
    node.output("tc qdisc add dev lo clsact");
    for round in 0..2 {
        let (pin, state) = (pin.clone(), state.clone());
        node.block_on(async move {
            let mut agent = Agent::start(&pin, &state, config(&[]), &[], TcChoice::Clsact);
            assert_eq!(agent.adopted, round == 1);
            let report = agent.until_report("attached", |r| r.attachments.len() == 2).await;
            assert!(report.attachments.iter().all(|a| a.tc == "clsact"), "{report:?}");
            agent.kill().await;
        });
        for direction in ["ingress", "egress"] {
            let filters = node.output(&format!("tc filter show dev up0 {direction}"));
            assert_eq!(
                filters
                    .matches(&format!("handle 0x5745 weir_tc_{direction}"))
                    .count(),
                1,
                "{filters}"
            );
        }
    }
    let report = node.block_on(async move { detach(&pin, &state, &BTreeSet::new()).await.unwrap() });
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    assert!(!node.output("tc qdisc show dev up0").contains("clsact"));
    assert!(node.output("tc qdisc show dev lo").contains("clsact"));
    assert!(!node.output("tc filter show dev lo ingress").contains("weir"));
}
