//! Rates: the difference of two readings of the counters.

use crate::{
    admin::api::{BackendCounters, Counters},
    status::{BackendStatus, ServiceStatus},
};

/// Two readings, the older first.
#[derive(Clone, Copy, Debug)]
pub struct Rates<'a> {
    before: &'a Counters,
    after: &'a Counters,
}

/// What passes in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rate {
    /// New flows.
    pub flows: f64,
    /// Packets, both directions.
    pub packets: f64,
    /// IP bytes from clients.
    pub bytes_in: f64,
    /// IP bytes to clients.
    pub bytes_out: f64,
}

impl<'a> Rates<'a> {
    /// From two readings of one agent; `None` when no time lies between them (an agent that was restarted).
    pub fn new(before: &'a Counters, after: &'a Counters) -> Option<Self> {
        (after.taken_us > before.taken_us).then_some(Self { before, after })
    }

    /// Of one backend; `None` if it was not counted both times.
    pub fn backend(&self, backend: &BackendStatus) -> Option<Rate> {
        let (before, after) = (
            self.before.backends.get(&backend.id)?,
            self.after.backends.get(&backend.id)?,
        );
        let rate = |of: fn(&BackendCounters) -> u64| self.per_second(of(before), of(after));
        Some(Rate {
            flows: rate(|c| c.flows),
            packets: rate(|c| c.packets_in) + rate(|c| c.packets_out),
            bytes_in: rate(|c| c.bytes_in),
            bytes_out: rate(|c| c.bytes_out),
        })
    }

    /// Of all backends of a service together.
    pub fn service(&self, service: &ServiceStatus) -> Rate {
        service
            .backends
            .iter()
            .filter_map(|b| self.backend(b))
            .fold(Rate::default(), |sum, rate| Rate {
                flows: sum.flows + rate.flows,
                packets: sum.packets + rate.packets,
                bytes_in: sum.bytes_in + rate.bytes_in,
                bytes_out: sum.bytes_out + rate.bytes_out,
            })
    }

    /// Of one drop reason of the node.
    pub fn drops(&self, reason: &str) -> f64 {
        let of = |counters: &Counters| counters.drops.get(reason).copied().unwrap_or(0);
        self.per_second(of(self.before), of(self.after))
    }

    fn per_second(&self, before: u64, after: u64) -> f64 {
        let elapsed = (self.after.taken_us - self.before.taken_us) as f64 / 1e6;
        // Counters of an id that changed hands start anew.
        after.saturating_sub(before) as f64 / elapsed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::fixture;

    #[test]
    fn rates_are_differences_by_the_agents_clock() {
        let (before, after) = (
            Counters::new(&fixture::reading(0), &fixture::status(), 1_000_000),
            Counters::new(&fixture::reading(10), &fixture::status(), 3_000_000),
        );
        let rates = Rates::new(&before, &after).unwrap();
        let status = fixture::status();
        let one = rates.backend(&status.services[0].backends[0]).unwrap();
        assert_eq!(
            one,
            Rate {
                flows: 5.0,
                packets: 150.0,
                bytes_in: 7_500.0,
                bytes_out: 150_000.0
            }
        );
        assert_eq!(rates.service(&status.services[0]).flows, 15.0);
        assert_eq!(rates.drops("no_flow"), 5.0);
    }

    #[test]
    fn a_restart_or_a_new_backend_makes_no_rate() {
        let (early, late) = (
            Counters::new(&fixture::reading(9), &fixture::status(), 5),
            Counters::new(&fixture::reading(1), &fixture::status(), 6),
        );
        assert!(Rates::new(&late, &early).is_none());
        let rates = Rates::new(&early, &late).unwrap();
        let mut backend = fixture::status().services[0].backends[0].clone();
        assert_eq!(rates.backend(&backend), Some(Rate::default()));
        backend.id = 99;
        assert_eq!(rates.backend(&backend), None);
    }
}
