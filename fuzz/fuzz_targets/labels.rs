//! Any labels of a container, a line each (`key=value`); a line that begins with `!` says what the container is, as `!host` or `!remote`.
//! The agent lives, refusals say what to do, and what is wished can be served.

#![no_main]

use std::{
    collections::{BTreeMap, BTreeSet},
    time::SystemTime,
};

use libfuzzer_sys::fuzz_target;
use weir::{
    config::{Announce, Policy, Vip},
    model::{Protocol, ServiceWish},
    route::RouteWish,
    source::{
        docker::container::{Container, Health, NetworkMode, Routing, RunState},
        labels::{self, Site},
    },
};
use weir_l7::table::host;

fuzz_target!(|text: &str| {
    let (facts, labels): (Vec<&str>, Vec<&str>) = text.lines().partition(|line| line.starts_with('!'));
    let is = |word: &str| facts.iter().any(|fact| fact[1..] == *word);
    let container = container(&labels, is);
    let policy = Policy {
        vips: vec![Vip {
            name: "web".into(),
            addresses: vec![
                [203, 0, 113, 10].into(),
                [0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10].into(),
            ],
            announce: Announce::None,
            node_address: false,
        }],
        ..Policy::default()
    };
    let site = Site {
        remote: is("remote"),
        node: if is("nowhere") {
            Vec::new()
        } else {
            vec![[192, 0, 2, 7].into()]
        },
        ..Site::default()
    };
    let Some(object) = labels::object(&container, &site, &policy) else {
        return;
    };
    assert_eq!(labels::object(&container, &site, &policy).as_ref(), Some(&object));
    for rejection in &object.rejections {
        assert!(
            !rejection.fault.is_empty() && !rejection.remedy.is_empty(),
            "{rejection:?}"
        );
        assert!(rejection.object.contains("label "), "{rejection:?}");
    }
    let services: BTreeSet<_> = object.services.iter().map(|wish| wish.address).collect();
    assert_eq!(services.len(), object.services.len(), "one address twice");
    object.services.iter().for_each(service);
    let routes: BTreeSet<_> = object.routes.iter().map(|wish| &wish.address).collect();
    assert_eq!(routes.len(), object.routes.len(), "one address twice");
    object.routes.iter().for_each(route);
});

fn container(labels: &[&str], is: impl Fn(&str) -> bool) -> Container {
    let pairs = labels
        .iter()
        .map(|line| line.split_once('=').unwrap_or((line, "")));
    let network = vec![[172, 17, 0, 2].into(), [0xfd00, 0, 0, 0, 0, 0, 0, 2].into()];
    let health = [
        ("starting", Health::Starting),
        ("healthy", Health::Healthy),
        ("unhealthy", Health::Unhealthy),
    ];
    Container {
        id: "0123456789abcdef".into(),
        name: "fuzz".into(),
        created: SystemTime::UNIX_EPOCH,
        started: SystemTime::UNIX_EPOCH,
        labels: pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
        state: if is("paused") {
            RunState::Paused
        } else {
            RunState::Running
        },
        health: health
            .into_iter()
            .find(|(word, _)| is(word))
            .map(|(_, health)| health),
        stop_signal: 15,
        stopping: is("stopping"),
        network_mode: match () {
            () if is("host") => NetworkMode::Host,
            () if is("none") => NetworkMode::None,
            () if is("container") => NetworkMode::Container("fedcba9876543210".into()),
            () => NetworkMode::Network("bridge".into()),
        },
        routing: Routing::default(),
        networks: if is("alone") {
            BTreeMap::new()
        } else {
            [("bridge".into(), network)].into()
        },
        exposed: match is("many") {
            true => [(80, Protocol::Tcp), (443, Protocol::Tcp), (53, Protocol::Udp)].into(),
            false => [(80, Protocol::Tcp)].into(),
        },
        published: match is("published") {
            true => [((80, Protocol::Tcp), vec![([0, 0, 0, 0], 18080).into()])].into(),
            false => BTreeMap::new(),
        },
    }
}

fn service(wish: &ServiceWish) {
    let ServiceWish {
        name,
        address,
        backends,
        ..
    } = wish;
    assert!(!name.is_empty() && !backends.is_empty(), "{wish:?}");
    for backend in backends {
        assert_eq!(backend.address.is_ipv4(), address.vip.is_ipv4(), "{wish:?}");
        assert!(backend.address.port() != 0 || address.port == 0, "{wish:?}");
    }
}

/// The shim's table can find it.
fn route(wish: &RouteWish) {
    let (host, path) = (&wish.address.host, &wish.address.path);
    let name = host.strip_prefix("*.").unwrap_or(host);
    assert!(
        host == "*" || host::normal(name).as_deref() == Some(name),
        "{wish:?}"
    );
    assert!(
        path == "/" || (path.starts_with('/') && !path.ends_with('/')),
        "{wish:?}"
    );
    assert!(wish.upstream.address.port() != 0, "{wish:?}");
}
