//! How often the datapath answers strangers.

use lb_common::{limits::RATE_WINDOWS, maps::Rate};

/// Counts one; false if the window has had its share.
#[inline(always)]
pub const fn allows(rate: &mut Rate, limit: u32, now: u32, ticks_per_second: u32) -> bool {
    let age = now.wrapping_sub(rate.since);
    // A window "of the future" is one of a clock that has wrapped: it ends some time.
    if age > ticks_per_second / RATE_WINDOWS && age < 1 << 31 {
        *rate = Rate { since: now, count: 0 };
    }
    if rate.count >= limit {
        return false;
    }
    rate.count += 1;
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_its_share_and_the_next_one_another() {
        let mut rate = Rate::default();
        let mut many = |now: u32, n: usize| (0..n).filter(|_| allows(&mut rate, 3, now, 250)).count();
        assert_eq!(many(1000, 10), 3);
        assert_eq!(many(1025, 10), 0);
        assert_eq!(many(1026, 10), 3);
        assert_eq!(many(u32::MAX, 2), 0, "not of this window");
    }
}
