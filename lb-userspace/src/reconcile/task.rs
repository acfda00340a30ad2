//! The loop around the [`Reconciler`]: waiting, debouncing, telling.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    Command, Options, RETRY_MAX, Reconciler, Surroundings,
    recollection::{Keeper, Recollection},
};
use crate::{
    datapath::{MapError, Maps, Topology, access::AccessLists},
    health::{Report, Targets},
    plan::{Policy, Sweep},
    source::Message,
    status::Status,
};

/// Pause between two statuses for every backend in them: telling must not cost more than doing.
const STATUS_PER_BACKEND: Duration = Duration::from_micros(10);
/// Messages taken from the inbox in one go, so that a flood cannot keep a pass from happening.
const BURST: usize = 1024;

/// Everything the loop listens to.
#[derive(Debug)]
pub struct Inputs {
    /// What the sources say.
    pub inbox: mpsc::Receiver<Message>,
    /// The network.
    pub topology: watch::Receiver<Topology>,
    /// Flow counts.
    pub sweeps: watch::Receiver<Sweep>,
    /// The configuration's part in programming.
    pub policy: watch::Receiver<Policy>,
    /// What other parts of the agent have to say in the status.
    pub surroundings: watch::Receiver<Surroundings>,
    /// How the health checks go.
    pub checks: watch::Receiver<Report>,
    /// The operator.
    pub commands: mpsc::Receiver<Command>,
}

/// Everything the loop tells.
#[derive(Debug)]
pub struct Outputs {
    /// State of the agent, after every pass (less often when there are very many backends).
    pub status: watch::Sender<Status>,
    /// Addresses whose [`Place`] the topology shall find.
    pub places: watch::Sender<BTreeSet<IpAddr>>,
    /// Whom to check.
    pub targets: watch::Sender<Targets>,
    /// Who may use which service, as it is in the maps.
    pub access: watch::Sender<Arc<AccessLists>>,
}

/// Runs until `stop`. The maps stay as they are then: traffic goes on.
///
/// # Errors
/// Only when the maps cannot be read at the start; later faults are retried and told in the status.
pub async fn run(
    maps: Box<dyn Maps>,
    options: Options,
    mut inputs: Inputs,
    outputs: Outputs,
    stop: CancellationToken,
) -> Result<(), MapError> {
    let clock = || tokio::time::Instant::now().into_std();
    let debounce = options.debounce;
    let wishes = options.wishes.clone();
    let policy = inputs.policy.borrow_and_update().clone();
    let mut reconciler = Reconciler::new(maps, options, policy, clock())?;
    reconciler.set_topology(&inputs.topology.borrow_and_update());
    let mut keeper = Keeper::new(wishes, reconciler.heard.version());
    let (mut pass_at, mut held_until) = (Some(clock()), clock());
    // The first lists are told whatever they are: the agent before this one may have ended before it acted on them.
    let mut access = None;
    let (mut status_at, mut status_free) = (None::<Instant>, clock());
    loop {
        let wake = pass_at
            .into_iter()
            .chain(status_at)
            .chain(
                keeper
                    .due(reconciler.heard.version())
                    .map(tokio::time::Instant::into_std),
            )
            .min()
            .unwrap_or_else(|| clock() + RETRY_MAX);
        let mut event = true;
        tokio::select! {
            () = stop.cancelled() => {
                let heard = &reconciler.heard;
                keeper.finish(heard.version(), || Recollection::of(heard)).await;
                return Ok(());
            }
            // A closed channel only means that nobody will say more: what was said stands.
            Some(message) = inputs.inbox.recv() => {
                reconciler.hear(message);
                for _ in 0..BURST {
                    let Ok(message) = inputs.inbox.try_recv() else { break };
                    reconciler.hear(message);
                }
            }
            Ok(()) = inputs.topology.changed() => {
                reconciler.set_topology(&inputs.topology.borrow_and_update());
            }
            Ok(()) = inputs.sweeps.changed() => reconciler.set_sweep(inputs.sweeps.borrow_and_update().clone()),
            Ok(()) = inputs.policy.changed() => reconciler.set_policy(inputs.policy.borrow_and_update().clone()),
            Ok(()) = inputs.surroundings.changed() => {}
            // A number of the status, and nothing to program.
            Ok(()) = inputs.checks.changed() => event = false,
            Some(command) = inputs.commands.recv() => reconciler.command(command, clock()),
            () = tokio::time::sleep_until(wake.into()) => event = false,
        }
        let now = clock();
        if event {
            // Leading edge: at once if the last pass is long enough ago, else when it is; never put off again.
            let at = held_until.max(now);
            pass_at = Some(pass_at.map_or(at, |planned| planned.min(at)));
        }
        if pass_at.is_some_and(|at| at <= now) {
            pass_at = reconciler.pass(&clock);
            held_until = clock() + debounce;
            let changes = reconciler.place_changes();
            outputs.places.send_if_modified(|places| {
                let change = |(ip, wanted)| match wanted {
                    true => places.insert(ip),
                    false => places.remove(&ip),
                };
                changes.into_iter().map(change).fold(false, |any, one| any | one)
            });
            let changes = reconciler.target_changes();
            outputs.targets.send_if_modified(|targets| changes.apply(targets));
            let version = reconciler.programmed.access_version();
            if access != Some(version) {
                access = Some(version);
                outputs
                    .access
                    .send_replace(Arc::new(reconciler.programmed.access_lists()));
            }
        }
        keeper.keep(reconciler.heard.version(), || Recollection::of(&reconciler.heard));
        // Every wake-up may have changed something to tell.
        if status_at.get_or_insert(status_free.max(now)) <= &mut clock() {
            let surroundings = inputs.surroundings.borrow().clone();
            let checks = inputs.checks.borrow().clone();
            let status = reconciler.status(&surroundings, &checks, clock());
            let backends = status.services.iter().map(|s| s.backends.len());
            let upstreams = status.routes.iter().map(|r| r.route.upstreams.len());
            let backends = backends.chain(upstreams).sum::<usize>() as u32;
            outputs.status.send_replace(status);
            (status_at, status_free) = (None, clock() + STATUS_PER_BACKEND * backends);
        }
    }
}
