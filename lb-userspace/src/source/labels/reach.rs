//! Where a container is reached from this node.

use std::net::{IpAddr, SocketAddr};

use super::{Site, refusal::Refusal};
use crate::{
    config::value::Listen,
    model::{Attachment, SnatMode},
    source::docker::container::{Container, NetworkMode},
};

/// Docker's driver of networks that are bridges of the node.
const BRIDGE: &str = "bridge";
/// Docker's driver of networks that span nodes, in namespaces of their own.
const OVERLAY: &str = "overlay";

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

/// How a container is connected at one of its addresses, and so whether its replies come back by themselves.
pub fn attachment(
    address: IpAddr,
    snat: SnatMode,
    container: &Container,
    site: &Site,
) -> Result<Attachment, Refusal> {
    if site.remote || !matches!(container.network_mode, NetworkMode::Network(_)) {
        return Ok(Attachment::Address);
    }
    let on = |(_, addresses): &(&String, &Vec<IpAddr>)| addresses.contains(&address);
    let Some((name, own)) = container
        .networks
        .iter()
        .find(on)
        .and_then(|(name, _)| container.routing.networks.get_key_value(name))
    else {
        return Ok(Attachment::Container);
    };
    if own.driver.as_deref() == Some(OVERLAY) {
        let other = |network: &&String| {
            let known = container.routing.networks.get(*network);
            known.is_some_and(|known| known.driver.as_deref() == Some(BRIDGE))
        };
        return Err(Refusal::Overlay {
            network: name.clone(),
            bridges: container.networks.keys().filter(other).cloned().collect(),
        });
    }
    let returns = match container.routing.default_network(address.is_ipv6()) {
        None if snat == SnatMode::Never => return Err(Refusal::NoGateway(name.clone())),
        None => false,
        Some((default, _)) if default == name => true,
        Some((_, default)) => {
            // On a bridge of this node replies pass our programs, if the container lets the requests in at all.
            let passes = default.driver.as_deref().is_none_or(|driver| driver == BRIDGE);
            passes && (address.is_ipv6() || !container.routing.is_strict(site.rp_filter))
        }
    };
    Ok(match returns {
        true => Attachment::Container,
        false => Attachment::IsolatedContainer,
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{
        docker::container::NetworkAttachment,
        labels::tests::{container, local},
    };

    fn network(driver: &str, gateway: bool) -> NetworkAttachment {
        NetworkAttachment {
            driver: Some(driver.into()),
            gateway: [gateway, gateway],
            ..NetworkAttachment::default()
        }
    }

    /// A container with 10.0.0.2 and fd00::2 on the first of the networks.
    fn on(networks: &[(&str, NetworkAttachment)]) -> Container {
        let mut container = container(&[]);
        container.networks.clear();
        for (index, (name, network)) in networks.iter().enumerate() {
            let last = 2 + index as u16;
            let addresses = vec![
                [10, 0, 0, last as u8].into(),
                [0xfd00, 0, 0, 0, 0, 0, 0, last].into(),
            ];
            container.networks.insert((*name).into(), addresses);
            container.routing.networks.insert((*name).into(), network.clone());
        }
        container
    }

    fn found(container: &Container, snat: SnatMode, site: &Site) -> [Result<Attachment, Refusal>; 2] {
        ["10.0.0.2", "fd00::2"].map(|ip| attachment(ip.parse().unwrap(), snat, container, site))
    }

    #[test]
    fn the_way_back_is_known_from_gateways_drivers_and_rp_filter() {
        use Attachment::{Address, Container as Returns, IsolatedContainer as Isolated};
        let (bridge, internal) = (network("bridge", true), network("bridge", false));
        let (macvlan, first) = (
            network("macvlan", true),
            NetworkAttachment {
                priority: 1,
                ..network("bridge", true)
            },
        );
        let strict = Site {
            rp_filter: [0, 1],
            ..local()
        };
        let loose = Site {
            rp_filter: [2, 1],
            ..local()
        };
        let remote = Site {
            remote: true,
            ..local()
        };
        for (name, networks, site, v4, v6) in [
            (
                "its only network",
                vec![("b", &bridge)],
                &strict,
                Returns,
                Returns,
            ),
            (
                "an internal network",
                vec![("b", &internal)],
                &local(),
                Isolated,
                Isolated,
            ),
            (
                "internal, and another one",
                vec![("b", &internal), ("c", &bridge)],
                &local(),
                Returns,
                Returns,
            ),
            (
                "the same, strict",
                vec![("b", &internal), ("c", &bridge)],
                &strict,
                Isolated,
                Returns,
            ),
            (
                "the first by name",
                vec![("b", &bridge), ("c", &bridge)],
                &strict,
                Returns,
                Returns,
            ),
            (
                "not the first by name",
                vec![("b", &bridge), ("a", &bridge)],
                &strict,
                Isolated,
                Returns,
            ),
            (
                "not the first, loose",
                vec![("b", &bridge), ("a", &bridge)],
                &loose,
                Returns,
                Returns,
            ),
            (
                "priority",
                vec![("b", &first), ("a", &bridge)],
                &strict,
                Returns,
                Returns,
            ),
            (
                "out by a macvlan",
                vec![("b", &bridge), ("a", &macvlan)],
                &local(),
                Isolated,
                Isolated,
            ),
            (
                "on another node",
                vec![("b", &internal)],
                &remote,
                Address,
                Address,
            ),
        ] {
            let networks: Vec<(&str, NetworkAttachment)> = networks
                .into_iter()
                .map(|(name, network)| (name, network.clone()))
                .collect();
            assert_eq!(
                found(&on(&networks), SnatMode::Auto, site),
                [Ok(v4), Ok(v6)],
                "{name}"
            );
        }
        // What the container itself was given counts more than the node's values.
        let mut own = on(&[("b", bridge.clone()), ("a", bridge.clone())]);
        own.routing.rp_filter = [None, Some(1)];
        assert_eq!(found(&own, SnatMode::Auto, &local())[0], Ok(Isolated));
        own.routing.rp_filter = [Some(0), Some(0)];
        assert_eq!(found(&own, SnatMode::Auto, &strict)[0], Ok(Returns));
    }

    #[test]
    fn what_cannot_come_back_is_refused_with_the_remedy() {
        let never = found(&on(&[("b", network("bridge", false))]), SnatMode::Never, &local());
        let refusal = never[0].clone().unwrap_err();
        assert_eq!(refusal.setting(), "snat");
        assert!(
            refusal
                .remedy("weir.service.web.")
                .contains("weir.service.web.snat to auto")
        );

        let overlay = on(&[
            ("b", network("overlay", false)),
            ("front", network("bridge", true)),
        ]);
        let refusal = found(&overlay, SnatMode::Auto, &local())[0].clone().unwrap_err();
        assert_eq!(refusal.setting(), "network");
        assert!(refusal.to_string().contains("overlay"), "{refusal}");
        assert_eq!(
            refusal.remedy("weir.service.web."),
            "set weir.service.web.network to one of: front"
        );
        let alone = found(&on(&[("b", network("overlay", false))]), SnatMode::Auto, &local())[0].clone();
        assert!(alone.unwrap_err().remedy("").contains("bridge network as well"));
    }
}
