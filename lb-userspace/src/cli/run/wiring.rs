//! The agent's parts and the channels between them. Each part is a task; the first that fails ends them all.

use std::{ops::RangeInclusive, sync::Arc, time::Duration, time::Instant};

use anyhow::Context as _;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, broadcast, mpsc, oneshot, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Files, translate};
use crate::{
    admin::{
        Admin, Context, Kernel, Options as AdminOptions,
        shims::{self, Shims},
        tap,
    },
    config::{Config, DockerConfig, SwarmConfig},
    datapath::{
        Maps as _, Topology,
        attach::{Attacher, TcChoice},
        bpf::KernelMaps,
        counters::Counters,
        heartbeat::Heartbeat,
        load,
        lock::PinLock,
        net, object, preflight,
        state::StateFile,
        sweep::{self, Sweeper},
        sysctl,
    },
    health,
    plan::Sweep,
    reconcile::{self, Command, Surroundings},
    source::{self, SourceId},
    status::Status,
};

/// Messages of sources that may wait: a burst of a Docker engine with a thousand containers.
const INBOX: usize = 1024;
/// Events kept for a reader that is slow; then it is told how many it lost.
const EVENTS: usize = 1024;
/// Time between two sweeps of the flow tables.
const SWEEP_EVERY: Duration = Duration::from_secs(5);
/// How long the parts may take to end.
const FAREWELL: Duration = Duration::from_secs(3);
/// Group whose members may use the socket, if it exists.
const SOCKET_GROUP: &str = "weir";

/// The tasks of the agent; each has a name for its failure.
type Tasks = JoinSet<anyhow::Result<()>>;

/// Loads or adopts the datapath, runs until SIGTERM or SIGINT, and leaves the datapath working.
pub(super) async fn agent(config: Config) -> anyhow::Result<()> {
    let files = Files::beside(&config.admin.socket);
    // First of all: whoever has the socket is the only one who answers.
    let admin = Admin::bind(&AdminOptions {
        socket: config.admin.socket.clone(),
        group: socket_group(),
        metrics: Some(config.admin.metrics),
    })
    .await?;
    let shim_socket = Shims::bind(&config.admin.socket).context("socket of the L7 shims")?;
    preflight::preflight(&config.bpf.pin_path)?;
    // Held until the process ends. Nothing of the pins is touched before.
    let _only_agent_of_these_pins = PinLock::take(&config.bpf.pin_path)?;
    let mut warnings: Vec<String> = port_overlap(&config).into_iter().collect();
    let state = StateFile::open(&files.state)?;
    let filters: Vec<String> = state.get().clsact.into_keys().collect();
    let loaded = load::load_over(
        object::programs()?,
        &config.bpf.pin_path,
        &translate::sizes(&config),
        &filters,
    )?;
    warnings.extend(loaded.warnings.iter().cloned());
    let pins = loaded.pins.clone();
    info!(pins = %pins.root().display(), adopted = loaded.adopted, "datapath loaded");
    for warning in &warnings {
        warn!("{warning}");
    }
    let maps = KernelMaps::open(&pins.maps())?;
    let sweeper = Sweeper::open(&pins)?;
    let hz = sweeper.hz()?;
    let (config, recalled) = source::etcd::recall(config);

    let stop = CancellationToken::new();
    let (status_to, status) = watch::channel(Status::default());
    let (shared_to, shared) = watch::channel(Arc::clone(&config.shared));
    let (config_to, config) = watch::channel(Arc::new(config));
    let (inbox_to, inbox) = mpsc::channel(INBOX);
    let (topology_to, topology) = watch::channel(Topology::default());
    let (places_to, places) = watch::channel(Default::default());
    let (report_to, report) = watch::channel(net::NetReport::default());
    let (commands_to, commands) = mpsc::channel(16);
    let (announce_to, requests) = mpsc::channel(16);
    let (swept_to, swept) = watch::channel(None);
    let (access_to, access) = watch::channel(Arc::default());
    let (events, _) = broadcast::channel(EVENTS);
    let first = config.borrow().clone();
    let mut tasks = Tasks::new();

    let context = Context {
        status,
        readings: Arc::new(Kernel::open(pins.clone(), maps.capacities())?),
        commands: commands_to.clone(),
        announce: announce_to,
        shims: shims::Connected::default(),
        events: events.clone(),
        started: Instant::now(),
        stop: stop.clone(),
    };
    let shims = shim_socket.serve(
        context.status.clone(),
        config.clone(),
        context.shims.clone(),
        stop.clone(),
    );
    tasks.spawn(async { shims.await.context("socket of the L7 shims") });
    tasks.spawn(async { admin.serve(context).await.context("admin API") });
    let event_maps = pins.maps();
    until(&mut tasks, &stop, async move {
        tap::follow(&event_maps, events).await.context("event stream")
    });
    let net_task = net::NetTask {
        devices: maps.devices()?,
        attacher: Attacher::new(loaded, state.clone(), TcChoice::Auto),
        heartbeat: Heartbeat::open(&pins).context("pinned program of the heartbeat")?,
        state,
        config: derived(&mut tasks, &stop, config.clone(), |c| translate::network(c)),
        wanted: places,
        requests,
        topology: topology_to,
        report: report_to,
    };
    until(&mut tasks, &stop, async {
        net::run(net_task).await.context("network")
    });
    until(&mut tasks, &stop, async {
        sweep::run(sweeper, SWEEP_EVERY, access, swept_to).await;
        Ok(())
    });
    let (targets_to, targets) = watch::channel(health::Targets::default());
    let (checks_to, checks) = watch::channel(health::Report::default());
    let inputs = reconcile::Inputs {
        inbox,
        topology,
        sweeps: derived(&mut tasks, &stop, swept, |r| {
            r.as_ref().map_or_else(Sweep::default, translate::sweep)
        }),
        policy: derived(&mut tasks, &stop, config.clone(), move |c| {
            translate::policy(c, hz)
        }),
        surroundings: derived(&mut tasks, &stop, report, move |r| surroundings(r, &warnings)),
        checks,
        commands,
    };
    let status = status_to.subscribe();
    let outputs = reconcile::Outputs {
        status: status_to,
        places: places_to,
        targets: targets_to,
        access: access_to,
    };
    let options = reconcile::Options {
        sources: sources(&first),
        source_wait: first.startup_wait,
        drains: Some(files.drains),
        deadlines: Some(files.deadlines),
        wishes: Some(files.wishes),
        ..reconcile::Options::default()
    };
    let token = stop.clone();
    tasks.spawn(async move {
        reconcile::run(Box::new(maps), options, inputs, outputs, token)
            .await
            .context("reconciler")
    });
    let prober = health::probe::Network::default();
    until(&mut tasks, &stop, {
        let (inbox, stop) = (inbox_to.clone(), stop.clone());
        let work = health::task::run(prober, targets.clone(), inbox, checks_to.clone(), stop.clone());
        lasting(stop, work)
    });
    let counters = Counters::open(&pins.maps())?;
    until(&mut tasks, &stop, {
        let (inbox, stop) = (inbox_to.clone(), stop.clone());
        let work = health::passive::run(counters, targets, status, inbox, checks_to, stop.clone());
        lasting(stop, work)
    });
    if let (Some(etcd), Some(recalled)) = (first.etcd.clone(), recalled) {
        let (config, inbox) = (config.clone(), inbox_to.clone());
        let etcd = source::etcd::spawn(etcd, recalled, config, shared_to, inbox, stop.clone());
        tasks.spawn(async { etcd.await.context("etcd source") });
    }
    if let Some((etcd, recalled)) = source::nodes::recall(&first) {
        let nodes = source::nodes::spawn(etcd, recalled, config.clone(), inbox_to.clone(), stop.clone());
        tasks.spawn(async { nodes.await.context("nodes source") });
    }
    let docker = source::docker::spawn(config.clone(), inbox_to.clone(), stop.clone());
    tasks.spawn(async { docker.await.context("docker source") });
    let swarm = source::swarm::spawn(config, inbox_to.clone(), stop.clone());
    tasks.spawn(async { swarm.await.context("swarm source") });
    let look = Arc::new(Notify::new());
    let file = source::file::spawn(config_to, shared, inbox_to, look.clone(), stop.clone());
    tasks.spawn(async { file.await.context("file source") });

    let result = wait(&mut tasks, &commands_to, &look).await;
    stop.cancel();
    let farewell = async { while tasks.join_next().await.is_some() {} };
    let _late_ones_end_with_the_process = tokio::time::timeout(FAREWELL, farewell).await;
    info!(
        "agent stopped; programs and maps stay in the kernel: traffic goes on. `weir detach` takes them off"
    );
    result
}

/// Waits for a signal to stop, or for a part that ends before.
/// SIGHUP has the configuration file read and the maps compared.
async fn wait(tasks: &mut Tasks, commands: &mpsc::Sender<Command>, look: &Notify) -> anyhow::Result<()> {
    let (mut term, mut int, mut hup) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
        signal(SignalKind::hangup())?,
    );
    loop {
        tokio::select! {
            _ = term.recv() => return Ok(()),
            _ = int.recv() => return Ok(()),
            _ = hup.recv() => {
                info!("SIGHUP: reading the configuration file and the maps");
                look.notify_one();
                let (reply, _nobody_waits) = oneshot::channel();
                let _the_reconciler_may_have_ended = commands.send(Command::Resync { reply }).await;
            }
            Some(ended) = tasks.join_next() => {
                ended.context("a part of the agent has failed")??;
                anyhow::bail!("a part of the agent has ended before its time: see the log");
            }
        }
    }
}

/// Runs `work` as a part of the agent until it ends or the agent stops.
fn until(
    tasks: &mut Tasks,
    stop: &CancellationToken,
    work: impl Future<Output = anyhow::Result<()>> + Send + 'static,
) {
    let stop = stop.clone();
    tasks.spawn(async move { stop.run_until_cancelled(work).await.unwrap_or(Ok(())) });
}

/// A part that ends by itself only when the parts it talks to have ended: their fault is told, not its end.
async fn lasting(stop: CancellationToken, work: impl Future<Output = ()> + Send) -> anyhow::Result<()> {
    work.await;
    stop.cancelled().await;
    Ok(())
}

/// A published value made of another one, anew whenever that changes.
fn derived<A, B>(
    tasks: &mut Tasks,
    stop: &CancellationToken,
    mut from: watch::Receiver<A>,
    make: impl Fn(&A) -> B + Send + 'static,
) -> watch::Receiver<B>
where
    A: Send + Sync + 'static,
    B: PartialEq + Send + Sync + 'static,
{
    let (to, receiver) = watch::channel(make(&from.borrow_and_update()));
    let stop_here = stop.clone();
    until(tasks, stop, async move {
        while from.changed().await.is_ok() {
            let value = make(&from.borrow_and_update());
            to.send_if_modified(|old| {
                let differs = *old != value;
                *old = value;
                differs
            });
        }
        // Nobody will say more; what was said stands until the agent stops.
        stop_here.cancelled().await;
        Ok(())
    });
    receiver
}

/// Sources that must have been read before anything is removed.
fn sources(config: &Config) -> Vec<SourceId> {
    let engines = config.docker.iter().map(DockerConfig::source);
    let swarms = config.swarm.iter().map(SwarmConfig::source);
    let etcd = config.etcd.as_ref().map(|_| source::etcd::SOURCE.to_owned());
    let nodes = config.nodes.as_ref().map(|_| source::nodes::SOURCE.to_owned());
    engines
        .chain(swarms)
        .chain(etcd)
        .chain(nodes)
        .chain([source::file::SOURCE.to_owned()])
        .map(SourceId)
        .collect()
}

/// What the network and the start have to say in the status.
fn surroundings(report: &net::NetReport, warnings: &[String]) -> Surroundings {
    Surroundings {
        attachments: report.attachments.clone(),
        faults: warnings.iter().chain(&report.faults).cloned().collect(),
        attached: report.attached,
    }
}

/// The group for the socket, if somebody has made it.
fn socket_group() -> Option<String> {
    let exists = nix::unistd::Group::from_name(SOCKET_GROUP).is_ok_and(|group| group.is_some());
    exists.then(|| SOCKET_GROUP.to_owned())
}

/// A warning when the node itself hands out ports of the SNAT range.
fn port_overlap(config: &Config) -> Option<String> {
    let text = sysctl::read("net.ipv4.ip_local_port_range").ok()?;
    config
        .snat
        .check_port_overlap(port_range(&text)?)
        .err()
        .map(|e| e.to_string())
}

/// Two ports, as `ip_local_port_range` has them, as a range.
fn port_range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut ports = text.split_whitespace().map(str::parse::<u16>);
    Some(ports.next()?.ok()?..=ports.next()?.ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_ranges_are_read() {
        assert_eq!(port_range("32768\t60999\n"), Some(32768..=60999));
        assert_eq!(port_range("32768"), None);
    }

    #[tokio::test]
    async fn derived_values_follow_their_origin() {
        let (to, from) = watch::channel(1);
        let (mut tasks, stop) = (Tasks::new(), CancellationToken::new());
        let mut doubled = derived(&mut tasks, &stop, from, |n| n * 2);
        assert_eq!(*doubled.borrow(), 2);
        to.send_replace(5);
        doubled.changed().await.unwrap();
        assert_eq!(*doubled.borrow(), 10);
        drop(to);
        stop.cancel();
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_part_that_fails_ends_the_agent_with_its_reason() {
        let (mut tasks, stop) = (Tasks::new(), CancellationToken::new());
        until(&mut tasks, &stop, async { anyhow::bail!("network: gone") });
        let (commands, _inbox) = mpsc::channel(1);
        let error = wait(&mut tasks, &commands, &Notify::new()).await.unwrap_err();
        assert!(format!("{error:#}").contains("network: gone"), "{error:#}");
    }
}
