//! Any keys of nodes, a line each (`key<tab>text`; without a text the key is gone; an empty line ends a revision): the balancer
//! lives, and what it takes for a container becomes wishes and refusals.

#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tokio::time::Instant;
use weir::{
    config::{Announce, Policy, Vip},
    etcd::{Change, Key, Snapshot},
    source::{
        labels::{self, Site},
        nodes::registry::Registry,
    },
};

const KEEP: Duration = Duration::from_secs(60);

fuzz_target!(|text: &str| {
    let mut registry = Registry::new("/weir");
    let mut revision = 1;
    let mut changes = Vec::new();
    let now = Instant::now();
    for line in text.lines() {
        let key = |name: &str, text: &str| Key {
            name: format!("/weir/nodes/{name}"),
            text: text.to_owned(),
            created: revision,
            revision,
            lease: 1,
        };
        match line.split_once('\t') {
            _ if line.is_empty() => revision += 1,
            Some((name, text)) => changes.push(Change::Put(key(name, text))),
            None => changes.push(Change::Delete {
                name: key(line, "").name,
                revision,
            }),
        }
    }
    let puts = changes.iter().filter_map(|change| match change {
        Change::Put(key) => Some(key.clone()),
        Change::Delete { .. } => None,
    });
    let snapshot = Snapshot {
        cluster: 1,
        revision: 1,
        keys: puts.collect(),
    };
    registry.change(changes, now, KEEP);
    judge(&mut registry);
    registry.settle(now + KEEP, KEEP);
    registry.reset(snapshot, now + KEEP, KEEP);
    judge(&mut registry);
    let kept = serde_json::to_vec(&registry).expect("a registry can be kept");
    let mut kept: Registry = serde_json::from_slice(&kept).expect("what was kept can be read");
    kept = kept.recalled();
    judge(&mut kept);
});

/// Everything that is known becomes wishes.
fn judge(registry: &mut Registry) {
    let _told = registry.take_dirty();
    let policy = Policy {
        vips: vec![Vip {
            name: "web".into(),
            addresses: vec![[203, 0, 113, 10].into()],
            announce: Announce::None,
            node_address: false,
        }],
        ..Policy::default()
    };
    let names: Vec<String> = registry.names().cloned().collect();
    for name in names {
        let Some(node) = registry.node(&name) else { continue };
        let site = Site {
            source: format!("node:{name}"),
            remote: true,
            node: node.about.iter().flat_map(|about| about.addresses.clone()).collect(),
            ..Site::default()
        };
        for (id, entry) in &node.containers {
            let Some(facts) = &entry.facts else { continue };
            let container = facts.container(id, &site.node);
            let Some(object) = labels::object(&container, &site, &policy) else {
                continue;
            };
            for rejection in &object.rejections {
                assert!(!rejection.fault.is_empty() && !rejection.remedy.is_empty(), "{rejection:?}");
            }
            for backend in object.services.iter().flat_map(|wish| &wish.backends) {
                assert!(site.node.contains(&backend.address.ip()), "{backend:?} is not at {:?}", site.node);
            }
        }
    }
}
