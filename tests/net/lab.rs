//! Client, balancer and backends in namespaces, wired by veth.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use lb_tests::{
    netns::{Attached, Namespace},
    packet::ToIp as _,
    weir::Weir,
};

/// How the balancer is wired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wiring {
    /// Clients on one device, backends on another.
    TwoArm,
    /// Clients and backends on one segment and one device of the balancer.
    OneArm,
}

/// Who forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// XDP in the driver, and TC for what it leaves. Senders complete their checksums.
    Native,
    /// XDP after the driver, otherwise the same.
    Generic,
    /// TC alone. Every offload is as the kernel sets it: packets come with partial checksums and 64 KiB long.
    Tc,
}

impl Body {
    /// What the agent's status calls it.
    pub const fn xdp_in_status(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Tc => "-",
        }
    }
}

/// The namespaces. Backends are `203.0.113.11` and on, `2001:db8:b::11` and on.
pub struct Lab {
    pub client: Namespace,
    pub node: Namespace,
    pub backends: Vec<Namespace>,
    pub interfaces: &'static str,
    body: Body,
    switch: Namespace,
    _programs: Vec<Attached>,
}

pub const VIP4: &str = "198.51.100.1";
pub const VIP6: &str = "2001:db8:f::1";

impl Lab {
    /// Wires `backends` backends.
    pub fn new(wiring: Wiring, body: Body, backends: usize) -> Result<Self> {
        let (client, node) = (Namespace::new("client")?, Namespace::new("node")?);
        let switch = Namespace::new("switch")?;
        let mut programs = Vec::new();
        switch.bridge("br0")?;
        let mut plug = |namespace: &Namespace, device: &str, port: &str| -> Result<()> {
            namespace.veth(device, &switch, port)?;
            switch.ip(&format!("link set {port} master br0"))?;
            if body != Body::Tc {
                namespace.complete_checksums(device)?;
                programs.push(switch.pass_all(port)?);
            }
            Ok(())
        };
        plug(&node, "b0", "node")?;
        node.address("b0", "203.0.113.1/24")?;
        node.address("b0", "2001:db8:b::1/64")?;
        let mut all = Vec::new();
        for i in 0..backends {
            let backend = Namespace::new("backend")?;
            plug(&backend, "e0", &format!("backend{i}"))?;
            backend.address("e0", &format!("203.0.113.{}/24", 11 + i))?;
            backend.address("e0", &format!("2001:db8:b::{}/64", 11 + i))?;
            all.push(backend);
        }
        let (via4, via6) = match wiring {
            Wiring::OneArm => {
                plug(&client, "e0", "client")?;
                client.address("e0", "203.0.113.200/24")?;
                client.address("e0", "2001:db8:b::200/64")?;
                ("203.0.113.1", "2001:db8:b::1")
            }
            Wiring::TwoArm => {
                client.veth("e0", &node, "c0")?;
                if body != Body::Tc {
                    client.complete_checksums("e0")?;
                    programs.push(client.pass_all("e0")?);
                }
                client.address("e0", "192.0.2.10/24")?;
                client.address("e0", "2001:db8:c::10/64")?;
                node.address("c0", "192.0.2.1/24")?;
                node.address("c0", "2001:db8:c::1/64")?;
                ("192.0.2.1", "2001:db8:c::1")
            }
        };
        client.ip(&format!("route add {VIP4}/32 via {via4}"))?;
        client.ip(&format!("route add {VIP6}/128 via {via6}"))?;
        let interfaces = if wiring == Wiring::OneArm {
            "[\"b0\"]"
        } else {
            "[\"b0\", \"c0\"]"
        };
        Ok(Self {
            client,
            node,
            backends: all,
            interfaces,
            body,
            switch,
            _programs: programs,
        })
    }

    /// Addresses of the backends' servers at this port.
    pub fn servers(&self, v6: bool, port: u16) -> Vec<SocketAddr> {
        (0..self.backends.len())
            .map(|i| SocketAddr::new(address_of(i, v6), port))
            .collect()
    }

    /// The configuration of one service on `vip`, which is routed here.
    pub fn config(&self, vip: &str, listen: &str, servers: &[SocketAddr]) -> String {
        self.head(&format!("[vips.lab]\naddress = \"{vip}\"\n")) + &service("lab", listen, "", servers)
    }

    /// The configuration up to its services; `vips` is TOML, and so may other sections be.
    pub fn head(&self, vips: &str) -> String {
        format!("interfaces = {}\n{vips}", self.interfaces)
    }

    /// Starts the agent on the balancer and waits until it serves.
    pub fn start(&self, config: &str) -> Result<Weir<'_>> {
        let xdp = match self.body {
            Body::Native => "native",
            Body::Generic => "generic",
            Body::Tc => "off",
        };
        Weir::start_with(&self.node, xdp, config)
    }

    /// Containers on a bridge of the balancer's own, `172.30.0.11` and `2001:db8:d::11` and on, as Docker makes them.
    pub fn containers(&self, count: usize) -> Result<Vec<Namespace>> {
        self.node.bridge("br-app")?;
        self.node.address("br-app", "172.30.0.1/24")?;
        self.node.address("br-app", "2001:db8:d::1/64")?;
        (0..count).map(|i| self.container(i)).collect()
    }

    /// Plugs the device `e0` of a namespace into the backends' segment.
    pub fn plug_backend(&self, namespace: &Namespace, port: &str) -> Result<()> {
        namespace.veth("e0", &self.switch, port)?;
        self.switch.ip(&format!("link set {port} master br0"))?;
        if self.body != Body::Tc {
            namespace.complete_checksums("e0")?;
        }
        Ok(())
    }

    fn container(&self, i: usize) -> Result<Namespace> {
        let container = Namespace::new("container")?;
        container.veth("eth0", &self.node, &format!("app{i}"))?;
        self.node.ip(&format!("link set app{i} master br-app"))?;
        container.address("eth0", &format!("172.30.0.{}/24", 11 + i))?;
        container.address("eth0", &format!("2001:db8:d::{}/64", 11 + i))?;
        container.ip("route add default via 172.30.0.1")?;
        container.ip("route add default via 2001:db8:d::1")?;
        Ok(container)
    }
}

/// One service on the only VIP; `more` are lines of its own.
pub fn service(name: &str, listen: &str, more: &str, servers: &[SocketAddr]) -> String {
    let mut text = format!("[[services]]\nname = \"{name}\"\nlisten = \"{listen}\"\n{more}\n");
    for server in servers {
        text += &format!("[[services.backends]]\naddress = \"{server}\"\n");
    }
    text
}

/// Address of a container.
pub fn container_address(index: usize, v6: bool) -> IpAddr {
    let text = if v6 {
        format!("2001:db8:d::{}", 11 + index)
    } else {
        format!("172.30.0.{}", 11 + index)
    };
    text.as_str().ip()
}

/// Address of a backend.
pub fn address_of(index: usize, v6: bool) -> IpAddr {
    let text = if v6 {
        format!("2001:db8:b::{}", 11 + index)
    } else {
        format!("203.0.113.{}", 11 + index)
    };
    text.as_str().ip()
}
