//! Any keys of nodes: the balancer lives, what it tells when something changes is all that has changed, and what it takes for a container
//! becomes wishes and refusals.
//!
//! A line each: `key<tab>text` puts a key and `key` alone deletes it, all at one revision until an empty line; `+30` lets 30 seconds pass,
//! `=1` reads the store of cluster 1 anew, `-` empties the store without a word.

#![no_main]

use std::{collections::BTreeMap, time::Duration};

use libfuzzer_sys::fuzz_target;
use tokio::time::Instant;
use weir::{
    config::{Announce, Policy, Vip},
    etcd::{Change, Key, Snapshot},
    node::facts::Facts,
    source::{
        labels::{self, Site},
        nodes::registry::{Node, Registry},
    },
};

const KEEP: Duration = Duration::from_secs(60);

/// A balancer, the store that it hears, and who hears the balancer.
struct World {
    registry: Registry,
    now: Instant,
    revision: i64,
    store: BTreeMap<String, Key>,
    changes: Vec<Change>,
    heard: BTreeMap<String, Told>,
}

/// What is known of a node by its balancer's words.
#[derive(Debug, Default, PartialEq)]
struct Told {
    is_lost: bool,
    is_in_force: bool,
    about: Option<String>,
    fault: Option<String>,
    containers: BTreeMap<String, Container>,
}

/// Good text and fault.
type Container = (Option<Facts>, Option<String>);

fuzz_target!(|text: &str| {
    let mut world = World {
        registry: Registry::new("/weir"),
        now: Instant::now(),
        revision: 1,
        store: BTreeMap::new(),
        changes: Vec::new(),
        heard: BTreeMap::new(),
    };
    for line in text.lines() {
        world.take(line);
    }
    world.change();
    let kept = serde_json::to_vec(&world.registry).expect("a registry can be kept");
    let kept: Registry = serde_json::from_slice(&kept).expect("what was kept can be read");
    world.registry = kept.recalled();
    world.heard.clear();
    world.hear(|node| node.is_in_force());
    world.read(1);
});

impl World {
    fn take(&mut self, line: &str) {
        let name = |name: &str| format!("/weir/nodes/{name}");
        match (line.split_at_checked(1), line.split_once('\t')) {
            (None, _) => self.revision += 1,
            (Some(("-", _)), _) => self.store.clear(),
            (Some(("+", seconds)), _) => {
                self.change();
                self.now += Duration::from_secs(seconds.parse::<u8>().unwrap_or(1).into());
                self.registry.settle(self.now, KEEP);
                self.hear(|_| true);
            }
            (Some(("=", cluster)), _) => {
                self.change();
                self.read(cluster.parse::<u8>().unwrap_or(1));
            }
            (_, Some((key, text))) => {
                let key = Key {
                    name: name(key),
                    text: text.to_owned(),
                    created: self.revision,
                    revision: self.revision,
                    lease: 1,
                };
                self.store.insert(key.name.clone(), key.clone());
                self.changes.push(Change::Put(key));
            }
            (_, None) => {
                self.store.remove(&name(line));
                self.changes.push(Change::Delete {
                    name: name(line),
                    revision: self.revision,
                });
            }
        }
    }

    fn change(&mut self) {
        self.revision += 1;
        self.registry
            .change(std::mem::take(&mut self.changes), self.now, KEEP);
        self.hear(|_| true);
    }

    fn read(&mut self, cluster: u8) {
        let snapshot = Snapshot {
            cluster: cluster.into(),
            revision: self.revision,
            keys: self.store.values().cloned().collect(),
        };
        self.registry.reset(snapshot, self.now, KEEP);
        self.hear(|_| true);
    }

    /// Takes over what is told; what is known then is what there is, of these nodes.
    fn hear(&mut self, of: impl Fn(&Node) -> bool) {
        let dirty = self.registry.take_dirty();
        for name in &dirty.forgotten {
            assert!(self.registry.node(name).is_none());
            self.heard.remove(name);
        }
        for name in &dirty.nodes {
            if let Some(node) = self.registry.node(name) {
                self.heard.insert(name.clone(), told(node));
            }
        }
        for (name, id) in &dirty.containers {
            let Some(node) = self.registry.node(name) else {
                continue;
            };
            let heard = self.heard.entry(name.clone()).or_default();
            match told(node).containers.remove(id) {
                Some(container) => _ = heard.containers.insert(id.clone(), container),
                None => _ = heard.containers.remove(id),
            }
        }
        for (name, heard) in &self.heard {
            assert!(
                self.registry.node(name).is_some() || *heard == Told::default(),
                "{name}: {heard:?} is gone"
            );
        }
        for name in self.registry.names() {
            let Some(node) = self.registry.node(name).filter(|node| of(node)) else {
                continue;
            };
            let heard = self.heard.get(name);
            assert_eq!(heard.unwrap_or(&Told::default()), &told(node), "{name}");
            judge(name, node);
        }
    }
}

fn told(node: &Node) -> Told {
    let in_force = node.containers.iter().filter(|_| node.is_in_force());
    Told {
        is_lost: node.is_lost(),
        is_in_force: node.is_in_force(),
        about: node.about.as_ref().map(|about| format!("{about:?}")),
        fault: node.fault.clone(),
        containers: in_force
            .map(|(id, entry)| (id.clone(), (entry.facts.clone(), entry.fault.clone())))
            .collect(),
    }
}

/// Everything that is known becomes wishes.
fn judge(name: &str, node: &Node) {
    let policy = Policy {
        vips: vec![Vip {
            name: "web".into(),
            addresses: vec![[203, 0, 113, 10].into()],
            announce: Announce::None,
            node_address: false,
        }],
        ..Policy::default()
    };
    let site = Site {
        source: format!("node:{name}"),
        remote: true,
        node: node
            .about
            .iter()
            .flat_map(|about| about.addresses.clone())
            .collect(),
        ..Site::default()
    };
    for (id, entry) in &node.containers {
        let Some(facts) = &entry.facts else { continue };
        let container = facts.container(id, &site.node);
        let Some(object) = labels::object(&container, &site, &policy) else {
            continue;
        };
        for rejection in &object.rejections {
            assert!(
                !rejection.fault.is_empty() && !rejection.remedy.is_empty(),
                "{rejection:?}"
            );
        }
        let services = object
            .services
            .iter()
            .flat_map(|wish| wish.backends.iter().map(|backend| (backend, wish.address.port)));
        let routes = object
            .routes
            .iter()
            .map(|wish| (&wish.upstream, wish.upstream.address.port()));
        for (backend, port) in services {
            assert!(
                backend.address.port() != 0 || port == 0,
                "{backend:?} has no port"
            );
            assert!(
                site.node.contains(&backend.address.ip()),
                "{backend:?} is not at {:?}",
                site.node
            );
        }
        for (backend, port) in routes {
            assert!(port != 0, "{backend:?} has no port");
            assert!(
                site.node.contains(&backend.address.ip()),
                "{backend:?} is not at {:?}",
                site.node
            );
        }
    }
}
