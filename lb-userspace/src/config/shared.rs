//! What many nodes have in common: where etcd is, and what its keys say. Judged by the code that judges the file.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;

use super::{Config, ConfigErrors, Policy, StaticService, check};

/// Where Weir's keys begin unless it was told otherwise.
pub const DEFAULT_PREFIX: &str = "/weir";
/// How long one question to one endpoint may take: an etcd that elects a leader answers within 2 s.
pub(super) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(3);
/// Silence of etcd after which it is asked for a sign of life.
pub(super) const DEFAULT_LIVENESS: Duration = Duration::from_secs(10);

/// How to reach etcd. Secrets are in files, which are read anew for every connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdConfig {
    /// `https://host:port`, or `http://` on loopback; at least one, none twice.
    pub endpoints: Vec<String>,
    /// Whom to trust and who we are; there for every `https` endpoint.
    pub tls: Option<EtcdTls>,
    /// User and the file of the password.
    pub login: Option<(String, PathBuf)>,
    /// Begins with a slash and does not end with one.
    pub prefix: String,
    /// Longest wait for one endpoint's answer.
    pub timeout: Duration,
    /// Silence after which etcd is asked for a sign of life.
    pub liveness: Duration,
    /// Where the last good read is kept; `None`: beside the socket.
    pub cache: Option<PathBuf>,
}

/// Files of a TLS connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdTls {
    /// Certificates of those who may have signed the server's.
    pub ca: PathBuf,
    /// Our certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// What `<prefix>/config` says to every node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// VIPs and defaults.
    pub policy: Policy,
    /// Clients that no service of any node admits.
    pub firewall: BTreeSet<IpNet>,
    /// One of this many new flows is reported.
    pub event_sample: Option<u32>,
}

// === impl Shared ===

impl Default for Shared {
    fn default() -> Self {
        Self {
            policy: Policy::built_in(),
            firewall: BTreeSet::new(),
            event_sample: None,
        }
    }
}

impl Shared {
    /// Checks the text of `<prefix>/config`; `key` is for messages. VIPs are announced on the interfaces of `node`.
    ///
    /// # Errors
    /// Every fault of the text together, in its order.
    pub fn parse(key: &str, text: &str, node: &Config) -> Result<Self, ConfigErrors> {
        check::shared::shared(Path::new(key), text, node)
    }
}

// === impl StaticService ===

impl StaticService {
    /// Checks the text of one service, which is what `[[services]]` holds; its name is that of its key.
    ///
    /// # Errors
    /// Every fault of the text together, in its order.
    pub fn parse(key: &str, name: &str, text: &str, policy: &Policy) -> Result<Self, ConfigErrors> {
        check::shared::service(Path::new(key), name, text, policy)
    }
}
