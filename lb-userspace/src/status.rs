//! What the reconciler tells the world after every pass: one value, read by CLI, admin API and metrics.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::{
    model::{BackendState, Rejection, ServiceAddress},
    route::Route,
};

/// The agent's state. Published on a `tokio::sync::watch` channel.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// Services in address order.
    pub services: Vec<ServiceStatus>,
    /// Routes in the order of host and path.
    pub routes: Vec<RouteStatus>,
    /// Sources in name order.
    pub sources: Vec<SourceStatus>,
    /// Everything refused.
    pub rejections: Vec<Rejection>,
    /// Programs by device.
    pub attachments: Vec<AttachmentStatus>,
    /// Faults of the agent itself: a failing map write, a missing sysctl.
    pub faults: Vec<String>,
    /// Every source has been read once (or its waiting time is over), the maps hold the desired state, and every interface of the
    /// configuration has its programs.
    pub ready: bool,
    /// When the maps last changed.
    pub last_commit: Option<SystemTime>,
    /// How long the last pass took from the first waiting update to the last commit, microseconds.
    pub last_commit_us: u64,
    /// Ring commits since start.
    pub commits: u64,
    /// How the health checks go.
    #[serde(default)]
    pub checks: crate::health::Report,
    /// How full the flow tables are; empty before the first sweep.
    #[serde(default)]
    pub flow_tables: Vec<FlowTableStatus>,
}

/// How full one flow table is, as of the last sweep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowTableStatus {
    /// `ipv4` or `ipv6`.
    pub family: String,
    /// Flows that cannot be evicted.
    pub established: u64,
    /// Flows whose handshake is not finished: they give way when their place is needed.
    pub half_open: u64,
    /// Flows that the table is made for.
    pub rated: u64,
}

/// One service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Id in the maps.
    pub id: u32,
    /// Name for people.
    pub name: String,
    /// Address.
    pub address: ServiceAddress,
    /// Generation of its ring.
    pub generation: u32,
    /// Backends, leaving ones too.
    pub backends: Vec<BackendStatus>,
    /// Its last container is gone; without a new one it is forgotten then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_until: Option<SystemTime>,
}

/// One backend of one service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackendStatus {
    /// Id in the maps.
    pub id: u32,
    /// Name for people.
    pub name: String,
    /// Address and port.
    pub address: std::net::SocketAddr,
    /// Weight.
    pub weight: u32,
    /// State.
    pub state: BackendState,
    /// No longer wished for: goes when its flows have ended or at the deadline.
    pub leaving: bool,
    /// Why it is in that state.
    pub reason: String,
    /// Since when.
    pub since: SystemTime,
    /// Where it is: `node`, `bridge docker0`, `remote eth0`, `remote eth0 (neighbour unknown)`, `no route`.
    pub place: String,
    /// End of draining.
    pub drain_deadline: Option<SystemTime>,
    /// Share of the ring, parts per 10,000.
    pub ring_share: u32,
    /// Live flows at the last sweep.
    pub flows: u64,
    /// Tenths of its share while it comes back slowly, 1 to 9; absent otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenths: Option<u8>,
    /// What everybody who judges it says; empty where its source is the only judge.
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

/// One word in the state of a backend: it takes new flows when all say that it is fit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// Who: the name of its source, `check`, `passive` or `operator`.
    pub by: String,
    /// Fit for new flows.
    pub fit: bool,
    /// Why.
    pub reason: String,
    /// Since when.
    pub since: SystemTime,
}

/// One route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteStatus {
    /// What shall be served.
    #[serde(flatten)]
    pub route: Route,
    /// What has to be there before it is served; `None`: it is served.
    pub waiting_for: Option<String>,
}

/// One source.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SourceStatus {
    /// Name.
    pub name: String,
    /// Connected now.
    pub connected: bool,
    /// Last sign of life.
    pub last_heard: Option<SystemTime>,
    /// Last complete list.
    pub last_full_read: Option<SystemTime>,
    /// What is wrong.
    pub fault: Option<String>,
    /// Which of several endpoints is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<String>,
    /// Objects it told of.
    pub objects: usize,
}

/// The programs on one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentStatus {
    /// Interface name.
    pub device: String,
    /// `native`, `generic`, or `-`.
    pub xdp: String,
    /// `tcx`, `clsact`, or `-`.
    pub tc: String,
    /// Why XDP is on or off there; empty where it never is (bridges, `lo`).
    #[serde(default)]
    pub why: String,
}
