//! `[l7]`: how the L7 shim serves routes. The agent itself reads nothing of it but its faults.

use std::{path::PathBuf, time::Duration};

/// Where browsers look for HTTP and HTTPS.
pub const DEFAULT_PORTS: (u16, u16) = (80, 443);
/// As many as Interlock gave its proxies.
pub const DEFAULT_CONNECTIONS: u32 = 1024;
/// More is a slip of the pen: each takes a file descriptor.
pub const MAX_CONNECTIONS: u32 = 1 << 20;

/// How routes are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct L7 {
    /// Port of plain HTTP on every VIP and address of the shim; `None`: none.
    pub http_port: Option<u16>,
    /// Port of HTTPS; `None`: none.
    pub https_port: Option<u16>,
    /// Client connections at a time; further ones wait in the listener's queue.
    pub max_connections: u32,
    /// Folder in which the labels of containers name certificates and keys, PEM.
    pub certificates: Option<PathBuf>,
    /// Certificate chain and private key in one PEM file, for hosts that name none.
    pub default_certificate: Option<PathBuf>,
    /// Oldest version of TLS that is spoken.
    pub min_tls: TlsVersion,
    /// Times.
    pub timeouts: L7Timeouts,
}

/// Versions of TLS; older ones are not spoken at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// TLS 1.2.
    #[default]
    Tls12,
    /// TLS 1.3.
    Tls13,
}

/// Times after which the shim gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L7Timeouts {
    /// Connecting to an upstream.
    pub connect: Duration,
    /// Silence of a client.
    pub client: Duration,
    /// Silence of an upstream.
    pub server: Duration,
}

impl Default for L7 {
    fn default() -> Self {
        Self {
            http_port: Some(DEFAULT_PORTS.0),
            https_port: Some(DEFAULT_PORTS.1),
            max_connections: DEFAULT_CONNECTIONS,
            certificates: None,
            default_certificate: None,
            min_tls: TlsVersion::default(),
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
        }
    }
}
