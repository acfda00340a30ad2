//! Where the containers of an engine are, seen from this node.

use std::net::IpAddr;

use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags};

use crate::{
    config::{Config, DockerConfig, value},
    datapath::sysctl,
    source::labels::Site,
};

/// The site of an engine. Addresses of the node that nobody configured are those of the configured interfaces; a
/// failure to read them leaves them empty, which refuses host-network containers by name and nothing else.
pub fn site(config: &Config, docker: &DockerConfig) -> Site {
    let node = if docker.node_addresses.is_empty() && !docker.remote {
        local_addresses(config)
    } else {
        docker.node_addresses.clone()
    };
    Site {
        source: docker.source(),
        remote: docker.remote,
        node,
        allow: docker.allow.clone(),
        rp_filter: ["all", "default"].map(rp_filter),
    }
}

/// Containers begin with the values of the node's first namespace. What cannot be read is taken for off.
fn rp_filter(which: &str) -> u8 {
    let value = sysctl::read(&format!("net.ipv4.conf.{which}.rp_filter"));
    value
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or_default()
}

fn local_addresses(config: &Config) -> Vec<IpAddr> {
    let names = config.interface_names().unwrap_or_else(|error| {
        tracing::warn!(%error, "the node's own addresses are not known");
        Vec::new()
    });
    let Ok(all) = getifaddrs() else {
        return Vec::new();
    };
    let own: Vec<_> = all
        .filter(|entry| entry.flags.contains(InterfaceFlags::IFF_UP))
        .filter_map(|entry| {
            let address = entry.address?;
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            let ip = v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))?;
            Some((entry.interface_name, ip))
        })
        .collect();
    names
        .iter()
        .flat_map(|name| own.iter().filter(move |(device, _)| device == name))
        .map(|(_, ip)| *ip)
        .filter(|ip| value::is_unicast(*ip) && !is_link_local(*ip) && !is_foreign_vip(*ip, config))
        .collect()
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// A VIP on an interface is not an address of the node, unless it is declared to be.
fn is_foreign_vip(ip: IpAddr, config: &Config) -> bool {
    config
        .policy
        .vips
        .iter()
        .any(|vip| !vip.node_address && vip.addresses.contains(&ip))
}
