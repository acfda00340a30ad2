//! When checks are made: spread by a hash, with some chance, so that many backends make no bursts. Pure.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::Duration,
};

use super::{Key, WHOLE};

/// The first checks of many new backends begin this far apart on average, until they fill the interval.
const FIRST_APART: Duration = Duration::from_millis(2);

/// Wait before the first check of one of `new` backends that came together.
pub fn first(key: &Key, new: usize, interval: Duration) -> Duration {
    let apart = FIRST_APART.saturating_mul(u32::try_from(new).unwrap_or(u32::MAX));
    // A single backend is checked at once.
    let window = if new <= 1 {
        Duration::ZERO
    } else {
        apart.min(interval)
    };
    window.mul_f64(share(key, 0))
}

/// Wait between the `count`th check and the next one: a tenth more or less than the interval.
pub fn next(key: &Key, count: u64, interval: Duration) -> Duration {
    interval.mul_f64(0.9 + 0.2 * share(key, count + 1))
}

/// A slow start, which is a bounded number of rings: wait before the step that follows `tenths`.
pub fn step(slow_start: Duration) -> Duration {
    slow_start / u32::from(WHOLE)
}

/// From 0 to less than 1; the same for the same.
fn share(key: &Key, count: u64) -> f64 {
    let mut hasher = DefaultHasher::new();
    (key, count).hash(&mut hasher);
    // 53 bits are what a float keeps.
    (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::model::{Protocol, ServiceAddress};

    fn key(i: u32) -> Key {
        Key {
            service: Some(ServiceAddress {
                vip: IpAddr::from([192, 0, 2, 1]),
                port: 80,
                protocol: Protocol::Tcp,
            }),
            backend: (IpAddr::from(i.to_be_bytes()), 80).into(),
        }
    }

    #[test]
    fn many_fill_the_interval_and_one_goes_at_once() {
        let interval = Duration::from_secs(5);
        assert_eq!(first(&key(1), 1, interval), Duration::ZERO);
        let few = (0..10).map(|i| first(&key(i), 10, interval)).max().unwrap();
        assert!(few <= Duration::from_millis(20), "{few:?}");
        let mut buckets = [0u32; 50];
        for i in 0..10_000 {
            let at = first(&key(i), 10_000, interval);
            assert!(at < interval);
            buckets[(at.as_millis() / 100) as usize] += 1;
        }
        // 200 on average; five standard deviations are 71.
        assert!(buckets.iter().all(|n| (129..271).contains(n)), "{buckets:?}");
    }

    #[test]
    fn chance_is_a_tenth_and_never_the_same() {
        let interval = Duration::from_secs(10);
        let waits: Vec<_> = (0..100).map(|count| next(&key(7), count, interval)).collect();
        assert!(
            waits.iter().all(|w| (9.0..=11.0).contains(&w.as_secs_f64())),
            "{waits:?}"
        );
        let mut different = waits.clone();
        different.sort();
        different.dedup();
        assert!(different.len() > 90);
        let mean = waits.iter().sum::<Duration>() / 100;
        assert!((9.7..10.3).contains(&mean.as_secs_f64()), "{mean:?}");
    }
}
