//! The checks as they run: one task that knows what is due, and a bounded number of probes at once.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap, HashMap},
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, interval, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    By, Judge, Key, Report, SOURCE, Standing, Target, Targets, Verdict, WHOLE, pace,
    probe::{Outcome, Probe},
};
use crate::source::{Message, SourceId, Update};

/// Checks under way at once: half the files that a process may open by default.
pub const AT_ONCE: usize = 512;
/// Time between two reports, unless there is a new fault to tell.
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// Checks what is on `targets`, and sends what comes of it to the inbox, until `stop` or until nobody listens.
pub async fn run<P: Probe>(
    probe: P,
    mut targets: watch::Receiver<Targets>,
    inbox: mpsc::Sender<Message>,
    report: watch::Sender<Report>,
    stop: CancellationToken,
) {
    let mut checks = Checks::new(probe);
    let mut tell = interval(REPORT_EVERY);
    checks.follow(&targets.borrow_and_update());
    loop {
        checks.start();
        if !checks.verdicts.is_empty() {
            let update = Update::Verdicts(std::mem::take(&mut checks.verdicts));
            let source = SourceId(SOURCE.into());
            if inbox.send(Message { source, update }).await.is_err() {
                return;
            }
        }
        if std::mem::take(&mut checks.news) {
            checks.report(&report);
        }
        let next = checks.next();
        tokio::select! {
            () = stop.cancelled() => return,
            changed = targets.changed() => match changed {
                Ok(()) => checks.follow(&targets.borrow_and_update()),
                Err(_) => return,
            },
            Some(done) = checks.running.join_next() => {
                checks.conclude(done);
                while let Some(done) = checks.running.try_join_next() {
                    checks.conclude(done);
                }
            }
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            _ = tell.tick() => checks.report(&report),
        }
    }
}

/// What happens to a backend at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// It is checked.
    Probe,
    /// Its share grows.
    Step,
}

/// A time at which something is due. Only the last one of its kind counts for a backend.
type Due = Reverse<(Instant, u64, What, Key)>;

/// What a probe brings back: whom, of which generation, what.
type Done = (Key, u64, Outcome);

struct Checks<P> {
    probe: P,
    entries: HashMap<Key, Entry>,
    due: BinaryHeap<Due>,
    running: JoinSet<Done>,
    serial: u64,
    verdicts: Vec<Verdict>,
    counted: Report,
    /// There is something in the report that should not wait.
    news: bool,
}

/// One backend.
struct Entry {
    target: Target,
    judge: Judge,
    known: Instant,
    /// Serial numbers of what is due for it: its next check, the next step of its slow start.
    due: [u64; 2],
    checks: u64,
    tenths: u8,
    /// What the last verdict said, and since when; `None` before the first.
    said: Option<(String, SystemTime)>,
    fault: Option<String>,
}

// === impl Checks ===

impl<P: Probe> Checks<P> {
    fn new(probe: P) -> Self {
        Self {
            probe,
            entries: HashMap::new(),
            due: BinaryHeap::new(),
            running: JoinSet::new(),
            serial: 0,
            verdicts: Vec::new(),
            counted: Report::default(),
            news: false,
        }
    }

    /// Takes in whom to check now.
    fn follow(&mut self, targets: &Targets) {
        let active = &targets.active;
        self.entries.retain(|key, entry| {
            active
                .get(key)
                .is_some_and(|target| target.generation == entry.target.generation)
        });
        let differs = |(key, target): &(&Key, &Target)| {
            self.entries
                .get(key)
                .is_none_or(|entry| entry.target.check != target.check)
        };
        let fresh: Vec<(Key, Target)> = active
            .iter()
            .filter(differs)
            .map(|(key, target)| (*key, target.clone()))
            .collect();
        let (count, now) = (fresh.len(), Instant::now());
        for (key, target) in fresh {
            let wait = pace::first(&key, count, target.check.timing.interval);
            match self.entries.get_mut(&key) {
                // Checked otherwise from now on; what it was held to be stands until then.
                Some(entry) => entry.target = target,
                None => drop(self.entries.insert(key, Entry::new(target, now))),
            }
            self.schedule(key, What::Probe, now + wait);
        }
    }

    fn schedule(&mut self, key: Key, what: What, at: Instant) {
        self.serial += 1;
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.due[what as usize] = self.serial;
            self.due.push(Reverse((at, self.serial, what, key)));
        }
    }

    /// When [`Checks::start`] has something to do: nothing that waits for a place is due before a probe ends.
    fn next(&self) -> Option<Instant> {
        let Reverse((at, ..)) = self.due.peek()?;
        (self.running.len() < AT_ONCE).then_some(*at)
    }

    /// Starts what is due, as far as there is room.
    fn start(&mut self) {
        let now = Instant::now();
        while self.running.len() < AT_ONCE {
            let Some(Reverse((_, serial, what, key))) =
                self.due.peek().copied().filter(|Reverse((at, ..))| *at <= now)
            else {
                return;
            };
            self.due.pop();
            let Some(entry) = self
                .entries
                .get_mut(&key)
                .filter(|entry| entry.due[what as usize] == serial)
            else {
                continue;
            };
            match what {
                What::Probe => {
                    let (probe, check) = (self.probe.clone(), entry.target.check.clone());
                    let generation = entry.target.generation;
                    entry.checks += 1;
                    self.running
                        .spawn(async move { (key, generation, probe.probe(key.backend, check).await) });
                }
                What::Step => self.step(key, now),
            }
        }
    }

    /// The next tenth of a slow start.
    fn step(&mut self, key: Key, now: Instant) {
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        entry.tenths = (entry.tenths + 1).min(WHOLE);
        let (again, wait) = (
            entry.tenths < WHOLE,
            pace::step(entry.target.check.timing.slow_start),
        );
        self.verdicts.extend(entry.verdict(key));
        if again {
            self.schedule(key, What::Step, now + wait);
        }
    }

    /// Takes in what a probe brings back.
    fn conclude(&mut self, done: Result<Done, tokio::task::JoinError>) {
        let Ok((key, generation, outcome)) = done else {
            // A probe that panicked has no result; its backend would never be checked again.
            tracing::error!("a health check has panicked: every backend is checked anew");
            let keys: Vec<Key> = self.entries.keys().copied().collect();
            for key in keys {
                self.schedule(key, What::Probe, Instant::now());
            }
            return;
        };
        match &outcome {
            Outcome::Passed(_) => self.counted.passed += 1,
            Outcome::Failed(_) => self.counted.failed += 1,
            Outcome::Impossible(_) => self.counted.impossible += 1,
        }
        let now = Instant::now();
        let Some(entry) = self
            .entries
            .get_mut(&key)
            .filter(|entry| entry.target.generation == generation)
        else {
            return;
        };
        let before = entry.fault.take();
        let slow_start = entry.target.check.timing.slow_start;
        let begins = entry.take_in(outcome, now, slow_start);
        self.news |= before != entry.fault;
        if begins.is_some() {
            self.verdicts.extend(entry.verdict(key));
        }
        let wait = pace::next(
            &key,
            entry.checks,
            entry.judge.interval(&entry.target.check.timing),
        );
        self.schedule(key, What::Probe, now + wait);
        if begins == Some(true) {
            self.schedule(key, What::Step, now + pace::step(slow_start));
        }
    }

    fn report(&self, to: &watch::Sender<Report>) {
        let faults: BTreeSet<String> = self.entries.values().filter_map(|e| e.fault.clone()).collect();
        let report = Report {
            targets: self.entries.len(),
            running: self.running.len(),
            faults: faults
                .into_iter()
                .map(|fault| format!("health checks: {fault}"))
                .collect(),
            ..self.counted.clone()
        };
        to.send_if_modified(|old| {
            // The one number of somebody else.
            let report = Report {
                ejected: old.ejected,
                ..report
            };
            let differs = *old != report;
            *old = report;
            differs
        });
    }
}

// === impl Entry ===

impl Entry {
    fn new(target: Target, now: Instant) -> Self {
        Self {
            judge: Judge::new(target.before),
            target,
            known: now,
            due: [0; 2],
            checks: 0,
            tenths: WHOLE,
            said: None,
            fault: None,
        }
    }

    /// Takes in a result. `None`: there is nothing to tell; else whether a slow start begins.
    fn take_in(&mut self, outcome: Outcome, now: Instant, slow_start: Duration) -> Option<bool> {
        let (passed, text) = match outcome {
            Outcome::Passed(text) => (true, text),
            Outcome::Failed(text) => (false, text),
            Outcome::Impossible(text) => {
                let first = self.said.is_none() && self.judge.standing() == Standing::Open;
                if first {
                    self.said = Some((format!("cannot be checked: {text}"), SystemTime::now()));
                }
                self.fault = Some(text);
                return first.then_some(false);
            }
        };
        let changed = self
            .judge
            .observe(passed, &self.target.check.timing, now.duration_since(self.known));
        let standing = self.judge.standing();
        let confirmed = self.said.is_none() && (passed == (standing == Standing::Fit));
        if !changed && !confirmed {
            return None;
        }
        let text = match standing {
            Standing::Open => format!("starting ({text})"),
            Standing::Fit | Standing::Unfit => text,
        };
        self.said = Some((text, SystemTime::now()));
        let begins = changed && standing == Standing::Fit && !slow_start.is_zero();
        self.tenths = if begins { 1 } else { WHOLE };
        if changed {
            // A step of a slow start that was cut short is not due any more.
            self.due[What::Step as usize] = 0;
        }
        Some(begins)
    }

    fn verdict(&self, key: Key) -> Option<Verdict> {
        let (reason, since) = self.said.clone()?;
        Some(Verdict {
            key,
            generation: self.target.generation,
            by: By::Check,
            fit: self.judge.standing() == Standing::Fit,
            tenths: self.tenths,
            reason,
            since,
        })
    }
}

#[cfg(test)]
mod tests;
