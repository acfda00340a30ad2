//! Any labels of a container, a line each (`key=value`): the agent lives, and refusals say what to do.

#![no_main]

use std::{collections::BTreeMap, time::SystemTime};

use libfuzzer_sys::fuzz_target;
use weir::{
    config::{Announce, Policy, Vip},
    model::Protocol,
    source::{
        docker::container::{Container, NetworkMode, RunState},
        labels::{self, Site},
    },
};

fuzz_target!(|text: &str| {
    let pairs = text.lines().map(|line| line.split_once('=').unwrap_or((line, "")));
    let labels: BTreeMap<String, String> = pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    let container = Container {
        id: "0123456789abcdef".into(),
        name: "fuzz".into(),
        created: SystemTime::UNIX_EPOCH,
        started: SystemTime::UNIX_EPOCH,
        labels,
        state: RunState::Running,
        health: None,
        stop_signal: 15,
        stopping: false,
        network_mode: NetworkMode::Network("bridge".into()),
        networks: [("bridge".into(), vec![[172, 17, 0, 2].into()])].into(),
        exposed: [(80, Protocol::Tcp)].into(),
        published: BTreeMap::new(),
    };
    let policy = Policy {
        vips: vec![Vip {
            name: "web".into(),
            addresses: vec![[203, 0, 113, 10].into()],
            announce: Announce::None,
            node_address: false,
        }],
        ..Policy::default()
    };
    let Some(object) = labels::object(&container, &Site::default(), &policy) else {
        return;
    };
    for rejection in &object.rejections {
        assert!(!rejection.fault.is_empty() && !rejection.remedy.is_empty(), "{rejection:?}");
    }
    for route in &object.routes {
        assert!(!route.address.host.is_empty() && route.address.path.starts_with('/'), "{route:?}");
    }
});
