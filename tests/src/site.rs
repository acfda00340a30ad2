//! A client and a node with a Docker engine, joined by one cable: where e2e and demo happen.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use anyhow::Result;
use serde_json::Value;

use crate::{docker::Engine, netns::Namespace, packet::ToIp as _};

/// The VIP that the client's side routes to the node.
pub const VIP: &str = "198.51.100.1";
/// The client.
pub const CLIENT: &str = "192.0.2.10";
/// The node, on the client's side.
pub const NODE: &str = "192.0.2.1";
/// The label that makes a container a backend of service `web`, port 80.
pub const LABEL: &str = "weir.service.web.listen=80/tcp";

/// The two namespaces.
#[derive(Debug)]
pub struct Site {
    pub client: Namespace,
    pub node: Namespace,
}

impl Site {
    /// Makes them.
    pub fn new() -> Result<Self> {
        let (client, node) = (Namespace::new("client")?, Namespace::new("node")?);
        client.veth("eth0", &node, "uplink")?;
        client.address("eth0", &format!("{CLIENT}/24"))?;
        node.address("uplink", &format!("{NODE}/24"))?;
        client.ip(&format!("route add {VIP}/32 via {NODE}"))?;
        node.ip(&format!("route add default via {CLIENT}"))?;
        // A load takes more ports than the usual range has before TIME_WAIT gives them back.
        client.sysctl("net.ipv4.ip_local_port_range", "10000 65000")?;
        client.sysctl("net.ipv4.tcp_tw_reuse", "1")?;
        Ok(Self { client, node })
    }

    /// The agent's configuration: the cable, the VIP, the engine.
    pub fn config(&self, engine: &Engine) -> String {
        format!(
            "interfaces = [\"uplink\"]\n\n[vips.web]\naddress = \"{VIP}\"\n\n[docker]\nendpoint = \"{}\"\n",
            engine.endpoint()
        )
    }
}

/// The VIP's HTTP is a service as any other: its backends are shims, here the one of the node.
pub fn http_service() -> String {
    format!(
        "\n[[services]]\nname = \"http\"\nvip = \"web\"\nlisten = [\"80/tcp\"]\n\n\
         [[services.backends]]\naddress = \"{NODE}:80\"\n"
    )
}

/// A port of the VIP.
pub fn vip(port: u16) -> SocketAddr {
    SocketAddr::new(VIP.ip(), port)
}

/// The client's address.
pub fn client() -> IpAddr {
    CLIENT.ip()
}

/// Names of the backends that take new flows, by the agent's status.
pub fn serving(status: &Value) -> BTreeSet<String> {
    backends(status)
        .filter(|backend| backend["ring_share"].as_u64() > Some(0))
        .filter_map(|backend| backend["name"].as_str())
        .map(str::to_owned)
        .collect()
}

/// All backends of all services in the agent's status.
pub fn backends(status: &Value) -> impl Iterator<Item = &Value> {
    let services = status["services"].as_array().into_iter().flatten();
    services.flat_map(|service| service["backends"].as_array().into_iter().flatten())
}
