//! The list of connections for `weir flows`, read from the pinned maps.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use aya::Pod;
use lb_common::{
    addr::{Addr4, Addr16},
    flow::{Address, FlowKey},
    maps::{Flow, flow_state},
};
use serde::{Deserialize, Serialize};

use super::{
    batch::{Cursor, Table},
    load::Pins,
    sweep::{SweepError, Sweeper},
};

/// Which connections are wanted; an empty filter is all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowFilter {
    /// Client address.
    pub client: Option<IpAddr>,
    /// Service id.
    pub service: Option<u32>,
    /// Backend id.
    pub backend: Option<u32>,
}

/// One connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowLine {
    /// IP protocol number (6 or 17).
    pub protocol: u32,
    /// Client.
    pub client: SocketAddr,
    /// Virtual address and port.
    pub vip: SocketAddr,
    /// Source address and port towards the backend.
    pub source: SocketAddr,
    /// Backend.
    pub backend: SocketAddr,
    /// Backend id.
    pub backend_id: u32,
    /// Service id.
    pub service_id: u32,
    /// `syn`, `established`, `closing`, `closed`, `reset`, or `udp`.
    pub state: String,
    /// Since the client last sent.
    pub idle: Duration,
    /// Since the flow was made.
    pub age: Duration,
}

/// Up to `limit` connections that pass `filter`, and how many passed in all.
pub fn list(pins: &Pins, filter: &FlowFilter, limit: usize) -> Result<(Vec<FlowLine>, u64), SweepError> {
    let sweeper = Sweeper::open(pins)?;
    let clock = Clock {
        now: sweeper.now()?,
        hz: sweeper.hz()?.max(1),
    };
    let (mut lines, mut count) = (Vec::new(), 0);
    family::<Addr4>(pins, "FLOWS4", filter, limit, clock, &mut lines, &mut count)?;
    family::<Addr16>(pins, "FLOWS6", filter, limit, clock, &mut lines, &mut count)?;
    Ok((lines, count))
}

#[derive(Clone, Copy)]
struct Clock {
    now: u32,
    hz: u32,
}

impl Clock {
    /// Time since a stamp; a stamp later than `now` is no time ago.
    fn since(self, stamp: u32) -> Duration {
        let ticks = self.now.wrapping_sub(stamp);
        let ticks = if ticks < 1 << 31 { ticks } else { 0 };
        Duration::from_millis(u64::from(ticks) * 1000 / u64::from(self.hz))
    }
}

fn family<A: Address>(
    pins: &Pins,
    name: &'static str,
    filter: &FlowFilter,
    limit: usize,
    clock: Clock,
    lines: &mut Vec<FlowLine>,
    count: &mut u64,
) -> Result<(), SweepError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let table: Table<FlowKey<A>, Flow<A>> = Table::open(&pins.maps(), name)?;
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    let mut cursor = Cursor::new(4096);
    while table.next_chunk(&mut cursor, &mut keys, &mut values)? {
        for (key, flow) in keys.iter().zip(&values) {
            if flow.state & flow_state::REVERSE != 0 || !passes(filter, key, flow) {
                continue;
            }
            *count += 1;
            if lines.len() < limit {
                lines.push(line(key, flow, clock));
            }
        }
        keys.clear();
        values.clear();
    }
    Ok(())
}

fn passes<A: Address>(filter: &FlowFilter, key: &FlowKey<A>, flow: &Flow<A>) -> bool {
    filter
        .client
        .is_none_or(|client| IpAddr::from(key.src.wide()) == client)
        && filter.service.is_none_or(|id| id == flow.service)
        && filter.backend.is_none_or(|id| id == flow.backend)
}

fn line<A: Address>(key: &FlowKey<A>, flow: &Flow<A>, clock: Clock) -> FlowLine {
    let at = |address: A, port: lb_common::addr::Be16| SocketAddr::new(address.wide().into(), port.get());
    FlowLine {
        protocol: key.proto,
        client: at(key.src, key.sport),
        vip: at(key.dst, key.dport),
        source: at(flow.src, flow.sport),
        backend: at(flow.dst, flow.dport),
        backend_id: flow.backend,
        service_id: flow.service,
        state: state(key.proto, flow.state).to_owned(),
        idle: clock.since(flow.last_seen),
        age: clock.since(flow.created),
    }
}

/// The word for a state.
fn state(proto: u32, bits: u32) -> &'static str {
    use flow_state as s;
    const BOTH_FINS: u32 = s::FIN_CLIENT | s::FIN_BACKEND;
    match bits {
        _ if proto == 17 => "udp",
        b if b & s::RESET != 0 => "reset",
        b if b & BOTH_FINS == BOTH_FINS => "closed",
        b if b & BOTH_FINS != 0 => "closing",
        b if b & s::ESTABLISHED != 0 => "established",
        _ => "syn",
    }
}
