//! The loop that owns the maps: hears sources, the network, sweeps and the operator; plans; applies; tells.
//!
//! [`Reconciler`] is the whole of it without waiting: what it does depends on what it was given and on the time it is
//! told. [`run`] is the loop around it.

mod status;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

pub use status::Surroundings;

use crate::{
    datapath::{MapError, Maps, Place, Topology},
    desired::{Drains, DrainsError, Heard, names},
    model::{Backend, Rejection, ServiceAddress},
    plan::{Group, Inputs as PlanInputs, Plan, Policy, Programmed, Scope, Sweep, plan},
    source::{Message, SourceId},
    status::Status,
};

/// First wait after a failed write; doubled with every further failure.
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// Longest wait after a failed write.
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Pause between two statuses for every backend in them: telling must not cost more than doing.
const STATUS_PER_BACKEND: Duration = Duration::from_micros(10);
/// Messages taken from the inbox in one go, so that a flood cannot keep a pass from happening.
const BURST: usize = 1024;

/// How the reconciler behaves; fixed while it runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// Sources whose first complete list is waited for before anything is removed.
    pub sources: Vec<SourceId>,
    /// How long to wait for them.
    pub source_wait: Duration,
    /// How long a new backend waits for the topology to say where it is.
    pub place_wait: Duration,
    /// The first update is acted on at once; what follows within this time is taken together.
    pub debounce: Duration,
    /// How often the maps are read back and compared.
    pub resync_every: Duration,
    /// Where the operator's drains are kept; `None` forgets them at the end.
    pub drains: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            sources: Vec::new(),
            source_wait: Duration::from_secs(30),
            place_wait: Duration::from_secs(1),
            debounce: Duration::from_millis(20),
            resync_every: Duration::from_secs(180),
            drains: None,
        }
    }
}

/// What the operator asks for.
#[derive(Debug)]
pub enum Command {
    /// Drain the backends that this names; answers how many there are now. Old flows may go on for `deadline`, or
    /// else for the drain time of each backend.
    Drain {
        backend: String,
        deadline: Option<Duration>,
        reply: oneshot::Sender<Result<usize, CommandError>>,
    },
    /// Let them serve again; answers how many drains were lifted.
    Undrain {
        backend: String,
        reply: oneshot::Sender<Result<usize, CommandError>>,
    },
    /// Read the maps back and plan everything anew.
    Resync {
        reply: oneshot::Sender<Result<usize, CommandError>>,
    },
}

/// Why a command was refused.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// Nothing has that name.
    #[error(
        "no backend is named {0}: give a name, an address or address:port as `weir status` shows it, or service/ and \
         one of them"
    )]
    Unknown(String),
    /// It was done, but a restart will undo it.
    #[error(transparent)]
    NotKept(#[from] DrainsError),
    /// The maps could not be read.
    #[error(transparent)]
    Maps(#[from] MapError),
}

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
    let policy = inputs.policy.borrow_and_update().clone();
    let mut reconciler = Reconciler::new(maps, options, policy, clock())?;
    reconciler.set_topology(inputs.topology.borrow_and_update().clone());
    let (mut pass_at, mut held_until) = (Some(clock()), clock());
    let (mut status_at, mut status_free) = (None::<Instant>, clock());
    loop {
        let wake = pass_at
            .into_iter()
            .chain(status_at)
            .min()
            .unwrap_or_else(|| clock() + RETRY_MAX);
        let mut event = true;
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            // A closed channel only means that nobody will say more: what was said stands.
            Some(message) = inputs.inbox.recv() => {
                reconciler.hear(message);
                for _ in 0..BURST {
                    let Ok(message) = inputs.inbox.try_recv() else { break };
                    reconciler.hear(message);
                }
            }
            Ok(()) = inputs.topology.changed() => {
                reconciler.set_topology(inputs.topology.borrow_and_update().clone());
            }
            Ok(()) = inputs.sweeps.changed() => reconciler.set_sweep(inputs.sweeps.borrow_and_update().clone()),
            Ok(()) = inputs.policy.changed() => reconciler.set_policy(inputs.policy.borrow_and_update().clone()),
            Ok(()) = inputs.surroundings.changed() => {}
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
            let places = reconciler.wanted_places();
            outputs
                .places
                .send_if_modified(|old| std::mem::replace(old, places.clone()) != places);
        }
        // Every wake-up may have changed something to tell.
        if status_at.get_or_insert(status_free.max(now)) <= &mut clock() {
            let surroundings = inputs.surroundings.borrow().clone();
            let status = reconciler.status(&surroundings, clock());
            let backends = status
                .services
                .iter()
                .map(|s| s.backends.len() as u32)
                .sum::<u32>();
            outputs.status.send_replace(status);
            (status_at, status_free) = (None, clock() + STATUS_PER_BACKEND * backends);
        }
    }
}

/// The reconciler without its waiting.
pub struct Reconciler {
    maps: Box<dyn Maps>,
    options: Options,
    policy: Policy,
    heard: Heard,
    programmed: Programmed,
    topology: Topology,
    sweep: Sweep,
    /// Addresses without a place: how long their backends wait for one.
    asked: BTreeMap<IpAddr, Instant>,
    all_dirty: bool,
    dirty: BTreeSet<ServiceAddress>,
    rejections: BTreeMap<ServiceAddress, Vec<Rejection>>,
    faults: Vec<String>,
    /// Passes in a row with a failed write.
    failures: u32,
    may_remove: bool,
    /// Some pass has programmed everything that was wished for then.
    settled: bool,
    started: Instant,
    resync_at: Instant,
    /// When the oldest update that is not programmed yet came.
    waiting_since: Option<Instant>,
    last_commit: Option<SystemTime>,
    last_commit_us: u64,
}

// === impl Reconciler ===

impl Reconciler {
    /// Adopts what the maps hold.
    ///
    /// # Errors
    /// When the maps cannot be read.
    pub fn new(
        maps: Box<dyn Maps>,
        options: Options,
        policy: Policy,
        now: Instant,
    ) -> Result<Self, MapError> {
        let programmed = Programmed::adopt(&maps.dump()?, now);
        let mut this = Self {
            heard: Heard::default(),
            programmed,
            topology: Topology::default(),
            sweep: Sweep::default(),
            asked: BTreeMap::new(),
            all_dirty: true,
            dirty: BTreeSet::new(),
            rejections: BTreeMap::new(),
            faults: Vec::new(),
            failures: 0,
            may_remove: false,
            settled: false,
            started: now,
            resync_at: now + options.resync_every,
            waiting_since: None,
            last_commit: None,
            last_commit_us: 0,
            maps,
            options,
            policy,
        };
        if let Some(path) = &this.options.drains {
            match Drains::load(path) {
                Ok(drains) => this.heard.set_drains(drains),
                Err(fault) => error!("{fault}"),
            }
        }
        Ok(this)
    }

    /// Takes in what a source says.
    pub fn hear(&mut self, message: Message) {
        self.waiting_since.get_or_insert_with(Instant::now);
        self.heard.absorb(message);
    }

    /// Takes in how the network is now.
    pub fn set_topology(&mut self, topology: Topology) {
        let old = std::mem::replace(&mut self.topology, topology);
        let new = &self.topology;
        let network = |t: &Topology| (t.devices.clone(), t.node_addresses.clone(), t.loopback_ifindex);
        if network(&old) != network(new) {
            self.all_dirty = true;
        }
        let answered = new
            .places
            .iter()
            .filter(|(ip, place)| old.places.get(ip) != Some(place));
        let forgotten = old.places.keys().filter(|ip| !new.places.contains_key(ip));
        for ip in answered.map(|(ip, _)| ip).chain(forgotten) {
            self.dirty.extend(self.heard.services_at(*ip));
        }
        self.asked.retain(|ip, _| !new.places.contains_key(ip));
    }

    /// Takes in what a sweep counted.
    pub fn set_sweep(&mut self, sweep: Sweep) {
        self.sweep = sweep;
    }

    /// Takes in a changed configuration.
    pub fn set_policy(&mut self, policy: Policy) {
        self.all_dirty |= policy != self.policy;
        self.policy = policy;
    }

    /// Does what the operator asks, with the next pass, and answers.
    pub fn command(&mut self, command: Command, now: Instant) {
        let (reply, result) = match command {
            Command::Drain {
                backend,
                deadline,
                reply,
            } => (reply, self.drain(backend, deadline)),
            Command::Undrain { backend, reply } => (reply, self.undrain(&backend)),
            Command::Resync { reply } => {
                let result = self.resync(now).map(|()| self.programmed.services.len());
                (reply, result.map_err(Into::into))
            }
        };
        // The operator may have gone away without waiting for the answer.
        let _ = reply.send(result);
    }

    fn drain(&mut self, selector: String, deadline: Option<Duration>) -> Result<usize, CommandError> {
        let count = self.named(&selector).count();
        if count == 0 {
            return Err(CommandError::Unknown(selector));
        }
        let mut drains = self.heard.drains().clone();
        drains.0.insert(selector, deadline);
        self.keep_drains(drains)?;
        Ok(count)
    }

    fn undrain(&mut self, selector: &str) -> Result<usize, CommandError> {
        let mut drains = self.heard.drains().clone();
        let before = drains.0.len();
        drains.0.retain(|drain, _| {
            drain != selector
                && !self
                    .named(selector)
                    .any(|(service, backend)| names(drain, service, backend))
        });
        let lifted = before - drains.0.len();
        if lifted == 0 {
            return Err(CommandError::Unknown(selector.into()));
        }
        self.keep_drains(drains)?;
        Ok(lifted)
    }

    /// The backends that a selector names, each with the name of its service.
    fn named(&self, selector: &str) -> impl Iterator<Item = (&str, &Backend)> {
        let services = self.heard.desired().services.values().map(|w| &*w.service);
        services
            .flat_map(|service| service.backends.iter().map(|b| (service.name.as_str(), b)))
            .filter(move |(service, backend)| names(selector, service, backend))
    }

    fn keep_drains(&mut self, drains: Drains) -> Result<(), DrainsError> {
        self.heard.set_drains(drains);
        match &self.options.drains {
            Some(path) => self.heard.drains().save(path),
            None => Ok(()),
        }
    }

    /// Plans and applies once. Returns when the next pass is due without any event.
    pub fn pass(&mut self, clock: &dyn Fn() -> Instant) -> Option<Instant> {
        let now = clock();
        let changed = self.heard.refresh();
        self.ask_for_places(&changed, now);
        self.dirty.extend(changed);
        self.judge_sources(now);
        // After a failed write it is not known what the maps hold: the answer alone may have been lost.
        if (self.failures > 0 || now >= self.resync_at)
            && let Err(fault) = self.resync(now)
        {
            return Some(self.failed(vec![fault.to_string()], now));
        }

        let capacities = self.maps.capacities();
        let inputs = PlanInputs {
            desired: self.heard.desired(),
            topology: &self.topology,
            capacities: &capacities,
            policy: &self.policy,
            sweep: &self.sweep,
            asked: &self.asked,
            may_remove: self.may_remove,
            now,
        };
        let dirty = std::mem::take(&mut self.dirty);
        let scope = if std::mem::take(&mut self.all_dirty) {
            Scope::All
        } else {
            Scope::Some(&dirty)
        };
        let mut plan = plan(&self.programmed, &inputs, scope);
        self.keep_rejections(&mut plan);
        self.dirty = std::mem::take(&mut plan.waiting);
        let next = plan.next_deadline;
        let faults = self.apply(plan, clock);

        let retry = if faults.is_empty() {
            self.failures = 0;
            self.faults.clear();
            let places_known = !self.asked.values().any(|until| *until > now);
            self.settled |= self.may_remove && places_known && self.topology.loopback_ifindex != 0;
            None
        } else {
            Some(self.failed(faults, now))
        };
        let source_wait = (!self.may_remove).then_some(self.started + self.options.source_wait);
        [next, retry, source_wait, Some(self.resync_at)]
            .into_iter()
            .flatten()
            .min()
    }

    /// Addresses whose place the topology shall find: of all desired backends, and of those whose flows still go on.
    pub fn wanted_places(&self) -> BTreeSet<IpAddr> {
        let mut wanted: BTreeSet<IpAddr> = self.heard.addresses().collect();
        wanted.extend(self.programmed.waiting_slots().map(|slot| slot.address.ip()));
        wanted
    }

    fn ask_for_places(&mut self, changed: &BTreeSet<ServiceAddress>, now: Instant) {
        let until = now + self.options.place_wait;
        let services = &self.heard.desired().services;
        let backends = changed
            .iter()
            .filter_map(|a| services.get(a))
            .flat_map(|w| &w.service.backends);
        for ip in backends
            .map(|b| b.address.ip())
            .filter(|ip| !self.topology.places.contains_key(ip))
        {
            self.asked.entry(ip).or_insert(until);
        }
        if !changed.is_empty() {
            self.asked
                .retain(|ip, _| self.heard.services_at(*ip).next().is_some());
        }
    }

    /// Decides whether what nobody wishes may go.
    fn judge_sources(&mut self, now: Instant) {
        if self.may_remove {
            return;
        }
        let silent: Vec<&str> = self
            .options
            .sources
            .iter()
            .filter(|s| !self.heard.has_read(s))
            .map(|s| s.0.as_str())
            .collect();
        let over = now >= self.started + self.options.source_wait;
        if silent.is_empty() || over {
            if !silent.is_empty() {
                warn!(sources = ?silent, "not read in time: what only they wish for drains now");
            }
            self.may_remove = true;
            self.all_dirty = true;
        }
    }

    fn resync(&mut self, now: Instant) -> Result<(), MapError> {
        self.programmed.resync(&self.maps.dump()?, now);
        self.resync_at = now + self.options.resync_every;
        self.all_dirty = true;
        Ok(())
    }

    fn keep_rejections(&mut self, plan: &mut Plan) {
        for (address, new) in std::mem::take(&mut plan.rejections) {
            let old = self.rejections.remove(&address).unwrap_or_default();
            for rejection in new.iter().filter(|r| !old.contains(r)) {
                warn!("{rejection}");
            }
            if !new.is_empty() {
                self.rejections.insert(address, new);
            }
        }
    }

    /// Applies step by step and records each success. Returns what failed.
    fn apply(&mut self, plan: Plan, clock: &dyn Fn() -> Instant) -> Vec<String> {
        for note in &plan.notes {
            self.programmed.note(note);
        }
        let mut faults = Vec::new();
        let mut failed: BTreeSet<Group> = BTreeSet::new();
        let steps = plan.steps.len();
        for step in plan.steps {
            let skipped = match step.group {
                Group::Last => !failed.is_empty(),
                group => failed.contains(&Group::Shared) || failed.contains(&group),
            };
            if skipped {
                continue;
            }
            match self.maps.apply(&step.op) {
                Ok(()) => self.programmed.record(&step.op, clock()),
                Err(fault) => {
                    failed.insert(step.group);
                    faults.push(match step.group {
                        Group::Service(address) => format!("service {address}: {fault}"),
                        _ => fault.to_string(),
                    });
                }
            }
        }
        let since = self.waiting_since.take();
        if steps > 0 && faults.is_empty() {
            self.last_commit = Some(SystemTime::now());
            self.last_commit_us = since.map_or(0, |since| since.elapsed().as_micros() as u64);
            info!(writes = steps, took_us = self.last_commit_us, "programmed");
        }
        faults
    }

    /// Remembers faults, and says when to try again.
    fn failed(&mut self, faults: Vec<String>, now: Instant) -> Instant {
        for fault in faults.iter().filter(|fault| !self.faults.contains(fault)) {
            error!("{fault}; will be tried again");
        }
        self.faults = faults;
        let wait = RETRY_FIRST * 2u32.pow(self.failures.min(10));
        self.failures += 1;
        now + wait.min(RETRY_MAX)
    }
}
