//! What is believed of nodes, and what their containers come to.

use std::path::Path;

use super::*;
use crate::{
    etcd::{Change, Key, Snapshot},
    node::facts::{About, Facts},
    source::{docker::container::NetworkMode, labels::tests::container},
};

const KEEP: Duration = Duration::from_secs(60);

fn config(nodes: &str) -> Config {
    let text = format!(
        "interfaces = [\"lo\"]\n[vips.web]\naddress = \"198.51.100.1\"\n[etcd]\nendpoints = \"http://[::1]:1\"\n[nodes]\n{nodes}"
    );
    Config::parse(Path::new("weir.toml"), &text).unwrap()
}

fn key(name: &str, text: &str) -> Key {
    Key {
        name: format!("/weir/nodes/{name}"),
        text: text.into(),
        created: 1,
        revision: 1,
        lease: 7,
    }
}

fn about(node: u8) -> Key {
    let about = About {
        addresses: vec![[192, 0, 2, node].into()],
        version: String::new(),
        boot: String::new(),
        ttl_s: 15,
        fault: None,
    };
    key(&format!("n{node}/node"), &serde_json::to_string(&about).unwrap())
}

/// A container with a label of service `web`, in the node's own network.
fn web(node: u8, id: &str) -> Key {
    let mut container = container(&[("weir.service.web.listen", "80/tcp")]);
    container.network_mode = NetworkMode::Host;
    let facts = serde_json::to_string(&Facts::of(&container).unwrap()).unwrap();
    key(&format!("n{node}/containers/{id}"), &facts)
}

/// A node with one container.
fn node(number: u8) -> [Key; 2] {
    [web(number, "c1"), about(number)]
}

fn at(revision: i64, changes: Vec<Change>) -> Vec<Change> {
    let dated = |change| match change {
        Change::Put(key) => Change::Put(Key { revision, ..key }),
        Change::Delete { name, .. } => Change::Delete { name, revision },
    };
    changes.into_iter().map(dated).collect()
}

fn gone(keys: impl IntoIterator<Item = Key>) -> Vec<Change> {
    let gone = |key: Key| Change::Delete {
        name: key.name,
        revision: 0,
    };
    keys.into_iter().map(gone).collect()
}

fn snapshot(cluster: u64, revision: i64, keys: impl IntoIterator<Item = Key>) -> Snapshot {
    Snapshot {
        cluster,
        revision,
        keys: keys.into_iter().collect(),
    }
}

/// So many nodes.
fn registry(nodes: u8, now: Instant) -> Registry {
    let mut registry = Registry::new("/weir");
    registry.reset(snapshot(1, 10, (1..=nodes).flat_map(node)), now, KEEP);
    registry
}

/// Backends in force, `node container address`, and faults.
fn show(registry: &Registry, config: &Config) -> Vec<String> {
    let nodes = registry
        .names()
        .filter_map(|name| Some((name, registry.node(name)?)));
    let mut lines = Vec::new();
    for (name, node) in nodes {
        for object in View::new(name, node, config).objects() {
            let backends = object.services.iter().flat_map(|wish| &wish.backends);
            lines.extend(backends.map(|backend| format!("{name} {} {}", object.id, backend.address)));
            lines.extend(object.rejections.iter().map(ToString::to_string));
        }
    }
    lines
}

fn serving(registry: &Registry) -> usize {
    show(registry, &config("")).len()
}

#[test]
fn one_lost_node_drains_at_once_and_comes_back() {
    let now = Instant::now();
    let mut registry = registry(3, now);
    assert_eq!(
        show(&registry, &config("")),
        ["n1 c1 192.0.2.1:80", "n2 c1 192.0.2.2:80", "n3 c1 192.0.2.3:80"].map(|l| l.replace(":80", ":8080"))
    );
    registry.take_dirty();
    registry.change(at(11, gone(node(2))), now, KEEP);
    assert_eq!(serving(&registry), 2);
    let dirty = registry.take_dirty();
    assert_eq!(dirty.nodes, ["n2".to_owned()].into());
    assert_eq!(dirty.containers.len(), 0, "the node says it all");
    // It writes its own key last; a container that it has no more is not there then.
    registry.change(at(12, vec![Change::Put(web(2, "c2"))]), now, KEEP);
    assert_eq!(serving(&registry), 2);
    registry.change(at(13, vec![Change::Put(about(2))]), now, KEEP);
    assert_eq!(show(&registry, &config(""))[1], "n2 c2 192.0.2.2:8080");
    // One that never comes back is forgotten.
    registry.change(at(14, gone([web(2, "c2"), about(2)])), now, KEEP);
    assert_eq!(registry.due(KEEP), Some(now + KEEP));
    registry.settle(now + KEEP, KEEP);
    assert_eq!(registry.take_dirty().forgotten, ["n2".to_owned()].into());
    assert_eq!((registry.names().count(), registry.due(KEEP)), (2, None));
}

#[test]
fn a_container_that_its_node_withdraws_is_gone_at_once_even_the_last() {
    let now = Instant::now();
    let mut registry = registry(1, now);
    registry.take_dirty();
    registry.change(at(11, gone([web(1, "c1")])), now, KEEP);
    assert_eq!(serving(&registry), 0);
    assert_eq!(
        registry.take_dirty().containers,
        [("n1".to_owned(), "c1".to_owned())].into()
    );
    registry.change(at(12, gone([about(1)])), now, KEEP);
    assert_eq!(serving(&registry), 0);
}

#[test]
fn nodes_lost_together_stay_for_a_time() {
    let now = Instant::now();
    let mut registry = registry(5, now);
    // One lease after the other ends: the first ones drain, and serve again when it turns out to be most of them.
    let second = Duration::from_secs(1);
    for lost in 1..=5u8 {
        let at_time = now + second * u32::from(lost);
        registry.change(at(10 + i64::from(lost), gone(node(lost))), at_time, KEEP);
        let want = if lost <= 2 { 5 - usize::from(lost) } else { 5 };
        assert_eq!(serving(&registry), want, "{lost} are lost");
        assert_eq!(registry.held().is_some(), lost > 2);
    }
    // Three come back, one without its container: the rest is believed to be lost.
    registry.change(at(21, vec![Change::Put(about(1))]), now + 9 * second, KEEP);
    for back in 2..=3 {
        let changes = node(back).map(Change::Put).into();
        registry.change(at(22, changes), now + 9 * second, KEEP);
    }
    assert_eq!(serving(&registry), 2);
    assert_eq!(registry.held(), None);
}

#[test]
fn nodes_that_do_not_come_back_drain_when_the_time_is_over() {
    let now = Instant::now();
    let mut registry = registry(2, now);
    registry.change(at(11, gone((1..=2).flat_map(node))), now, KEEP);
    assert_eq!(serving(&registry), 2);
    registry.settle(now + KEEP - Duration::from_millis(1), KEEP);
    assert_eq!(serving(&registry), 2);
    registry.settle(now + KEEP, KEEP);
    assert_eq!((serving(&registry), registry.names().count()), (0, 0));
}

#[test]
fn changes_of_several_revisions_in_one_message_are_taken_in_order() {
    let now = Instant::now();
    let mut registry = registry(3, now);
    let mut changes = at(11, vec![Change::Put(about(1))]);
    changes.extend(at(12, gone(node(1))));
    registry.change(changes, now, KEEP);
    assert_eq!(serving(&registry), 2);
    let mut changes = at(13, node(1).map(Change::Put).into());
    changes.extend(at(14, gone([web(1, "c1")])));
    changes.extend(at(15, vec![Change::Put(web(1, "c9"))]));
    registry.change(changes, now, KEEP);
    assert_eq!(show(&registry, &config(""))[0], "n1 c9 192.0.2.1:8080");
}

#[test]
fn a_wiped_store_takes_nothing_away_until_half_of_the_nodes_are_in_it() {
    let now = Instant::now();
    for (cluster, revision) in [(2, 1), (1, 3)] {
        let mut registry = registry(4, now);
        registry.reset(snapshot(cluster, revision, []), now, KEEP);
        assert_eq!((serving(&registry), registry.due(KEEP)), (4, None));
        assert!(registry.held().is_some_and(|why| why.contains("wiped")));
        registry.settle(now + 1000 * KEEP, KEEP);
        assert_eq!(serving(&registry), 4, "for ever");
        registry.change(at(4, node(1).map(Change::Put).into()), now, KEEP);
        assert_eq!(serving(&registry), 4);
        registry.change(at(5, node(2).map(Change::Put).into()), now, KEEP);
        assert_eq!((serving(&registry), registry.held()), (2, None));
    }
    // The same store, read anew after a loss of the connection: one node has gone meanwhile.
    let mut registry = registry(4, now);
    registry.reset(snapshot(1, 30, (2..=4).flat_map(node)), now, KEEP);
    assert_eq!(serving(&registry), 3);
}

#[test]
fn what_was_in_force_comes_back_from_the_cache() {
    let now = Instant::now();
    let mut before = registry(3, now);
    before.change(at(11, gone(node(3))), now, KEEP);
    let text = serde_json::to_vec(&before).unwrap();
    let mut after = serde_json::from_slice::<Registry>(&text).unwrap().recalled();
    assert_eq!(serving(&after), 2);
    assert_eq!(after.take_dirty().nodes.len(), 2);
    // The present is what counts then, and a store that was wiped meanwhile is found out.
    after.reset(snapshot(2, 1, []), now, KEEP);
    assert_eq!(serving(&after), 2);
    assert!(after.held().is_some());
}

#[test]
fn a_bad_key_refuses_one_object() {
    let now = Instant::now();
    let mut registry = registry(2, now);
    registry.change(
        vec![
            Change::Put(key("n1/containers/c1", "{}")),
            Change::Put(key("n1/containers/c2", "nonsense")),
            Change::Put(key("n2/node", "nonsense")),
            Change::Put(key("n2/colour", "red")),
            Change::Put(key("a b/node", "")),
        ],
        now,
        KEEP,
    );
    let shown = show(&registry, &config(""));
    assert_eq!(shown.len(), 5, "{shown:#?}");
    assert_eq!(shown[0], "n1 c1 192.0.2.1:8080");
    assert!(
        shown[1].starts_with("node:n1: container c1: its key cannot be read: missing field")
            && shown[1].ends_with("stays in force"),
        "{shown:#?}"
    );
    assert!(shown[2].starts_with("node:n1: container c2"), "{shown:#?}");
    assert_eq!(shown[3], "n2 c1 192.0.2.2:8080");
    assert!(
        shown[4].contains("its last good word stays in force"),
        "{shown:#?}"
    );
    assert_eq!(registry.strange.len(), 2);
    registry.change(at(12, gone([key("n2/colour", "")])), now, KEEP);
    assert_eq!(registry.strange.len(), 1);
}

#[test]
fn nodes_claim_what_this_balancer_allows() {
    let now = Instant::now();
    let registry = registry(2, now);
    let rules = "allow-services = [\"other\"]\n[nodes.node.n1]\nallow-services = [\"web\"]\n";
    let shown = show(&registry, &config(rules));
    assert_eq!(shown[0], "n1 c1 192.0.2.1:8080");
    assert!(
        shown[1].contains("`node:n2` may not claim a service named `web`"),
        "{shown:#?}"
    );
    let shown = show(&registry, &config("[nodes.node.n1]\nenabled = false\n"));
    assert_eq!(shown, ["n2 c1 192.0.2.2:8080"]);
    let shown = show(&registry, &config("allow-addresses = [\"192.0.2.2\"]\n"));
    assert_eq!(shown.len(), 3, "{shown:#?}");
    assert!(
        shown[1].contains("address 192.0.2.1: is not one that nodes may have"),
        "{shown:#?}"
    );
}

#[test]
fn keys_that_mean_nothing_do_not_fill_the_status() {
    let now = Instant::now();
    let mut registry = registry(1, now);
    assert_eq!(view::strangers(&registry), None);
    let strange = |i: usize| Change::Put(key(&format!("x/{i:03}"), "?"));
    registry.change(at(9, (0..view::STRANGERS).map(strange).collect()), now, KEEP);
    let told = view::strangers(&registry).unwrap().rejections;
    assert_eq!(told.len(), view::STRANGERS);
    assert_eq!(told[1].object, "/weir/nodes/x/001");
    registry.change(at(10, (0..view::STRANGERS + 7).map(strange).collect()), now, KEEP);
    let told = view::strangers(&registry).unwrap().rejections;
    assert_eq!(told.len(), view::STRANGERS + 1);
    assert_eq!(told.last().unwrap().object, "each of 7 more");
}

#[test]
fn a_node_with_very_many_addresses_is_told_once() {
    let now = Instant::now();
    let mut registry = registry(1, now);
    let many: Vec<String> = (0..999).map(|i| format!("\"192.0.2.{}\"", i % 250 + 1)).collect();
    let about = key("n1/node", &format!("{{\"addresses\":[{}]}}", many.join(",")));
    registry.change(at(9, vec![Change::Put(about)]), now, KEEP);
    let config = config("");
    let view = View::new("n1", registry.node("n1").unwrap(), &config);
    assert_eq!(view.site.node.len(), 16);
    let own = view
        .objects()
        .into_iter()
        .find(|object| object.id == "/node")
        .unwrap();
    let [rejection] = own.rejections.as_slice() else {
        panic!("{:?}", own.rejections);
    };
    assert!(
        rejection.to_string().contains("983 addresses more than the 16"),
        "{rejection}"
    );
}
