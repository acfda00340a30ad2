//! Labels of a container → what it wishes. Pure: container, site and policy in, [`Object`] out.
//!
//! A bad label refuses the one service that it belongs to, of this one container, and nothing else.

mod check;
mod reach;
mod refusal;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

pub(super) use reach::{attachment, places};
pub use refusal::Refusal;

use super::{
    Object,
    docker::container::{Container, Health, NetworkMode, RunState},
    interlock,
};
use crate::{
    config::{
        Allowed, Policy, health,
        value::{self, Listen, ValueError},
    },
    model::{
        Backend, BackendState, FlowTimeouts, Protocol, Rejection, ServiceAddress, ServiceSettings,
        ServiceWish,
    },
    route::RouteWish,
};

/// What the labels begin with that mean something to Weir: its own, and those of Interlock.
const FAMILIES: &[&str] = &[PREFIX, interlock::v1::PREFIX, interlock::v2::PREFIX];
/// Every label of Weir begins with this.
pub const PREFIX: &str = "weir.";
/// Labels of a service: `weir.service.<name>.<setting>`.
const SERVICE: &str = "weir.service.";
/// `weir.enable`.
const ENABLE: &str = "weir.enable";
/// Every setting of a service.
pub const SETTINGS: &[&str] = &[
    "listen",
    "vip",
    "port",
    "weight",
    "drain",
    "affinity",
    "snat",
    "allow",
    "deny",
    "network",
    "when-empty",
    "reset-unknown",
    "check",
    "check-port",
    "check-interval",
    "check-fast-interval",
    "check-timeout",
    "check-rise",
    "check-fall",
    "check-grace",
    "check-slow-start",
    "check-method",
    "check-path",
    "check-host",
    "check-status",
    "check-body",
    "check-tls",
    "check-server-name",
    "when-unhealthy",
    "passive",
    "timeout-established",
    "timeout-syn",
    "timeout-closing",
    "timeout-udp",
];

/// Where the engine's containers are, seen from this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Site {
    /// Name of the source that hears the engine.
    pub source: String,
    /// The engine runs on another node.
    pub remote: bool,
    /// Addresses of the engine's node: of host-network containers, and of published ports when it is remote.
    pub node: Vec<IpAddr>,
    /// What its containers may claim.
    pub allow: Allowed,
    /// `rp_filter` of this node for all interfaces and for new ones: what its containers begin with.
    pub rp_filter: [u8; 2],
}

/// Whether one of the labels is ours.
pub fn is_ours<'l>(mut labels: impl Iterator<Item = &'l str>) -> bool {
    labels.any(|label| FAMILIES.iter().any(|family| label.starts_with(family)))
}

/// What a container wishes; `None` when it says nothing to Weir, is switched off, or does not run.
pub fn object(container: &Container, site: &Site, policy: &Policy) -> Option<Object> {
    if container.state == RunState::Stopped || !is_ours(container.labels.keys().map(String::as_str)) {
        return None;
    }
    let mut refused = Refused {
        source: &site.source,
        container,
        rejections: Vec::new(),
    };
    match container.labels.get(ENABLE).map(|text| value::boolean(text)) {
        Some(Ok(false)) => return None,
        // Whether it shall serve is unknown: not serving is what can be seen and mended.
        Some(Err(error)) => {
            refused.note(ENABLE, &error, error.remedy());
            return Some(refused.into_object(Vec::new(), Vec::new()));
        }
        Some(Ok(true)) | None => {}
    }

    let mut wishes: Vec<ServiceWish> = Vec::new();
    for (name, labels) in group(container, &mut refused) {
        let spoilt = match service(name, &labels, container, site, policy) {
            Ok(found) => match clash(&found, &wishes) {
                None => {
                    wishes.extend(found);
                    continue;
                }
                Some(refusal) => ("listen", refusal),
            },
            Err(spoilt) => spoilt,
        };
        let (label, refusal) = spoilt;
        let prefix = format!("{SERVICE}{name}.");
        refused.note(&format!("{prefix}{label}"), &refusal, refusal.remedy(&prefix));
    }
    let routes = interlock::routes(container, site, policy, &mut refused);
    Some(refused.into_object(wishes, routes))
}

/// The refusals of one container.
pub(super) struct Refused<'c> {
    source: &'c str,
    container: &'c Container,
    rejections: Vec<Rejection>,
}

impl Refused<'_> {
    pub(super) fn note(&mut self, label: &str, fault: &impl fmt::Display, remedy: String) {
        self.rejections.push(Rejection {
            source: self.source.into(),
            object: format!("{}: label {label}", self.container.label_holder()),
            fault: fault.to_string(),
            remedy,
        });
    }

    fn into_object(self, services: Vec<ServiceWish>, routes: Vec<RouteWish>) -> Object {
        Object {
            id: self.container.id.clone(),
            name: self.container.name.clone(),
            created: self.container.created,
            services,
            routes,
            rejections: self.rejections,
        }
    }
}

/// Labels by service. A label outside `weir.service.` that nobody knows is refused here: it concerns no service.
fn group<'c>(
    container: &'c Container,
    refused: &mut Refused<'_>,
) -> BTreeMap<&'c str, BTreeMap<&'c str, &'c str>> {
    let mut services: BTreeMap<&str, BTreeMap<&str, &str>> = BTreeMap::new();
    for (label, text) in container
        .labels
        .iter()
        .filter(|(label, _)| label.starts_with(PREFIX))
    {
        match label.strip_prefix(SERVICE).and_then(|rest| rest.split_once('.')) {
            Some((name, setting)) => {
                services.entry(name).or_default().insert(setting, text);
            }
            None if label == ENABLE => {}
            None => {
                let unknown = Refusal::Unknown {
                    prefix: PREFIX.into(),
                    text: label.trim_start_matches(PREFIX).into(),
                    known: &["enable", "service.<name>.<setting>"],
                };
                refused.note(label, &unknown, unknown.remedy(PREFIX));
            }
        }
    }
    services
}

/// One service, or the label that spoils it.
fn service(
    name: &str,
    labels: &BTreeMap<&str, &str>,
    container: &Container,
    site: &Site,
    policy: &Policy,
) -> Result<Vec<ServiceWish>, (&'static str, Refusal)> {
    let labels = Labels(labels);
    value::name(name).map_err(|error| ("listen", error.into()))?;
    labels.all_known(name)?;
    let settings = ServiceSettings {
        client_ip_affinity: labels.get("affinity", policy.defaults.client_ip_affinity, value::affinity)?,
        snat: labels.get("snat", policy.defaults.snat, value::snat)?,
        allow: labels.get("allow", Vec::new(), value::prefixes)?,
        deny: labels.get("deny", Vec::new(), value::prefixes)?,
        timeouts: timeouts(&labels, policy.defaults.timeouts)?,
        when_empty: labels.get("when-empty", policy.defaults.when_empty, value::when_empty)?,
        reset_unknown: labels.get("reset-unknown", policy.defaults.reset_unknown, value::boolean)?,
        when_unhealthy: labels.get(
            "when-unhealthy",
            policy.defaults.when_unhealthy,
            health::when_unhealthy,
        )?,
        passive: check::passive(&labels, policy.defaults.passive.as_ref(), &policy.checks)?,
    };
    let weight = labels.get("weight", value::DEFAULT_WEIGHT, value::weight)?;
    let drain = labels.get("drain", policy.drain, value::duration)?;
    let port = labels.get("port", None, |text| value::port(text).map(Some))?;
    let listens = labels.get("listen", Vec::new(), value::listens)?;
    if listens.is_empty() {
        return Err(("listen", Refusal::NoListen));
    }
    let vips = policy
        .choose_vip(labels.0.get("vip").copied())
        .map_err(|error| ("vip", error.into()))?;

    // What all services get are checks by TCP: a service of UDP is checked so only where it says so itself.
    let named = labels.0.contains_key("check");
    let mut check = check::check(&labels, container, &policy.checks)?;
    if let Some(check) = &mut check {
        // Traffic to a container of this node never leaves by a gateway: a check that did would tell nothing.
        Arc::make_mut(check).on_link =
            !site.remote && matches!(container.network_mode, NetworkMode::Network(_));
    }
    allowed(name, &listens, &vips, site)?;

    let (state, reason) = state(container);
    let network = labels.0.get("network").copied();
    let mut wishes = Vec::new();
    let mut reachable = BTreeSet::new();
    for listen in &listens {
        let inside = container_port(*listen, port, container).map_err(|refusal| ("port", refusal))?;
        let places = places(*listen, inside, network, container, site)?;
        reachable.extend(places.iter().map(SocketAddr::ip));
        if let Some(check) = &check {
            health::fits(check, inside).map_err(|error| ("check", error.into()))?;
        }
        for vip in &vips {
            let Some(address) = places.iter().find(|place| place.is_ipv4() == vip.is_ipv4()) else {
                continue;
            };
            let attachment = attachment(address.ip(), settings.snat, container, site)
                .map_err(|refusal| (refusal.setting(), refusal))?;
            wishes.push(ServiceWish {
                name: name.into(),
                address: ServiceAddress {
                    vip: *vip,
                    port: listen.port,
                    protocol: listen.protocol,
                },
                settings: settings.clone(),
                backends: vec![Backend {
                    address: *address,
                    weight,
                    state,
                    reason: reason.into(),
                    drain,
                    name: container.name.clone(),
                    check: check
                        .clone()
                        .filter(|_| named || listen.protocol == Protocol::Tcp),
                    attachment,
                }],
            });
        }
    }
    if wishes.is_empty() {
        return Err(("vip", Refusal::Family(reachable.into_iter().collect())));
    }
    Ok(wishes)
}

/// The idle timeouts of the service's flows.
fn timeouts(labels: &Labels<'_>, base: FlowTimeouts) -> Result<FlowTimeouts, (&'static str, Refusal)> {
    Ok(FlowTimeouts {
        tcp_established: labels.get("timeout-established", base.tcp_established, value::timeout)?,
        tcp_syn: labels.get("timeout-syn", base.tcp_syn, value::timeout)?,
        tcp_closing: labels.get("timeout-closing", base.tcp_closing, value::timeout)?,
        udp: labels.get("timeout-udp", base.udp, value::timeout)?,
    })
}

/// Refuses what the containers of this engine may not claim.
fn allowed(
    name: &str,
    listens: &[Listen],
    vips: &[IpAddr],
    site: &Site,
) -> Result<(), (&'static str, Refusal)> {
    let refused = |setting, what| {
        let refusal = Refusal::NotAllowed {
            what,
            engine: site.source.clone(),
        };
        Err((setting, refusal))
    };
    if !site.allow.service(name) {
        return refused("*", format!("a service named `{name}`"));
    }
    if let Some(vip) = vips.iter().find(|vip| !site.allow.vip(**vip)) {
        return refused("vip", format!("VIP {vip}"));
    }
    match listens
        .iter()
        .find(|listen| !site.allow.port(listen.port, listen.protocol))
    {
        Some(listen) => refused("listen", format!("port {listen}")),
        None => Ok(()),
    }
}

/// The labels of one service by setting.
struct Labels<'l>(&'l BTreeMap<&'l str, &'l str>);

impl Labels<'_> {
    fn get<T>(
        &self,
        setting: &'static str,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, ValueError>,
    ) -> Result<T, (&'static str, Refusal)> {
        match self.0.get(setting) {
            Some(text) => parse(text).map_err(|error| (setting, error.into())),
            None => Ok(default),
        }
    }

    fn all_known(&self, name: &str) -> Result<(), (&'static str, Refusal)> {
        match self.0.keys().find(|setting| !SETTINGS.contains(setting)) {
            Some(unknown) => Err((
                "*",
                Refusal::Unknown {
                    prefix: format!("{SERVICE}{name}."),
                    text: (*unknown).into(),
                    known: SETTINGS,
                },
            )),
            None => Ok(()),
        }
    }
}

/// A service of the same container that has one of the addresses already.
fn clash(found: &[ServiceWish], others: &[ServiceWish]) -> Option<Refusal> {
    found.iter().find_map(|wish| {
        let other = others.iter().find(|other| other.address == wish.address)?;
        Some(Refusal::Twice {
            address: wish.address,
            other: other.name.clone(),
        })
    })
}

/// Whether a container serves, and why not.
pub(super) fn state(container: &Container) -> (BackendState, &'static str) {
    match (container.stopping, container.state, container.health) {
        (true, ..) => (BackendState::Draining, "container stopping"),
        (_, RunState::Paused, _) => (BackendState::Unready, "container paused"),
        (_, _, Some(Health::Starting)) => (BackendState::Unready, "health: starting"),
        (_, _, Some(Health::Unhealthy)) => (BackendState::Unready, "health: unhealthy"),
        (_, _, Some(Health::Healthy)) => (BackendState::Active, "health: healthy"),
        (_, _, None) => (BackendState::Active, "running"),
    }
}

/// The port inside the container; 0 keeps the client's.
fn container_port(listen: Listen, named: Option<u16>, container: &Container) -> Result<u16, Refusal> {
    if let Some(port) = named {
        return Ok(port);
    }
    if listen.port == 0 {
        return Ok(0);
    }
    let of_protocol = |(port, protocol): &(u16, Protocol)| (*protocol == listen.protocol).then_some(*port);
    let exposed: Vec<u16> = container.exposed.iter().filter_map(of_protocol).collect();
    match exposed.as_slice() {
        [only] => Ok(*only),
        several if several.contains(&listen.port) => Ok(listen.port),
        // A container in the node's network exposes nothing to Docker: it listens where it says. A task whose service
        // publishes nothing is refused for that.
        [] if matches!(
            container.network_mode,
            NetworkMode::Host | NetworkMode::Task { .. }
        ) =>
        {
            Ok(listen.port)
        }
        _ => Err(Refusal::Port {
            exposed: exposed
                .into_iter()
                .map(|port| Listen {
                    port,
                    protocol: listen.protocol,
                })
                .collect(),
        }),
    }
}
