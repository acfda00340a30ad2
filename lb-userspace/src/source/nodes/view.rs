//! A node as a balancer sees it: its facts under the balancer's own rules. Pure.

use std::{net::IpAddr, time::SystemTime};

use super::{
    SOURCE,
    registry::{Entry, Node, Registry},
};
use crate::{
    config::{Allowed, Config, NodesConfig, value},
    model::Rejection,
    source::{
        Object,
        labels::{self, Site},
    },
};

/// Id of the object that has the faults of a node's own key; no container has it, as a slash ends its key.
const OWN: &str = "/node";
/// So many addresses of a node count: one of each family is used, and each that is refused has a line in the status.
const ADDRESSES: usize = 16;
/// So many keys that mean nothing are told by name: whoever fills etcd with them shall not fill the status, too.
pub(super) const STRANGERS: usize = 100;

/// The name of a node as a source.
pub(super) fn source(node: &str) -> String {
    format!("node:{node}")
}

/// A node as this balancer sees it.
pub(super) struct View<'n> {
    node: &'n Node,
    config: &'n Config,
    pub(super) site: Site,
    rejections: Vec<Rejection>,
    /// Its containers may serve.
    serves: bool,
}

// === impl View ===

impl<'n> View<'n> {
    pub(super) fn new(name: &str, node: &'n Node, config: &'n Config) -> Self {
        let mut view = Self {
            node,
            config,
            site: Site {
                source: source(name),
                remote: true,
                node: Vec::new(),
                allow: Allowed::default(),
                rp_filter: [0; 2],
            },
            rejections: Vec::new(),
            serves: false,
        };
        let Some(nodes) = config.nodes.as_ref().filter(|nodes| nodes.reads(name)) else {
            return view;
        };
        view.serves = node.is_in_force();
        view.site.allow = nodes.allowed(name).clone();
        if let Some(fault) = &node.fault {
            let known = match node.about {
                Some(_) => "; its last good word stays in force",
                None => "",
            };
            view.refuse(
                format!("cannot be read: {fault}"),
                format!("restart `weir node` on that machine, of this version{known}"),
            );
        }
        let addresses = node.about.iter().flat_map(|about| &about.addresses);
        let more = addresses.clone().count().saturating_sub(ADDRESSES);
        if more > 0 {
            view.refuse(
                format!("has {more} addresses more than the {ADDRESSES} that count"),
                "set `node.addresses` on that machine: one of each family will do".into(),
            );
        }
        for address in addresses.take(ADDRESSES) {
            match unfit(*address, nodes, config) {
                None => view.site.node.push(*address),
                Some((fault, remedy)) => view.refuse(format!("address {address}: {fault}"), remedy.into()),
            }
        }
        view
    }

    fn refuse(&mut self, fault: String, remedy: String) {
        self.rejections.push(Rejection {
            source: self.site.source.clone(),
            object: "the node's own key".into(),
            fault,
            remedy,
        });
    }

    /// Everything of it, its own faults too.
    pub(super) fn objects(&self) -> Vec<Object> {
        let containers = self.node.containers.iter();
        let mut objects: Vec<Object> = containers
            .filter_map(|(id, entry)| self.object(id, entry))
            .collect();
        if !self.rejections.is_empty() {
            objects.push(object(OWN, self.rejections.clone()));
        }
        objects
    }

    /// What one container wishes, and what of it is refused.
    pub(super) fn object(&self, id: &str, entry: &Entry) -> Option<Object> {
        if !self.serves {
            return None;
        }
        let container = entry
            .facts
            .as_ref()
            .map(|facts| facts.container(id, &self.site.node));
        let wished =
            container.and_then(|container| labels::object(&container, &self.site, &self.config.policy));
        let Some(fault) = &entry.fault else {
            return wished;
        };
        let stays = match &wished {
            Some(_) => "; what it said before stays in force",
            None => "",
        };
        let rejection = Rejection {
            source: self.site.source.clone(),
            object: format!("container {id}"),
            fault: format!("its key {fault}"),
            remedy: format!("restart `weir node` on that machine, of this version{stays}"),
        };
        let mut wished = wished.unwrap_or_else(|| object(id, Vec::new()));
        wished.rejections.push(rejection);
        Some(wished)
    }
}

/// Why a node may not be at an address, and what to do about it.
fn unfit(address: IpAddr, nodes: &NodesConfig, config: &Config) -> Option<(&'static str, &'static str)> {
    let own_vip = || {
        let mut vips = config.policy.vips.iter();
        vips.any(|vip| !vip.node_address && vip.addresses.contains(&address))
    };
    if !value::is_unicast(address) || address.is_loopback() {
        Some((
            "cannot be reached from another machine",
            "set `node.addresses` on that machine",
        ))
    } else if own_vip() {
        Some((
            "is a VIP",
            "set `node.addresses` on that machine to addresses of its own",
        ))
    } else if !nodes.may_be_at(address) {
        Some((
            "is not one that nodes may have",
            "correct it on that machine, or `nodes.allow-addresses` here",
        ))
    } else {
        None
    }
}

/// The keys that mean nothing, as an object of the connection.
pub(super) fn strangers(registry: &Registry) -> Option<Object> {
    let root = registry.root();
    let rejection = |key: &String| Rejection {
        source: SOURCE.into(),
        object: key.clone(),
        fault: "is no key of a node's".into(),
        remedy: format!("only `weir node` writes below {root}: delete it"),
    };
    let mut rejections: Vec<_> = registry.strange.iter().take(STRANGERS).map(rejection).collect();
    if let Some(more @ 1..) = registry.strange.len().checked_sub(STRANGERS) {
        rejections.push(rejection(&format!("each of {more} more")));
    }
    (!rejections.is_empty()).then(|| object(root, rejections))
}

/// An object that wishes nothing.
fn object(id: &str, rejections: Vec<Rejection>) -> Object {
    Object {
        id: id.to_owned(),
        name: id.to_owned(),
        created: SystemTime::UNIX_EPOCH,
        services: Vec::new(),
        routes: Vec::new(),
        rejections,
    }
}
