//! How a shim serves routes: `[l7]` of the agent's configuration.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::Acme;

/// Where browsers look for HTTP and HTTPS.
pub const DEFAULT_PORTS: (u16, u16) = (80, 443);
/// As many as Interlock gave its proxies.
pub const DEFAULT_CONNECTIONS: u32 = 1024;
/// More is a slip of the pen: each takes a file descriptor.
pub const MAX_CONNECTIONS: u32 = 1 << 20;

/// How routes are served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct L7 {
    /// Addresses on which the shim listens; `::` is all, IPv4 too.
    pub listen: Vec<IpAddr>,
    /// Port of plain HTTP; `None`: none.
    pub http_port: Option<u16>,
    /// Port of HTTPS; `None`: none.
    pub https_port: Option<u16>,
    /// Client connections at a time; further ones wait in the listener's queue.
    pub max_connections: u32,
    /// Longest body of a request, bytes; `None`: any.
    pub max_body: Option<u64>,
    /// Folder in which the labels of containers name certificates and keys, PEM.
    pub certificates: Option<PathBuf>,
    /// Certificate chain and private key in one PEM file, for hosts that name none.
    pub default_certificate: Option<PathBuf>,
    /// Certificates that the shim gets by itself; `None`: none.
    pub acme: Option<Acme>,
    /// Oldest version of TLS that is spoken.
    pub min_tls: TlsVersion,
    /// `Strict-Transport-Security` of hosts that are HTTPS only, seconds; 0: none.
    pub hsts_s: u64,
    /// Hosts whose plain HTTP is answered by a redirect to HTTPS without being a route: those that go around the shim.
    pub redirect_to_https: Vec<String>,
    /// Which cluster the shim is of: routes that name another one are not served.
    pub cluster: Option<String>,
    /// Clients whose connections begin with a PROXY protocol header, and must.
    pub proxy_protocol: Vec<IpNet>,
    /// Upstreams are told the client by a PROXY protocol header before everything else; connections to them are then not
    /// used for a second request.
    pub send_proxy_protocol: bool,
    /// Clients whose `X-Forwarded-*` and `Forwarded` are believed and continued.
    pub trusted_proxies: Vec<IpNet>,
    /// The log of requests, on standard output.
    pub access_log: AccessLog,
    /// Host and path of the status page, `status.example.com/weir`; `None`: none.
    pub status_page: Option<String>,
    /// Where metrics, health and the status page are served; `None`: nowhere.
    pub metrics: Option<SocketAddr>,
    /// Times.
    pub timeouts: L7Timeouts,
}

/// Versions of TLS; older ones are not spoken at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum TlsVersion {
    /// TLS 1.2.
    #[default]
    #[serde(rename = "1.2")]
    Tls12,
    /// TLS 1.3.
    #[serde(rename = "1.3")]
    Tls13,
}

/// What is written for each request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessLog {
    /// Nothing.
    #[default]
    Off,
    /// A line of JSON.
    Json,
    /// The combined format of Apache, with route, upstream and time behind it.
    Combined,
}

/// Times after which the shim gives up, milliseconds in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct L7Timeouts {
    /// Connecting to an upstream.
    #[serde(rename = "connect_ms", with = "millis")]
    pub connect: Duration,
    /// Silence of a client, between requests and in the middle of a body.
    #[serde(rename = "client_ms", with = "millis")]
    pub client: Duration,
    /// Silence of an upstream.
    #[serde(rename = "server_ms", with = "millis")]
    pub server: Duration,
    /// From the first byte of a request to the end of its header, and for a TLS handshake.
    #[serde(rename = "header_ms", with = "millis")]
    pub header: Duration,
    /// From a request to the header of its answer, all tries together.
    #[serde(rename = "request_ms", with = "millis")]
    pub request: Duration,
    /// How long connections may go on when the shim stops or is replaced.
    #[serde(rename = "drain_ms", with = "millis")]
    pub drain: Duration,
}

impl Default for L7 {
    fn default() -> Self {
        Self {
            listen: vec![IpAddr::V6(Ipv6Addr::UNSPECIFIED)],
            http_port: Some(DEFAULT_PORTS.0),
            https_port: Some(DEFAULT_PORTS.1),
            max_connections: DEFAULT_CONNECTIONS,
            max_body: None,
            certificates: None,
            default_certificate: None,
            acme: None,
            min_tls: TlsVersion::default(),
            hsts_s: 31_536_000,
            redirect_to_https: Vec::new(),
            cluster: None,
            proxy_protocol: Vec::new(),
            send_proxy_protocol: false,
            trusted_proxies: Vec::new(),
            access_log: AccessLog::default(),
            status_page: None,
            metrics: None,
            timeouts: L7Timeouts::default(),
        }
    }
}

impl Default for L7Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            client: Duration::from_secs(60),
            server: Duration::from_secs(60),
            header: Duration::from_secs(10),
            request: Duration::from_secs(120),
            drain: Duration::from_secs(30),
        }
    }
}

/// A duration as whole milliseconds.
pub(crate) mod millis {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(u64::try_from(value.as_millis()).unwrap_or(u64::MAX))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_millis)
    }
}
