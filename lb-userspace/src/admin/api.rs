//! What the admin API says: one definition for the agent and for the command line.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::SystemTime,
};

use lb_common::{
    counter::{Counter, DropReason},
    maps,
};
use serde::{Deserialize, Serialize};

use crate::{
    model::{Protocol, ServiceAddress},
    status::Status,
};

/// Both directions of a connection are an entry each.
const ENTRIES_PER_FLOW: u64 = 2;

/// One reading of the datapath's counters, summed over CPUs.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// `STATS`.
    pub stats: maps::Stats,
    /// `DROPS`.
    pub drops: maps::Drops,
    /// `SERVICE_STATS` by service id.
    pub services: BTreeMap<u32, maps::ServiceStats>,
    /// `BACKEND_STATS` by backend id.
    pub backends: BTreeMap<u32, maps::BackendStats>,
    /// Entries that fit in `FLOWS4` and `FLOWS6`.
    pub flow_capacity: [u32; 2],
}

/// How full one flow table is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowTable {
    /// `ipv4` or `ipv6`.
    pub family: String,
    /// Entries in use at the last sweep; a connection takes two.
    pub entries: u64,
    /// Entries that fit.
    pub capacity: u64,
}

/// Answer of `GET /v1/counters`: every number since the maps were made, by the names of `lb_common::counter`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// When it was read: microseconds on the agent's monotonic clock. Two readings give a rate.
    pub taken_us: u64,
    /// Counters of the node.
    pub node: BTreeMap<String, u64>,
    /// Dropped packets by reason.
    pub drops: BTreeMap<String, u64>,
    /// By service id.
    pub services: BTreeMap<u32, ServiceCounters>,
    /// By backend id.
    pub backends: BTreeMap<u32, BackendCounters>,
    /// How full the flow tables are.
    pub flow_tables: Vec<FlowTable>,
}

/// Counters of one service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceCounters {
    /// Flows created.
    pub flows: u64,
    /// Dropped packets by reason; reasons that never occurred are left out.
    pub drops: BTreeMap<String, u64>,
}

/// Counters of one backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendCounters {
    /// Packets from clients.
    pub packets_in: u64,
    /// IP bytes from clients.
    pub bytes_in: u64,
    /// Packets to clients.
    pub packets_out: u64,
    /// IP bytes to clients.
    pub bytes_out: u64,
    /// Flows created.
    pub flows: u64,
    /// Flows whose handshake it finished.
    pub established: u64,
    /// SYNs it answered by RST or an ICMP error.
    pub refused: u64,
    /// SYNs taken away from it.
    pub resteered: u64,
}

/// Query of `GET /v1/flows`. Every filter that is given must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowQuery {
    /// Service name or address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Client address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<IpAddr>,
    /// Backend, in any form that `weir drain` takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// At most so many flows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

/// Answer of `GET /v1/flows`, in no particular order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowList {
    /// The flows.
    pub flows: Vec<FlowRow>,
    /// The limit was reached: there may be more.
    pub more: bool,
}

/// One flow: a client connection and where it was sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowRow {
    /// Protocol.
    pub protocol: Protocol,
    /// Client.
    pub client: SocketAddr,
    /// Virtual address and port that the client used.
    pub vip: SocketAddr,
    /// Where it was sent.
    pub backend: SocketAddr,
    /// Source that the backend sees, where it is not the client itself.
    pub snat: Option<SocketAddr>,
    /// Service id.
    pub service_id: u32,
    /// Backend id.
    pub backend_id: u32,
    /// Name of the service, empty if it is gone.
    pub service: String,
    /// Name of the backend, empty if it is gone.
    pub backend_name: String,
    /// `syn`, `established`, `closing`, `closed`, `reset` or `udp`.
    pub state: String,
    /// Seconds since it was created.
    pub age_s: u32,
    /// Seconds since its last packet from the client; stamped at most once a second.
    pub idle_s: u32,
}

/// [`FlowQuery`] with its names resolved to ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowFilter {
    /// Ids of services; `None`: all.
    pub services: Option<BTreeSet<u32>>,
    /// Client address.
    pub client: Option<IpAddr>,
    /// Ids of backends; `None`: all.
    pub backends: Option<BTreeSet<u32>>,
    /// Stop after so many.
    pub limit: usize,
}

/// One line of `GET /v1/events`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRecord {
    /// When the agent heard of it.
    pub time: SystemTime,
    /// `new_flow`, `drop` or `resteer`; `lost` when this reader was too slow for `count` events.
    pub kind: String,
    /// Client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<SocketAddr>,
    /// Virtual address and port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vip: Option<SocketAddr>,
    /// Protocol.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Service name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Backend name and address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// Why a packet was dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How many events were lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
}

/// Body of `POST /v1/announce`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnnounceQuery {
    /// This VIP alone; without it all that the node announces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vip: Option<IpAddr>,
}

/// Answer of `POST /v1/announce`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announced {
    /// What the neighbours are told, never empty.
    pub announced: Vec<AnnouncedVip>,
}

/// A VIP and where it is announced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnnouncedVip {
    /// The VIP.
    pub vip: IpAddr,
    /// The interface.
    pub interface: String,
}

/// Body of `POST /v1/drain` and (without a deadline) `POST /v1/undrain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// Which backend: see [`super::select`].
    pub backend: String,
    /// Take every backend that matches instead of refusing when there are several.
    #[serde(default)]
    pub all: bool,
    /// How long old flows may go on, milliseconds; without it the drain time of each backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
}

/// A backend of a service, or an upstream of a route, as answers name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendName {
    /// Id in the maps; an upstream of a route has none.
    pub id: Option<u32>,
    /// Name of the service, or host of the route.
    pub service: String,
    /// Address of the service; a route has none.
    pub service_address: Option<ServiceAddress>,
    /// Name of the backend.
    pub name: String,
    /// Address of the backend.
    pub address: SocketAddr,
}

/// Answer of a state-changing call that was carried out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// The backends that it was done to.
    pub backends: Vec<BackendName>,
}

/// Body of every answer that is not a success.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What is wrong.
    pub error: String,
    /// What to do about it.
    pub remedy: String,
    /// What could have been meant.
    #[serde(default)]
    pub candidates: Vec<BackendName>,
}

// === impl Counters ===

impl Counters {
    /// From the maps' words to names; live flows are those of the last sweep, as `status` has them.
    pub fn new(reading: &Reading, status: &Status, taken_us: u64) -> Self {
        let flows = |v4: bool| {
            let services = status.services.iter().filter(|s| s.address.vip.is_ipv4() == v4);
            services.flat_map(|s| &s.backends).map(|b| b.flows).sum::<u64>()
        };
        let table = |family: &str, v4: bool, capacity: u32| FlowTable {
            family: family.into(),
            entries: ENTRIES_PER_FLOW * flows(v4),
            capacity: capacity.into(),
        };
        let [v4, v6] = reading.flow_capacity;
        Self {
            taken_us,
            node: by_name(Counter::ALL.iter().map(|c| c.name()), &reading.stats.counters),
            drops: by_name(DropReason::ALL.iter().map(|r| r.name()), &reading.drops.reasons),
            services: reading
                .services
                .iter()
                .map(|(id, s)| (*id, ServiceCounters::from(s)))
                .collect(),
            backends: reading
                .backends
                .iter()
                .map(|(id, b)| (*id, BackendCounters::from(b)))
                .collect(),
            flow_tables: vec![table("ipv4", true, v4), table("ipv6", false, v6)],
        }
    }
}

impl From<&maps::ServiceStats> for ServiceCounters {
    fn from(stats: &maps::ServiceStats) -> Self {
        let mut drops = by_name(DropReason::ALL.iter().map(|r| r.name()), &stats.drops);
        drops.retain(|_, count| *count > 0);
        Self {
            flows: stats.flows,
            drops,
        }
    }
}

impl From<&maps::BackendStats> for BackendCounters {
    fn from(s: &maps::BackendStats) -> Self {
        Self {
            packets_in: s.packets_in,
            bytes_in: s.bytes_in,
            packets_out: s.packets_out,
            bytes_out: s.bytes_out,
            flows: s.flows,
            established: s.established,
            refused: s.refused,
            resteered: s.resteered,
        }
    }
}

/// Pairs names with values of the same index.
fn by_name<'a>(names: impl Iterator<Item = &'a str>, values: &[u64]) -> BTreeMap<String, u64> {
    names.map(str::to_owned).zip(values.iter().copied()).collect()
}
