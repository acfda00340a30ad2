//! The single counting exit, and the counters of backends.

use lb_common::counter::Counter;

use crate::{
    tables::Tables,
    verdict::{Action, NO_SERVICE, Verdict},
};

/// Counts a verdict: every packet passes here once, last (but those of earlier programs, which count by themselves).
#[inline(always)]
pub fn finish<T: Tables>(tables: T, verdict: Verdict) -> Verdict {
    let counter = match verdict.action() {
        Action::Pass => Counter::Passed,
        Action::ToTc => Counter::ToTc,
        Action::Transmit => Counter::Transmitted,
        Action::Redirect(_) => Counter::Redirected,
        Action::Neighbour(_) => Counter::ToNeighbour,
        Action::ToNode | Action::ToNodeByLoopback => Counter::ToNode,
        Action::Again => Counter::FragmentsAgain,
        // Whoever decides counts.
        Action::Earlier => return verdict,
        Action::Drop(reason, service) => {
            tables.count_drop(reason);
            count_service_drop(tables, reason, service);
            Counter::Dropped
        }
    };
    tables.count(counter);
    verdict
}

/// Adds a drop to its service's reasons.
#[inline(never)]
fn count_service_drop<T: Tables>(tables: T, reason: u32, service: u32) -> u32 {
    if service != NO_SERVICE
        && let Some(stats) = tables.service_stats(service)
        && let Some(slot) = stats.drops.get_mut(reason as usize)
    {
        *slot += 1;
    }
    0
}

/// Counts one packet of a client, `bytes` of IP.
#[inline(always)]
pub fn from_client<T: Tables>(tables: T, backend: u32, bytes: u32) {
    if let Some(stats) = tables.backend_stats(backend) {
        stats.packets_in += 1;
        stats.bytes_in += bytes as u64;
    }
}

/// Counts one packet of a backend, `bytes` of IP.
#[inline(always)]
pub fn from_backend<T: Tables>(tables: T, backend: u32, bytes: u32) {
    if let Some(stats) = tables.backend_stats(backend) {
        stats.packets_out += 1;
        stats.bytes_out += bytes as u64;
    }
}
