//! Which devices the interfaces of the configuration are. An answer stays while there is none: a default route goes for a moment
//! when an address is renewed, and a device that is renamed is still the same.

use std::collections::{BTreeMap, BTreeSet};

use super::netlink::Link;

/// An interface of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum InterfaceName {
    /// The devices of the IPv4 default route.
    Auto,
    /// By name.
    Named(String),
}

/// The last answers: interface index and name.
pub type Answers = BTreeMap<InterfaceName, Vec<(u32, String)>>;

/// What the interfaces are now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Uplinks {
    /// Devices to attach to.
    pub devices: BTreeSet<u32>,
    /// What is wrong.
    pub faults: Vec<String>,
    /// Some interface is no device at the moment.
    pub incomplete: bool,
}

/// Finds the devices of `interfaces`. `default` are those of the default route now; `last` is brought up to date.
pub fn resolve(interfaces: &[InterfaceName], links: &[Link], default: &[u32], last: &mut Answers) -> Uplinks {
    let mut uplinks = Uplinks::default();
    last.retain(|interface, _| interfaces.contains(interface));
    for interface in interfaces {
        let is_it = |link: &&Link| match interface {
            InterfaceName::Auto => default.contains(&link.ifindex),
            InterfaceName::Named(name) => link.name == *name,
        };
        let (found, refused): (Vec<&Link>, Vec<&Link>) =
            links.iter().filter(is_it).partition(|link| link.serves());
        uplinks.faults.extend(refused.iter().map(|link| refusal(link)));
        if !found.is_empty() {
            uplinks.devices.extend(found.iter().map(|link| link.ifindex));
            let answer = found.iter().map(|link| (link.ifindex, link.name.clone()));
            last.insert(interface.clone(), answer.collect());
            continue;
        }
        let before = last.get(interface).map_or(&[][..], Vec::as_slice);
        // By number, or made anew by name; a device of the configuration's own name has been looked for already.
        let kept: Vec<&Link> = links
            .iter()
            .filter(|link| link.serves())
            .filter(|link| {
                before
                    .iter()
                    .any(|(ifindex, name)| link.ifindex == *ifindex || link.name == *name)
            })
            .collect();
        uplinks.devices.extend(kept.iter().map(|link| link.ifindex));
        uplinks.incomplete |= kept.is_empty();
        if refused.is_empty() {
            uplinks.faults.push(explain(interface, &kept));
        }
    }
    uplinks
}

/// What `resolve` refuses.
pub fn refusals(interfaces: &[InterfaceName], links: &[Link], default: &[u32]) -> Vec<String> {
    let is_it = |link: &&Link| {
        interfaces.iter().any(|interface| match interface {
            InterfaceName::Auto => default.contains(&link.ifindex),
            InterfaceName::Named(name) => link.name == *name,
        })
    };
    let refused = links.iter().filter(is_it).filter(|link| !link.serves());
    refused.map(refusal).collect()
}

/// What is wrong with a device that has no Ethernet header.
pub const NO_ETHERNET: &str =
    "packets have no Ethernet headers there (tun, WireGuard, PPP and the like), which Weir needs";

/// Why a device is refused, and what to do.
pub fn refusal(link: &Link) -> String {
    format!(
        "interface {}: {NO_ETHERNET}: name the Ethernet device by which clients and backends are reached",
        link.name
    )
}

/// Why an interface has no device of its own, and what serves instead.
fn explain(interface: &InterfaceName, kept: &[&Link]) -> String {
    let names: Vec<&str> = kept.iter().map(|link| link.name.as_str()).collect();
    let names = names.join(", ");
    match (interface, kept) {
        (InterfaceName::Auto, []) => {
            "interfaces = \"auto\": there is no IPv4 default route: name the interface".to_owned()
        }
        (InterfaceName::Auto, _) => format!(
            "interfaces = \"auto\": there is no IPv4 default route: {names} stays attached, as it was the last; name the interface if \
             there is none for long"
        ),
        (InterfaceName::Named(name), []) => format!(
            "interface {name} does not exist (yet): it is attached when it comes; correct `interfaces` if it never will"
        ),
        (InterfaceName::Named(name), _) => {
            format!("interface {name} is called {names} now: it stays attached; correct `interfaces`")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(ifindex: u32, name: &str) -> Link {
        Link {
            ifindex,
            name: name.into(),
            mac: [2, 0, 0, 0, 0, ifindex as u8],
            mtu: 1500,
            bridge: false,
            veth: false,
            vlan_port: false,
            loopback: false,
            up: true,
            carrier_ups: 1,
            master: None,
            lower: None,
            vlan: false,
            ethernet: true,
            xdp_program: None,
        }
    }

    fn named(name: &str) -> InterfaceName {
        InterfaceName::Named(name.into())
    }

    #[test]
    fn the_last_answer_stays_while_there_is_none() {
        let (interfaces, mut last) = ([InterfaceName::Auto], Answers::new());
        let links = [link(2, "eth0"), link(3, "eth1")];
        let none = resolve(&interfaces, &links, &[], &mut last);
        assert!(none.incomplete && none.devices.is_empty() && none.faults.len() == 1);
        assert_eq!(resolve(&interfaces, &links, &[2], &mut last).devices, [2].into());
        let kept = resolve(&interfaces, &links, &[], &mut last);
        assert_eq!((kept.devices, kept.incomplete), ([2].into(), false));
        assert!(
            kept.faults[0].contains("eth0 stays attached"),
            "{:?}",
            kept.faults
        );
        // Made anew, and then renamed.
        let made_anew = [link(9, "eth0"), link(3, "eth1")];
        assert_eq!(
            resolve(&interfaces, &made_anew, &[], &mut last).devices,
            [9].into()
        );
        assert_eq!(
            resolve(&interfaces, &made_anew, &[9], &mut last).devices,
            [9].into()
        );
        let renamed = [link(9, "wan0"), link(3, "eth1")];
        assert_eq!(resolve(&interfaces, &renamed, &[], &mut last).devices, [9].into());
        // Gone is gone, and another answer is another answer.
        assert!(resolve(&interfaces, &[link(3, "eth1")], &[], &mut last).incomplete);
        assert_eq!(resolve(&interfaces, &links, &[3], &mut last).devices, [3].into());
        assert_eq!(
            resolve(&interfaces, &links, &[2, 3], &mut last).devices,
            [2, 3].into()
        );
    }

    #[test]
    fn a_device_under_another_name_stays() {
        let (interfaces, mut last) = ([named("eth0")], Answers::new());
        resolve(&interfaces, &[link(2, "eth0")], &[], &mut last);
        let renamed = resolve(&interfaces, &[link(2, "old0")], &[], &mut last);
        assert_eq!((renamed.devices, renamed.incomplete), ([2].into(), false));
        assert!(
            renamed.faults[0].contains("is called old0 now"),
            "{:?}",
            renamed.faults
        );
        // Whoever has the name is meant.
        let taken = [link(2, "old0"), link(5, "eth0")];
        assert_eq!(resolve(&interfaces, &taken, &[], &mut last).devices, [5].into());
        // An interface that is configured no more is forgotten.
        let none = resolve(&[named("eth7")], &taken, &[], &mut last);
        assert!(none.incomplete && none.devices.is_empty() && last.is_empty());
    }

    #[test]
    fn devices_without_ethernet_headers_are_refused() {
        let mut last = Answers::new();
        let tunnel = Link {
            ethernet: false,
            ..link(4, "wg0")
        };
        let links = [link(2, "eth0"), tunnel];
        let refused = resolve(&[named("eth0"), named("wg0")], &links, &[], &mut last);
        assert_eq!((refused.devices, refused.incomplete), ([2].into(), true));
        assert_eq!(refused.faults.len(), 1);
        assert!(refused.faults[0].starts_with("interface wg0: packets have no Ethernet headers"));
        // The default route moves into a tunnel: what it was before stays.
        resolve(&[InterfaceName::Auto], &links, &[2], &mut last);
        let kept = resolve(&[InterfaceName::Auto], &links, &[4], &mut last);
        assert_eq!((kept.devices, kept.incomplete), ([2].into(), false));
    }
}
