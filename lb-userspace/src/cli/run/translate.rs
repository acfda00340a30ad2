//! The configuration and the reports of one part of the agent, in the words of another. Pure, but for the clock.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use lb_common::limits;

use crate::{
    config::{Announce, Config, Interface, UnusedPorts, XdpMode},
    datapath::{
        Capacities, attach::XdpChoice, load::Sizes, net::NetConfig, sweep::SweepReport,
        uplinks::InterfaceName, xdp::RemoteBackends,
    },
    desired::Retention,
    plan::{Policy, Sweep},
};

/// Sizes for maps that are made anew.
pub(super) fn sizes(config: &Config) -> Sizes {
    let l = &config.limits;
    Sizes {
        limits: Capacities {
            services: l.services,
            backends: l.backends,
            ring_rows: l.ring_rows,
            acl: limits::MAX_ACL_ENTRIES,
            flows4: l.flows4,
            flows6: l.flows6,
        },
        events_bytes: l.events_bytes,
    }
}

/// What the plan needs to know; `hz` is the rate of the flow clock.
pub(super) fn policy(config: &Config, hz: u32) -> Policy {
    Policy {
        snat_addresses: {
            let vips = floating_vips(config);
            let mut sources = config.snat.addresses.clone();
            sources.retain(|source| !vips.contains(source));
            sources
        },
        own_vips: announced(config).into_iter().map(|(_, vip)| vip).collect(),
        routed_vips: routed(config),
        mark: config.bpf.mark,
        snat_port_min: *config.snat.ports.start(),
        snat_port_max: *config.snat.ports.end(),
        event_sample: config.event_sample,
        flow_share: config.limits.flow_share,
        hz,
        default_drain: config.policy.drain,
        retention: Retention {
            term: config.policy.remember,
            vips: vips(config).collect(),
        },
        firewall: config.firewall.clone(),
    }
}

/// What the follower of the network needs to know.
pub(super) fn network(config: &Config) -> NetConfig {
    NetConfig {
        interfaces: interfaces(config),
        xdp: match config.bpf.xdp {
            XdpMode::Auto => XdpChoice::Auto,
            XdpMode::Native => XdpChoice::Native,
            XdpMode::Generic => XdpChoice::Generic,
            XdpMode::Off => XdpChoice::Off,
        },
        remote: remote_backends(config),
        announce: announced(config),
        vips: floating_vips(config),
        snat_ports: Some(config.snat.ports.clone()),
    }
}

/// The interfaces as the follower of the network has them.
pub(in crate::cli) fn interfaces(config: &Config) -> Vec<InterfaceName> {
    let name = |interface: &Interface| match interface {
        Interface::Auto => InterfaceName::Auto,
        Interface::Named(name) => InterfaceName::Named(name.clone()),
    };
    config.interfaces.iter().map(name).collect()
}

/// What the configuration says of backends on other machines.
fn remote_backends(config: &Config) -> RemoteBackends {
    let docker = config.docker.iter().any(|engine| engine.remote);
    let sources = [
        ("[nodes]", config.nodes.is_some()),
        ("[swarm]", !config.swarm.is_empty()),
        ("[etcd]", config.etcd.is_some()),
        ("[[docker]] with `remote`", docker),
    ];
    let services = config.services.iter().flat_map(|service| {
        let backends = service.wishes.iter().flat_map(|wish| &wish.backends);
        backends.map(|backend| (backend.address.ip(), service.name.clone()))
    });
    RemoteBackends {
        source: sources
            .into_iter()
            .find_map(|(name, there)| there.then(|| name.to_owned())),
        services: services.collect(),
    }
}

/// VIPs that may be on an interface of this node now and of another one in a second, whoever puts them there: no sources for
/// connections. The node's own address stays.
fn floating_vips(config: &Config) -> BTreeSet<IpAddr> {
    let floating = config.policy.vips.iter().filter(|vip| !vip.node_address);
    floating.flat_map(|vip| vip.addresses.iter().copied()).collect()
}

/// A sweep as the plan counts it.
pub(super) fn sweep(report: &SweepReport) -> Sweep {
    Sweep {
        started: Some(report.started),
        flows: report.flows_by_backend.clone(),
        established: report.established,
        half_open: report.half_open,
        refused: report.refused.clone(),
    }
}

/// Every address of every VIP.
pub(super) fn vips(config: &Config) -> impl Iterator<Item = IpAddr> {
    config
        .policy
        .vips
        .iter()
        .flat_map(|vip| vip.addresses.iter().copied())
}

/// VIPs that somebody routes to the node, and whether their unused ports are met with silence.
fn routed(config: &Config) -> BTreeMap<IpAddr, bool> {
    config
        .policy
        .vips
        .iter()
        .filter(|vip| vip.announce == Announce::None && !vip.node_address)
        .flat_map(|vip| {
            let silent = vip.unused_ports == UnusedPorts::Drop;
            vip.addresses.iter().map(move |address| (*address, silent))
        })
        .collect()
}

/// VIPs that the node puts on its interfaces.
fn announced(config: &Config) -> BTreeSet<(String, IpAddr)> {
    config
        .policy
        .vips
        .iter()
        .filter_map(|vip| match &vip.announce {
            Announce::Address { interface } => Some((interface, &vip.addresses)),
            Announce::None => None,
        })
        .flat_map(|(interface, addresses)| addresses.iter().map(|vip| (interface.clone(), *vip)))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(Path::new("weir.toml"), text).unwrap()
    }

    const VIPS: &str = "interfaces = [\"auto\"]\n[vips.own]\naddress = \"192.0.2.5\"\nnode-address = true\n\
                        [vips.float]\naddress = [\"198.51.100.1\", \"2001:db8::1\"]\n";

    #[test]
    fn floating_vips_are_no_sources_and_the_node_stays_one() {
        let net = network(&config(VIPS));
        let floating: Vec<String> = net.vips.iter().map(ToString::to_string).collect();
        assert_eq!(floating, ["198.51.100.1", "2001:db8::1"]);
    }

    #[test]
    fn the_configuration_tells_what_can_be_remote() {
        let remote = |more: &str| network(&config(&format!("{VIPS}{more}"))).remote;
        assert_eq!(remote(""), RemoteBackends::default());
        let local = "[docker]\nendpoint = \"unix:///var/run/docker.sock\"\n";
        assert_eq!(remote(local), RemoteBackends::default());
        for (text, source) in [
            (
                "[swarm]\nendpoints = [\"unix:///var/run/docker.sock\"]\n",
                "[swarm]",
            ),
            ("[etcd]\nendpoints = [\"http://127.0.0.1:2379\"]\n", "[etcd]"),
            (
                "[etcd]\nendpoints = [\"http://127.0.0.1:2379\"]\n[nodes]\n",
                "[nodes]",
            ),
        ] {
            assert_eq!(remote(text).source.as_deref(), Some(source), "{text}");
        }
        let service = "[[services]]\nname = \"web\"\nvip = \"own\"\nlisten = \"80/tcp\"\n\
                       [[services.backends]]\naddress = \"10.0.0.9:80\"\n";
        let services = remote(service).services;
        assert_eq!(services, [("10.0.0.9".parse().unwrap(), "web".to_owned())].into());
    }
}
