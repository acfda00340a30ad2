//! Labels of Interlock → routes: a migration without editing Compose files. Pure.
//!
//! [`v1`] reads `interlock.*` of containers, [`v2`] `com.docker.lb.*` of Swarm services; both take any map of labels.
//! [`routes`] adds where a container is reached. A bad label refuses the route that it belongs to, of this one container,
//! and nothing else.

mod fault;
pub mod option;
mod reader;
#[cfg(test)]
mod tests;
pub mod v1;
pub mod v2;
pub mod value;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

pub use fault::Fault;

use super::{
    docker::container::Container,
    labels::{self, Refusal, Refused, Site},
};
use crate::{
    config::{Policy, value::DEFAULT_WEIGHT, value::Listen},
    model::{Attachment, Backend, Check, Protocol, SnatMode},
    route::{RouteAddress, RouteSettings, RouteWish},
};

/// What labels say about a route. Where it is reached is not in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Host name.
    pub host: String,
    /// Other host names.
    pub aliases: BTreeSet<String>,
    /// Path prefix.
    pub path: String,
    /// Settings.
    pub settings: RouteSettings,
    /// How an upstream is checked.
    pub check: Arc<Check>,
    /// Port inside the container; `None`: the one that it publishes or exposes.
    pub port: Option<u16>,
    /// Docker network whose address is used.
    pub network: Option<String>,
    /// What is approximated, or means nothing here.
    pub remarks: Vec<String>,
}

/// The labels of one family, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// What the labels begin with.
    pub prefix: &'static str,
    /// The route, unless a fault spoils it. With a route, faults are those of single aliases.
    pub spec: Option<Spec>,
    /// Label and what is wrong with it.
    pub faults: Vec<(String, Fault)>,
}

/// Both families; any map of labels, of containers or of Swarm services.
pub fn parse(labels: &BTreeMap<String, String>) -> Vec<Parsed> {
    [v1::parse(labels), v2::parse(labels)]
        .into_iter()
        .flatten()
        .collect()
}

/// The routes that a container wishes.
pub(super) fn routes(
    container: &Container,
    site: &Site,
    policy: &Policy,
    refused: &mut Refused<'_>,
) -> Vec<RouteWish> {
    let mut wishes: Vec<RouteWish> = Vec::new();
    for Parsed { prefix, spec, faults } in parse(&container.labels) {
        let mut note = |label: &str, fault: Fault| refused.note(label, &fault, fault.remedy(prefix));
        for (label, fault) in faults {
            note(&label, fault);
        }
        let Some(mut spec) = spec else { continue };
        let upstream = match upstream(&mut spec, container, site, policy) {
            Ok(upstream) => upstream,
            Err((setting, refusal)) => {
                note(&format!("{prefix}{setting}"), refusal.into());
                continue;
            }
        };
        let others = wishes.len();
        for host in [&spec.host].into_iter().chain(&spec.aliases) {
            let address = RouteAddress {
                host: host.clone(),
                path: spec.path.clone(),
            };
            match wishes.iter().position(|other| other.address == address) {
                // An alias that is the host itself says nothing new.
                Some(index) if index >= others => {}
                Some(_) => note(&format!("{prefix}*"), Fault::Twice(address)),
                None => wishes.push(RouteWish {
                    address,
                    of: spec.host.clone(),
                    settings: spec.settings.clone(),
                    remarks: spec.remarks.clone(),
                    upstream: upstream.clone(),
                }),
            }
        }
    }
    wishes
}

/// Where a container is reached for a route, and in which state it is.
fn upstream(
    spec: &mut Spec,
    container: &Container,
    site: &Site,
    policy: &Policy,
) -> Result<Backend, (&'static str, Refusal)> {
    let port = match spec.port {
        Some(port) => port,
        None => port(container, &mut spec.remarks).map_err(|refusal| ("port", refusal))?,
    };
    let listen = Listen {
        port,
        protocol: Protocol::Tcp,
    };
    let places = labels::places(listen, port, spec.network.as_deref(), container, site)?;
    let place = places.iter().find(|place| place.is_ipv4()).or(places.first());
    let address: SocketAddr = *place.ok_or(("network", Refusal::NoAddress))?;
    // The shim connects by the node's own routes: it needs no source, but overlay networks it does not reach either.
    labels::attachment(address.ip(), SnatMode::Auto, container, site)
        .map_err(|refusal| (refusal.setting(), refusal))?;
    let (state, reason) = labels::state(container);
    let mut check = Arc::clone(&spec.check);
    let slow_start = policy.checks.check.timing.slow_start;
    if check.timing.slow_start.is_zero() && !slow_start.is_zero() {
        // The labels, which have no word for it but HAProxy's own, say nothing.
        Arc::make_mut(&mut check).timing.slow_start = slow_start;
    }
    Ok(Backend {
        address,
        weight: DEFAULT_WEIGHT,
        state,
        reason: reason.into(),
        drain: policy.drain,
        name: container.name.clone(),
        check: Some(check),
        attachment: Attachment::Address,
    })
}

/// The port of a container whose labels name none: of what it publishes, else of what it exposes, the lowest.
/// Interlock takes the first of a list without an order.
fn port(container: &Container, remarks: &mut Vec<String>) -> Result<u16, Refusal> {
    let tcp = |(port, protocol): &(u16, Protocol)| (*protocol == Protocol::Tcp).then_some(*port);
    let mut ports: Vec<u16> = container.published.keys().filter_map(tcp).collect();
    if ports.is_empty() {
        ports = container.exposed.iter().filter_map(tcp).collect();
    }
    let lowest = *ports.first().ok_or(Refusal::Port { exposed: Vec::new() })?;
    if ports.len() > 1 {
        let all: Vec<String> = ports.iter().map(ToString::to_string).collect();
        remarks.push(format!(
            "no label names the port: {lowest} is taken, the lowest of {}",
            all.join(", ")
        ));
    }
    Ok(lowest)
}
