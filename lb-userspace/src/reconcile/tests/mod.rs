//! The loop on paused time, and how long a change takes; what it programs is the business of the scripts in
//! `tests/control`.

mod sources;

use std::sync::Arc;

use lb_common::limits::RING_ROWS_BY_BACKENDS;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    datapath::{Capacities, MapOp, Place, access::AccessLists, fake::FakeMaps},
    desired::Retention,
    health::{Before, By, Verdict},
    model::{Attachment, Backend, BackendState, Check, CheckKind, Protocol, ServiceSettings, ServiceWish},
    route::{RouteAddress, RouteSettings, RouteWish, WHOLE_HOST},
    source::{Object, Update},
    status::Status,
};

const SOURCE: &str = "docker";

/// The loop and its channels.
struct Agent {
    maps: FakeMaps,
    inbox: mpsc::Sender<Message>,
    topology: watch::Sender<Topology>,
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<Status>,
    places: watch::Receiver<BTreeSet<IpAddr>>,
    targets: watch::Receiver<crate::health::Targets>,
    access: watch::Receiver<Arc<AccessLists>>,
    /// Senders that only have to stay open.
    _others: (
        watch::Sender<Sweep>,
        watch::Sender<Policy>,
        watch::Sender<Surroundings>,
    ),
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), MapError>>,
}

fn capacities(services: u32, backends: u32, ring_rows: u32) -> Capacities {
    Capacities {
        services,
        backends,
        ring_rows,
        acl: 8,
        flows4: 8,
        flows6: 8,
    }
}

fn policy() -> Policy {
    Policy {
        snat_addresses: vec![IpAddr::from([192, 0, 2, 1])],
        own_vips: BTreeSet::new(),
        routed_vips: BTreeMap::new(),
        mark: 1,
        snat_port_min: 1,
        snat_port_max: 2,
        event_sample: 0,
        flow_share: 50,
        hz: 250,
        default_drain: Duration::ZERO,
        retention: Retention::default(),
        firewall: BTreeSet::new(),
    }
}

fn start(options: Options) -> Agent {
    start_on(FakeMaps::new(capacities(8, 64, 256)), options)
}

fn start_on(maps: FakeMaps, options: Options) -> Agent {
    let (inbox_to, inbox) = mpsc::channel(8);
    let (topology_to, topology) = watch::channel(Topology {
        loopback_ifindex: 1,
        ..Topology::default()
    });
    let (sweeps_to, sweeps) = watch::channel(Sweep::default());
    let (policy_to, policy) = watch::channel(policy());
    let (surroundings_to, surroundings) = watch::channel(Surroundings {
        attached: true,
        ..Surroundings::default()
    });
    let (commands_to, commands) = mpsc::channel(8);
    let (status_to, status) = watch::channel(Status::default());
    let (places_to, places) = watch::channel(BTreeSet::new());
    let (access_to, access) = watch::channel(Arc::default());
    let (targets_to, targets) = watch::channel(crate::health::Targets::default());
    let stop = CancellationToken::new();
    let inputs = Inputs {
        inbox,
        topology,
        sweeps,
        policy,
        surroundings,
        checks: watch::channel(crate::health::Report::default()).1,
        commands,
    };
    let outputs = Outputs {
        status: status_to,
        places: places_to,
        targets: targets_to,
        access: access_to,
    };
    let task = tokio::spawn(run(
        Box::new(maps.clone()),
        options,
        inputs,
        outputs,
        stop.clone(),
    ));
    Agent {
        maps,
        inbox: inbox_to,
        topology: topology_to,
        commands: commands_to,
        status,
        places,
        targets,
        access,
        _others: (sweeps_to, policy_to, surroundings_to),
        stop,
        task,
    }
}

fn message(update: Update) -> Message {
    Message {
        source: SourceId(SOURCE.into()),
        update,
    }
}

fn backend(address: u32) -> Backend {
    Backend {
        address: (IpAddr::from(address.to_be_bytes()), 80).into(),
        weight: 1,
        state: BackendState::Active,
        reason: String::new(),
        drain: Duration::from_secs(30),
        name: format!("web-{address}"),
        check: None,
        attachment: Attachment::Address,
    }
}

/// A container of one backend.
fn container(service: u16, backend: Backend) -> Object {
    let wish = ServiceWish {
        name: format!("service-{service}"),
        address: ServiceAddress {
            vip: IpAddr::from([203, 0, 113, 1]),
            port: service,
            protocol: Protocol::Tcp,
        },
        settings: ServiceSettings::default(),
        backends: vec![backend],
    };
    Object {
        id: wish.backends[0].name.clone(),
        name: wish.backends[0].name.clone(),
        created: SystemTime::UNIX_EPOCH,
        services: vec![wish],
        routes: Vec::new(),
        rejections: Vec::new(),
    }
}

const REMOTE: Place = Place::Remote {
    slot: 1,
    mac: None,
    uplink: true,
};

#[tokio::test(start_paused = true)]
async fn lists_are_told_at_the_start_and_when_they_have_changed() {
    let mut agent = start(Options::default());
    agent.access.changed().await.unwrap();
    let first = agent.access.borrow_and_update().version;
    agent._others.1.send_replace(Policy {
        firewall: ["10.0.0.0/8".parse().unwrap()].into(),
        ..policy()
    });
    agent.access.changed().await.unwrap();
    let lists = agent.access.borrow_and_update().clone();
    let client = IpAddr::from([10, 0, 0, 1]).into();
    assert!(lists.version > first && !lists.admits(1, &client));
}

#[tokio::test(start_paused = true)]
async fn the_loop_reads_its_sources_and_stops() {
    let mut agent = start(Options {
        sources: vec![SourceId(SOURCE.into())],
        ..Options::default()
    });
    let first = agent
        .status
        .wait_for(|s| !s.version.is_empty())
        .await
        .unwrap()
        .ready;
    assert!(!first);
    agent
        .inbox
        .send(message(Update::Reset(Vec::new())))
        .await
        .unwrap();
    agent.status.wait_for(|s| s.ready).await.unwrap();
    let (reply, answer) = oneshot::channel();
    let drain = Command::Drain {
        backend: "nobody".into(),
        deadline: None,
        reply,
    };
    agent.commands.send(drain).await.unwrap();
    assert!(matches!(answer.await.unwrap(), Err(CommandError::Unknown(_))));
    agent.stop.cancel();
    agent.task.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn places_are_asked_for_while_they_matter() {
    let mut agent = start(Options::default());
    agent
        .inbox
        .send(message(Update::Put(container(1, backend(5)))))
        .await
        .unwrap();
    let ip = IpAddr::from([0, 0, 0, 5]);
    agent
        .places
        .wait_for(|places| places.contains(&ip))
        .await
        .unwrap();
    agent.topology.send_modify(|t| t.places.extend([(ip, REMOTE)]));
    agent.status.wait_for(|s| s.commits == 1).await.unwrap();
    // It drains with its flows: its place still matters.
    agent
        .inbox
        .send(message(Update::Remove("web-5".into())))
        .await
        .unwrap();
    agent
        .status
        .wait_for(|s| s.services.iter().any(|s| s.backends[0].leaving))
        .await
        .unwrap();
    assert!(agent.places.borrow().contains(&ip));
    agent.stop.cancel();
    agent.task.await.unwrap().unwrap();
}

/// A failing check takes a backend out of the ring, a slow start gives its share back in tenths, and an agent that starts
/// anew lets it serve on until its check has spoken.
#[tokio::test(start_paused = true)]
async fn verdicts_make_the_ring() {
    let mut agent = start(Options::default());
    let checked = |i| Backend {
        check: Some(std::sync::Arc::new(Check::of(vec![CheckKind::Tcp]))),
        ..backend(i)
    };
    let ips = [5u32, 6].map(|i| IpAddr::from(i.to_be_bytes()));
    agent
        .topology
        .send_modify(|t| t.places.extend(ips.map(|ip| (ip, REMOTE))));
    let all = || Update::Reset(vec![container(1, checked(5)), container(1, checked(6))]);
    agent.inbox.send(message(all())).await.unwrap();
    let targets = agent
        .targets
        .wait_for(|t| t.active.len() == 2)
        .await
        .unwrap()
        .clone();
    let verdict = |index: usize, fit: bool, tenths: u8| {
        let (key, target) = targets.active.iter().nth(index).unwrap();
        message(Update::Verdicts(vec![Verdict {
            key: *key,
            generation: target.generation,
            by: By::Check,
            fit,
            tenths,
            reason: "as told".into(),
            since: SystemTime::now(),
        }]))
    };
    let share = |status: &Status, index: usize| -> u32 {
        status
            .services
            .first()
            .map_or(0, |s| s.backends[index].ring_share)
    };
    for index in [0, 1] {
        agent.inbox.send(verdict(index, true, 10)).await.unwrap();
    }
    agent
        .status
        .wait_for(|s| share(s, 0) > 4900 && share(s, 1) > 4900)
        .await
        .unwrap();
    agent.inbox.send(verdict(0, false, 10)).await.unwrap();
    let status = agent.status.wait_for(|s| share(s, 0) == 0).await.unwrap().clone();
    let out = &status.services[0].backends[0];
    assert_eq!(
        (out.state, out.reason.as_str()),
        (BackendState::Unready, "check: as told")
    );
    assert_eq!((out.drain_deadline, out.conditions.len()), (None, 2));
    assert_eq!(share(&status, 1), 10_000);
    // One tenth beside a whole one, then three, then all.
    for (tenths, least, most) in [(1u8, 850, 960), (3, 2250, 2370), (10, 4950, 5050)] {
        agent.inbox.send(verdict(0, true, tenths)).await.unwrap();
        let as_told = |s: &Status| (least..=most).contains(&share(s, 0));
        let status = agent.status.wait_for(as_told).await.unwrap().clone();
        assert_eq!(
            status.services[0].backends[0].tenths,
            Some(tenths).filter(|t| *t < 10)
        );
        assert_eq!(status.services[0].backends[0].weight, 1);
    }
    agent.inbox.send(verdict(1, false, 10)).await.unwrap();
    agent.status.wait_for(|s| share(s, 1) == 0).await.unwrap();
    agent.stop.cancel();
    agent.task.await.unwrap().unwrap();

    let waits = Options {
        sources: vec![SourceId(SOURCE.into())],
        ..Options::default()
    };
    let mut next = start_on(agent.maps.clone(), waits);
    next.topology
        .send_modify(|t| t.places.extend(ips.map(|ip| (ip, REMOTE))));
    agent.maps.take_log();
    next.inbox.send(message(all())).await.unwrap();
    let targets = next
        .targets
        .wait_for(|t| t.active.len() == 2)
        .await
        .unwrap()
        .clone();
    let before: Vec<Before> = targets.active.values().map(|t| t.before).collect();
    assert_eq!(before, [Before::Served, Before::Waited]);
    let status = next
        .status
        .wait_for(|s| s.ready && share(s, 0) == 10_000)
        .await
        .unwrap()
        .clone();
    assert_eq!(status.services[0].backends[1].reason, "check: no result yet");
    let rings = |op: &MapOp| matches!(op, MapOp::PutRing { .. } | MapOp::PutService { .. });
    assert!(!agent.maps.take_log().iter().any(rings), "the ring is as it was");
    next.stop.cancel();
    next.task.await.unwrap().unwrap();
}

/// The first change is programmed at once, what follows within the debounce time together, and a stream that never ends
/// cannot put that off.
#[tokio::test(start_paused = true)]
async fn a_stream_of_changes_is_taken_in_steps() {
    let debounce = Duration::from_millis(20);
    let mut agent = start(Options {
        debounce,
        ..Options::default()
    });
    agent.topology.send_modify(|topology| {
        topology
            .places
            .extend((1..=50u32).map(|i| (IpAddr::from(i.to_be_bytes()), REMOTE)));
    });
    agent.status.wait_for(|s| s.ready).await.unwrap();
    tokio::time::sleep(debounce * 2).await;
    agent.maps.take_log();

    let started = tokio::time::Instant::now();
    let mut commits = Vec::new();
    for i in 1..=50u32 {
        agent
            .inbox
            .send(message(Update::Put(container(1, backend(i)))))
            .await
            .unwrap();
        // Time stands still until the loop has nothing to do.
        tokio::time::sleep(Duration::from_millis(2)).await;
        let committed = agent
            .maps
            .take_log()
            .iter()
            .any(|op| matches!(op, MapOp::PutService { .. }));
        if committed {
            commits.push(started.elapsed());
        }
    }
    let leading = commits[0];
    assert!(
        leading <= Duration::from_millis(2),
        "the first waited {leading:?}"
    );
    let gaps: Vec<Duration> = commits.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(
        gaps.iter().all(|gap| *gap >= debounce - Duration::from_millis(2)),
        "{gaps:?}"
    );
    assert!(
        gaps.iter().all(|gap| *gap <= debounce + Duration::from_millis(4)),
        "{gaps:?}"
    );
    assert!((4..=6).contains(&commits.len()), "{commits:?}");
    agent.stop.cancel();
    agent.task.await.unwrap().unwrap();
}

/// One change among many touches that service alone. Prints how long it takes: 1,000 services of 100 backends when built
/// with optimization.
#[test]
fn a_change_among_many_is_small() {
    let services: u16 = if cfg!(debug_assertions) { 20 } else { 1000 };
    let per_service = 100;
    let rows = RING_ROWS_BY_BACKENDS[1].1;
    let maps = FakeMaps::unchecked(capacities(2048, 131_072, u32::from(services) * rows + 64));
    let clock = Instant::now;
    let mut reconciler =
        Reconciler::new(Box::new(maps.clone()), Options::default(), policy(), clock()).unwrap();
    let mut topology = Topology {
        loopback_ifindex: 1,
        ..Topology::default()
    };
    let mut objects = Vec::new();
    for service in 0..services {
        for i in 0..per_service {
            let backend = backend(u32::from(service) * per_service + i + 1);
            topology.places.insert(backend.address.ip(), REMOTE);
            objects.push(container(service + 1, backend));
        }
    }
    let timed =
        |what: &str, started: Instant| println!("{services} services: {what} {:?}", started.elapsed());
    let started = clock();
    reconciler.set_topology(&topology);
    reconciler.hear(message(Update::Reset(objects)));
    reconciler.pass(&clock);
    timed("first pass", started);
    maps.take_log();

    let mut unready = backend(1);
    unready.state = BackendState::Unready;
    let started = clock();
    reconciler.hear(message(Update::Put(container(1, unready))));
    reconciler.pass(&clock);
    timed("one backend less", started);
    // The ring, its commit, and the backend that drains.
    assert_eq!(maps.take_log().len(), 3);

    let started = clock();
    let new = backend(u32::MAX);
    let ip = new.address.ip();
    reconciler.hear(message(Update::Put(container(1, new))));
    reconciler.pass(&clock);
    assert!(reconciler.place_changes().contains(&(ip, true)));
    timed("asked for a place", started);
    assert_eq!(maps.take_log().len(), 0);
    topology.places.insert(ip, REMOTE);
    let started = clock();
    reconciler.set_topology(&topology);
    reconciler.pass(&clock);
    timed("one backend more", started);
    assert_eq!(maps.take_log().len(), 3);

    let started = clock();
    let status = reconciler.status(
        &Surroundings::default(),
        &crate::health::Report::default(),
        clock(),
    );
    timed("status", started);
    assert_eq!(status.services.len(), usize::from(services));
    let started = clock();
    reconciler.resync(clock()).unwrap();
    reconciler.pass(&clock);
    timed("resync", started);
    assert_eq!(maps.take_log().len(), 0);
}
