//! When something that failed is tried again.

use std::time::Duration;

use tokio::time::Instant;

/// Longest wait, unless the first one or the authority's word is longer.
const LONGEST: Duration = Duration::from_secs(6 * 3600);

/// A wait that grows with every failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// Failures, one after the other.
    pub failures: u32,
    /// When it is over.
    pub until: Instant,
}

// === impl Pause ===

impl Pause {
    /// After another failure. `later` is the authority's word.
    pub fn failed(before: Option<Self>, now: Instant, first: Duration, later: Option<Duration>) -> Self {
        let failures = before.map_or(0, |pause| pause.failures) + 1;
        let own = wait(first, failures, fastrand::f64());
        Self {
            failures,
            until: now + own.max(later.unwrap_or_default()),
        }
    }

    /// After a success: nothing is done twice in a hurry, whatever the clocks say.
    pub fn done(now: Instant, first: Duration) -> Self {
        Self {
            failures: 0,
            until: now + first,
        }
    }

    /// How long it goes on.
    pub fn left(self, now: Instant) -> Duration {
        self.until.saturating_duration_since(now)
    }
}

/// Twice as long after each failure, a fifth more or less by `chance` (0 to 1), so that nodes do not come together.
fn wait(first: Duration, failures: u32, chance: f64) -> Duration {
    let doubled = first.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1)));
    doubled.min(LONGEST.max(first)).mul_f64(0.8 + 0.4 * chance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_some_hours() {
        let minute = Duration::from_secs(60);
        let plain = |failures| wait(minute, failures, 0.5);
        assert_eq!([plain(1), plain(2), plain(5)], [minute, 2 * minute, 16 * minute]);
        assert_eq!([plain(20), plain(u32::MAX)], [LONGEST; 2]);
        assert_eq!(wait(minute, 1, 0.0), Duration::from_secs(48));
        assert_eq!(wait(minute, 1, 1.0), Duration::from_secs(72));
        assert_eq!(wait(2 * LONGEST, 3, 0.5), 2 * LONGEST);
    }

    #[test]
    fn the_authority_may_ask_for_more_and_a_success_begins_anew() {
        let (now, first) = (Instant::now(), Duration::from_secs(60));
        let one = Pause::failed(None, now, first, None);
        let two = Pause::failed(Some(one), now, first, Some(LONGEST * 4));
        assert_eq!((one.failures, two.failures), (1, 2));
        assert!(one.left(now) <= Duration::from_secs(72));
        assert_eq!(two.left(now), LONGEST * 4);
        let done = Pause::done(now, first);
        assert_eq!((done.failures, done.left(now)), (0, first));
        assert_eq!(done.left(now + LONGEST), Duration::ZERO);
    }
}
