//! Where a container is reached from this node.

use std::net::{IpAddr, SocketAddr};

use super::{Site, refusal::Refusal};
use crate::{
    config::value::Listen,
    source::docker::container::{Container, NetworkMode},
};

/// Where a container port is reached from this node: at most one place for each family.
pub fn places(
    listen: Listen,
    port: u16,
    network: Option<&str>,
    container: &Container,
    site: &Site,
) -> Result<Vec<SocketAddr>, (&'static str, Refusal)> {
    let at = |addresses: &[IpAddr]| -> Vec<SocketAddr> {
        addresses
            .iter()
            .map(|address| SocketAddr::new(*address, port))
            .collect()
    };
    match &container.network_mode {
        NetworkMode::Host if site.node.is_empty() => Err(("network", Refusal::NoNodeAddress)),
        NetworkMode::Host => Ok(at(&site.node)),
        NetworkMode::Container(id) => Err(("network", Refusal::SharedNetwork(id.chars().take(12).collect()))),
        NetworkMode::None => Err(("network", Refusal::NoAddress)),
        NetworkMode::Task { elsewhere, .. } => {
            published(listen, port, container, site).map_err(|refusal| match refusal {
                Refusal::Unpublished(port) => {
                    let elsewhere = elsewhere.get(&(port.port, port.protocol)).copied();
                    ("port", Refusal::NotOnNode { port, elsewhere })
                }
                other => ("port", other),
            })
        }
        NetworkMode::Network(_) if site.remote => {
            published(listen, port, container, site).map_err(|refusal| ("port", refusal))
        }
        NetworkMode::Network(created_with) => bridge(network, created_with, container)
            .map(at)
            .map_err(|refusal| ("network", refusal)),
    }
}

/// The container's addresses on one network: the named one, else the one it was created with, else the only one.
fn bridge<'c>(
    named: Option<&str>,
    created_with: &str,
    container: &'c Container,
) -> Result<&'c [IpAddr], Refusal> {
    let usable: Vec<(&String, &Vec<IpAddr>)> = container
        .networks
        .iter()
        .filter(|(_, addresses)| !addresses.is_empty())
        .collect();
    let names = || usable.iter().map(|(name, _)| (*name).clone()).collect::<Vec<_>>();
    let find = |wanted: &str| {
        usable
            .iter()
            .find(|(name, _)| *name == wanted)
            .map(|(_, addresses)| addresses.as_slice())
    };
    if let Some(network) = named {
        return find(network).ok_or_else(|| Refusal::NoNetwork {
            network: network.into(),
            known: names(),
        });
    }
    match (find(created_with), usable.as_slice()) {
        (Some(addresses), _) => Ok(addresses),
        (None, [(_, only)]) => Ok(only.as_slice()),
        (None, []) => Err(Refusal::NoAddress),
        (None, _) => Err(Refusal::NetworkChoice(names())),
    }
}

/// Where the engine's node publishes a port.
fn published(
    listen: Listen,
    port: u16,
    container: &Container,
    site: &Site,
) -> Result<Vec<SocketAddr>, Refusal> {
    if port == 0 {
        return Err(Refusal::EveryPortRemote(listen));
    }
    let wanted = Listen {
        port,
        protocol: listen.protocol,
    };
    let bindings = container
        .published
        .get(&(port, listen.protocol))
        .ok_or(Refusal::Unpublished(wanted))?;
    let mut found: Vec<SocketAddr> = Vec::new();
    // Port 0 is none; as a backend's it would mean the client's own.
    let usable = |binding: &&SocketAddr| !binding.ip().is_loopback() && binding.port() != 0;
    for binding in bindings.iter().filter(usable) {
        let candidates = if binding.ip().is_unspecified() {
            site.node
                .iter()
                .copied()
                .filter(|ip| ip.is_ipv4() == binding.is_ipv4())
                .collect()
        } else {
            vec![binding.ip()]
        };
        for ip in candidates {
            if !found.iter().any(|place| place.is_ipv4() == ip.is_ipv4()) {
                found.push(SocketAddr::new(ip, binding.port()));
            }
        }
    }
    if found.is_empty() {
        return Err(if site.node.is_empty() {
            Refusal::NoNodeAddress
        } else {
            Refusal::Unpublished(wanted)
        });
    }
    Ok(found)
}
