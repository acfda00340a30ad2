//! Which upstream a request goes to: pure, but for the cursor and the numbers that it reads.

use std::net::{IpAddr, SocketAddr};

use lb_route::{BackendState, Balance};

use crate::served::{Served, Target};

/// Longest schedule; weights beyond it are rounded.
const LONGEST_SCHEDULE: u64 = 1024;
/// Tries of one request, the first one too.
pub const TRIES: usize = 3;

/// What a choice depends on.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// The client.
    pub client: IpAddr,
    /// The upstream that the client's cookie names.
    pub cookie: Option<u64>,
    /// The worker that asks.
    pub worker: usize,
    /// Milliseconds on the shim's clock.
    pub now_ms: u64,
}

/// Upstreams that this request has been to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tried {
    places: [u16; TRIES],
    count: usize,
}

impl Tried {
    /// Notes one.
    pub fn add(&mut self, place: usize) {
        if let Some(next) = self.places.get_mut(self.count) {
            *next = place as u16;
            self.count += 1;
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }

    fn has(&self, place: usize) -> bool {
        self.places[..self.count].contains(&(place as u16))
    }
}

/// The order in which upstreams are used in turn: each as often as its weight says, spread evenly.
pub fn schedule(weights: &[u32]) -> Vec<u16> {
    let sum: u64 = weights.iter().map(|w| u64::from(*w)).sum();
    let divisor = weights.iter().fold(0, |a, b| gcd(a, u64::from(*b))).max(1);
    let scaled: Vec<i64> = weights
        .iter()
        .map(|weight| {
            let weight = u64::from(*weight);
            let share = if sum / divisor > LONGEST_SCHEDULE {
                // At least once, or it would never serve.
                (weight * LONGEST_SCHEDULE / sum).max(u64::from(weight > 0))
            } else {
                weight / divisor
            };
            share as i64
        })
        .collect();
    let total: i64 = scaled.iter().sum();
    let mut credit = vec![0; weights.len()];
    (0..total)
        .map(|_| {
            for (credit, weight) in credit.iter_mut().zip(&scaled) {
                *credit += weight;
            }
            let mut best = 0;
            for place in 1..credit.len() {
                if credit[place] > credit[best] {
                    best = place;
                }
            }
            credit[best] -= total;
            best as u16
        })
        .collect()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The place of the upstream to try next; `None`: there is none that was not tried.
///
/// Upstreams that could not be reached a moment ago are left out as long as there are others; without an active one,
/// draining ones serve, as they do on layer 4.
pub fn pick(route: &Served, asked: Asked, tried: &Tried) -> Option<usize> {
    let fit = |place: usize, target: &Target| {
        target.state == BackendState::Active && target.weight > 0 && !tried.has(place)
    };
    let steady =
        |place: usize, target: &Target| fit(place, target) && !target.upstream.is_shunned(asked.now_ms);
    if let Some(cookie) = asked.cookie {
        let mut targets = route.targets.iter().enumerate();
        if let Some((place, _)) = targets.find(|(place, t)| t.upstream.cookie == cookie && steady(*place, t))
        {
            return Some(place);
        }
    }
    choose(route, asked, &steady)
        .or_else(|| choose(route, asked, &fit))
        .or_else(|| {
            let draining =
                |(place, t): &(usize, &Target)| t.state == BackendState::Draining && !tried.has(*place);
            let mut targets = route.targets.iter().enumerate();
            targets.find(draining).map(|(place, _)| place)
        })
}

fn choose(route: &Served, asked: Asked, fit: &dyn Fn(usize, &Target) -> bool) -> Option<usize> {
    let targets = &route.targets;
    match route.settings.balance {
        Balance::RoundRobin => {
            let cursor = &route.stats.of(asked.worker).cursor;
            let length = route.schedule.len();
            for _ in 0..length {
                let at = (cursor.get() as usize).wrapping_add(asked.worker) % length;
                cursor.add(1);
                let place = usize::from(route.schedule[at]);
                if fit(place, &targets[place]) {
                    return Some(place);
                }
            }
            None
        }
        Balance::LeastConnections => {
            let cursor = &route.stats.of(asked.worker).cursor;
            cursor.add(1);
            let start = (cursor.get() as usize).wrapping_add(asked.worker);
            let places = (0..targets.len()).map(|i| (i + start) % targets.len());
            places
                .filter(|place| fit(*place, &targets[*place]))
                .min_by_key(|place| {
                    let target = &targets[*place];
                    // Requests that each share of weight would have with this one.
                    ((target.upstream.stats.sum(|s| &s.active) + 1) << 16) / u64::from(target.weight)
                })
        }
        Balance::ClientIp => {
            let client = hash_of_ip(asked.client);
            let score = |target: &Target| {
                let mixed = mix(client ^ target.upstream.cookie);
                // Uniform in (0, 1]; the exponential race makes shares proportional to weights.
                let uniform = ((mixed >> 11) + 1) as f64 / (1_u64 << 53) as f64;
                -uniform.ln() / f64::from(target.weight.max(1))
            };
            let places = (0..targets.len()).filter(|place| fit(*place, &targets[*place]));
            places.min_by(|a, b| score(&targets[*a]).total_cmp(&score(&targets[*b])))
        }
    }
}

/// The name of an upstream in cookies: the same in every shim and after every restart, and no address.
pub fn cookie_of(address: SocketAddr) -> u64 {
    mix(fnv(address.to_string().as_bytes()))
}

fn hash_of_ip(ip: IpAddr) -> u64 {
    match ip {
        IpAddr::V4(ip) => fnv(&ip.octets()),
        IpAddr::V6(ip) => fnv(&ip.octets()),
    }
}

/// FNV-1a: stable over versions and machines, which hashes of the standard library are not.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The finaliser of SplitMix64: every bit depends on every bit.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::served::tests::served;

    fn asked(client: u32, cookie: Option<u64>) -> Asked {
        Asked {
            client: IpAddr::V4(client.into()),
            cookie,
            worker: 0,
            now_ms: 0,
        }
    }

    #[test]
    fn schedules_are_even() {
        assert_eq!(schedule(&[1, 1, 1]), [0, 1, 2]);
        assert_eq!(schedule(&[5, 5]), [0, 1]);
        assert_eq!(schedule(&[2, 1]), [0, 1, 0]);
        assert_eq!(schedule(&[3, 0, 1]), [0, 0, 2, 0]);
        assert!(schedule(&[0]).is_empty() && schedule(&[]).is_empty());
        let long = schedule(&[100_000, 1, 7]);
        assert!(long.len() <= LONGEST_SCHEDULE as usize + 3);
        assert!(long.contains(&1) && long.contains(&2));
    }

    #[test]
    fn all_ways_keep_to_weights_and_states() {
        for balance in [Balance::RoundRobin, Balance::ClientIp, Balance::LeastConnections] {
            let route = served(
                balance,
                &[
                    (3, "active"),
                    (1, "active"),
                    (9, "unready"),
                    (0, "active"),
                    (9, "draining"),
                ],
            );
            let mut counts = BTreeMap::new();
            for client in 0..4000 {
                let place = pick(&route, asked(client, None), &Tried::default()).unwrap();
                *counts.entry(place).or_insert(0) += 1;
                if balance == Balance::LeastConnections {
                    route.targets[place].upstream.stats.of(0).begin();
                }
            }
            assert_eq!(counts.keys().copied().collect::<Vec<_>>(), [0, 1], "{balance}");
            assert!((2800..=3200).contains(&counts[&0]), "{balance}: {counts:?}");
        }
    }

    #[test]
    fn a_client_stays_when_others_go() {
        let before = served(
            Balance::ClientIp,
            &[(1, "active"), (1, "active"), (1, "active"), (1, "active")],
        );
        let after = served(
            Balance::ClientIp,
            &[(1, "active"), (1, "active"), (1, "active"), (1, "unready")],
        );
        for client in 0..1000 {
            let first = pick(&before, asked(client, None), &Tried::default()).unwrap();
            let second = pick(&after, asked(client, None), &Tried::default()).unwrap();
            assert!(first == second || first == 3, "{client}");
        }
    }

    #[test]
    fn cookies_hold_while_their_upstream_serves() {
        let route = served(
            Balance::RoundRobin,
            &[(1, "active"), (1, "active"), (1, "draining")],
        );
        let cookie = |place: usize| Some(route.targets[place].upstream.cookie);
        for _ in 0..5 {
            assert_eq!(pick(&route, asked(1, cookie(1)), &Tried::default()), Some(1));
        }
        assert_ne!(pick(&route, asked(1, cookie(2)), &Tried::default()), Some(2));
        assert!(pick(&route, asked(1, Some(7)), &Tried::default()).is_some());
    }

    #[test]
    fn what_was_tried_or_is_shunned_comes_last() {
        let route = served(
            Balance::RoundRobin,
            &[(1, "active"), (1, "active"), (1, "draining")],
        );
        let mut tried = Tried::default();
        route.targets[0].upstream.shun(5);
        assert_eq!(pick(&route, asked(1, None), &tried), Some(1));
        tried.add(1);
        assert_eq!(pick(&route, asked(1, None), &tried), Some(0));
        tried.add(0);
        assert_eq!(pick(&route, asked(1, None), &tried), Some(2));
        tried.add(2);
        assert_eq!(pick(&route, asked(1, None), &tried), None);
        assert_eq!(tried.count(), TRIES);
    }
}
