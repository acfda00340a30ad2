//! Nodes that publish their containers, and balancers that read them.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use ipnet::IpNet;

use super::Allowed;

/// How long a node's keys outlive whoever publishes them: three renewals, and time to try another endpoint in each.
pub(super) const DEFAULT_TTL: Duration = Duration::from_secs(15);
/// How long the containers of nodes stay that are lost together: nodes that lost etcd are back a few seconds after it.
pub(super) const DEFAULT_KEEP: Duration = Duration::from_secs(60);

/// `[node]`: this machine publishes its containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeConfig {
    /// Its name among nodes.
    pub name: String,
    /// Where balancers reach it; empty: the address that it reaches etcd from.
    pub addresses: Vec<IpAddr>,
    /// How long its keys outlive whoever publishes them; whole seconds.
    pub ttl: Duration,
    /// Whether its keys go when it is told to stop; else they are left to the next start, or to the lease's end.
    pub withdraw: bool,
}

/// `[nodes]`: this balancer reads what nodes publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodesConfig {
    /// How long the containers of lost nodes stay in force if more than half of all nodes are lost together.
    pub keep: Duration,
    /// What the containers of nodes may claim that have no rule of their own.
    pub allow: Allowed,
    /// Where nodes may be; `None`: anywhere.
    pub addresses: Option<Vec<IpNet>>,
    /// Rules of single nodes, by name.
    pub rules: BTreeMap<String, NodeRule>,
}

/// `[nodes.node.<name>]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRule {
    /// Whether the node is read at all.
    pub enabled: bool,
    /// What its containers may claim.
    pub allow: Allowed,
}

// === impl NodesConfig ===

impl NodesConfig {
    /// Whether this node is read.
    pub fn reads(&self, node: &str) -> bool {
        self.rules.get(node).is_none_or(|rule| rule.enabled)
    }

    /// What the containers of this node may claim.
    pub fn allowed(&self, node: &str) -> &Allowed {
        self.rules.get(node).map_or(&self.allow, |rule| &rule.allow)
    }

    /// Whether a node may be at this address.
    pub fn may_be_at(&self, address: IpAddr) -> bool {
        let inside = |all: &Vec<IpNet>| all.iter().any(|prefix| prefix.contains(&address));
        self.addresses.as_ref().is_none_or(inside)
    }
}

/// A name that can be part of a key, a metric and a table: that of a host, in any case.
pub fn is_node_name(text: &str) -> bool {
    let inner = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    let bytes = text.as_bytes();
    bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.iter().all(|c| inner(*c))
        && bytes.len() <= LONGEST_NAME
}

/// Longest name of a node: that of a host.
const LONGEST_NAME: usize = 253;
