//! What is believed of a store, and what its texts come to.

use std::path::Path;

use super::{cache, mirror::Mirror};
use crate::{
    config::Config,
    etcd::{Change, Key, Snapshot},
    source::Object,
};

fn node() -> Config {
    let text = "interfaces = [\"lo\"]\n[vips.web]\naddress = \"192.0.2.1\"\n";
    Config::parse(Path::new("weir.toml"), text).unwrap()
}

fn service(port: u16) -> String {
    format!("listen = [\"{port}/tcp\"]\n[[backends]]\naddress = \"10.0.0.1:80\"\n")
}

fn key(name: &str, created: i64, revision: i64, text: &str) -> Key {
    Key {
        name: format!("/weir/{name}"),
        text: text.into(),
        created,
        revision,
        lease: 0,
    }
}

fn snapshot(revision: i64, keys: &[Key]) -> Snapshot {
    Snapshot {
        cluster: 1,
        revision,
        keys: keys.to_vec(),
    }
}

fn delete(name: &str) -> Change {
    Change::Delete {
        name: format!("/weir/{name}"),
        revision: 99,
    }
}

/// `id port…` of every object, and its faults.
fn show(mirror: &mut Mirror) -> Vec<String> {
    let line = |object: &Object| {
        let ports: Vec<String> = object
            .services
            .iter()
            .map(|s| s.address.port.to_string())
            .collect();
        let faults: String = object.rejections.iter().map(|r| format!(" ({r})")).collect();
        format!("{} {}{faults}", object.id, ports.join(","))
    };
    mirror.outcome(&node()).objects.values().map(line).collect()
}

#[test]
fn a_faulty_text_is_named_and_leaves_the_last_good_one() {
    let mut mirror = Mirror::new("/weir");
    mirror.reset(snapshot(
        5,
        &[
            key("services/a", 2, 2, &service(80)),
            key("services/b", 3, 3, &service(81)),
        ],
    ));
    assert_eq!(show(&mut mirror), ["services/a 80", "services/b 81"]);

    for (revision, text) in [(6, "listen = [\"eighty\"]"), (7, "= not TOML at all")] {
        mirror.change(vec![Change::Put(key("services/a", 2, revision, text))]);
        let shown = show(&mut mirror);
        assert!(
            shown[0].starts_with("services/a 80 (etcd: /weir/services/a:1:"),
            "{shown:?}"
        );
        assert!(
            shown[0].contains("its text of revision 2 stays in force"),
            "{shown:?}"
        );
        assert_eq!(shown[1], "services/b 81");
    }
    // A full read and a start later it still does.
    let keys = [
        key("services/a", 2, 7, "= not TOML at all"),
        key("services/b", 3, 3, &service(81)),
    ];
    mirror.reset(snapshot(9, &keys));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("etcd.json");
    let recall = |root: &str| cache::recall(&path, |kept: &Mirror| kept.root() == root).unwrap();
    assert!(recall("/weir/").is_none());
    show(&mut mirror);
    cache::keep(&path, &mirror).unwrap();
    assert!(recall("/other/").is_none());
    let mut mirror = recall("/weir/").unwrap();
    assert!(show(&mut mirror)[0].starts_with("services/a 80 ("));

    mirror.change(vec![Change::Put(key("services/a", 2, 10, &service(82)))]);
    assert_eq!(show(&mut mirror), ["services/a 82", "services/b 81"]);
    // One that was never good does nothing.
    mirror.change(vec![Change::Put(key("services/c", 11, 11, "vip = \"no\""))]);
    let shown = show(&mut mirror);
    assert!(
        shown[2].starts_with("services/c  (") && shown[2].contains("does nothing"),
        "{shown:?}"
    );
}

#[test]
fn older_texts_are_asked_for_where_no_good_one_is_known() {
    let mut mirror = Mirror::new("/weir");
    let web = |revision, text: &str| key("services/web", 2, revision, text);
    mirror.reset(snapshot(
        9,
        &[web(9, "worst"), key("services/a", 3, 3, &service(81))],
    ));
    show(&mut mirror);
    assert_eq!(mirror.without_good(), [("/weir/services/web".to_owned(), 9)]);
    mirror.remember(web(7, "worse"));
    show(&mut mirror);
    assert_eq!(mirror.without_good(), [("/weir/services/web".to_owned(), 7)]);
    mirror.remember(web(4, &service(80)));
    assert!(
        show(&mut mirror)[1].contains("services/web 80 ("),
        "{:?}",
        show(&mut mirror)
    );
    assert!(show(&mut mirror)[1].contains("its text of revision 4 stays in force"));
    assert_eq!(mirror.without_good(), []);
}

#[test]
fn a_slip_in_a_keys_name_is_named() {
    let mut mirror = Mirror::new("/weir");
    let slip = key("service/a", 2, 2, &service(80));
    mirror.reset(snapshot(5, &[slip.clone(), key("nodes/n1/x", 3, 3, "")]));
    let shown = show(&mut mirror);
    assert!(
        shown.len() == 1 && shown[0].contains("/weir/service/a: is no key of Weir's"),
        "{shown:?}"
    );
    mirror.change(vec![delete("service/a")]);
    assert!(show(&mut mirror).is_empty() && mirror.held().is_none());
    mirror.change(vec![Change::Put(slip)]);
    assert_eq!(show(&mut mirror).len(), 1);
}

#[test]
fn the_older_key_has_the_address() {
    let mut mirror = Mirror::new("/weir");
    mirror.reset(snapshot(
        5,
        &[
            key("services/a", 4, 4, &service(80)),
            key("services/b", 3, 3, &service(80)),
        ],
    ));
    let shown = show(&mut mirror);
    assert!(
        shown[0].starts_with("services/a  (") && shown[0].contains("taken by /weir/services/b"),
        "{shown:?}"
    );
    assert_eq!(shown[1], "services/b 80");
    mirror.change(vec![delete("services/b")]);
    assert_eq!(show(&mut mirror), ["services/a 80"]);
}

#[test]
fn shared_vips_are_there_for_the_services_beside_them() {
    let mut mirror = Mirror::new("/weir");
    let text = format!("vip = \"more\"\n{}", service(80));
    let config = |revision, text: &str| key("config", 2, revision, text);
    mirror.reset(snapshot(
        5,
        &[
            config(2, "[vips.more]\naddress = \"192.0.2.2\"\n"),
            key("services/a", 3, 3, &text),
        ],
    ));
    assert_eq!(show(&mut mirror), ["services/a 80"]);
    let vip = mirror.outcome(&node()).objects["services/a"].services[0]
        .address
        .vip;
    assert_eq!(vip.to_string(), "192.0.2.2");
    // A faulty one changes nothing.
    mirror.change(vec![Change::Put(config(6, "[vips.more]\naddress = \"many\"\n"))]);
    let shown = show(&mut mirror);
    assert!(
        shown[0].contains("vips.more.address") && shown[0].contains("revision 2 stays"),
        "{shown:?}"
    );
    assert_eq!(shown[1], "services/a 80");
    // A good one without the VIP takes it away from the services.
    mirror.change(vec![Change::Put(config(7, ""))]);
    assert!(show(&mut mirror)[0].contains("`more` is not a configured VIP"));
}

#[test]
fn a_wiped_store_is_not_believed_before_config_is_back() {
    let (a, b) = (
        key("services/a", 2, 2, &service(80)),
        key("services/b", 3, 3, &service(81)),
    );
    let config = key("config", 1, 1, "");
    let both = ["services/a 80", "services/b 81"];

    // Without `config`: one by one is believed, the last is not.
    let mut mirror = Mirror::new("/weir");
    mirror.reset(snapshot(5, &[a.clone(), b.clone()]));
    mirror.change(vec![delete("services/b")]);
    assert_eq!((show(&mut mirror).len(), mirror.held()), (1, None));
    mirror.change(vec![delete("services/a")]);
    assert_eq!(show(&mut mirror), ["services/a 80"]);
    assert!(mirror.held().unwrap().contains("/weir/config"));
    // Something else turns up: it serves, the rest is still held.
    mirror.change(vec![Change::Put(b.clone())]);
    assert_eq!((show(&mut mirror).len(), mirror.held().is_some()), (2, true));
    mirror.change(vec![Change::Put(config.clone())]);
    assert_eq!(
        (show(&mut mirror), mirror.held()),
        (vec![both[1].to_owned()], None)
    );

    // With `config`: an empty list is believed as long as it is there.
    mirror.reset(snapshot(6, std::slice::from_ref(&config)));
    assert!(show(&mut mirror).is_empty());
    mirror.reset(snapshot(7, &[config.clone(), a.clone(), b.clone()]));
    // Another store: nothing in it, over a watch or by a full read, and again.
    let mut other = mirror.clone();
    other.change(vec![delete("config"), delete("services/a"), delete("services/b")]);
    mirror.reset(snapshot(1, &[]));
    mirror.reset(snapshot(1, &[]));
    for mirror in [&mut mirror, &mut other] {
        assert_eq!(show(mirror), both);
        assert!(mirror.held().unwrap().contains("3 deleted key(s)"));
        // Everything put back: there is nothing to hold.
        mirror.reset(snapshot(9, &[config.clone(), a.clone(), b.clone()]));
        assert_eq!(
            (show(mirror), mirror.held()),
            (both.map(String::from).to_vec(), None)
        );
        // `config` alone gone: services may go only after it is back.
        mirror.change(vec![delete("config"), delete("services/a")]);
        assert_eq!(show(mirror), both);
        mirror.change(vec![Change::Put(config.clone())]);
        assert_eq!(show(mirror), [both[1]]);
    }
}
