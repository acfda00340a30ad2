//! The loop on paused time; what it programs is the business of the scripts in `tests/control`.

use super::*;
use crate::{
    datapath::{Capacities, fake::FakeMaps},
    source::Update,
};

#[tokio::test(start_paused = true)]
async fn the_loop_reads_its_sources_and_stops() {
    let maps = FakeMaps::new(Capacities {
        services: 8,
        backends: 8,
        ring_rows: 8,
        acl: 8,
        flows4: 8,
        flows6: 8,
    });
    let policy = Policy {
        snat_addresses: Vec::new(),
        own_vips: BTreeSet::new(),
        snat_port_min: 1,
        snat_port_max: 2,
        event_sample: 0,
        hz: 250,
        default_drain: Duration::ZERO,
    };
    let (inbox_tx, inbox) = mpsc::channel(8);
    let (_topology, topology) = watch::channel(Topology {
        loopback_ifindex: 1,
        ..Topology::default()
    });
    let (_sweeps, sweeps) = watch::channel(Sweep::default());
    let (_policy, policy) = watch::channel(policy);
    let (_surroundings, surroundings) = watch::channel(Surroundings::default());
    let (commands_tx, commands) = mpsc::channel(8);
    let (status, mut status_rx) = watch::channel(Status::default());
    let (places, _places) = watch::channel(BTreeSet::new());
    let source = SourceId("docker".into());
    let options = Options {
        sources: vec![source.clone()],
        ..Options::default()
    };
    let stop = CancellationToken::new();
    let inputs = Inputs {
        inbox,
        topology,
        sweeps,
        policy,
        surroundings,
        commands,
    };
    let task = tokio::spawn(run(
        Box::new(maps),
        options,
        inputs,
        Outputs { status, places },
        stop.clone(),
    ));

    assert!(!status_rx.wait_for(|s| !s.version.is_empty()).await.unwrap().ready);
    inbox_tx
        .send(Message {
            source,
            update: Update::Reset(Vec::new()),
        })
        .await
        .unwrap();
    status_rx.wait_for(|s| s.ready).await.unwrap();
    let (reply, answer) = oneshot::channel();
    commands_tx
        .send(Command::Drain {
            backend: "nobody".into(),
            deadline: None,
            reply,
        })
        .await
        .unwrap();
    assert!(matches!(answer.await.unwrap(), Err(CommandError::Unknown(_))));
    stop.cancel();
    task.await.unwrap().unwrap();
}
