//! The configuration and the reports of one part of the agent, in the words of another. Pure, but for the clock.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Instant, SystemTime},
};

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
        snat_addresses: config.snat.addresses.clone(),
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
        snat_ports: Some(config.snat.ports.clone()),
    }
}

/// A sweep as the plan counts it. It began at a time of day, the plan thinks in instants.
pub(super) fn sweep(report: &SweepReport) -> Sweep {
    let ago = SystemTime::now()
        .duration_since(report.started)
        .unwrap_or(report.took);
    Sweep {
        started: Instant::now().checked_sub(ago),
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_sweep_keeps_its_start() {
        let report = SweepReport {
            started: SystemTime::now() - Duration::from_secs(5),
            took: Duration::from_secs(1),
            flows_by_backend: [(3, 7)].into(),
            flows_by_service: [(1, 7)].into(),
            total: 7,
            expired: 0,
        };
        let sweep = sweep(&report);
        let age = sweep.started.unwrap().elapsed();
        assert!(
            age >= Duration::from_secs(5) && age < Duration::from_secs(60),
            "{age:?}"
        );
        assert_eq!(sweep.flows, report.flows_by_backend);
    }
}
