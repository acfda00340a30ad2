//! The configuration and the reports of one part of the agent, in the words of another. Pure, but for the clock.

use std::{collections::BTreeSet, net::IpAddr};

use lb_common::limits;

use crate::{
    config::{Announce, Config, Interface, XdpMode},
    datapath::{
        Capacities,
        attach::XdpChoice,
        load::Sizes,
        net::{InterfaceName, NetConfig},
        sweep::SweepReport,
    },
    plan::{Policy, Sweep},
};

/// Sizes for maps that are made anew. The configuration counts connections, the maps entries, two a connection.
pub(super) fn sizes(config: &Config) -> Sizes {
    let l = &config.limits;
    Sizes {
        limits: Capacities {
            services: l.services,
            backends: l.backends,
            ring_rows: l.ring_rows,
            acl: limits::MAX_ACL_ENTRIES,
            flows4: limits::flow_entries(l.flows4),
            flows6: limits::flow_entries(l.flows6),
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
        snat_port_min: *config.snat.ports.start(),
        snat_port_max: *config.snat.ports.end(),
        event_sample: config.event_sample,
        hz,
        default_drain: config.policy.drain,
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
        vips: floating_vips(config),
        snat_ports: Some(config.snat.ports.clone()),
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
    }
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
