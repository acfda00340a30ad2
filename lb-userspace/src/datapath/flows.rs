//! The list of connections for `weir flows`, read from the pinned maps.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use lb_common::{
    addr::{Addr4, Addr16, Be16},
    flow::Address,
    maps::flow_state,
    slot::{Slot, head},
};
use serde::{Deserialize, Serialize};

use super::{
    flow_table::FlowMaps,
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
    let flows = FlowMaps::open(&pins.maps())?;
    let (mut lines, mut count) = (Vec::new(), 0);
    family::<Addr4>(&flows, filter, limit, clock, &mut lines, &mut count);
    family::<Addr16>(&flows, filter, limit, clock, &mut lines, &mut count);
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
    flows: &FlowMaps,
    filter: &FlowFilter,
    limit: usize,
    clock: Clock,
    lines: &mut Vec<FlowLine>,
    count: &mut u64,
) {
    let is_forward = |seen: u64| head::is_live(seen) && head::flow_state(seen) & flow_state::REVERSE == 0;
    for id in 0..flows.slots::<A>() {
        if !flows.head::<A>(id).is_some_and(is_forward) {
            continue;
        }
        let Some(slot) = flows.read::<A>(id).filter(|slot| is_forward(slot.head)) else {
            continue;
        };
        if !passes(filter, &slot) {
            continue;
        }
        // Where its packets go, only the reverse slot says.
        let reverse = flows
            .read::<A>(slot.body.partner)
            .filter(|reverse| head::generation(reverse.head) == slot.body.partner_generation());
        if let Some(reverse) = reverse {
            *count += 1;
            if lines.len() < limit {
                lines.push(line(&slot, &reverse, clock));
            }
        }
    }
}

fn passes<A: Address>(filter: &FlowFilter, slot: &Slot<A>) -> bool {
    filter
        .client
        .is_none_or(|client| IpAddr::from(slot.src.wide()) == client)
        && filter.service.is_none_or(|id| id == u32::from(slot.body.service))
        && filter.backend.is_none_or(|id| id == slot.body.backend_id())
}

fn line<A: Address>(slot: &Slot<A>, reverse: &Slot<A>, clock: Clock) -> FlowLine {
    let at = |address: A, port: Be16| SocketAddr::new(address.wide().into(), port.get());
    let state = head::flow_state(slot.head);
    FlowLine {
        protocol: slot.key().proto,
        client: at(slot.src, slot.sport),
        vip: at(slot.dst, slot.dport),
        source: at(slot.body.to_src, slot.body.to_sport),
        backend: at(reverse.src, reverse.sport),
        backend_id: slot.body.backend_id(),
        service_id: slot.body.service.into(),
        state: word(state).to_owned(),
        idle: clock.since(slot.seen),
        age: clock.since(slot.body.to_dst.word()),
    }
}

/// The word for a state.
fn word(bits: u32) -> &'static str {
    use flow_state as s;
    match bits {
        b if b & s::UDP != 0 => "udp",
        b if b & s::ESTABLISHED == 0 => "syn",
        b if s::is_closed(b) => "closed",
        b if b & s::RESET != 0 => "reset",
        b if b & s::FINS != 0 => "closing",
        _ => "established",
    }
}
