//! The agent's configuration: `raw` is the file as written, [`Config`] is valid by construction.

mod check;
mod engine;
mod errors;
pub mod health;
pub mod l7;
mod node;
mod raw;
mod shared;
#[cfg(test)]
mod tests;
pub mod value;

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use ipnet::IpNet;
use lb_common::limits;

use crate::model::{EmptyPolicy, FlowTimeouts, ServiceSettings, ServiceWish, SnatMode, UnhealthyPolicy};

pub use engine::{Allowed, DockerConfig, Endpoint, SwarmConfig};
pub use errors::{ConfigErrors, ConfigFault};
pub use health::CheckPolicy;
pub use node::{NodeConfig, NodeRule, NodesConfig, is_node_name};
pub use shared::{DEFAULT_PREFIX, EtcdConfig, EtcdTls, Shared};

/// Where Docker listens unless it was told otherwise.
pub const DEFAULT_DOCKER_ENDPOINT: &str = "unix:///var/run/docker.sock";
/// Full list of Docker: what events missed is repaired in this time. A list of a hundred containers costs ~100 ms.
pub const DEFAULT_RESYNC: Duration = Duration::from_secs(300);
/// Silence of Docker after which it is asked for a sign of life: well under a minute, well above the rate at which
/// a quiet engine would notice being asked.
pub const DEFAULT_LIVENESS: Duration = Duration::from_secs(30);
/// Time between two lists of a swarm's tasks: how late a task that is told to stop is noticed.
pub const DEFAULT_POLL: Duration = Duration::from_secs(1);
/// Longest wait for a swarm manager's answer. A leader's election takes two or three seconds, a busy manager one.
pub const DEFAULT_SWARM_LIVENESS: Duration = Duration::from_secs(10);
/// Wait for each source's first list before anything is removed: a Docker engine that starts with the node needs a
/// few seconds.
pub const DEFAULT_STARTUP_WAIT: Duration = Duration::from_secs(10);
/// The socket of `weir status` and its kin: root's, gone at boot.
pub const DEFAULT_ADMIN_SOCKET: &str = "/run/weir/weir.sock";
/// Metrics and health: loopback, a port that no well-known exporter uses.
pub const DEFAULT_METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9475);
/// Where maps, programs and links are pinned.
pub const DEFAULT_PIN_PATH: &str = "/sys/fs/bpf/weir";

/// A configuration without a fault.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The file it was read from.
    pub path: PathBuf,
    /// Where clients and remote backends are.
    pub interfaces: Vec<Interface>,
    /// What labels and services are checked against.
    pub policy: Policy,
    /// Sizes of maps.
    pub limits: Limits,
    /// Source translation.
    pub snat: Snat,
    /// Clients that no service admits: those of the file and those that the nodes share.
    pub firewall: BTreeSet<IpNet>,
    /// Docker engines, by name.
    pub docker: Vec<DockerConfig>,
    /// Swarms, by name.
    pub swarm: Vec<SwarmConfig>,
    /// The etcd source; `None`: the file is all there is.
    pub etcd: Option<EtcdConfig>,
    /// This machine publishes its containers.
    pub node: Option<NodeConfig>,
    /// Containers that other machines publish are balanced.
    pub nodes: Option<NodesConfig>,
    /// Status and metrics.
    pub admin: Admin,
    /// Longest wait for each source's first list.
    pub startup_wait: Duration,
    /// One of this many new flows is reported as an event; 0: none.
    pub event_sample: u32,
    /// Pins and attachment.
    pub bpf: Bpf,
    /// How the L7 shim serves routes.
    pub l7: l7::L7,
    /// Services of the file.
    pub services: Vec<StaticService>,
    /// The file's text.
    text: Arc<str>,
    /// What the nodes share, as far as it is part of this.
    pub shared: Arc<Shared>,
}

/// What a service may claim, and what it gets when it says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The only addresses a service may claim, by name.
    pub vips: Vec<Vip>,
    /// Settings of a service that says nothing about them.
    pub defaults: ServiceSettings,
    /// Drain deadline of a backend that says nothing.
    pub drain: Duration,
    /// How long a service from labels outlives its last container.
    pub remember: Duration,
    /// Checks of a service that says nothing about them, and what it may name.
    pub checks: CheckPolicy,
}

/// A service that claims no VIP of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VipError {
    /// Neither a name nor an address of `[vips]`.
    #[error("`{text}` is not a configured VIP")]
    Unknown { text: String, known: Vec<String> },
    /// Nothing is named, and there is not exactly one VIP.
    #[error("no VIP is named, and {} are configured", .known.len())]
    Choice { known: Vec<String> },
}

/// An interface to attach to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Interface {
    /// The device of the IPv4 default route.
    Auto,
    /// By name.
    Named(String),
}

/// One or several virtual addresses under one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vip {
    /// Name that labels use.
    pub name: String,
    /// At least one; IPv4 and IPv6.
    pub addresses: Vec<IpAddr>,
    /// How the network learns of it.
    pub announce: Announce,
    /// It is the node's own primary address: only the ports of services are taken.
    pub node_address: bool,
    /// What becomes of packets for ports that no service has, if it is routed to the node.
    pub unused_ports: UnusedPorts,
}

/// What becomes of packets for a routed VIP that are no service's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnusedPorts {
    /// TCP is answered by RST, UDP by ICMP "port unreachable".
    #[default]
    Refuse,
    /// Silence.
    Drop,
}

/// How the network learns of a VIP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Announce {
    /// Put on this interface, removed by `weir detach`.
    Address { interface: String },
    /// Somebody routes it to the node.
    None,
}

/// Sizes of maps; a pinned map keeps the size it was made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Services.
    pub services: u32,
    /// Backend records.
    pub backends: u32,
    /// Rows of rings.
    pub ring_rows: u32,
    /// IPv4 connections (two flow entries each).
    pub flows4: u32,
    /// IPv6 connections (two flow entries each).
    pub flows6: u32,
    /// Percent of the flows of a table that one service may hold, of those that cannot be evicted; of no effect while there
    /// is no other service.
    pub flow_share: u32,
    /// Event ring buffer, bytes.
    pub events_bytes: u32,
}

/// Source translation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snat {
    /// Source addresses; empty: those of the device that a packet leaves by.
    pub addresses: Vec<IpAddr>,
    /// Source ports.
    pub ports: RangeInclusive<u16>,
}

/// SNAT ports that the node itself hands out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "snat.ports {}-{} overlap net.ipv4.ip_local_port_range {}-{}: choose ports outside of it, or move it by sysctl",
    .ports.start(), .ports.end(), .ephemeral.start(), .ephemeral.end()
)]
pub struct SnatOverlap {
    /// Configured.
    pub ports: RangeInclusive<u16>,
    /// The node's.
    pub ephemeral: RangeInclusive<u16>,
}

/// Status and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// Unix socket of the command line.
    pub socket: PathBuf,
    /// Address of metrics and health; loopback unless allowed otherwise.
    pub metrics: SocketAddr,
}

/// Pins and attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bpf {
    /// Directory in a bpffs.
    pub pin_path: PathBuf,
    /// How XDP is attached.
    pub xdp: XdpMode,
    /// Bits of the mark of packets that a TC program has sent on.
    pub mark: u32,
}

/// How XDP is attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XdpMode {
    /// Native, else generic with a warning.
    #[default]
    Auto,
    /// Native or an error.
    Native,
    /// Generic.
    Generic,
    /// TC alone.
    Off,
}

/// A service of the file: one wish per address that it listens on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaticService {
    /// Name.
    pub name: String,
    /// At least one.
    pub wishes: Vec<ServiceWish>,
}

// === impl Config ===

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// Every fault of the file together; a file that cannot be read is one fault.
    pub fn load(path: &Path) -> Result<Self, ConfigErrors> {
        match fs::read_to_string(path) {
            Ok(text) => Self::parse(path, &text),
            Err(error) => Err(ConfigErrors {
                path: path.to_owned(),
                faults: vec![ConfigFault {
                    key: String::new(),
                    position: None,
                    fault: format!("cannot be read: {error}"),
                    remedy: "name a file that exists and that the agent may read".into(),
                }],
            }),
        }
    }

    /// Checks a text; `path` is for messages.
    ///
    /// # Errors
    /// Every fault of the text together, in its order.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigErrors> {
        check::check(path, text, Arc::default())
    }

    /// The same file beside what the nodes share: the file's word counts where both say something.
    ///
    /// # Errors
    /// None for a configuration that was parsed: its text has no fault, and the shared part was checked by itself.
    pub fn with_shared(&self, shared: &Arc<Shared>) -> Result<Self, ConfigErrors> {
        check::check(&self.path, &self.text, Arc::clone(shared))
    }

    /// Sections that differ from `old` and are read at start alone.
    pub fn needs_restart(&self, old: &Self) -> Vec<&'static str> {
        let changed = [
            ("limits", self.limits != old.limits),
            ("admin", self.admin != old.admin),
            ("bpf", self.bpf != old.bpf),
            ("etcd", self.etcd != old.etcd),
            // Everything in it is followed; whether it is there is not.
            ("nodes", self.nodes.is_some() != old.nodes.is_some()),
        ];
        changed
            .into_iter()
            .filter_map(|(section, differs)| differs.then_some(section))
            .collect()
    }

    /// Names of the devices to attach to, `auto` resolved, none twice. Without a default route `auto` is what it was before.
    ///
    /// # Errors
    /// `auto`, and the kernel's routes cannot be read or have never named a default route.
    pub fn interface_names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for interface in &self.interfaces {
            let name = match interface {
                Interface::Named(name) => name.clone(),
                Interface::Auto => last_answer(default_route_device(&fs::read_to_string("/proc/net/route")?))
                    .ok_or_else(|| {
                        io::Error::other(
                            "interfaces: `auto` needs an IPv4 default route and there is none; name the interface",
                        )
                    })?,
            };
            if !names.contains(&name) {
                names.push(name);
            }
        }
        Ok(names)
    }
}

/// An answer, or the last one while there is none: a default route goes for a moment when an address is renewed, and containers of
/// the node's own network must not go with it.
fn last_answer(now: Option<String>) -> Option<String> {
    static LAST: Mutex<Option<String>> = Mutex::new(None);
    // One assignment: nothing half-made is left behind by a panic elsewhere.
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if now.is_some() {
        *last = now;
    }
    last.clone()
}

/// The device of the default route with the least metric, from the text of `/proc/net/route`.
fn default_route_device(routes: &str) -> Option<String> {
    routes
        .lines()
        .skip(1)
        .filter_map(|line| {
            let field: Vec<_> = line.split_whitespace().collect();
            // Iface Destination Gateway Flags RefCnt Use Metric Mask …
            let default = field.get(1) == Some(&"00000000") && field.get(7) == Some(&"00000000");
            let metric: u32 = field.get(6)?.parse().ok()?;
            default.then(|| (metric, (*field.first().unwrap_or(&"")).to_owned()))
        })
        .min()
        .map(|(_, device)| device)
}

// === impl Policy ===

impl Policy {
    /// Before any text has said something.
    fn built_in() -> Self {
        Self {
            vips: Vec::new(),
            defaults: built_in_settings(),
            drain: Duration::from_secs(limits::DEFAULT_DRAIN_S.into()),
            remember: Duration::from_secs(limits::DEFAULT_REMEMBER_S.into()),
            checks: CheckPolicy::default(),
        }
    }

    /// The addresses that a service claims: those of the VIP it names, else those of the only VIP there is.
    ///
    /// # Errors
    /// The name or address is none of the configured ones, or nothing is named and there is a choice.
    pub fn choose_vip(&self, named: Option<&str>) -> Result<Vec<IpAddr>, VipError> {
        let known = || self.vips.iter().map(|vip| vip.name.clone()).collect();
        match (named, self.vips.as_slice()) {
            (Some(text), _) => self
                .vip(text.trim())
                .map(|(_, addresses)| addresses)
                .ok_or_else(|| VipError::Unknown {
                    text: text.to_owned(),
                    known: known(),
                }),
            (None, [only]) => Ok(only.addresses.clone()),
            (None, _) => Err(VipError::Choice { known: known() }),
        }
    }

    /// The VIP of a name or an address.
    pub fn vip(&self, name_or_address: &str) -> Option<(&Vip, Vec<IpAddr>)> {
        if let Some(vip) = self.vips.iter().find(|vip| vip.name == name_or_address) {
            return Some((vip, vip.addresses.clone()));
        }
        let address = name_or_address.parse::<IpAddr>().ok()?.to_canonical();
        let vip = self.vips.iter().find(|vip| vip.addresses.contains(&address))?;
        Some((vip, vec![address]))
    }
}

// === impl VipError ===

impl VipError {
    /// What to do, where `setting` is the label or key that names the VIP.
    pub fn remedy(&self, setting: &str) -> String {
        let (Self::Unknown { known, .. } | Self::Choice { known }) = self;
        if known.is_empty() {
            return "configure one under [vips]: only those addresses may be claimed".into();
        }
        if let Self::Unknown { text, .. } = self {
            let names: Vec<&str> = known.iter().map(String::as_str).collect();
            if let Some(name) = value::nearest(text, &names) {
                return format!("did you mean `{name}`? Known: {}", known.join(", "));
            }
        }
        format!(
            "set `{setting}` to one of: {}; or add it under [vips]",
            known.join(", ")
        )
    }
}

// === impl Snat ===

impl Snat {
    /// Compares with the live `net.ipv4.ip_local_port_range`.
    ///
    /// # Errors
    /// The ranges share a port.
    pub fn check_port_overlap(&self, ephemeral: RangeInclusive<u16>) -> Result<(), SnatOverlap> {
        if self.ports.start() <= ephemeral.end() && ephemeral.start() <= self.ports.end() {
            return Err(SnatOverlap {
                ports: self.ports.clone(),
                ephemeral,
            });
        }
        Ok(())
    }
}

// === impl Limits ===

impl Default for Limits {
    fn default() -> Self {
        Self {
            services: limits::DEFAULT_SERVICES,
            backends: limits::DEFAULT_BACKENDS,
            ring_rows: limits::DEFAULT_RING_ROWS,
            flows4: limits::DEFAULT_FLOWS4,
            flows6: limits::DEFAULT_FLOWS6,
            flow_share: limits::DEFAULT_FLOW_SHARE,
            events_bytes: limits::EVENTS_BYTES,
        }
    }
}

/// Settings before `[defaults]` says otherwise.
fn built_in_settings() -> ServiceSettings {
    ServiceSettings {
        client_ip_affinity: false,
        snat: SnatMode::Auto,
        allow: Vec::new(),
        deny: Vec::new(),
        timeouts: FlowTimeouts::default(),
        when_empty: EmptyPolicy::DrainersThenRefuse,
        reset_unknown: false,
        when_unhealthy: UnhealthyPolicy::AsEmpty,
        passive: None,
    }
}
