//! Contradictions and merging: see also the scripts of `tests/control`.

use super::*;
use crate::model::{Protocol, ServiceSettings};

fn object(id: &str, age: u64, affinity: bool) -> Object {
    let wish = ServiceWish {
        name: "web".into(),
        address: ServiceAddress {
            vip: [203, 0, 113, 1].into(),
            port: 80,
            protocol: Protocol::Tcp,
        },
        settings: ServiceSettings {
            client_ip_affinity: affinity,
            ..ServiceSettings::default()
        },
        backends: vec![Backend {
            address: ([10, 0, 0, age as u8], 80).into(),
            weight: 1,
            state: BackendState::Active,
            reason: String::new(),
            drain: std::time::Duration::ZERO,
            name: id.into(),
            check: None,
        }],
    };
    Object {
        id: id.into(),
        name: id.into(),
        created: SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(age),
        services: vec![wish],
        routes: Vec::new(),
        rejections: Vec::new(),
    }
}

fn hear(heard: &mut Heard, source: &str, update: Update) -> BTreeSet<ServiceAddress> {
    heard.absorb(Message {
        source: SourceId(source.into()),
        update,
    });
    heard.refresh(SystemTime::UNIX_EPOCH)
}

#[test]
fn the_order_of_hearing_does_not_matter() {
    let objects = [object("a", 1, true), object("b", 2, false), object("c", 3, true)];
    let mut forward = Heard::default();
    let mut backward = Heard::default();
    for object in &objects {
        hear(&mut forward, "docker", Update::Put(object.clone()));
    }
    for object in objects.iter().rev() {
        hear(&mut backward, "docker", Update::Put(object.clone()));
    }
    assert_eq!(forward.desired(), backward.desired());
    assert_eq!(forward.rejections().len(), 1);
    assert_eq!(
        forward
            .desired()
            .services
            .values()
            .next()
            .unwrap()
            .service
            .backends
            .len(),
        2
    );
}

#[test]
fn what_is_heard_again_changes_nothing() {
    let mut heard = Heard::default();
    assert_eq!(
        hear(&mut heard, "docker", Update::Put(object("a", 1, true))).len(),
        1
    );
    assert!(hear(&mut heard, "docker", Update::Reset(vec![object("a", 1, true)])).is_empty());
    assert_eq!(hear(&mut heard, "docker", Update::Reset(Vec::new())).len(), 1);
    assert!(heard.desired().services.is_empty());
    let ip = [10, 0, 0, 1].into();
    assert!(!heard.has_backend_at(ip));
    assert_eq!(heard.take_touched(), [ip].into());
}

#[test]
fn a_source_that_ends_takes_its_objects_and_its_name_along() {
    let mut heard = Heard::default();
    hear(&mut heard, "node:n1", Update::Put(object("a", 1, true)));
    hear(&mut heard, "node:n2", Update::Put(object("b", 2, true)));
    assert_eq!(hear(&mut heard, "node:n1", Update::End).len(), 1);
    let names: Vec<String> = heard.sources().into_iter().map(|source| source.name).collect();
    assert_eq!(names, ["node:n2"]);
    let services = &heard.desired().services;
    assert_eq!(services.values().next().unwrap().service.backends.len(), 1);
}
