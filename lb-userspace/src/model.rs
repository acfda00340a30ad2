//! The domain words: services and backends as people mean them. No wire types, no I/O.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
pub use lb_route::BackendState;
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

/// What a service does when there are backends and every one of them is judged unfit by a check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnhealthyPolicy {
    /// As without backends: [`EmptyPolicy`] decides.
    #[default]
    AsEmpty,
    /// All of them serve: a check that fails everywhere is more likely wrong than right.
    ServeAll,
}

/// Ejection of a backend by what the datapath sees of it: connections that it refuses or leaves unanswered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passive {
    /// Attempts are counted over this time.
    pub window: Duration,
    /// Fewer failed attempts in a window say nothing.
    pub failures: u32,
    /// Share of failed attempts from which on a backend is an outlier, percent.
    pub ratio: u32,
    /// First ejection; the next one, if it comes soon, is twice as long, and so on.
    pub eject: Duration,
    /// Longest ejection.
    pub eject_max: Duration,
    /// Share of the service's backends that is never ejected, percent.
    pub keep: u32,
}

impl Default for Passive {
    fn default() -> Self {
        Self {
            window: Duration::from_secs(10),
            failures: 5,
            ratio: 50,
            eject: Duration::from_secs(30),
            eject_max: Duration::from_secs(300),
            keep: 50,
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
    /// With nothing but unfit backends.
    pub when_unhealthy: UnhealthyPolicy,
    /// Ejection of outliers; `None`: switched off. Counts TCP alone.
    pub passive: Option<Passive>,
}

/// What is tried by an active check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckKind {
    /// A TCP connection.
    Tcp,
    /// An HTTP/1.1 request.
    Http,
    /// The same inside TLS.
    Https,
}

/// How a backend is actively checked. Docker's HEALTHCHECK and the operator count besides.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Check {
    /// What is tried, in this order, at least one and none twice; all must pass.
    pub kinds: Vec<CheckKind>,
    /// Port to try instead of the backend's own; never 0.
    pub port: Option<u16>,
    /// The request of `http` and `https`.
    pub http: HttpCheck,
    /// The session of `https`.
    pub tls: TlsCheck,
    /// When, how often, and how many results count.
    pub timing: CheckTiming,
    /// The backend is on a network of this node: a check that would leave by a gateway fails instead.
    #[serde(default)]
    pub on_link: bool,
}

/// Times and thresholds of a check.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CheckTiming {
    /// Time from one check to the next; a tenth more or less, by chance.
    pub interval: Duration,
    /// The same while the verdict is open: new backends, and results that contradict the verdict.
    pub fast_interval: Duration,
    /// Time for all kinds together; no answer by then is a failure.
    pub timeout: Duration,
    /// Passed checks in a row that bring a backend back; at least 1. A new backend needs one.
    pub rise: u32,
    /// Failed checks in a row that take a backend out; at least 1.
    pub fall: u32,
    /// A new backend that fails is starting, not failing, for so long.
    pub grace: Duration,
    /// Time in which a backend that comes back is given its share little by little; 0: at once.
    pub slow_start: Duration,
}

/// The request, and which answers are good.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HttpCheck {
    /// Method.
    pub method: HttpMethod,
    /// Path and query, with the leading `/`.
    pub path: String,
    /// `Host`; `None`: the address and port that are checked.
    pub host: Option<String>,
    /// Status codes, first and last of each range; at least one range.
    pub status: Vec<(u16, u16)>,
    /// Text that the first 64 KiB of the body must contain.
    pub body: Option<String>,
}

/// Methods without an effect on the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum HttpMethod {
    /// `GET`.
    #[default]
    Get,
    /// `HEAD`: an answer without a body.
    Head,
    /// `OPTIONS`.
    Options,
}

/// How a checked server proves who it is, and the checker too. The server is always verified.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TlsCheck {
    /// Name in its certificate, sent as SNI; `None`: its address.
    pub server_name: Option<String>,
    /// Whom to trust and what to show; `None`: the node's own certificate authorities, and nothing.
    pub files: Option<TlsFiles>,
}

/// Files of a `[tls.<name>]` section, PEM. Labels name the section: a container names no files of the node.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TlsFiles {
    /// Certificate authorities to trust; `None`: the node's own.
    pub ca: Option<PathBuf>,
    /// Client certificate with its chain, and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl Check {
    /// A check of these kinds with everything else as it is when nothing is said.
    pub fn of(kinds: Vec<CheckKind>) -> Self {
        Self {
            kinds,
            port: None,
            http: HttpCheck::default(),
            tls: TlsCheck::default(),
            timing: CheckTiming::default(),
            on_link: false,
        }
    }
}

impl Default for CheckTiming {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(5),
            fast_interval: Duration::from_secs(1),
            timeout: Duration::from_secs(2),
            rise: 2,
            fall: 3,
            grace: Duration::from_secs(10),
            slow_start: Duration::ZERO,
        }
    }
}

impl Default for HttpCheck {
    fn default() -> Self {
        Self {
            method: HttpMethod::Get,
            path: "/".into(),
            host: None,
            status: vec![(200, 399)],
            body: None,
        }
    }
}

impl HttpMethod {
    /// As in a request line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Head => "HEAD",
            Self::Options => "OPTIONS",
        }
    }
}

impl fmt::Display for CheckKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Http => "http",
            Self::Https => "https",
        })
    }
}

/// How a backend is connected, as far as it matters for the way to it and back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attachment {
    /// It has an address, and the routes say where that is.
    #[default]
    Address,
    /// A container of this node, at its address on one of Docker's networks. Its replies come back by its default route.
    Container,
    /// The same, but its replies to other networks do not come back here: it needs a source on its own network.
    IsolatedContainer,
}

impl Attachment {
    /// Nothing is known but the address.
    pub fn is_address(&self) -> bool {
        *self == Self::Address
    }
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
    /// How it is checked; `None`: not at all, what its source says is all there is.
    pub check: Option<Arc<Check>>,
    /// How it is connected.
    #[serde(default, skip_serializing_if = "Attachment::is_address")]
    pub attachment: Attachment,
}

/// One service as one source object wishes it: part of what becomes a service together with others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Backends that have come back and are given their share little by little: tenths of it, 1 to 9, by address.
    pub slow: BTreeMap<SocketAddr, u8>,
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
