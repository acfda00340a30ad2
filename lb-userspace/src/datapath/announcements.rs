//! When the neighbours are told which MAC a VIP has. Pure: what is on the devices and the time in, what to send out.
//!
//! As keepalived does: five frames, and five more after five seconds, because a switch that has just begun to forward loses
//! the first ones. Told is what is new: an address, a link that has come up, another MAC. The operator can ask for more.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

/// Frames of one round (keepalived's `garp_master_repeat`).
pub const REPEAT: u32 = 5;
/// Time between the rounds (keepalived's `garp_master_delay`).
pub const ROUND_DELAY: Duration = Duration::from_secs(5);
/// Rounds for something new.
const ROUNDS: u32 = 2;

/// A VIP on a device whose link is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Presence {
    /// Device.
    pub ifindex: u32,
    /// MAC of the device.
    pub mac: [u8; 6],
    /// How often the device has got a carrier.
    pub carrier_ups: u32,
    /// VIP.
    pub address: IpAddr,
}

/// The operator wants the neighbours to be told.
#[derive(Debug)]
pub struct AnnounceRequest {
    /// This VIP alone; `None`: all.
    pub vip: Option<IpAddr>,
    /// What is told to whom: device and VIP.
    pub reply: oneshot::Sender<Vec<(String, IpAddr)>>,
}

/// What the neighbours were told, and what they will be.
#[derive(Debug, Default)]
pub struct Announcements {
    known: BTreeSet<Presence>,
    due: BTreeMap<Presence, Due>,
}

#[derive(Clone, Copy, Debug)]
struct Due {
    at: Instant,
    rounds: u32,
}

// === impl Announcements ===

impl Announcements {
    /// Takes in which VIPs are on devices whose links are up: new ones are due at once.
    pub fn observe(&mut self, present: BTreeSet<Presence>, now: Instant) {
        self.due.retain(|presence, _| present.contains(presence));
        for new in present.difference(&self.known) {
            self.due.insert(
                *new,
                Due {
                    at: now,
                    rounds: ROUNDS,
                },
            );
        }
        self.known = present;
    }

    /// Has those that match told again, and returns them.
    pub fn repeat(&mut self, vip: Option<IpAddr>, now: Instant) -> Vec<Presence> {
        let wanted = |presence: &&Presence| vip.is_none_or(|vip| vip == presence.address);
        let again: Vec<Presence> = self.known.iter().filter(wanted).copied().collect();
        for presence in &again {
            self.due.insert(
                *presence,
                Due {
                    at: now,
                    rounds: ROUNDS,
                },
            );
        }
        again
    }

    /// Whom to tell now, [`REPEAT`] frames each.
    pub fn take_due(&mut self, now: Instant) -> Vec<Presence> {
        let due: Vec<Presence> = self
            .due
            .iter()
            .filter(|(_, due)| due.at <= now)
            .map(|(presence, _)| *presence)
            .collect();
        for presence in &due {
            if let Some(entry) = self.due.get_mut(presence) {
                entry.at = now + ROUND_DELAY;
                entry.rounds -= 1;
            }
        }
        self.due.retain(|_, due| due.rounds > 0);
        due
    }

    /// When something is due.
    pub fn next_due(&self) -> Option<Instant> {
        self.due.values().map(|due| due.at).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(ifindex: u32, last: u8) -> Presence {
        Presence {
            ifindex,
            mac: [2, 0, 0, 0, 0, 1],
            carrier_ups: 1,
            address: [192, 0, 2, last].into(),
        }
    }

    #[test]
    fn what_is_new_is_told_twice_and_what_stays_is_not() {
        let (mut all, now) = (Announcements::default(), Instant::now());
        all.observe([on(1, 1), on(1, 2)].into(), now);
        assert_eq!(all.take_due(now), [on(1, 1), on(1, 2)]);
        assert_eq!(all.take_due(now), []);
        assert_eq!(all.next_due(), Some(now + ROUND_DELAY));
        all.observe([on(1, 1), on(1, 2)].into(), now);
        // One of them goes before its second round.
        all.observe([on(1, 1)].into(), now);
        let later = now + ROUND_DELAY;
        assert_eq!(all.take_due(later), [on(1, 1)]);
        assert_eq!(
            (all.take_due(later + ROUND_DELAY), all.next_due()),
            (vec![], None)
        );
    }

    #[test]
    fn a_link_that_comes_back_and_another_mac_are_new() {
        let (mut all, now) = (Announcements::default(), Instant::now());
        let told = |all: &mut Announcements, present: &[Presence]| {
            all.observe(present.iter().copied().collect(), now);
            all.take_due(now)
        };
        assert_eq!(told(&mut all, &[on(1, 1)]).len(), 1);
        assert_eq!(told(&mut all, &[]).len(), 0);
        assert_eq!(told(&mut all, &[on(1, 1)]).len(), 1);
        let other = Presence {
            mac: [2, 0, 0, 0, 0, 9],
            ..on(1, 1)
        };
        assert_eq!(told(&mut all, &[other]), [other]);
        // Down and up again between two looks.
        let again = Presence {
            carrier_ups: 2,
            ..other
        };
        assert_eq!(told(&mut all, &[again]), [again]);
    }

    #[test]
    fn the_operator_can_have_them_told_again() {
        let (mut all, now) = (Announcements::default(), Instant::now());
        all.observe([on(1, 1), on(1, 2)].into(), now);
        all.take_due(now);
        all.take_due(now + ROUND_DELAY);
        let later = now + 4 * ROUND_DELAY;
        assert_eq!(all.repeat(Some([192, 0, 2, 2].into()), later), [on(1, 2)]);
        assert_eq!(all.take_due(later), [on(1, 2)]);
        assert_eq!(all.repeat(None, later).len(), 2);
        assert_eq!(all.repeat(Some([192, 0, 2, 3].into()), later), []);
    }
}
