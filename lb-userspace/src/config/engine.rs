//! Docker engines and swarms: where they listen, and what their containers may claim.

use std::{fmt, net::IpAddr, path::PathBuf, time::Duration};

use super::value::Listen;
use crate::model::Protocol;

/// One engine and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DockerConfig {
    /// Name among engines; `None` for the only one of `[docker]`.
    pub name: Option<String>,
    /// Where the engine listens.
    pub endpoint: Endpoint,
    /// Its containers run on another node: they are reached by that node's address and published ports.
    pub remote: bool,
    /// Addresses of the engine's node. For a local engine empty means: the addresses of `interfaces`.
    pub node_addresses: Vec<IpAddr>,
    /// Full list every so often.
    pub resync: Duration,
    /// Silence after which the engine is asked for a sign of life.
    pub liveness: Duration,
    /// How long its containers serve on while it is not heard; `None`: as long as it takes.
    pub keep: Option<Duration>,
    /// What its containers may claim.
    pub allow: Allowed,
}

/// One swarm and how to reach its managers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwarmConfig {
    /// Name among swarms; `None` for the only one of `[swarm]`.
    pub name: Option<String>,
    /// Where its managers listen, at least one: one is asked at a time, the next one when it cannot answer.
    pub endpoints: Vec<Endpoint>,
    /// Time from one complete list to the next: Swarm tells no events of tasks.
    pub poll: Duration,
    /// No answer for so long, and another manager is asked.
    pub liveness: Duration,
    /// How long its tasks serve on while no manager is heard; `None`: as long as it takes.
    pub keep: Option<Duration>,
    /// What its services may claim.
    pub allow: Allowed,
}

/// What the containers of one engine or swarm may claim: an absent list allows all that the policy does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Addresses of these VIPs.
    pub vips: Option<Vec<IpAddr>>,
    /// These ports.
    pub ports: Option<Vec<Listen>>,
    /// Services of these names; a `*` at the end stands for any end.
    pub services: Option<Vec<String>>,
}

/// Where an engine listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// Plain HTTP, `host:port`; only on loopback.
    Http(String),
    /// HTTPS with both sides verified, `host:port`.
    Tls {
        address: String,
        ca: PathBuf,
        cert: PathBuf,
        key: PathBuf,
    },
}

// === impl DockerConfig ===

impl DockerConfig {
    /// Name of the source that hears this engine: `docker`, or `docker:<name>`.
    pub fn source(&self) -> String {
        match &self.name {
            Some(name) => format!("docker:{name}"),
            None => "docker".into(),
        }
    }
}

// === impl SwarmConfig ===

impl SwarmConfig {
    /// Name of the source that hears this swarm: `swarm`, or `swarm:<name>`.
    pub fn source(&self) -> String {
        match &self.name {
            Some(name) => format!("swarm:{name}"),
            None => "swarm".into(),
        }
    }
}

// === impl Endpoint ===

/// As in the configuration.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Http(address) | Self::Tls { address, .. } => write!(f, "tcp://{address}"),
        }
    }
}

// === impl Allowed ===

impl Allowed {
    /// Whether containers may claim a service of this name.
    pub fn service(&self, name: &str) -> bool {
        let matches = |pattern: &String| match pattern.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == pattern,
        };
        self.services.as_ref().is_none_or(|all| all.iter().any(matches))
    }

    /// Whether containers may claim an address of this VIP.
    pub fn vip(&self, vip: IpAddr) -> bool {
        self.vips.as_ref().is_none_or(|all| all.contains(&vip))
    }

    /// Whether containers may claim this port; every port of a VIP only where `*` is allowed, which allows each.
    pub fn port(&self, port: u16, protocol: Protocol) -> bool {
        let matches =
            |listen: &Listen| listen.protocol == protocol && (listen.port == 0 || listen.port == port);
        self.ports.as_ref().is_none_or(|all| all.iter().any(matches))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_lists_allow_all_and_others_what_they_name() {
        let all = Allowed::default();
        assert!(all.service("x") && all.port(0, Protocol::Udp) && all.vip("192.0.2.1".parse().unwrap()));
        let some = Allowed {
            vips: Some(vec!["192.0.2.1".parse().unwrap()]),
            ports: Some(super::super::value::listens("80/tcp, */udp").unwrap()),
            services: Some(vec!["web".into(), "api-*".into()]),
        };
        assert!(some.service("web") && some.service("api-") && some.service("api-v2"));
        assert!(!some.service("web2") && !some.service("api"));
        assert!(some.vip("192.0.2.1".parse().unwrap()) && !some.vip("192.0.2.2".parse().unwrap()));
        assert!(some.port(80, Protocol::Tcp) && some.port(53, Protocol::Udp) && some.port(0, Protocol::Udp));
        assert!(!some.port(81, Protocol::Tcp) && !some.port(0, Protocol::Tcp));
    }
}
