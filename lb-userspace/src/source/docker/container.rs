//! What Weir knows of one container, taken from Docker's answer. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::SystemTime,
};

use bollard::models::{
    ContainerInspectResponse, ContainerStateStatusEnum as Status, HealthStatusEnum, PortMap,
};

use super::signal;
use crate::model::Protocol;

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
    /// Ports that its image or its creator names.
    pub exposed: BTreeSet<(u16, Protocol)>,
    /// Where its ports are published on the engine's node.
    pub published: BTreeMap<(u16, Protocol), Vec<SocketAddr>>,
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
        let network_mode = answer.host_config.and_then(|host| host.network_mode);
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
            network_mode: mode(network_mode.as_deref()),
            networks: settings
                .networks
                .unwrap_or_default()
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
