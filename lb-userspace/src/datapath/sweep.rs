//! Counts live flows, and ends those that have been idle for too long. Nothing depends on it: the programs find out by
//! themselves what has expired, when a packet of it comes or its slot is needed.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use lb_common::{
    addr::{Addr4, Addr16},
    counter::DropReason,
    flow::Address,
    maps::{Meta, ServiceStats, flow_state},
    slot::{SLOTS, Slot, head},
};
use lb_ebpf::table::{age, mapped::timeout};
use nix::time::{ClockId, clock_getres};
use tokio::{sync::watch, task::JoinError};

use super::{
    MapError,
    access::AccessLists,
    batch::{Table, open_program, run_program},
    counters::Counters,
    flow_table::FlowMaps,
    load::{Pins, SWEEP_PROGRAM},
};

/// Shortest packet that the kernel lets an XDP program be run with.
const MIN_PACKET: usize = 64;
/// Rates that Linux can be built with (kernel/Kconfig.hz).
const RATES: [u32; 4] = [100, 250, 300, 1000];
/// Buckets between two looks at the clock and two chances for others to run.
const CHUNK: u32 = 1 << 16;
/// Sweeps that ask the lists after these have changed.
const LOOKS: u32 = 2;
/// Pause between two sweeps for the sake of the lists, in lengths of the first: lists that change all the time leave most of
/// the CPU to others.
const REST: u32 = 3;
/// The longest such pause.
const REST_MAX: Duration = Duration::from_millis(500);

/// What a sweep found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SweepReport {
    /// When it began; by a clock that nobody sets.
    pub started: Instant,
    /// How long it took.
    pub took: Duration,
    /// Live connections by backend id, half-open ones too.
    pub flows_by_backend: BTreeMap<u32, u64>,
    /// Live connections by service id, half-open ones too.
    pub flows_by_service: BTreeMap<u32, u64>,
    /// Live connections.
    pub total: u64,
    /// Of IPv4 and IPv6: those that cannot be evicted.
    pub established: [u64; 2],
    /// Of IPv4 and IPv6: those whose handshake is not finished. They give way when their place is needed.
    pub half_open: [u64; 2],
    /// Connections ended.
    pub expired: u64,
    /// Connections ended because their client may not use the service any more.
    pub denied: u64,
    /// Packets dropped because their service holds its share, since the maps were made, by service id; those with flows
    /// alone.
    pub refused: BTreeMap<u32, u64>,
}

/// Why a sweep failed.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// A map.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The kernel program.
    #[error("the pin of program {SWEEP_PROGRAM} cannot be opened: {0}")]
    Program(io::Error),
    /// The kernel program could not be run.
    #[error("program {SWEEP_PROGRAM} could not be run: {0}")]
    Run(#[from] io::Error),
    /// The flow clock runs at no rate that Linux has.
    #[error("the kernel's coarse clock ticks every {tick:?}: no rate that Linux can be built with")]
    Rate {
        /// Resolution of the coarse clocks, one tick.
        tick: Duration,
    },
    /// The blocking task died.
    #[error("sweep task: {0}")]
    Task(#[from] JoinError),
}

/// Runs sweeps over the pinned maps of one load.
#[derive(Debug)]
pub struct Sweeper {
    program: OwnedFd,
    maps: PathBuf,
    counters: Counters,
}

impl Sweeper {
    /// Opens the pinned program and, once per set of maps, notes the rate of the flow clock.
    pub fn open(pins: &Pins) -> Result<Self, SweepError> {
        let program = open_program(&pins.programs().join(SWEEP_PROGRAM)).map_err(SweepError::Program)?;
        let sweeper = Self {
            program,
            maps: pins.maps(),
            counters: Counters::open(&pins.maps())?,
        };
        let table: Table<u32, Meta> = Table::open(&sweeper.maps, "META")?;
        let meta = table.get(&0)?.unwrap_or_default();
        if meta.hz == 0 {
            let hz = ticks_per_second()?;
            table.put(&0, &Meta { hz, ..meta })?;
        }
        Ok(sweeper)
    }

    /// The flow clock: low 32 bits of jiffies.
    pub fn now(&self) -> Result<u32, SweepError> {
        Ok(self.run(&[0; MIN_PACKET])?)
    }

    /// Ticks of the flow clock per second, as measured when the maps were made.
    pub fn hz(&self) -> Result<u32, SweepError> {
        let table: Table<u32, Meta> = Table::open(&self.maps, "META")?;
        Ok(table.get(&0)?.unwrap_or_default().hz)
    }

    fn run(&self, packet: &[u8]) -> io::Result<u32> {
        loop {
            match run_program(self.program.as_fd(), packet) {
                // A signal, or another test run on this CPU.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                result => return result,
            }
        }
    }

    /// One sweep over both families, which ends the flows of clients that `access` refuses, too. Blocks for some milliseconds
    /// with a million flows: see [`run`].
    pub fn sweep(&self, access: Option<&AccessLists>) -> Result<SweepReport, SweepError> {
        let began = Instant::now();
        let mut report = SweepReport {
            started: began,
            took: Duration::ZERO,
            flows_by_backend: BTreeMap::new(),
            flows_by_service: BTreeMap::new(),
            total: 0,
            established: [0; 2],
            half_open: [0; 2],
            expired: 0,
            denied: 0,
            refused: BTreeMap::new(),
        };
        // Mapped anew each time: the tables would count as this process's memory for as long as they are.
        let flows = FlowMaps::open(&self.maps)?;
        let access = access.filter(|lists| !lists.is_empty());
        self.family::<Addr4>(&flows, access, &mut report)?;
        self.family::<Addr16>(&flows, access, &mut report)?;
        let services: Vec<u32> = report.flows_by_service.keys().copied().collect();
        let refused = |stats: &ServiceStats| stats.drops[DropReason::ServiceShare as usize];
        let counted = self.counters.services(&services)?.into_iter();
        report.refused = counted
            .map(|(id, stats)| (id, refused(&stats)))
            .filter(|(_, refused)| *refused > 0)
            .collect();
        report.took = began.elapsed();
        Ok(report)
    }

    fn family<A: Address>(
        &self,
        flows: &FlowMaps,
        access: Option<&AccessLists>,
        report: &mut SweepReport,
    ) -> Result<(), SweepError> {
        // Ids are small numbers: counting by index is what makes a million flows cheap.
        let (mut by_backend, mut by_service) = (Vec::new(), Vec::new());
        let buckets = flows.buckets::<A>();
        for first in (0..buckets).step_by(CHUNK as usize) {
            let now = self.now()?;
            for id in first * SLOTS as u32..(first + CHUNK).min(buckets) * SLOTS as u32 {
                let Some(slot) = live::<A>(flows, id) else {
                    continue;
                };
                if access.is_some_and(|access| is_denied(access, &slot)) && flows.end::<A>(id, slot.head) {
                    report.denied += 1;
                    continue;
                }
                match judge(flows, id, &slot, now) {
                    Life::Lives if head::flow_state(slot.head) & flow_state::REVERSE == 0 => {
                        bump(&mut by_backend, slot.body.backend_id());
                        bump(&mut by_service, slot.body.service.into());
                        report.total += 1;
                        let state = head::flow_state(slot.head);
                        let family = usize::from(A::V6);
                        report.established[family] += u64::from(flow_state::is_counted(state));
                        report.half_open[family] += u64::from(state & flow_state::ESTABLISHED == 0);
                    }
                    Life::Lives => {}
                    Life::Ended => report.expired += 1,
                }
            }
            std::thread::yield_now();
        }
        for (counts, sums) in [
            (by_backend, &mut report.flows_by_backend),
            (by_service, &mut report.flows_by_service),
        ] {
            for (id, count) in (0_u32..).zip(counts).filter(|(_, count)| *count > 0) {
                *sums.entry(id).or_default() += count;
            }
        }
        Ok(())
    }
}

/// A slot that holds a live flow. Most are told by their heads alone.
fn live<A: Address>(flows: &FlowMaps, id: u32) -> Option<Slot<A>> {
    if !head::is_live(flows.head::<A>(id)?) {
        return None;
    }
    flows.read::<A>(id).filter(|slot| head::is_live(slot.head))
}

/// Whether a slot is the forward one of a client that may not use the service.
fn is_denied<A: Address>(access: &AccessLists, slot: &Slot<A>) -> bool {
    head::flow_state(slot.head) & flow_state::REVERSE == 0
        && !access.admits(slot.body.service.into(), &slot.src.wide())
}

/// What a slot's flow is.
enum Life {
    /// Live, as far as this slot tells.
    Lives,
    /// Ended just now.
    Ended,
}

/// Ends a flow that neither direction was heard of for its idle time, and reverse slots whose flow is gone.
fn judge<A: Address>(flows: &FlowMaps, id: u32, slot: &Slot<A>, now: u32) -> Life {
    let context = flows.context();
    let state = head::flow_state(slot.head);
    let idle = age(now, slot.seen);
    let allowed = context
        .timeouts
        .get(usize::from(slot.body.service))
        .map_or(u32::MAX, |timeouts| {
            timeout(timeouts, state, context.ticks_per_second)
        });
    if idle <= allowed {
        return Life::Lives;
    }
    let partner = live::<A>(flows, slot.body.partner)
        .filter(|partner| head::generation(partner.head) == slot.body.partner_generation());
    if state & flow_state::REVERSE != 0 {
        // Its forward slot is judged when its turn comes; without one nobody else will.
        return if partner.is_none() && flows.end_orphan::<A>(id, slot.head) {
            Life::Ended
        } else {
            Life::Lives
        };
    }
    let idle = partner.map_or(idle, |partner| idle.min(age(now, partner.seen)));
    if idle > allowed && flows.end::<A>(id, slot.head) {
        Life::Ended
    } else {
        Life::Lives
    }
}

/// Adds one to the count of an id.
fn bump(counts: &mut Vec<u64>, id: u32) {
    // An id past every configurable limit is not one of ours, and must not make us allocate by it.
    if id > lb_common::limits::MAX_BACKENDS {
        return;
    }
    if counts.len() <= id as usize {
        counts.resize(id as usize + 1, 0);
    }
    counts[id as usize] += 1;
}

/// Ticks of the flow clock per second. The resolution of the coarse clocks is one tick (kernel/time/posix-timers.c), on
/// an idle machine and on an overloaded one.
fn ticks_per_second() -> Result<u32, SweepError> {
    let tick = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).map_err(io::Error::from)?;
    let tick = Duration::from(tick);
    rate(tick).ok_or(SweepError::Rate { tick })
}

/// The rate whose tick takes so long; the kernel rounds it to nanoseconds.
fn rate(tick: Duration) -> Option<u32> {
    RATES
        .into_iter()
        .find(|hz| (Duration::from_secs(1) / *hz).abs_diff(tick) < Duration::from_micros(1))
}

/// Sweeps every `interval` and publishes what it found, until nobody listens any more. When `access` changes it sweeps at once,
/// for the flows of clients that are refused from now on; and the sweep after that one looks for them again, for the sake of
/// flows that were being made meanwhile.
pub async fn run(
    sweeper: Sweeper,
    interval: Duration,
    mut access: watch::Receiver<Arc<AccessLists>>,
    reports: watch::Sender<Option<SweepReport>>,
) {
    let sweeper = Arc::new(sweeper);
    let mut timer = tokio::time::interval(interval);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // How often the lists are still to be asked, and when the next sweep for their sake may be.
    let (mut looks, mut free_at) = (0, tokio::time::Instant::now());
    loop {
        let mut by_change = false;
        tokio::select! {
            _ = timer.tick() => {}
            Ok(()) = access.changed() => {
                (looks, by_change) = (LOOKS, true);
                tokio::time::sleep_until(free_at).await;
            }
            () = reports.closed() => return,
        }
        let lists = (looks > 0).then(|| Arc::clone(&access.borrow()));
        let shared = Arc::clone(&sweeper);
        let result = tokio::task::spawn_blocking(move || shared.sweep(lists.as_deref())).await;
        match result.map_err(SweepError::from).and_then(|inner| inner) {
            Ok(report) => {
                looks = looks.saturating_sub(1);
                if report.denied > 0 {
                    tracing::info!(flows = report.denied, "ended: their clients are denied now");
                }
                if by_change {
                    free_at = tokio::time::Instant::now() + (report.took * REST).min(REST_MAX);
                }
                reports.send_replace(Some(report));
            }
            Err(e) => tracing::warn!(error = %e, "sweep failed; the next one follows in {interval:?}"),
        }
    }
}

/// The rate of the flow clock of pinned maps, for those who only read.
pub fn pinned_hz(maps: &Path) -> Result<u32, MapError> {
    Ok(Table::<u32, Meta>::open(maps, "META")?
        .get(&0)?
        .unwrap_or_default()
        .hz)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_recognised_and_nonsense_is_not() {
        assert_eq!(rate(Duration::from_millis(10)), Some(100));
        assert_eq!(rate(Duration::from_millis(4)), Some(250));
        assert_eq!(rate(Duration::from_nanos(3_333_333)), Some(300));
        assert_eq!(rate(Duration::from_millis(1)), Some(1000));
        assert_eq!(rate(Duration::from_nanos(1)), None);
        assert_eq!(rate(Duration::ZERO), None);
    }
}
