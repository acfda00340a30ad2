//! The loop that owns the maps: hears sources, the network, sweeps and the operator; plans; applies; tells.
//!
//! [`Reconciler`] is the whole of it without waiting: what it does depends on what it was given and on the time it is
//! told. [`run`] is the loop around it.

mod memory;
mod operator;
mod places;
mod pressure;
mod recollection;
mod status;
mod task;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use lb_common::maps::backend_state;
use tracing::{error, info, warn};

use memory::Memory;
pub use operator::{Command, CommandError};
use pressure::Pressure;
use recollection::Recollection;
pub use status::Surroundings;
pub use task::{Inputs, Outputs, run};

use crate::{
    datapath::{MapError, Maps, Topology},
    desired::{Drains, Heard, OPERATOR_SOURCE, TargetChanges},
    model::{Rejection, ServiceAddress},
    plan::{Group, Inputs as PlanInputs, Plan, Policy, Programmed, Scope, Sweep, plan},
    source::{Message, SourceId, Update},
};

/// First wait after a failed write; doubled with every further failure.
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// Longest wait after a failed write.
const RETRY_MAX: Duration = Duration::from_secs(10);

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
    /// Where is kept until when leaving backends drain; `None` starts their time anew with every agent.
    pub deadlines: Option<PathBuf>,
    /// Where is kept what the sources wish; `None`: a source that is silent at the start has wished nothing.
    pub wishes: Option<PathBuf>,
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
            deadlines: None,
            wishes: None,
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
    pressure: Pressure,
    /// Addresses without a place: how long their backends wait for one.
    asked: BTreeMap<IpAddr, Instant>,
    /// Addresses of backends that drain or are dead, as last told.
    waiting_places: BTreeSet<IpAddr>,
    /// What the file of deadlines holds.
    remembered: Memory,
    all_dirty: bool,
    dirty: BTreeSet<ServiceAddress>,
    rejections: BTreeMap<ServiceAddress, Vec<Rejection>>,
    faults: Vec<String>,
    /// Passes in a row with a failed write.
    failures: u32,
    may_remove: bool,
    /// Every source has been read.
    all_read: bool,
    /// Backends that were found serving and that nobody has wished for yet, until every source has been read.
    unclaimed: BTreeSet<(ServiceAddress, SocketAddr)>,
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
            pressure: Pressure::default(),
            asked: BTreeMap::new(),
            waiting_places: BTreeSet::new(),
            remembered: Memory::default(),
            all_dirty: true,
            dirty: BTreeSet::new(),
            rejections: BTreeMap::new(),
            faults: Vec::new(),
            failures: 0,
            may_remove: false,
            all_read: false,
            unclaimed: BTreeSet::new(),
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
        for (address, entry) in &this.programmed.services {
            for (backend, id) in &entry.live {
                let serves = this.programmed.slots[id].record.state == backend_state::ACTIVE;
                this.heard.adopt(*address, *backend, serves);
                if serves {
                    this.unclaimed.insert((*address, *backend));
                }
            }
        }
        if let Some(path) = &this.options.drains {
            match Drains::load(path) {
                Ok(drains) => this.heard.set_drains(drains),
                Err(fault) => error!("{fault}"),
            }
        }
        if let Some(path) = &this.options.deadlines
            && let Err(fault) = Memory::recall(path, &mut this.programmed, now, memory::uptime())
        {
            error!("{fault}");
        }
        this.heard
            .set_retention(this.policy.retention.clone(), SystemTime::now());
        this.recall();
        Ok(this)
    }

    /// Lets the last word of every source stand that still is one. What somebody wished for is no silent stranger's: it goes
    /// when its own source withdraws it, or is no more. All else that was found may be.
    fn recall(&mut self) {
        let Some(path) = &self.options.wishes else {
            return;
        };
        let Recollection { objects, services } = recollection::load(path)
            .unwrap_or_else(|fault| {
                error!("{fault}");
                None
            })
            .unwrap_or_default();
        self.heard.restore_remembered(services, SystemTime::now());
        for (source, objects) in objects {
            for wish in objects.iter().flat_map(|object| &object.services) {
                for backend in &wish.backends {
                    self.unclaimed.remove(&(wish.address, backend.address));
                }
            }
            // The operator's file is always there to be read.
            if source.0 != OPERATOR_SOURCE && self.options.sources.contains(&source) {
                self.heard.recall(&source, objects);
            }
        }
    }

    /// Takes in what a source says.
    pub fn hear(&mut self, message: Message) {
        self.waiting_since.get_or_insert_with(Instant::now);
        if message.update == Update::End {
            // It will never be read.
            self.options.sources.retain(|source| *source != message.source);
        }
        self.heard.absorb(message);
    }

    /// Whom to check from now on, and whom no more, since the last call.
    pub fn target_changes(&mut self) -> TargetChanges {
        self.heard.take_target_changes()
    }

    /// Takes in what a sweep counted.
    pub fn set_sweep(&mut self, sweep: Sweep) {
        let limits = pressure::Limits {
            rated: self.rated_flows(),
            share: self.programmed.settings().flow_share,
            percent: self.policy.flow_share,
        };
        let (programmed, services) = (&self.programmed, &self.heard.desired().services);
        self.pressure.judge(&sweep, limits, |id| {
            let address = programmed.service_address(id)?;
            Some((services.get(&address)?.service.name.clone(), address))
        });
        self.sweep = sweep;
    }

    /// Flows that the tables of IPv4 and IPv6 are made for.
    fn rated_flows(&self) -> [u32; 2] {
        let capacities = self.maps.capacities();
        [capacities.flows4, capacities.flows6]
    }

    /// Takes in a changed configuration.
    pub fn set_policy(&mut self, policy: Policy) {
        self.all_dirty |= policy != self.policy;
        if policy.retention != self.policy.retention {
            self.heard
                .set_retention(policy.retention.clone(), SystemTime::now());
        }
        self.policy = policy;
    }

    /// Plans and applies once. Returns when the next pass is due without any event.
    pub fn pass(&mut self, clock: &dyn Fn() -> Instant) -> Option<Instant> {
        let now = clock();
        let today = SystemTime::now();
        let changed = self.heard.refresh(today);
        self.claim(&changed);
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
            unclaimed: &self.unclaimed,
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
        self.remember(now);

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
        let expiry = self.heard.next_expiry();
        let expiry = expiry.map(|at| now + at.duration_since(today).unwrap_or_default());
        [next, retry, source_wait, expiry, Some(self.resync_at)]
            .into_iter()
            .flatten()
            .min()
    }

    /// Keeps the deadlines for the agent after this one, when they have changed.
    fn remember(&mut self, now: Instant) {
        let Some(path) = &self.options.deadlines else {
            return;
        };
        let memory = Memory::of(&self.programmed);
        if memory == self.remembered {
            return;
        }
        match memory.save(path, now, memory::uptime()) {
            Ok(()) => self.remembered = memory,
            // The next change tries again; until then a restart only drains for longer.
            Err(fault) => warn!("{fault}"),
        }
    }

    /// What is wished for now may go when it no longer is.
    fn claim(&mut self, changed: &BTreeSet<ServiceAddress>) {
        if self.unclaimed.is_empty() {
            return;
        }
        let services = &self.heard.desired().services;
        for (address, wanted) in changed
            .iter()
            .filter_map(|address| services.get_key_value(address))
        {
            for backend in &wanted.service.backends {
                self.unclaimed.remove(&(*address, backend.address));
            }
        }
    }

    /// Decides whether what nobody wishes may go.
    fn judge_sources(&mut self, now: Instant) {
        if self.all_read {
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
        if !self.may_remove && over && !silent.is_empty() {
            warn!(sources = ?silent, "not read in time: what they last wished, or may have, stays until they are");
        }
        self.all_read = silent.is_empty();
        if self.all_read {
            self.unclaimed.clear();
            self.heard.forget_adopted();
        }
        if self.all_read || (over && !self.may_remove) {
            self.may_remove = true;
            self.all_dirty = true;
            self.heard.settle();
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
