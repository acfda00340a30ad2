//! [`Readings`] of the pinned maps.

use super::{
    ReadError, Readings,
    api::{FlowFilter, FlowList, FlowRow, Reading},
};
use crate::{
    datapath::{Capacities, MapError, counters::Counters, flows, load::Pins},
    model::Protocol,
};

/// Reads the datapath that an agent has loaded.
#[derive(Debug)]
pub struct Kernel {
    pins: Pins,
    counters: Counters,
    capacities: Capacities,
}

impl Kernel {
    /// Opens the pinned counters.
    ///
    /// # Errors
    /// Nothing is pinned there.
    pub fn open(pins: Pins, capacities: Capacities) -> Result<Self, MapError> {
        let counters = Counters::open(&pins.maps())?;
        Ok(Self {
            pins,
            counters,
            capacities,
        })
    }
}

impl Readings for Kernel {
    fn counters(&self, services: &[u32], backends: &[u32]) -> Result<Reading, ReadError> {
        let mut reading = Reading {
            services: self.counters.services(services)?,
            backends: self.counters.backends(backends)?,
            flow_capacity: [self.capacities.flows4, self.capacities.flows6],
            ..Reading::default()
        };
        reading.stats.counters = self.counters.stats()?;
        reading.drops.reasons = self.counters.drops()?;
        Ok(reading)
    }

    fn flows(&self, filter: &FlowFilter) -> Result<FlowList, ReadError> {
        let mut list = FlowList::default();
        // A name seldom means more than one id, so a walk for each is no loss.
        for service in ids(filter.services.as_ref()) {
            for backend in ids(filter.backends.as_ref()) {
                let one = flows::FlowFilter {
                    client: filter.client,
                    service,
                    backend,
                };
                let room = filter.limit - list.flows.len();
                let (lines, count) = flows::list(&self.pins, &one, room)?;
                list.more |= count > lines.len() as u64;
                list.flows.extend(lines.into_iter().map(row));
            }
        }
        Ok(list)
    }
}

/// Each id once, or `None` once where every id is meant.
fn ids(wanted: Option<&std::collections::BTreeSet<u32>>) -> Vec<Option<u32>> {
    wanted.map_or(vec![None], |ids| ids.iter().copied().map(Some).collect())
}

/// A line of the datapath without the names, which it does not know.
fn row(line: flows::FlowLine) -> FlowRow {
    let seconds = |d: std::time::Duration| u32::try_from(d.as_secs()).unwrap_or(u32::MAX);
    FlowRow {
        protocol: if line.protocol == u32::from(Protocol::Udp.number()) {
            Protocol::Udp
        } else {
            Protocol::Tcp
        },
        client: line.client,
        vip: line.vip,
        backend: line.backend,
        snat: (line.source != line.client).then_some(line.source),
        service_id: line.service_id,
        backend_id: line.backend_id,
        service: String::new(),
        backend_name: String::new(),
        state: line.state,
        age_s: seconds(line.age),
        idle_s: seconds(line.idle),
    }
}
