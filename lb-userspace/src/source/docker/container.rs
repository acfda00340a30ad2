//! What Weir knows of one container, taken from Docker's answer. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::SystemTime,
};

use bollard::models::{
    ContainerInspectResponse, ContainerStateStatusEnum as Status, EndpointSettings, HealthStatusEnum, PortMap,
};

use super::signal;
use crate::model::Protocol;

/// `rp_filter`: the source must be reached by the interface that a packet came in by.
const STRICT: u8 = 1;

/// One container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// Docker's id.
    pub id: String,
    /// Name without the leading slash.
    pub name: String,
    /// When it was created.
    pub created: SystemTime,
    /// When it last started.
    pub started: SystemTime,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// What it does.
    pub state: RunState,
    /// Health; `None` without a HEALTHCHECK.
    pub health: Option<Health>,
    /// The signal that asks it to stop.
    pub stop_signal: u8,
    /// It was told to stop.
    pub stopping: bool,
    /// How it is connected.
    pub network_mode: NetworkMode,
    /// Addresses by network name.
    pub networks: BTreeMap<String, Vec<IpAddr>>,
    /// What else decides where its replies go.
    pub routing: Routing,
    /// Ports that its image or its creator names.
    pub exposed: BTreeSet<(u16, Protocol)>,
    /// Where its ports are published on the engine's node.
    pub published: BTreeMap<(u16, Protocol), Vec<SocketAddr>>,
}

/// What decides where a container's replies go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routing {
    /// Its networks by name; empty where the source does not tell.
    pub networks: BTreeMap<String, NetworkAttachment>,
    /// `rp_filter` of the container's own `--sysctl`, for all interfaces and for new ones.
    pub rp_filter: [Option<u8>; 2],
}

/// One network of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkAttachment {
    /// Docker's id of the network.
    pub id: String,
    /// Its driver, once the engine has told.
    pub driver: Option<String>,
    /// Whether it gives the container a gateway, IPv4 and IPv6. An internal network gives none (Docker 25 and newer).
    pub gateway: [bool; 2],
    /// The gateway of the network with the highest priority becomes the default route (Docker 28 and newer).
    pub priority: i64,
}

/// What a container does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Running.
    Running,
    /// Frozen.
    Paused,
    /// Created, exited, dead, or between two runs.
    Stopped,
}

/// Docker's judgement of its HEALTHCHECK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// No check has passed yet.
    Starting,
    /// Fit.
    Healthy,
    /// Unfit.
    Unhealthy,
}

/// `HostConfig.NetworkMode`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkMode {
    /// The node's own network.
    Host,
    /// No network.
    None,
    /// Inside another container's network.
    Container(String),
    /// On networks; this is the one that it was created with.
    Network(String),
    /// A task of a Swarm service: reached by the ports that are published on its node.
    Task {
        /// The service whose labels it has.
        service: String,
        /// Ports that the service publishes and that do not reach the task on its node.
        elsewhere: BTreeMap<(u16, Protocol), Elsewhere>,
    },
}

/// Why a published port of a service does not reach a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elsewhere {
    /// It is published through Swarm's own mesh, which ends on no particular task.
    Mesh,
    /// Docker chose the port on the node, and Swarm does not tell which.
    Untold,
}

/// An answer without an id: nothing can be kept under it.
#[derive(Debug, thiserror::Error)]
#[error("Docker's answer about a container has no id; is this endpoint really a Docker engine?")]
pub struct NoId;

impl Container {
    /// Who carries its labels, for people: `container web-1 (3f2a9c012345)`, or `service web` of a Swarm.
    pub fn label_holder(&self) -> String {
        match &self.network_mode {
            NetworkMode::Task { service, .. } => format!("service {service}"),
            _ => {
                let short: String = self.id.chars().take(12).collect();
                format!("container {} ({short})", self.name)
            }
        }
    }
}

impl TryFrom<ContainerInspectResponse> for Container {
    type Error = NoId;

    fn try_from(answer: ContainerInspectResponse) -> Result<Self, NoId> {
        let id = answer.id.ok_or(NoId)?;
        let config = answer.config.unwrap_or_default();
        let state = answer.state.unwrap_or_default();
        let settings = answer.network_settings.unwrap_or_default();
        let host = answer.host_config.unwrap_or_default();
        let sysctls = host.sysctls.unwrap_or_default();
        let rp_filter = |which: &str| {
            let name = format!("net.ipv4.conf.{which}.rp_filter");
            sysctls.get(&name)?.trim().parse().ok()
        };
        let endpoints = settings.networks.unwrap_or_default();
        let routing = Routing {
            networks: endpoints
                .iter()
                .map(|(name, endpoint)| (name.clone(), endpoint.into()))
                .collect(),
            rp_filter: [rp_filter("all"), rp_filter("default")],
        };
        let published = published(settings.ports.unwrap_or_default());
        let mut exposed: BTreeSet<_> = config
            .exposed_ports
            .unwrap_or_default()
            .iter()
            .filter_map(|text| port(text))
            .collect();
        // `docker run --publish` exposes what it publishes, and so does Compose's `expose`.
        exposed.extend(published.keys());
        Ok(Self {
            name: answer.name.unwrap_or_default().trim_start_matches('/').to_owned(),
            created: time(answer.created.as_deref()),
            started: time(state.started_at.as_deref()),
            labels: config.labels.unwrap_or_default().into_iter().collect(),
            state: match state.status {
                Some(Status::RUNNING | Status::STOPPING) => RunState::Running,
                Some(Status::PAUSED) => RunState::Paused,
                _ => RunState::Stopped,
            },
            health: match state.health.and_then(|health| health.status) {
                Some(HealthStatusEnum::STARTING) => Some(Health::Starting),
                Some(HealthStatusEnum::HEALTHY) => Some(Health::Healthy),
                Some(HealthStatusEnum::UNHEALTHY) => Some(Health::Unhealthy),
                Some(HealthStatusEnum::NONE | HealthStatusEnum::EMPTY) | None => None,
            },
            stop_signal: config
                .stop_signal
                .as_deref()
                .and_then(signal::number)
                .unwrap_or(signal::TERM),
            stopping: state.status == Some(Status::STOPPING),
            network_mode: mode(host.network_mode.as_deref()),
            routing,
            networks: endpoints
                .into_iter()
                .map(|(name, endpoint)| {
                    let texts = [endpoint.ip_address, endpoint.global_ipv6_address];
                    let addresses = texts.into_iter().flatten().filter_map(|text| text.parse().ok());
                    (name, addresses.collect())
                })
                .collect(),
            exposed,
            published,
            id,
        })
    }
}

impl From<&EndpointSettings> for NetworkAttachment {
    fn from(endpoint: &EndpointSettings) -> Self {
        let given = |gateway: &Option<String>| gateway.as_ref().is_some_and(|text| !text.is_empty());
        Self {
            id: endpoint.network_id.clone().unwrap_or_default(),
            driver: None,
            gateway: [given(&endpoint.gateway), given(&endpoint.ipv6_gateway)],
            priority: endpoint.gw_priority.unwrap_or_default(),
        }
    }
}

// === impl Routing ===

impl Routing {
    /// The network whose gateway is the container's default route: the one of the highest priority, then the first by name,
    /// as Docker orders them.
    pub fn default_network(&self, v6: bool) -> Option<(&str, &NetworkAttachment)> {
        let networks = self.networks.iter();
        networks
            .filter(|(_, network)| network.gateway[usize::from(v6)])
            .min_by_key(|(name, network)| (std::cmp::Reverse(network.priority), *name))
            .map(|(name, network)| (name.as_str(), network))
    }

    /// Whether the container drops packets that come by another interface than its default route's. `node` is what the
    /// node gives its containers.
    pub fn is_strict(&self, node: [u8; 2]) -> bool {
        let [all, new] = [0, 1].map(|i| self.rp_filter[i].unwrap_or(node[i]));
        all.max(new) == STRICT
    }
}

fn mode(text: Option<&str>) -> NetworkMode {
    match text {
        Some("host") => NetworkMode::Host,
        Some("none") => NetworkMode::None,
        // An empty mode is what very old engines said for the default.
        None | Some("" | "default") => NetworkMode::Network("bridge".into()),
        Some(other) => match other.strip_prefix("container:") {
            Some(id) => NetworkMode::Container(id.to_owned()),
            None => NetworkMode::Network(other.to_owned()),
        },
    }
}

/// `80/tcp`; ports of other protocols are nothing to a balancer of TCP and UDP.
fn port(text: &str) -> Option<(u16, Protocol)> {
    let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return None,
    };
    Some((number.parse().ok()?, protocol))
}

fn published(ports: PortMap) -> BTreeMap<(u16, Protocol), Vec<SocketAddr>> {
    ports
        .into_iter()
        .filter_map(|(text, bindings)| {
            let found: Vec<_> = bindings?
                .into_iter()
                .filter_map(|binding| {
                    let host_port = binding.host_port?.parse().ok()?;
                    // Without an address Docker means every one.
                    let host_ip = binding.host_ip.filter(|ip| !ip.is_empty());
                    let host_ip = host_ip.as_deref().unwrap_or("0.0.0.0").parse().ok()?;
                    Some(SocketAddr::new(host_ip, host_port))
                })
                .collect();
            (!found.is_empty()).then_some((port(&text)?, found))
        })
        .collect()
}

/// Docker's RFC 3339 times; its zero time (year 1) and absent ones are the epoch.
pub fn time(text: Option<&str>) -> SystemTime {
    text.and_then(|text| text.parse::<jiff::Timestamp>().ok())
        .map(SystemTime::from)
        .filter(|time| *time > SystemTime::UNIX_EPOCH)
        .unwrap_or(SystemTime::UNIX_EPOCH)
}
