//! Many nodes that publish as fast as they can: what is in the maps then is what they said last.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use anyhow::Result;
use lb_tests::{
    etcd::Etcd,
    fleet::{Fleet, Random},
    netns::Namespace,
    weir::Weir,
};
use serde_json::Value;

use super::super::etcd::{Rings, rings};

const NODES: usize = 20;
const EACH: usize = 20;
const SERVICES: usize = 10;
const CHANGES: usize = 400;

type Backends = BTreeMap<String, BTreeSet<SocketAddr>>;

/// Who takes new flows, by the status.
fn told(status: &Value) -> Backends {
    let mut all = Backends::new();
    for service in status["services"].as_array().into_iter().flatten() {
        let serving = service["backends"].as_array().into_iter().flatten();
        let serving = serving.filter(|backend| backend["ring_share"].as_u64() > Some(0));
        let addresses: BTreeSet<SocketAddr> = serving
            .filter_map(|backend| backend["address"].as_str()?.parse().ok())
            .collect();
        if !addresses.is_empty() {
            all.insert(service["name"].as_str().unwrap_or_default().to_owned(), addresses);
        }
    }
    all
}

/// The same by the rings in the kernel; service `s<n>` listens at port n + 1.
fn programmed(rings: &Rings) -> Backends {
    let of = |(address, ring): (&weir::model::ServiceAddress, &Vec<SocketAddr>)| {
        (format!("s{}", address.port - 1), ring.iter().copied().collect())
    };
    rings.iter().map(of).collect()
}

#[test]
fn what_many_nodes_said_last_is_in_the_maps() -> Result<()> {
    let (node, world) = (Namespace::new("node")?, Namespace::new("world")?);
    node.veth("c0", &world, "e0")?;
    node.address("c0", "192.0.2.1/24")?;
    node.ip("neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev c0 nud permanent")?;
    node.ip("route add 10.80.0.0/16 via 192.0.2.2")?;
    let mut etcd = Etcd::start(&node, "127.0.0.1", 3)?;
    let mut fleet = Fleet::start(&node, &etcd, NODES, EACH, SERVICES)?;
    let config = format!(
        "interfaces = [\"c0\"]\n[vips.test]\naddress = \"198.51.100.1\"\n[defaults]\ndrain = \"0s\"\n[nodes]\n{}",
        etcd.section()
    );
    let mut weir = Weir::start_with(&node, "off", &config)?;
    let mut random = Random(0x5eed);
    for round in 0..2 {
        for _ in 0..CHANGES {
            fleet.change(&mut random)?;
        }
        if round == 0 {
            // The leader goes in the middle of it.
            etcd.kill(etcd.leader()?);
        }
        let expected = fleet.expected();
        weir.await_status("as published", |status| told(status) == expected)?;
        assert_eq!(programmed(&rings(&weir)?), expected);
        etcd.run_all()?;
    }
    let status = weir.status()?;
    let sources = status["sources"].as_array().into_iter().flatten();
    let nodes = sources.filter(|source| {
        source["name"]
            .as_str()
            .is_some_and(|name| name.starts_with("node:"))
    });
    assert_eq!(nodes.filter(|node| node["connected"] == true).count(), NODES);
    assert_eq!(
        status["rejections"].as_array().map(Vec::len),
        Some(0),
        "{status:#}"
    );
    Ok(())
}
