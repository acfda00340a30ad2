//! One configuration for many nodes: real agents, each in a namespace of its own, and real etcd servers.

mod faults;
mod nodes;
mod operator;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{etcd::Etcd, guard::Guard, load::Load, netns::Namespace, weir::Weir};
use serde_json::Value;
use weir::{model::ServiceAddress, plan::address_of};

/// Where etcd listens for the nodes.
const STORE: &str = "10.77.0.1";
/// The same by IPv6.
const STORE6: &str = "fd77::1";
/// A VIP in every node's own file.
const OWN: &str = "[vips.own]\naddress = \"198.51.100.1\"\n";

/// A switch with etcd at it, and nodes.
struct Lab {
    store: Namespace,
    nodes: Vec<Namespace>,
}

impl Lab {
    fn new(nodes: usize) -> Result<Self> {
        let store = Namespace::new("store")?;
        store.bridge("br0")?;
        store.address("br0", &format!("{STORE}/16"))?;
        store.address("br0", &format!("{STORE6}/64"))?;
        let node = |at: usize| {
            let node = Namespace::new("node")?;
            node.veth("eth0", &store, &format!("to-{at}"))?;
            store.ip(&format!("link set to-{at} master br0"))?;
            node.address("eth0", &format!("10.77.1.{}/16", at + 1))?;
            node.address("eth0", &format!("fd77::{}/64", at + 10))?;
            Ok(node)
        };
        let nodes = (0..nodes).map(node).collect::<Result<_>>()?;
        Ok(Self { store, nodes })
    }

    fn agent(&self, node: usize, etcd: &Etcd<'_>) -> Result<Weir<'_>> {
        // TC alone: the devices keep their offloads, as real ones would.
        Weir::start_with(&self.nodes[node], "off", &config(etcd))
    }

    fn plug(&self, role: &str, address: &str) -> Result<Namespace> {
        let namespace = Namespace::new(role)?;
        let port = format!("to-{}", address.replace("10.77.", ""));
        namespace.veth("eth0", &self.store, &port)?;
        self.store.ip(&format!("link set {port} master br0"))?;
        namespace.address("eth0", &format!("{address}/16"))?;
        Ok(namespace)
    }

    /// Servers at 10.77.2.1 and on, port 80, and a client whose packets to the VIP go to the first node.
    fn traffic(&self, servers: u8) -> Result<Traffic> {
        let server = |octet| {
            let namespace = self.plug("backend", &format!("10.77.2.{octet}"))?;
            let mut command = namespace.command(lb_tests::docker::server());
            let process = Guard::spawn(command.arg("80").env("NAME", format!("server-{octet}")))?;
            Ok((process, namespace))
        };
        let servers: Vec<_> = (1..=servers).map(server).collect::<Result<_>>()?;
        let client = self.plug("client", "10.77.3.1")?;
        client.ip("route add 198.51.100.1/32 via 10.77.1.1")?;
        client.sysctl("net.ipv4.ip_local_port_range", "10000 65000")?;
        client.sysctl("net.ipv4.tcp_tw_reuse", "1")?;
        for octet in 1..=servers.len() {
            let server = SocketAddr::new(format!("10.77.2.{octet}").parse()?, 80);
            let until = Instant::now() + READY;
            // Nobody says when it listens.
            while let Err(fault) = client.talk(server) {
                ensure!(Instant::now() < until, "{server} does not answer: {fault:#}");
            }
        }
        Ok(Traffic {
            client,
            _servers: servers,
        })
    }
}

/// A client and servers.
struct Traffic {
    client: Namespace,
    // A process ends before its namespace.
    _servers: Vec<(Guard, Namespace)>,
}

impl Traffic {
    /// Clients that connect anew all the time, and clients that stay.
    fn load(&self) -> Load {
        Load::start(&self.client, ([198, 51, 100, 1], 80).into(), 2, 2)
    }
}

/// How long a server may take to listen.
const READY: Duration = Duration::from_secs(30);

fn config(etcd: &Etcd<'_>) -> String {
    format!("interfaces = [\"eth0\"]\n{OWN}{}", etcd.section())
}

/// The text of a service on a port of a VIP, with these last octets as backends.
fn service(vip: &str, port: u16, backends: impl IntoIterator<Item = u8>) -> String {
    let backend = |octet| {
        format!(
            "\n[[backends]]\naddress = \"10.77.2.{octet}:80\"\nweight = {}\n",
            1 + octet % 3
        )
    };
    let backends: String = backends.into_iter().map(backend).collect();
    format!("vip = \"{vip}\"\nlisten = [\"{port}/tcp\"]\n{backends}")
}

/// The committed rings, entry by entry, with backends for ids.
pub(super) type Rings = BTreeMap<ServiceAddress, Vec<SocketAddr>>;

pub(super) fn rings(weir: &Weir<'_>) -> Result<Rings> {
    let dump = weir.dump()?;
    let address = |id: &u32| {
        let backend = dump.backends.get(id).context("a ring names an unknown backend")?;
        Ok(SocketAddr::new(backend.addr.into(), backend.port.get()))
    };
    let ring = |(key, service): (_, &lb_common::maps::Service)| {
        let ids = dump.rings.get(&service.ring_row).map_or(&[][..], Vec::as_slice);
        Ok((address_of(key), ids.iter().map(address).collect::<Result<_>>()?))
    };
    dump.services.iter().map(ring).collect()
}

/// What the agent says of etcd.
fn source(status: &Value) -> &Value {
    let sources = status["sources"].as_array().into_iter().flatten();
    sources
        .into_iter()
        .find(|source| source["name"] == "etcd")
        .unwrap_or(&Value::Null)
}

fn connected(status: &Value) -> bool {
    source(status)["connected"] == true
}

/// How many backends of a service take new flows.
fn serving(status: &Value, service: &str) -> usize {
    let services = status["services"].as_array().into_iter().flatten();
    let backends = services
        .filter(|s| s["name"] == service)
        .flat_map(|s| s["backends"].as_array().into_iter().flatten());
    backends
        .filter(|backend| backend["ring_share"].as_u64() > Some(0))
        .count()
}
