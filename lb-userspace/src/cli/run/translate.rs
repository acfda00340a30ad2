//! The configuration and the reports of one part of the agent, in the words of another. Pure, but for the clock.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use lb_common::limits;

use crate::{
    config::{Announce, Config, Interface, UnusedPorts, XdpMode},
    datapath::{
        Capacities,
        attach::XdpChoice,
        load::Sizes,
        net::{InterfaceName, NetConfig},
        sweep::SweepReport,
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
        snat_addresses: config.snat.addresses.clone(),
        own_vips: announced(config).into_iter().map(|(_, vip)| vip).collect(),
        routed_vips: routed(config),
        mark: config.bpf.mark,
        snat_port_min: *config.snat.ports.start(),
        snat_port_max: *config.snat.ports.end(),
        event_sample: config.event_sample,
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
    let interfaces = config.interfaces.iter().map(|interface| match interface {
        Interface::Auto => InterfaceName::Auto,
        Interface::Named(name) => InterfaceName::Named(name.clone()),
    });
    NetConfig {
        interfaces: interfaces.collect(),
        xdp: match config.bpf.xdp {
            XdpMode::Auto => XdpChoice::Auto,
            XdpMode::Native => XdpChoice::Native,
            XdpMode::Generic => XdpChoice::Generic,
            XdpMode::Off => XdpChoice::Off,
        },
        announce: announced(config),
        snat_ports: Some(config.snat.ports.clone()),
    }
}

/// A sweep as the plan counts it.
pub(super) fn sweep(report: &SweepReport) -> Sweep {
    Sweep {
        started: Some(report.started),
        flows: report.flows_by_backend.clone(),
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
