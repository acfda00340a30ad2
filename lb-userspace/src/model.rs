//! The domain words: services and backends as people mean them. No wire types, no I/O.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Layer-4 protocol of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP, protocol number 6.
    Tcp,
    /// UDP, protocol number 17.
    Udp,
}

impl Protocol {
    /// The IP protocol number.
    pub const fn number(self) -> u16 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// What a packet must match: VIP, port, protocol. The identity of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServiceAddress {
    /// Virtual IP.
    pub vip: IpAddr,
    /// Port, host order; 0 is every port of the VIP that has no service of its own.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

impl fmt::Display for ServiceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", SocketAddr::new(self.vip, self.port), self.protocol)
    }
}

/// When the source address is translated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnatMode {
    /// Where the reply would not come back by itself: remote backends, and clients on the backend's own bridge.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never: the operator routes replies back through the balancer.
    Never,
}

/// What a service without any backend for new flows does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EmptyPolicy {
    /// Use draining backends while there are any, then refuse (RST).
    #[default]
    DrainersThenRefuse,
    /// Refuse at once (RST).
    Refuse,
    /// Drop silently.
    Drop,
}

/// Idle timeouts of a service's flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowTimeouts {
    /// TCP, handshake done.
    pub tcp_established: Duration,
    /// TCP, handshake not done.
    pub tcp_syn: Duration,
    /// TCP, closed by both sides or reset.
    pub tcp_closing: Duration,
    /// UDP.
    pub udp: Duration,
}

impl Default for FlowTimeouts {
    fn default() -> Self {
        use lb_common::limits as l;
        let s = |seconds: u32| Duration::from_secs(seconds.into());
        Self {
            tcp_established: s(l::DEFAULT_TCP_ESTABLISHED_S),
            tcp_syn: s(l::DEFAULT_TCP_SYN_S),
            tcp_closing: s(l::DEFAULT_TCP_CLOSING_S),
            udp: s(l::DEFAULT_UDP_S),
        }
    }
}

/// Everything about a service that is not its address and not its backends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceSettings {
    /// Flows of one client address go to one backend.
    pub client_ip_affinity: bool,
    /// Source translation.
    pub snat: SnatMode,
    /// Only these clients (empty: everybody not denied). The longest matching prefix of both lists decides.
    pub allow: Vec<IpNet>,
    /// Not these clients. An equal prefix in both lists denies.
    pub deny: Vec<IpNet>,
    /// Flow timeouts.
    pub timeouts: FlowTimeouts,
    /// Without backends.
    pub when_empty: EmptyPolicy,
    /// Answer TCP packets of unknown flows by RST instead of silence.
    pub reset_unknown: bool,
}

/// Whether a backend may take new flows, as its source and the operator wish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendState {
    /// Takes new flows.
    Active,
    /// Takes no new flows; old ones go on until they end or the drain deadline passes.
    Draining,
    /// Known, but not serving (starting, unhealthy, paused): takes no new flows, old ones go on without a deadline.
    Unready,
}

/// A place that serves a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// Where to reach it. Port 0 keeps the port that the client used.
    pub address: SocketAddr,
    /// Share of new flows relative to the other backends; 0 drains.
    pub weight: u32,
    /// State.
    pub state: BackendState,
    /// Why it is in that state, for people ("container stopping", "health: starting", "drained by operator").
    pub reason: String,
    /// How long old flows may go on once it is draining or removed.
    pub drain: Duration,
    /// Who it is, for people: container name, or the name in the file.
    pub name: String,
}

/// One service as one source object wishes it: part of what becomes a service together with others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceWish {
    /// Name for people.
    pub name: String,
    /// Address.
    pub address: ServiceAddress,
    /// Settings.
    pub settings: ServiceSettings,
    /// Backends that this object contributes.
    pub backends: Vec<Backend>,
}

/// A service as it shall be programmed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Service {
    /// Name for people.
    pub name: String,
    /// Address.
    pub address: ServiceAddress,
    /// Settings.
    pub settings: ServiceSettings,
    /// Backends, ordered by address, no address twice.
    pub backends: Vec<Backend>,
}

/// Something that was refused, and only that: the rest goes on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Rejection {
    /// Source that said it: `docker`, `file`.
    pub source: String,
    /// The object: "container web-1 (3f2a…): label weir.service.web.listen".
    pub object: String,
    /// What is wrong.
    pub fault: String,
    /// What to do about it.
    pub remedy: String,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}: {}; {}",
            self.source, self.object, self.fault, self.remedy
        )
    }
}
