//! Flow tables that fill up, and services that hold as much of them as one may: faults, told in the log when they come and
//! when they go, and in the status as long as they last.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use crate::{model::ServiceAddress, plan::Sweep, status::FlowTableStatus};

/// Share of the rated flows from which on a table is too full, percent.
const FULL: u64 = 80;
/// Share below which it is well again: a table at the brink is told of once.
const WELL: u64 = 75;
/// A service is well again when none of its flows was refused for so long: clients try again within it.
const CALM: Duration = Duration::from_secs(60);

/// The tables.
const FAMILIES: [(&str, &str, &str); 2] = [("ipv4", "IPv4", "flows4"), ("ipv6", "IPv6", "flows6")];

/// What a fault is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Object {
    /// A table, by its index.
    Table(usize),
    /// A service, by its id.
    Service(u32),
}

/// How full the flow tables are.
#[derive(Debug, Default)]
pub(super) struct Pressure {
    /// Packets refused so far by service id; `None` before the first sweep.
    refused: Option<BTreeMap<u32, u64>>,
    /// When a flow of a service was last refused.
    last_refused: BTreeMap<u32, Instant>,
    faults: BTreeMap<Object, String>,
}

/// What a sweep is judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Flows that the tables are made for.
    pub rated: [u32; 2],
    /// Flows that one service may hold, 0 for any number.
    pub share: [u32; 2],
    /// `limits.flow-share`.
    pub percent: u32,
}

// === impl Pressure ===

impl Pressure {
    /// Judges a sweep, and logs what has changed.
    pub fn judge(
        &mut self,
        sweep: &Sweep,
        limits: Limits,
        service: impl Fn(u32) -> Option<(String, ServiceAddress)>,
    ) {
        let Some(now) = sweep.started else { return };
        if let Some(before) = &self.refused {
            for (id, count) in &sweep.refused {
                if before.get(id).copied().unwrap_or(0) < *count {
                    self.last_refused.insert(*id, now);
                }
            }
        }
        self.refused = Some(sweep.refused.clone());
        self.last_refused
            .retain(|_, last| now.saturating_duration_since(*last) < CALM);

        let mut faults = BTreeMap::new();
        for (table, rated) in limits.rated.into_iter().enumerate() {
            let was = self.faults.contains_key(&Object::Table(table));
            let established = sweep.established[table];
            let share = established * 100 / u64::from(rated).max(1);
            if share >= if was { WELL } else { FULL } {
                faults.insert(Object::Table(table), full(table, established, rated));
            }
        }
        for id in self.last_refused.keys() {
            if let Some((name, address)) = service(*id) {
                faults.insert(Object::Service(*id), at_its_share(&name, address, limits));
            }
        }
        for (_, fault) in faults
            .iter()
            .filter(|(object, _)| !self.faults.contains_key(object))
        {
            warn!("{fault}");
        }
        for (object, fault) in &self.faults {
            if !faults.contains_key(object) {
                info!("over: {fault}");
            }
        }
        self.faults = faults;
    }

    /// What is wrong.
    pub fn faults(&self) -> impl Iterator<Item = &String> {
        self.faults.values()
    }
}

/// How full the tables are, for the status.
pub(super) fn tables(sweep: &Sweep, rated: [u32; 2]) -> Vec<FlowTableStatus> {
    let families = FAMILIES.iter().zip(rated).enumerate();
    let table = |(index, ((family, ..), rated)): (usize, (&(&str, _, _), u32))| FlowTableStatus {
        family: (*family).to_owned(),
        established: sweep.established[index],
        half_open: sweep.half_open[index],
        rated: rated.into(),
    };
    families.map(table).collect()
}

fn full(table: usize, established: u64, rated: u32) -> String {
    let (_, family, setting) = FAMILIES[table];
    format!(
        "flow table of {family}: {} flows that cannot be evicted, of {} that it is made for: when it is full, new flows are \
         dropped (`flow_table_full`); raise `limits.{setting}` and run `weir detach` before the next start, or shorten the \
         timeouts of services whose clients leave without a word",
        established, rated
    )
}

fn at_its_share(name: &str, address: ServiceAddress, limits: Limits) -> String {
    let table = usize::from(address.vip.is_ipv6());
    let (_, family, setting) = FAMILIES[table];
    let limit = match limits.share[table] {
        // Raised since.
        0 => "as many as one service could".to_owned(),
        share => format!("the {} that one service may", share),
    };
    format!(
        "service {name} ({address}): it holds {limit} of the {} {family} flows (`limits.flow-share` {} %), and its new flows \
         are dropped (`service_share`); raise `limits.flow-share`, or `limits.{setting}` and run `weir detach` before the next \
         start, or shorten its timeouts",
        limits.rated[table], limits.percent
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Protocol;

    const LIMITS: Limits = Limits {
        rated: [1000, 100],
        share: [500, 50],
        percent: 50,
    };

    fn web(id: u32) -> Option<(String, ServiceAddress)> {
        let address = ServiceAddress {
            vip: [192, 0, 2, 1].into(),
            port: 80,
            protocol: Protocol::Tcp,
        };
        (id == 3).then(|| ("web".to_owned(), address))
    }

    fn faults_of(pressure: &mut Pressure, sweep: &Sweep) -> Vec<String> {
        pressure.judge(sweep, LIMITS, web);
        pressure.faults().cloned().collect()
    }

    #[test]
    fn a_table_is_full_from_four_fifths_on_and_half_open_flows_do_not_count() {
        let mut pressure = Pressure::default();
        let at = |established| Sweep {
            started: Some(Instant::now()),
            established,
            half_open: [5000, 5000],
            ..Sweep::default()
        };
        assert_eq!(faults_of(&mut pressure, &at([799, 79])), Vec::<String>::new());
        let faults = faults_of(&mut pressure, &at([799, 80]));
        assert!(
            faults.len() == 1 && faults[0].contains("IPv6") && faults[0].contains("limits.flows6"),
            "{faults:?}"
        );
        // At the brink it stays one and the same fault.
        assert_eq!(faults_of(&mut pressure, &at([800, 76])).len(), 2);
        let faults = faults_of(&mut pressure, &at([800, 74]));
        assert!(
            faults.len() == 1 && faults[0].contains("800 flows") && faults[0].contains("of 1000"),
            "{faults:?}"
        );
    }

    #[test]
    fn a_service_at_its_share_is_named_with_the_limit_and_the_remedy() {
        let (mut pressure, start) = (Pressure::default(), Instant::now());
        let at = |seconds, refused: &[(u32, u64)]| Sweep {
            started: Some(start + Duration::from_secs(seconds)),
            refused: refused.iter().copied().collect(),
            ..Sweep::default()
        };
        // What was counted before the agent came is over.
        assert!(faults_of(&mut pressure, &at(0, &[(3, 7)])).is_empty());
        assert!(faults_of(&mut pressure, &at(5, &[(3, 7)])).is_empty());
        let faults = faults_of(&mut pressure, &at(10, &[(3, 8), (9, 1)]));
        assert_eq!(faults.len(), 1, "{faults:?}");
        for word in [
            "service web (192.0.2.1:80/tcp)",
            "the 500",
            "`limits.flow-share`",
            "limits.flows4",
        ] {
            assert!(faults[0].contains(word), "{word}: {faults:?}");
        }
        assert_eq!(faults_of(&mut pressure, &at(69, &[(3, 8)])).len(), 1);
        assert!(faults_of(&mut pressure, &at(70, &[(3, 8)])).is_empty());
    }

    #[test]
    fn the_status_shows_half_open_flows_apart() {
        let sweep = Sweep {
            established: [7, 8],
            half_open: [1, 2],
            ..Sweep::default()
        };
        let tables = tables(&sweep, LIMITS.rated);
        let numbers: Vec<_> = tables
            .iter()
            .map(|t| (t.family.as_str(), t.established, t.half_open, t.rated))
            .collect();
        assert_eq!(numbers, [("ipv4", 7, 1, 1000), ("ipv6", 8, 2, 100)]);
    }
}
