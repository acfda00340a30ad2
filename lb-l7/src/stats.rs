//! Numbers of routes and upstreams. Each worker counts in a place of its own, without locks and without shared cache lines;
//! who reads adds them up.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Upper bounds of the latency histogram, microseconds; slower ones are in the last place.
pub const BOUNDS_US: [u64; 12] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 5_000_000,
];
/// Classes of answers: 1xx to 5xx.
pub const CLASSES: usize = 5;

/// A number with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts; only by the worker that owns it.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// Counts down; only by the worker that owns it.
    pub fn sub(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_sub(n), Relaxed);
    }

    /// Raises it to `n`; only by the worker that owns it.
    pub fn raise(&self, n: u64) {
        if n > self.get() {
            self.0.store(n, Relaxed);
        }
    }

    /// Its value now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What one worker counts of one upstream, or of what a route answers by itself.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Shard {
    /// Answers by class.
    pub answers: [Counter; CLASSES],
    /// Requests under way, upgraded connections too.
    pub active: Counter,
    /// The most that there were.
    pub active_max: Counter,
    /// Bytes of bodies from clients.
    pub bytes_in: Counter,
    /// Bytes of bodies to clients.
    pub bytes_out: Counter,
    /// Connections made.
    pub connections: Counter,
    /// Connections that could not be made.
    pub connect_errors: Counter,
    /// Requests that failed after they were sent.
    pub errors: Counter,
    /// Requests taken away to another upstream.
    pub retries: Counter,
    /// Answers by time, from the request to the end of the answer; the last place is everything slower.
    pub latency: [Counter; BOUNDS_US.len() + 1],
    /// Sum of those times, microseconds.
    pub latency_us: Counter,
    /// Next place in the schedule of a route.
    pub cursor: Counter,
}

/// A shard for each worker.
#[derive(Debug)]
pub struct Shards(Box<[Shard]>);

impl Shards {
    /// For so many workers.
    pub fn new(workers: usize) -> Self {
        Self((0..workers).map(|_| Shard::default()).collect())
    }

    /// The place of one worker.
    pub fn of(&self, worker: usize) -> &Shard {
        &self.0[worker]
    }

    /// The sum of one number over all workers.
    pub fn sum(&self, number: impl Fn(&Shard) -> &Counter) -> u64 {
        self.0
            .iter()
            .fold(0, |sum, shard| sum.wrapping_add(number(shard).get()))
    }
}

impl Shard {
    /// Counts a request that begins.
    pub fn begin(&self) {
        self.active.add(1);
        self.active_max.raise(self.active.get());
    }

    /// Counts an answer.
    pub fn answered(&self, status: u16) {
        let class = usize::from(status / 100).clamp(1, CLASSES) - 1;
        self.answers[class].add(1);
    }

    /// Counts how long it took.
    pub fn took(&self, micros: u64) {
        let place = BOUNDS_US.partition_point(|bound| *bound < micros);
        self.latency[place].add(1);
        self.latency_us.add(micros);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_count_apart_and_are_summed() {
        let shards = Shards::new(2);
        shards.of(0).answered(200);
        shards.of(1).answered(204);
        shards.of(1).answered(503);
        assert_eq!(shards.sum(|s| &s.answers[1]), 2);
        assert_eq!(shards.sum(|s| &s.answers[4]), 1);
        shards.of(0).took(500);
        shards.of(0).took(501);
        shards.of(0).took(u64::MAX / 2);
        assert_eq!(
            (shards.of(0).latency[0].get(), shards.of(0).latency[1].get()),
            (1, 1)
        );
        assert_eq!(shards.of(0).latency[BOUNDS_US.len()].get(), 1);
        shards.of(0).begin();
        shards.of(0).begin();
        shards.of(0).active.sub(2);
        assert_eq!((shards.of(0).active.get(), shards.of(0).active_max.get()), (0, 2));
    }
}
