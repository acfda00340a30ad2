//! Counts live flows and has the kernel remove expired ones. Only the kernel removes: it looks again at both
//! directions of a connection, so a packet that arrives between our look and its own saves the flow.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aya::Pod;
use lb_common::{
    addr::{Addr4, Addr16},
    flow::{Address, FlowKey},
    maps::{Flow, Meta, Timeouts, flow_state},
};
use lb_ebpf::{
    sweep::{BATCH, HEADER},
    tables::{partner_key, timeout},
};
use nix::time::{ClockId, clock_getres};
use tokio::{sync::watch, task::JoinError};

use super::{
    MapError,
    batch::{Cursor, Table, open_program, run_program},
    load::{Pins, SWEEP_PROGRAM},
};

/// Entries read by one call: 0.6 MiB of flows, a few milliseconds.
const CHUNK: usize = 8192;
/// Shortest packet that the kernel lets an XDP program be run with.
const MIN_PACKET: usize = 64;
/// Rates that Linux can be built with (kernel/Kconfig.hz).
const RATES: [u32; 4] = [100, 250, 300, 1000];

/// What a sweep found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SweepReport {
    /// When it began; by a clock that nobody sets.
    pub started: Instant,
    /// How long it took.
    pub took: Duration,
    /// Live connections by backend id.
    pub flows_by_backend: BTreeMap<u32, u64>,
    /// Live connections by service id.
    pub flows_by_service: BTreeMap<u32, u64>,
    /// Live connections.
    pub total: u64,
    /// Connections removed.
    pub expired: u64,
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
}

impl Sweeper {
    /// Opens the pinned program and, once per set of maps, notes the rate of the flow clock.
    pub fn open(pins: &Pins) -> Result<Self, SweepError> {
        let program = open_program(&pins.programs().join(SWEEP_PROGRAM)).map_err(SweepError::Program)?;
        let sweeper = Self {
            program,
            maps: pins.maps(),
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

    /// One sweep over both families. Blocks for up to a second with a million flows: see [`run`].
    pub fn sweep(&self) -> Result<SweepReport, SweepError> {
        let began = Instant::now();
        let mut report = SweepReport {
            started: began,
            took: Duration::ZERO,
            flows_by_backend: BTreeMap::new(),
            flows_by_service: BTreeMap::new(),
            total: 0,
            expired: 0,
        };
        let table: Table<u32, Timeouts> = Table::open(&self.maps, "TIMEOUTS")?;
        let timeouts = table.range(0, table.capacity)?;
        self.family::<Addr4>("FLOWS4", 4, &timeouts, &mut report)?;
        self.family::<Addr16>("FLOWS6", 6, &timeouts, &mut report)?;
        report.took = began.elapsed();
        Ok(report)
    }

    fn family<A: Address>(
        &self,
        name: &'static str,
        family: u32,
        timeouts: &[Timeouts],
        report: &mut SweepReport,
    ) -> Result<(), SweepError>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let flows: Table<FlowKey<A>, Flow<A>> = Table::open(&self.maps, name)?;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut cursor = Cursor::new(CHUNK);
        let mut candidates: Vec<FlowKey<A>> = Vec::new();
        // Ids are small numbers: counting by index is what makes a million flows cheap.
        let (mut by_backend, mut by_service) = (Vec::new(), Vec::new());
        while flows.next_chunk(&mut cursor, &mut keys, &mut values)? {
            let now = self.now()?;
            for (key, flow) in keys.iter().zip(&values) {
                let expired = expired(now, key.proto, flow, timeouts);
                let forward = flow.state & flow_state::REVERSE == 0;
                if !expired && !forward {
                    continue;
                }
                // A connection lives while either direction does; the forward entry speaks for both.
                let partner = if expired {
                    flows.get(&partner_key(flow, key.proto))?
                } else {
                    None
                };
                let alive = !expired
                    || partner
                        .as_ref()
                        .is_some_and(|p| !self::expired(now, key.proto, p, timeouts));
                if alive && forward {
                    bump(&mut by_backend, flow.backend);
                    bump(&mut by_service, flow.service);
                    report.total += 1;
                } else if expired && (forward || partner.is_none()) && !alive {
                    candidates.push(*key);
                }
            }
            keys.clear();
            values.clear();
            // Removed at once, while what was read is still fresh; the walk copes with vanishing entries.
            for batch in candidates.chunks(BATCH) {
                report.expired += u64::from(self.run(&packet(family, batch))?);
            }
            candidates.clear();
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

fn expired<A: Address>(now: u32, proto: u32, flow: &Flow<A>, timeouts: &[Timeouts]) -> bool {
    timeouts.get(flow.service as usize).is_some_and(|t| {
        let age = now.wrapping_sub(flow.last_seen);
        // A stamp from the future (written after `now` was read) is fresh, not 2^32 ticks old.
        age < 1 << 31 && age > timeout(t, flow.state, proto)
    })
}

/// The input of the kernel program: family, count, keys.
fn packet<K: Pod>(family: u32, keys: &[K]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(HEADER + size_of_val(keys));
    packet.extend_from_slice(&family.to_ne_bytes());
    packet.extend_from_slice(&(keys.len() as u32).to_ne_bytes());
    // SAFETY: the keys are `Pod` without padding (sizes are asserted where they are defined), so every byte is
    // initialized; the slice lives through the call.
    packet.extend_from_slice(unsafe {
        std::slice::from_raw_parts(keys.as_ptr().cast::<u8>(), size_of_val(keys))
    });
    packet.resize(packet.len().max(MIN_PACKET), 0);
    packet
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

/// Sweeps every `interval` and publishes what it found, until nobody listens any more.
pub async fn run(sweeper: Sweeper, interval: Duration, reports: watch::Sender<Option<SweepReport>>) {
    let sweeper = std::sync::Arc::new(sweeper);
    let mut timer = tokio::time::interval(interval);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = timer.tick() => {}
            () = reports.closed() => return,
        }
        let shared = std::sync::Arc::clone(&sweeper);
        let result = tokio::task::spawn_blocking(move || shared.sweep()).await;
        match result.map_err(SweepError::from).and_then(|inner| inner) {
            Ok(report) => {
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

    #[test]
    fn a_future_stamp_is_fresh() {
        let timeouts = [Timeouts {
            established: 10,
            syn: 10,
            closing: 10,
            udp: 10,
        }];
        let flow = Flow::<Addr4> {
            last_seen: 5,
            ..Flow::default()
        };
        assert!(!expired(4, 6, &flow, &timeouts));
        assert!(!expired(15, 6, &flow, &timeouts));
        assert!(expired(16, 6, &flow, &timeouts));
    }
}
