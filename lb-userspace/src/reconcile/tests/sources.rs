//! Sources that are silent or end, and what the operator says of upstreams.

use super::*;

/// An agent that starts while an engine is silent serves on what the engine last wished, whatever the wait; the engine's first
/// list is its word again.
#[tokio::test(start_paused = true)]
async fn a_source_that_is_silent_at_the_start_keeps_its_last_word() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        sources: vec![SourceId(SOURCE.into())],
        wishes: Some(dir.path().join("wishes")),
        ..Options::default()
    };
    let ips = [5u32, 6].map(|i| IpAddr::from(i.to_be_bytes()));
    let placed = |agent: &Agent| {
        agent
            .topology
            .send_modify(|t| t.places.extend(ips.map(|ip| (ip, REMOTE))));
    };
    let mut first = start(options.clone());
    placed(&first);
    let all = vec![container(1, backend(5)), container(1, backend(6))];
    first.inbox.send(message(Update::Reset(all))).await.unwrap();
    first.status.wait_for(|s| s.ready && s.commits > 0).await.unwrap();
    first.stop.cancel();
    first.task.await.unwrap().unwrap();

    first.maps.take_log();
    let mut next = start_on(first.maps.clone(), options.clone());
    placed(&next);
    // `ready` comes with the end of the wait.
    let status = next.status.wait_for(|s| s.ready).await.unwrap().clone();
    assert_eq!(status.services[0].backends.len(), 2);
    let serves = |s: &Status, index: usize| s.services[0].backends[index].state == BackendState::Active;
    assert!(serves(&status, 0) && serves(&status, 1));
    let source = &status.sources[0];
    assert_eq!((source.connected, source.objects), (false, 2));
    let rings = |op: &MapOp| matches!(op, MapOp::PutRing { .. } | MapOp::PutService { .. });
    assert!(!next.maps.take_log().iter().any(rings), "the ring is as it was");

    // It speaks: one of the containers went meanwhile.
    let list = Update::Reset(vec![container(1, backend(6))]);
    next.inbox.send(message(list)).await.unwrap();
    next.status
        .wait_for(|s| s.services[0].backends[0].leaving && serves(s, 1))
        .await
        .unwrap();
    next.stop.cancel();
    next.task.await.unwrap().unwrap();

    // What an engine said that is no longer configured is nobody's word.
    let mut last = start_on(
        next.maps.clone(),
        Options {
            sources: Vec::new(),
            ..options
        },
    );
    placed(&last);
    last.status
        .wait_for(|s| s.ready && s.services.iter().all(|s| s.backends.iter().all(|b| b.leaving)))
        .await
        .unwrap();
    last.stop.cancel();
    last.task.await.unwrap().unwrap();
}

/// What the file of wishes does not tell, another version's lines say, may be a silent source's; what it does tell goes with its
/// own source, whoever else is silent.
#[tokio::test(start_paused = true)]
async fn a_silent_source_keeps_what_nobody_is_known_to_have_wished_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wishes");
    let file = || SourceId(crate::desired::OPERATOR_SOURCE.into());
    let options = Options {
        sources: vec![SourceId(SOURCE.into()), file()],
        wishes: Some(path.clone()),
        ..Options::default()
    };
    let says = |source: SourceId, objects: Vec<Object>| Message {
        source,
        update: Update::Reset(objects),
    };
    let ips = [5u32, 6, 7].map(|i| IpAddr::from(i.to_be_bytes()));
    let placed = |agent: &Agent| {
        agent
            .topology
            .send_modify(|t| t.places.extend(ips.map(|ip| (ip, REMOTE))));
    };
    let mut first = start(options.clone());
    placed(&first);
    let docker = vec![container(1, backend(5)), container(1, backend(6))];
    first
        .inbox
        .send(says(SourceId(SOURCE.into()), docker))
        .await
        .unwrap();
    let operator = vec![container(1, backend(7))];
    first.inbox.send(says(file(), operator)).await.unwrap();
    first.status.wait_for(|s| s.ready && s.commits > 0).await.unwrap();
    first.stop.cancel();
    first.task.await.unwrap().unwrap();

    // Of the engine's two containers one line can still be read; the operator has removed his backend meanwhile.
    let text = std::fs::read_to_string(&path).unwrap();
    let lines = text.lines().filter(|line| !line.contains("web-5"));
    let rest: Vec<&str> = lines.chain(["{\"source\":\"docker\"}"]).collect();
    assert_eq!(rest.len(), 3);
    std::fs::write(&path, rest.join("\n")).unwrap();
    let mut next = start_on(first.maps.clone(), options);
    placed(&next);
    next.inbox.send(says(file(), Vec::new())).await.unwrap();
    let status = next.status.wait_for(|s| s.ready).await.unwrap().clone();
    let backends = &status.services[0].backends;
    let stay: Vec<IpAddr> = backends
        .iter()
        .filter(|b| !b.leaving)
        .map(|b| b.address.ip())
        .collect();
    assert_eq!(stay, ips[..2], "{backends:?}");
    next.stop.cancel();
    next.task.await.unwrap().unwrap();
}

/// A source that is taken out of the configuration before it was ever heard is waited for no longer.
#[tokio::test(start_paused = true)]
async fn a_source_that_ends_is_not_waited_for() {
    let other = || SourceId("docker:other".into());
    let mut agent = start(Options {
        sources: vec![SourceId(SOURCE.into()), other()],
        source_wait: Duration::from_secs(1_000_000),
        ..Options::default()
    });
    agent
        .inbox
        .send(message(Update::Reset(Vec::new())))
        .await
        .unwrap();
    let update = Update::Freshness(crate::source::Freshness::default());
    let says = |update| Message {
        source: other(),
        update,
    };
    agent.inbox.send(says(update)).await.unwrap();
    agent.status.wait_for(|s| s.sources.len() == 2).await.unwrap();
    assert!(!agent.status.borrow().ready);
    agent.inbox.send(says(Update::End)).await.unwrap();
    let status = agent.status.wait_for(|s| s.ready).await.unwrap().clone();
    assert_eq!(status.sources.len(), 1);
    agent.stop.cancel();
    agent.task.await.unwrap().unwrap();
}

/// A container that serves routes alone is drained and undrained by its name, and by its host and name.
#[tokio::test(start_paused = true)]
async fn the_operator_drains_upstreams() {
    let mut agent = start(Options::default());
    let address = RouteAddress {
        host: "vote.example".into(),
        path: WHOLE_HOST.into(),
    };
    let wish = RouteWish {
        of: address.host.clone(),
        address,
        settings: RouteSettings::default(),
        remarks: Vec::new(),
        upstream: backend(5),
    };
    let object = Object {
        services: Vec::new(),
        routes: vec![wish],
        ..container(1, backend(5))
    };
    agent.inbox.send(message(Update::Put(object))).await.unwrap();
    let state = |s: &Status| s.routes.first().map(|r| r.route.upstreams[0].state);
    agent
        .status
        .wait_for(|s| state(s) == Some(BackendState::Active))
        .await
        .unwrap();
    for selector in ["web-5", "vote.example/web-5"] {
        let (reply, answer) = oneshot::channel();
        let drain = Command::Drain {
            backend: selector.into(),
            deadline: None,
            reply,
        };
        agent.commands.send(drain).await.unwrap();
        assert_eq!(answer.await.unwrap().unwrap(), 1, "{selector}");
        agent
            .status
            .wait_for(|s| state(s) == Some(BackendState::Draining))
            .await
            .unwrap();
        let (reply, answer) = oneshot::channel();
        let undrain = Command::Undrain {
            backend: "web-5".into(),
            reply,
        };
        agent.commands.send(undrain).await.unwrap();
        assert_eq!(answer.await.unwrap().unwrap(), 1, "{selector}");
        agent
            .status
            .wait_for(|s| state(s) == Some(BackendState::Active))
            .await
            .unwrap();
    }
    agent.stop.cancel();
    agent.task.await.unwrap().unwrap();
}

/// The answer that `when-empty` promises holds after the last container, and after a restart of the agent.
#[tokio::test(start_paused = true)]
async fn a_service_without_containers_is_kept_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        sources: vec![SourceId(SOURCE.into())],
        wishes: Some(dir.path().join("wishes")),
        ..Options::default()
    };
    let keep = |agent: &Agent| {
        agent._others.1.send_modify(|policy| {
            policy.retention.term = Duration::from_secs(600);
            policy.retention.vips = [IpAddr::from([203, 0, 113, 1])].into();
        });
        agent
            .topology
            .send_modify(|t| t.places.extend([(IpAddr::from(5u32.to_be_bytes()), REMOTE)]));
    };
    let mut first = start(options.clone());
    keep(&first);
    let all = Update::Reset(vec![container(1, backend(5))]);
    first.inbox.send(message(all)).await.unwrap();
    first.status.wait_for(|s| s.ready && s.commits > 0).await.unwrap();
    first
        .inbox
        .send(message(Update::Remove("web-5".into())))
        .await
        .unwrap();
    let kept = |s: &Status| {
        s.services
            .iter()
            .any(|s| s.kept_until.is_some() && s.name == "service-1")
    };
    first.status.wait_for(kept).await.unwrap();
    first.stop.cancel();
    first.task.await.unwrap().unwrap();

    let mut next = start_on(first.maps.clone(), options);
    keep(&next);
    next.inbox.send(message(Update::Reset(Vec::new()))).await.unwrap();
    next.status.wait_for(|s| s.ready && kept(s)).await.unwrap();
    let dump = next.maps.contents();
    assert_eq!(dump.services.len(), 1, "clients are still answered");
    next.stop.cancel();
    next.task.await.unwrap().unwrap();
}
