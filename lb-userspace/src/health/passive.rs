//! Passive ejection: a backend that refuses connections or leaves them unanswered, far more often than it takes them, is
//! taken out for a while by what the datapath counts, without any check of its own.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use lb_common::maps::BackendStats;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use super::{By, Key, Report, SOURCE, Targets, Verdict, WHOLE};
use crate::{
    datapath::counters::Counters,
    model::{BackendState, Passive, Protocol, ServiceAddress},
    source::{Message, SourceId, Update},
    status::{ServiceStatus, Status},
};

/// How often the counters are read: an outlier is ejected within a window, and as soon as it shows.
const READ_EVERY: Duration = Duration::from_secs(1);

/// One backend as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Address and port.
    pub address: SocketAddr,
    /// Id and name: another one has other counters, or none of the old faults.
    pub user: (u32, String),
    /// It takes new flows.
    pub serves: bool,
    /// What the datapath has counted.
    pub counted: Counted,
}

/// Attempts to connect, since the maps were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Answered by the backend.
    pub good: u64,
    /// Refused or left unanswered.
    pub bad: u64,
}

/// What is remembered of every backend.
#[derive(Debug, Default)]
pub struct Outliers(BTreeMap<Key, Seen>);

#[derive(Debug)]
struct Seen {
    user: (u32, String),
    /// The window: since when, and the counters then.
    window: (Instant, Counted),
    ejected: Option<Instant>,
    /// Ejections in a row, and when the last one ended.
    times: u32,
    back: Instant,
}

/// Reads the datapath's counters for the services on `targets` and sends verdicts to the inbox, until `stop` or until
/// nobody listens.
pub async fn run(
    counters: Counters,
    targets: watch::Receiver<Targets>,
    status: watch::Receiver<Status>,
    inbox: mpsc::Sender<Message>,
    report: watch::Sender<Report>,
    stop: CancellationToken,
) {
    let counters = Arc::new(counters);
    let mut outliers = Outliers::default();
    let mut tick = interval(READ_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let passive = targets.borrow().passive.clone();
        outliers.keep(&passive);
        if passive.is_empty() {
            continue;
        }
        let services: Vec<ServiceStatus> = {
            let status = status.borrow();
            let wanted = |s: &&ServiceStatus| passive.contains_key(&s.address);
            status.services.iter().filter(wanted).cloned().collect()
        };
        let ids: Vec<u32> = services
            .iter()
            .flat_map(|s| &s.backends)
            .map(|b| b.id)
            .filter(|id| *id != 0)
            .collect();
        let reader = counters.clone();
        let read = tokio::task::spawn_blocking(move || reader.backends(&ids)).await;
        let stats = match read {
            Ok(Ok(stats)) => stats,
            Ok(Err(error)) => {
                tracing::warn!(%error, "counters of the backends cannot be read: nobody is ejected by them");
                continue;
            }
            // The runtime is going down.
            Err(_) => return,
        };
        let mut verdicts = Vec::new();
        for service in &services {
            let rows = rows(service, &stats);
            verdicts.extend(outliers.judge(
                service.address,
                &passive[&service.address],
                &rows,
                Instant::now(),
            ));
        }
        let ejected = outliers.ejected();
        report.send_if_modified(|report| std::mem::replace(&mut report.ejected, ejected) != ejected);
        if verdicts.is_empty() {
            continue;
        }
        for verdict in verdicts.iter().filter(|verdict| !verdict.fit) {
            let service = verdict.key.service.map(|service| service.to_string());
            tracing::warn!(service, backend = %verdict.key.backend, "ejected: {}", verdict.reason);
        }
        let message = Message {
            source: SourceId(SOURCE.into()),
            update: Update::Verdicts(verdicts),
        };
        if inbox.send(message).await.is_err() {
            return;
        }
    }
}

fn rows(service: &ServiceStatus, stats: &BTreeMap<u32, BackendStats>) -> Vec<Row> {
    let present = service.backends.iter().filter(|b| !b.leaving);
    let row = |backend: &crate::status::BackendStatus| Row {
        address: backend.address,
        user: (backend.id, backend.name.clone()),
        serves: backend.state == BackendState::Active && backend.ring_share > 0,
        counted: stats.get(&backend.id).map(Counted::from).unwrap_or_default(),
    };
    present.map(row).collect()
}

// === impl Counted ===

impl From<&BackendStats> for Counted {
    fn from(stats: &BackendStats) -> Self {
        Self {
            good: stats.established,
            // A refused SYN that goes elsewhere is counted by both; a silent one only when it goes elsewhere, and a
            // refusal without another backend to go to only as such.
            bad: stats.refused.max(stats.resteered),
        }
    }
}

impl Counted {
    fn since(self, before: Self) -> Self {
        Self {
            good: self.good.saturating_sub(before.good),
            bad: self.bad.saturating_sub(before.bad),
        }
    }

    /// Failed attempts, percent; 0 without attempts.
    fn ratio(self) -> u64 {
        (self.bad * 100).checked_div(self.bad + self.good).unwrap_or(0)
    }
}

// === impl Outliers ===

impl Outliers {
    /// Forgets services that are not judged any more.
    pub fn keep(&mut self, services: &BTreeMap<ServiceAddress, Passive>) {
        self.0
            .retain(|key, _| key.service.is_some_and(|service| services.contains_key(&service)));
    }

    /// How many are ejected.
    pub fn ejected(&self) -> usize {
        self.0.values().filter(|seen| seen.ejected.is_some()).count()
    }

    /// Judges the backends of one service by their counters: who is ejected now, and who may come back.
    pub fn judge(
        &mut self,
        service: ServiceAddress,
        settings: &Passive,
        rows: &[Row],
        now: Instant,
    ) -> Vec<Verdict> {
        let key = |backend| Key {
            service: Some(service),
            backend,
        };
        self.0.retain(|key, _| {
            key.service != Some(service) || rows.iter().any(|row| row.address == key.backend)
        });
        let mut verdicts = Vec::new();
        let mut outliers = Vec::new();
        for row in rows {
            let seen = self
                .0
                .entry(key(row.address))
                .or_insert_with(|| Seen::new(row, now));
            if seen.user != row.user {
                *seen = Seen::new(row, now);
            }
            if seen.ejected.is_some_and(|until| until <= now) {
                seen.ejected = None;
                seen.back = now;
                seen.window = (now, row.counted);
                verdicts.push(verdict(key(row.address), true, "back after an ejection".into()));
            }
            if seen.times > 0 && seen.ejected.is_none() && now.duration_since(seen.back) >= settings.eject_max
            {
                seen.times = 0;
            }
            let found = row.counted.since(seen.window.1);
            let enough = found.bad >= u64::from(settings.failures.max(1));
            if row.serves && enough && found.ratio() >= u64::from(settings.ratio) && seen.ejected.is_none() {
                outliers.push((found, row.address));
            } else if now.duration_since(seen.window.0) >= settings.window {
                seen.window = (now, row.counted);
            }
        }
        // Those of UDP have no handshake whose lack could be counted.
        if service.protocol != Protocol::Tcp {
            return verdicts;
        }
        // The worst first, and never below the share that is kept.
        outliers.sort_by_key(|(found, address)| (std::cmp::Reverse((found.ratio(), found.bad)), *address));
        let mut serving = rows.iter().filter(|row| row.serves).count() as u64;
        let least = (rows.len() as u64 * u64::from(settings.keep))
            .div_ceil(100)
            .max(1);
        for (found, address) in outliers {
            let Some(seen) = self.0.get_mut(&key(address)) else {
                continue;
            };
            if serving <= least {
                break;
            }
            serving -= 1;
            let time = settings
                .eject
                .saturating_mul(2u32.saturating_pow(seen.times))
                .min(settings.eject_max);
            seen.times = seen.times.saturating_add(1);
            seen.ejected = Some(now + time);
            let Counted { good, bad } = found;
            let reason = format!(
                "{bad} of {} connections refused or unanswered; out for {time:?}, time {}",
                bad + good,
                seen.times
            );
            verdicts.push(verdict(key(address), false, reason));
        }
        verdicts
    }
}

// === impl Seen ===

impl Seen {
    fn new(row: &Row, now: Instant) -> Self {
        Self {
            user: row.user.clone(),
            window: (now, row.counted),
            ejected: None,
            times: 0,
            back: now,
        }
    }
}

fn verdict(key: Key, fit: bool, reason: String) -> Verdict {
    Verdict {
        key,
        generation: 0,
        by: By::Passive,
        fit,
        tenths: WHOLE,
        reason,
        since: SystemTime::now(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;

    const SERVICE: ServiceAddress = ServiceAddress {
        vip: IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)),
        port: 80,
        protocol: Protocol::Tcp,
    };

    fn address(i: usize) -> SocketAddr {
        ([10, 0, 0, i as u8], 80).into()
    }

    /// Backends with (good, bad) counts; those in `out` do not serve.
    fn rows(counts: &[(u64, u64)], out: &[usize]) -> Vec<Row> {
        let row = |(i, (good, bad)): (usize, &(u64, u64))| Row {
            address: address(i),
            user: (i as u32 + 1, format!("web-{i}")),
            serves: !out.contains(&i),
            counted: Counted {
                good: *good,
                bad: *bad,
            },
        };
        counts.iter().enumerate().map(row).collect()
    }

    fn names(verdicts: &[Verdict]) -> Vec<(SocketAddr, bool)> {
        verdicts.iter().map(|v| (v.key.backend, v.fit)).collect()
    }

    #[test]
    fn an_outlier_goes_for_a_growing_time() {
        let (mut outliers, settings) = (Outliers::default(), Passive::default());
        let mut now = Instant::now();
        let mut judge = |counts: &[(u64, u64)], out: &[usize], after: u64| {
            now += Duration::from_secs(after);
            outliers.judge(SERVICE, &settings, &rows(counts, out), now)
        };
        // What was counted before anybody looked says nothing.
        assert_eq!(judge(&[(0, 900), (10, 0), (10, 0)], &[], 0), []);
        // Too few, then enough, within one window.
        assert_eq!(judge(&[(0, 904), (20, 0), (20, 0)], &[], 1), []);
        let found = judge(&[(3, 905), (30, 0), (30, 0)], &[], 1);
        assert_eq!(names(&found), [(address(0), false)]);
        assert_eq!(
            found[0].reason,
            "5 of 8 connections refused or unanswered; out for 30s, time 1"
        );
        assert_eq!(judge(&[(3, 906), (90, 0), (90, 0)], &[0], 29), []);
        let back = judge(&[(3, 906), (90, 0), (90, 0)], &[0], 1);
        assert_eq!(names(&back), [(address(0), true)]);
        let again = judge(&[(3, 920), (99, 0), (99, 0)], &[], 5);
        assert!(
            again[0]
                .reason
                .ends_with("14 connections refused or unanswered; out for 60s, time 2"),
            "{again:?}"
        );
        assert_eq!(judge(&[(3, 920), (99, 0), (99, 0)], &[0], 59), []);
        assert_eq!(
            names(&judge(&[(3, 920), (99, 0), (99, 0)], &[0], 1)),
            [(address(0), true)]
        );
        // A long time without: the next one is a first one.
        assert_eq!(judge(&[(800, 920), (99, 0), (99, 0)], &[], 300), []);
        assert_eq!(judge(&[(800, 920), (99, 0), (99, 0)], &[], 11), []);
        assert!(
            judge(&[(800, 930), (99, 0), (99, 0)], &[], 1)[0]
                .reason
                .contains("out for 30s, time 1")
        );
    }

    #[test]
    fn a_few_among_many_are_no_outlier() {
        let (mut outliers, settings) = (Outliers::default(), Passive::default());
        let mut now = Instant::now();
        for i in 0..100u64 {
            // 49 of 100, for ever.
            let counts = [(51 * i, 49 * i), (100 * i, 0)];
            assert_eq!(outliers.judge(SERVICE, &settings, &rows(&counts, &[]), now), []);
            now += Duration::from_secs(1);
        }
        // 4 in every window of 10 s.
        let mut outliers = Outliers::default();
        for i in 0..100u64 {
            let counts = [(0, i / 3), (0, 0)];
            assert_eq!(outliers.judge(SERVICE, &settings, &rows(&counts, &[]), now), []);
            now += Duration::from_secs(1);
        }
        let udp = ServiceAddress {
            protocol: Protocol::Udp,
            ..SERVICE
        };
        outliers.judge(udp, &settings, &rows(&[(0, 0), (0, 0)], &[]), now);
        assert_eq!(
            outliers.judge(udp, &settings, &rows(&[(0, 90), (0, 0)], &[]), now),
            []
        );
    }

    #[test]
    fn another_user_of_the_address_has_a_clean_sheet() {
        let (mut outliers, settings) = (Outliers::default(), Passive::default());
        let now = Instant::now();
        outliers.judge(SERVICE, &settings, &rows(&[(0, 0), (0, 0)], &[]), now);
        let mut other = rows(&[(0, 50), (0, 0)], &[]);
        other[0].user.0 = 77;
        assert_eq!(outliers.judge(SERVICE, &settings, &other, now), []);
        other[0].counted.bad = 60;
        assert_eq!(outliers.judge(SERVICE, &settings, &other, now).len(), 1);
        assert_eq!(outliers.ejected(), 1);
        assert_eq!(outliers.judge(SERVICE, &settings, &other[1..], now), []);
        assert_eq!(outliers.ejected(), 0);
        outliers.keep(&BTreeMap::new());
        assert!(outliers.0.is_empty());
    }

    proptest! {
        /// However bad all of them are, the share that is kept goes on serving, and the worst go first.
        #[test]
        fn the_kept_share_serves_on(
            bad in proptest::collection::vec(0u64..100, 1..20),
            keep in 0u32..=100,
        ) {
            let settings = Passive { keep, ..Passive::default() };
            let (mut outliers, now) = (Outliers::default(), Instant::now());
            let zero: Vec<_> = bad.iter().map(|_| (0, 0)).collect();
            outliers.judge(SERVICE, &settings, &rows(&zero, &[]), now);
            let counts: Vec<_> = bad.iter().map(|bad| (100 - bad, *bad)).collect();
            let verdicts = outliers.judge(SERVICE, &settings, &rows(&counts, &[]), now);
            let left = bad.len() - verdicts.len();
            prop_assert!(left >= 1 && left * 100 >= bad.len() * keep as usize);
            let out: Vec<u64> = verdicts.iter().map(|v| {
                let index = (0..bad.len()).find(|i| address(*i) == v.key.backend).unwrap();
                bad[index]
            }).collect();
            prop_assert!(out.iter().all(|bad| *bad >= 50));
            let worst_left = (0..bad.len())
                .filter(|i| !verdicts.iter().any(|v| v.key.backend == address(*i)))
                .map(|i| bad[i])
                .max()
                .unwrap();
            prop_assert!(out.iter().all(|bad| *bad >= worst_left));
        }
    }
}
