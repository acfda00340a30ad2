//! Contradictions and merging: see also the scripts of `tests/control`.

use std::time::Duration;

use super::*;
use crate::model::{Attachment, Protocol, ServiceSettings};

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
            drain: Duration::ZERO,
            name: id.into(),
            check: None,
            attachment: Attachment::Address,
        }],
    };
    Object {
        id: id.into(),
        name: id.into(),
        created: SystemTime::UNIX_EPOCH + Duration::from_secs(age),
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

const TERM: Duration = Duration::from_secs(600);

fn day(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn remembering() -> Heard {
    let mut heard = Heard::default();
    let vips = [[203, 0, 113, 1].into()].into();
    heard.set_retention(Retention { term: TERM, vips }, day(0));
    heard
}

fn update(heard: &mut Heard, source: &str, update: Update, today: SystemTime) {
    heard.absorb(Message {
        source: SourceId(source.into()),
        update,
    });
    heard.refresh(today);
}

/// Name, client-IP affinity, backends and end of the only service; `None`: there is none.
fn only(heard: &Heard) -> Option<(String, bool, usize, Option<SystemTime>)> {
    let wanted = heard.desired().services.values().next()?;
    let service = &wanted.service;
    let affinity = service.settings.client_ip_affinity;
    Some((
        service.name.clone(),
        affinity,
        service.backends.len(),
        wanted.kept_until,
    ))
}

#[test]
fn a_service_outlives_its_last_container_with_its_settings() {
    let mut heard = remembering();
    update(&mut heard, "docker", Update::Put(object("a", 1, true)), day(10));
    assert_eq!(heard.next_expiry(), None);
    let version = heard.version();
    update(&mut heard, "docker", Update::Remove("a".into()), day(20));
    assert!(heard.version() > version + 1, "it is written for the next agent");
    let end = day(20) + TERM;
    assert_eq!(only(&heard), Some(("web".into(), true, 0, Some(end))));
    assert_eq!(heard.next_expiry(), Some(end));
    assert!(!heard.has_backend_at([10, 0, 0, 1].into()));
    // The time does not begin anew with every list of the engine.
    update(&mut heard, "docker", Update::Reset(Vec::new()), day(500));
    heard.refresh(day(619));
    assert_eq!(only(&heard).unwrap().3, Some(end));
    heard.refresh(end);
    assert_eq!((only(&heard), heard.next_expiry()), (None, None));
    assert!(heard.remembered().is_empty());
}

#[test]
fn a_new_container_has_the_word_again() {
    let mut heard = remembering();
    update(&mut heard, "docker", Update::Put(object("a", 1, true)), day(10));
    update(&mut heard, "docker", Update::Remove("a".into()), day(20));
    update(&mut heard, "docker", Update::Put(object("b", 2, false)), day(30));
    assert_eq!(only(&heard), Some(("web".into(), false, 1, None)));
    assert!(heard.rejections().is_empty() && heard.remembered().is_empty());
    heard.refresh(day(10_000));
    assert_eq!(only(&heard).unwrap().2, 1);
}

#[test]
fn what_the_operator_takes_out_is_gone() {
    for source in [OPERATOR_SOURCE, crate::source::etcd::SOURCE] {
        let mut heard = remembering();
        update(&mut heard, source, Update::Put(object("a", 1, true)), day(10));
        update(&mut heard, source, Update::Remove("a".into()), day(20));
        assert_eq!(only(&heard), None, "{source}");
    }
    // A VIP, or the whole of it.
    for retention in [
        Retention {
            term: TERM,
            vips: BTreeSet::new(),
        },
        Retention::default(),
    ] {
        let mut heard = remembering();
        update(&mut heard, "docker", Update::Put(object("a", 1, true)), day(10));
        update(&mut heard, "docker", Update::Remove("a".into()), day(20));
        heard.set_retention(retention, day(30));
        heard.refresh(day(30));
        assert_eq!(only(&heard), None);
    }
}

#[test]
fn the_next_agent_remembers_for_the_rest_of_the_time() {
    let mut heard = remembering();
    update(&mut heard, "docker", Update::Put(object("a", 1, true)), day(10));
    update(&mut heard, "docker", Update::Remove("a".into()), day(20));
    let mut next = remembering();
    next.restore_remembered(heard.remembered(), day(100));
    next.refresh(day(100));
    assert_eq!(only(&next), only(&heard));
    // The clock was set back meanwhile: not longer than the term.
    let mut late = remembering();
    late.restore_remembered(heard.remembered(), day(5));
    late.refresh(day(5));
    assert_eq!(only(&late).unwrap().3, Some(day(5) + TERM));
}
