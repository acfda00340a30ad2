//! Thresholds: results in, a standing out. Pure.

use std::time::Duration;

use super::Before;
use crate::model::CheckTiming;

/// What a backend is held to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// New, and it has neither passed nor failed for long enough.
    Open,
    /// Fit for new flows.
    Fit,
    /// Not fit.
    Unfit,
}

/// The judge of one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judge {
    standing: Standing,
    /// Results in a row that contradict the standing.
    against: u32,
    /// Results so far.
    results: u64,
}

// === impl Judge ===

impl Judge {
    /// A judge without a result.
    pub fn new(before: Before) -> Self {
        Self {
            standing: match before {
                Before::New => Standing::Open,
                Before::Served => Standing::Fit,
                Before::Waited => Standing::Unfit,
            },
            against: 0,
            results: 0,
        }
    }

    /// What the backend is held to be.
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// How often it was judged.
    pub fn results(&self) -> u64 {
        self.results
    }

    /// Takes in a result; `age` is how long the backend has been known. True if the standing changed.
    pub fn observe(&mut self, passed: bool, timing: &CheckTiming, age: Duration) -> bool {
        self.results += 1;
        let (contradicts, needed, next) = match self.standing {
            Standing::Open if passed => (true, 1, Standing::Fit),
            // While it may still be starting, failures only wait for the end of that time.
            Standing::Open if age < timing.grace => (true, u32::MAX, Standing::Unfit),
            Standing::Open => (true, timing.fall.max(1), Standing::Unfit),
            Standing::Fit => (!passed, timing.fall.max(1), Standing::Unfit),
            Standing::Unfit => (passed, timing.rise.max(1), Standing::Fit),
        };
        self.against = if contradicts {
            self.against.saturating_add(1)
        } else {
            0
        };
        if self.against < needed {
            return false;
        }
        self.against = 0;
        self.standing = next;
        true
    }

    /// Time to the next check, before chance.
    pub fn interval(&self, timing: &CheckTiming) -> Duration {
        if self.standing == Standing::Open || self.against > 0 {
            timing.fast_interval.min(timing.interval)
        } else {
            timing.interval
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LATER: Duration = Duration::from_secs(3600);

    fn timing(rise: u32, fall: u32) -> CheckTiming {
        CheckTiming {
            rise,
            fall,
            ..CheckTiming::default()
        }
    }

    /// Standings after each of the results, `+` passed and `-` failed.
    fn standings(before: Before, timing: &CheckTiming, age: Duration, results: &str) -> String {
        let mut judge = Judge::new(before);
        let mut step = |result| {
            judge.observe(result == '+', timing, age);
            match judge.standing() {
                Standing::Open => '?',
                Standing::Fit => 'F',
                Standing::Unfit => 'U',
            }
        };
        results.chars().map(&mut step).collect()
    }

    #[test]
    fn rise_and_fall() {
        let t = timing(2, 3);
        for (before, results, want) in [
            (Before::New, "+", "F"),
            (Before::New, "---++", "??UUF"),
            (Before::New, "--+", "??F"),
            (Before::Served, "--+---+", "FFFFFUU"),
            (Before::Served, "---", "FFU"),
            (Before::Waited, "+-++", "UUUF"),
        ] {
            assert_eq!(
                standings(before, &t, LATER, results),
                want,
                "{before:?} {results}"
            );
        }
        // Thresholds of 0 are not thresholds: one result decides.
        assert_eq!(standings(Before::Served, &timing(0, 0), LATER, "-+-"), "UFU");
    }

    #[test]
    fn a_starting_backend_is_not_failing() {
        let t = timing(2, 1);
        assert_eq!(standings(Before::New, &t, t.grace / 2, "------"), "??????");
        assert_eq!(standings(Before::New, &t, t.grace, "-"), "U");
        // Grace is for new ones: who served and fails is out.
        assert_eq!(standings(Before::Served, &t, Duration::ZERO, "-"), "U");
        let mut judge = Judge::new(Before::New);
        for _ in 0..5 {
            judge.observe(false, &t, Duration::ZERO);
        }
        assert!(
            judge.observe(false, &t, t.grace),
            "failures in the time of grace count at its end"
        );
    }

    #[test]
    fn it_looks_closer_while_the_verdict_is_open() {
        let t = timing(2, 2);
        let mut judge = Judge::new(Before::New);
        assert_eq!(judge.interval(&t), t.fast_interval);
        judge.observe(true, &t, LATER);
        assert_eq!(judge.interval(&t), t.interval);
        judge.observe(false, &t, LATER);
        assert_eq!(judge.interval(&t), t.fast_interval);
        judge.observe(false, &t, LATER);
        assert_eq!(judge.interval(&t), t.interval, "decided");
        let slow = CheckTiming {
            fast_interval: t.interval * 2,
            ..t.clone()
        };
        assert_eq!(Judge::new(Before::New).interval(&slow), t.interval);
    }

    proptest! {
        /// A standing changes only after so many results in a row against it, and then always.
        #[test]
        fn it_changes_exactly_at_the_thresholds(
            results in proptest::collection::vec(any::<bool>(), 0..200),
            rise in 1u32..5,
            fall in 1u32..5,
        ) {
            let timing = timing(rise, fall);
            let mut judge = Judge::new(Before::Served);
            let (mut fit, mut row) = (true, 0);
            for passed in results {
                row = if passed == fit { 0 } else { row + 1 };
                let changed = judge.observe(passed, &timing, LATER);
                if row >= if fit { fall } else { rise } {
                    (fit, row) = (!fit, 0);
                    prop_assert!(changed);
                } else {
                    prop_assert!(!changed);
                }
                prop_assert_eq!(judge.standing() == Standing::Fit, fit);
            }
        }
    }
}
