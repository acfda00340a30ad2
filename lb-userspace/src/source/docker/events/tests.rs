use std::collections::HashMap;

use bollard::models::{ContainerInspectResponse, EventActor};

use super::*;

const ID: &str = "3f2a9c";

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// What Docker says of a running container that started then.
fn running(started: u64) -> Container {
    let started = jiff::Timestamp::try_from(at(started)).unwrap();
    let answer: ContainerInspectResponse = serde_json::from_value(serde_json::json!({
        "Id": ID,
        "Name": "/web-1",
        "Created": "1970-01-01T00:00:50.5Z",
        "State": { "Status": "running", "Running": true, "StartedAt": started.to_string() },
        "HostConfig": { "NetworkMode": "default" },
        "Config": {
            "StopSignal": "SIGQUIT",
            "ExposedPorts": { "80/tcp": {}, "9/sctp": {} },
            "Labels": { "weir.service.web.listen": "80/tcp", "other": "1" },
        },
        "NetworkSettings": {
            "Ports": { "80/tcp": [{ "HostIp": "0.0.0.0", "HostPort": "32768" }], "81/tcp": null },
            "Networks": { "bridge": { "IPAddress": "172.17.0.2", "GlobalIPv6Address": "" } },
        },
    }))
    .unwrap();
    answer.try_into().unwrap()
}

fn message(
    kind: EventMessageTypeEnum,
    action: &str,
    attributes: &[(&str, &str)],
    seconds: u64,
) -> EventMessage {
    EventMessage {
        typ: Some(kind),
        action: Some(action.into()),
        actor: Some(EventActor {
            id: Some(
                if kind == EventMessageTypeEnum::NETWORK {
                    "net"
                } else {
                    ID
                }
                .into(),
            ),
            attributes: Some(
                attributes
                    .iter()
                    .map(|(k, v)| ((*k).into(), (*v).into()))
                    .collect::<HashMap<_, _>>(),
            ),
        }),
        time_nano: Some(i64::try_from(seconds).unwrap() * 1_000_000_000),
        ..EventMessage::default()
    }
}

fn event(action: &str, seconds: u64) -> Event {
    let (action, signal) = action.split_once(' ').unwrap_or((action, ""));
    let attributes = [("weir.service.web.listen", "80/tcp"), ("signal", signal)];
    Event::parse(&message(
        EventMessageTypeEnum::CONTAINER,
        action,
        &attributes,
        seconds,
    ))
    .unwrap()
}

/// A cache that has listed one container which started at 100.
fn listed() -> Cache {
    let mut cache = Cache::default();
    cache.begin_listing();
    cache.finish_listing(vec![running(100)], &[]);
    cache
}

fn ticket(action: Action) -> u64 {
    match action {
        Action::Inspect { ticket, .. } => ticket,
        other => panic!("{other:?} is no inspection"),
    }
}

fn stopping(cache: &Cache) -> bool {
    cache.containers[ID].stopping
}

const PUT: fn() -> Action = || Action::Put(ID.into());
const REMOVE: fn() -> Action = || Action::Remove(ID.into());

#[test]
fn dockers_answer_becomes_a_container() {
    let container = running(100);
    assert_eq!(container.name, "web-1");
    assert_eq!(
        container.created,
        SystemTime::UNIX_EPOCH + Duration::from_millis(50_500)
    );
    assert_eq!(container.started, at(100));
    assert_eq!(container.stop_signal, 3);
    assert_eq!(
        container.networks["bridge"],
        ["172.17.0.2".parse::<std::net::IpAddr>().unwrap()]
    );
    assert_eq!(container.exposed.len(), 1, "sctp is nothing to us");
    assert_eq!(container.published.len(), 1);
}

#[test]
fn what_does_not_matter_is_dropped_before_any_work() {
    use EventMessageTypeEnum::{CONTAINER, NETWORK};
    let ours = [("weir.service.web.listen", "80"), ("container", ID)];
    for action in [
        "exec_create: /bin/check",
        "exec_start: /bin/check",
        "exec_die",
        "export",
        "oom",
        "create",
        "stop",
        "top",
    ] {
        assert_eq!(
            Event::parse(&message(CONTAINER, action, &ours, 1)),
            None,
            "{action}"
        );
    }
    assert_eq!(
        Event::parse(&message(CONTAINER, "kill", &[("signal", "nonsense")], 1)),
        None
    );
    assert_eq!(Event::parse(&message(NETWORK, "create", &ours, 1)), None);
    let connect = Event::parse(&message(NETWORK, "connect", &ours, 1)).unwrap();
    assert_eq!((connect.id.as_str(), connect.kind), (ID, Kind::Changed));
    // Docker is asked for no action that would be dropped, exec_* above all.
    for action in ACTIONS.iter().filter(|action| !action.ends_with("connect")) {
        let message = message(CONTAINER, action, &[("signal", "15")], 1);
        assert!(Event::parse(&message).is_some(), "{action}");
    }
}

#[test]
fn strangers_are_never_inspected() {
    let mut cache = listed();
    for action in ["start", "kill", "die", "pause", "health_status: healthy"] {
        let attributes = [("signal", "15"), ("com.example", "1")];
        let mut stranger =
            Event::parse(&message(EventMessageTypeEnum::CONTAINER, action, &attributes, 1)).unwrap();
        stranger.id = "stranger".into();
        assert_eq!(cache.on_event(&stranger), Action::Ignore, "{action}");
    }
}

#[test]
fn the_stop_signal_drains_without_a_question() {
    for signal in ["3", "QUIT", "SIGQUIT", "9", "SIGKILL"] {
        let mut cache = listed();
        assert_eq!(
            cache.on_event(&event(&format!("kill {signal}"), 110)),
            PUT(),
            "{signal}"
        );
        assert!(stopping(&cache));
        // Docker's own SIGKILL at the end of its patience is no news.
        assert_eq!(cache.on_event(&event("kill 9", 120)), Action::Ignore);
    }
    for signal in ["1", "SIGHUP", "SIGUSR1", "15"] {
        let mut cache = listed();
        assert_eq!(
            cache.on_event(&event(&format!("kill {signal}"), 110)),
            Action::Ignore,
            "{signal}"
        );
        assert!(!stopping(&cache));
    }
}

#[test]
fn stopping_survives_answers_and_lists_of_the_same_life_only() {
    let mut cache = listed();
    cache.on_event(&event("kill 3", 110));
    let asked = ticket(cache.on_event(&event("health_status: unhealthy", 111)));
    assert_eq!(cache.on_inspected(ID, asked, Some(running(100))), PUT());
    assert!(stopping(&cache));
    cache.begin_listing();
    cache.finish_listing(vec![running(100)], &[]);
    assert!(stopping(&cache));

    assert_eq!(cache.on_event(&event("die", 112)), REMOVE());
    let asked = ticket(cache.on_event(&event("start", 113)));
    assert_eq!(cache.on_inspected(ID, asked, Some(running(113))), PUT());
    assert!(!stopping(&cache));
}

#[test]
fn a_signal_before_the_first_answer_is_not_forgotten() {
    let mut cache = listed();
    cache.on_event(&event("die", 112));
    let asked = ticket(cache.on_event(&event("start", 113)));
    assert_eq!(cache.on_event(&event("kill 3", 114)), Action::Ignore);
    assert_eq!(cache.on_inspected(ID, asked, Some(running(113))), PUT());
    assert!(stopping(&cache));
}

#[test]
fn a_signal_from_before_we_listened_is_met_by_the_list() {
    let mut cache = Cache::default();
    cache.begin_listing();
    assert_eq!(cache.on_event(&event("kill 3", 110)), Action::Ignore);
    cache.finish_listing(vec![running(100)], &[]);
    assert!(stopping(&cache));
    // The same signal to an earlier life says nothing.
    let mut cache = Cache::default();
    cache.begin_listing();
    cache.on_event(&event("kill 3", 90));
    cache.finish_listing(vec![running(100)], &[]);
    assert!(!stopping(&cache));
}

#[test]
fn the_end_is_told_at_once_and_once() {
    let mut cache = listed();
    assert_eq!(
        cache.on_event(&event("die", 99)),
        Action::Ignore,
        "of an earlier life"
    );
    assert_eq!(cache.on_event(&event("die", 110)), REMOVE());
    assert_eq!(cache.on_event(&event("destroy", 111)), Action::Ignore);
}

#[test]
fn changes_are_asked_about() {
    for action in [
        "pause",
        "unpause",
        "health_status: healthy",
        "rename",
        "update",
        "restart",
        "start",
    ] {
        let mut cache = listed();
        let asked = ticket(cache.on_event(&event(action, 110)));
        let mut answer = running(100);
        answer.state = RunState::Paused;
        assert_eq!(cache.on_inspected(ID, asked, Some(answer)), PUT(), "{action}");
        assert_eq!(cache.containers[ID].state, RunState::Paused);
    }
}

#[test]
fn an_overtaken_answer_is_not_believed() {
    let mut cache = listed();
    let first = ticket(cache.on_event(&event("pause", 110)));
    let second = ticket(cache.on_event(&event("unpause", 111)));
    assert_eq!(cache.on_inspected(ID, first, None), Action::Ignore);
    assert_eq!(cache.on_inspected(ID, second, Some(running(100))), PUT());
    // The container ended while Docker was being asked.
    let third = ticket(cache.on_event(&event("rename", 112)));
    assert_eq!(cache.on_event(&event("die", 113)), REMOVE());
    assert_eq!(cache.on_inspected(ID, third, Some(running(100))), Action::Ignore);
    assert!(cache.containers.is_empty());
}

#[test]
fn an_answer_that_it_is_gone_or_stopped_removes_it() {
    let mut cache = listed();
    let asked = ticket(cache.on_event(&event("update", 110)));
    assert_eq!(cache.on_inspected(ID, asked, None), REMOVE());
    let mut cache = listed();
    let asked = ticket(cache.on_event(&event("update", 110)));
    let mut stopped = running(100);
    stopped.state = RunState::Stopped;
    assert_eq!(cache.on_inspected(ID, asked, Some(stopped)), REMOVE());
}

#[test]
fn an_answer_that_says_nothing_changes_nothing() {
    let mut cache = listed();
    let asked = ticket(cache.on_event(&event("update", 110)));
    cache.on_unclear(ID, asked);
    assert!(cache.asked.is_empty());
    cache.begin_listing();
    cache.finish_listing(Vec::new(), &[ID.into()]);
    assert_eq!(cache.containers[ID], running(100));
}

#[test]
fn events_are_newer_than_the_list_that_was_being_read() {
    // Ended meanwhile.
    let mut cache = listed();
    cache.begin_listing();
    assert_eq!(cache.on_event(&event("die", 110)), REMOVE());
    cache.finish_listing(vec![running(100)], &[]);
    assert!(cache.containers.is_empty());
    // Started and inspected meanwhile: the list does not have it yet.
    let mut cache = Cache::default();
    cache.begin_listing();
    let asked = ticket(cache.on_event(&event("start", 110)));
    cache.on_inspected(ID, asked, Some(running(110)));
    cache.finish_listing(Vec::new(), &[]);
    assert_eq!(cache.containers.len(), 1);
    // Ended and started again meanwhile: the list has the new life.
    let mut cache = listed();
    cache.begin_listing();
    cache.on_event(&event("die", 110));
    cache.on_event(&event("start", 111));
    cache.finish_listing(vec![running(111)], &[]);
    assert_eq!(cache.containers[ID].started, at(111));
    // Gone while nobody listened.
    let mut cache = listed();
    cache.begin_listing();
    cache.finish_listing(Vec::new(), &[]);
    assert!(cache.containers.is_empty() && cache.kills.is_empty());
}
