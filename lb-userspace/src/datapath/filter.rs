//! What packets of ours carry, and the filter of it that every packet meets first.

use std::{collections::BTreeSet, net::IpAddr};

use lb_common::{
    addr::{Addr4, Addr16, Be16},
    flow,
    limits::{OURS_WORDS, PORT_WORDS, ROUTED_WORDS},
    maps::Ours,
};

use crate::model::{Protocol, ServiceAddress};

/// Contents of `OURS`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Every address that packets of ours may carry: VIPs, SNAT sources, backends on this node.
    pub addresses: BTreeSet<IpAddr>,
    /// Ports of the services; 0 stands for all.
    pub ports: BTreeSet<(Protocol, u16)>,
    /// VIPs that are routed to this node.
    pub routed: BTreeSet<IpAddr>,
}

// === impl Filter ===

impl Filter {
    /// Adds what another one has.
    pub fn extend(&mut self, other: &Self) {
        self.addresses.extend(&other.addresses);
        self.ports.extend(&other.ports);
        self.routed.extend(&other.routed);
    }

    /// Whether another one has all of it.
    pub fn is_subset(&self, other: &Self) -> bool {
        self.addresses.is_subset(&other.addresses)
            && self.ports.is_subset(&other.ports)
            && self.routed.is_subset(&other.routed)
    }

    /// Whether packets to a service get past it.
    pub fn carries(&self, service: &ServiceAddress) -> bool {
        self.addresses.contains(&service.vip) && self.ports.contains(&(service.protocol, service.port))
    }

    /// The value of the map.
    pub fn value(&self) -> Box<Ours> {
        let mut ours = Box::new(Ours {
            words: [0; OURS_WORDS],
            ports: [0; PORT_WORDS],
            routed: [0; ROUTED_WORDS],
        });
        for vip in &self.routed {
            let (word, mask) = match vip {
                IpAddr::V4(v4) => flow::routed_bit(Addr4::from_octets(v4.octets())),
                IpAddr::V6(_) => flow::routed_bit(Addr16::from(*vip)),
            };
            ours.routed[word as usize] |= mask;
        }
        for address in &self.addresses {
            let (word, mask) = match address {
                IpAddr::V4(v4) => flow::ours_bit(Addr4::from_octets(v4.octets())),
                IpAddr::V6(_) => flow::ours_bit(Addr16::from(*address)),
            };
            ours.words[word as usize] |= mask;
        }
        for (protocol, port) in &self.ports {
            let all = if *port == 0 { 0..=u16::MAX } else { *port..=*port };
            for port in all {
                let (word, mask) = flow::port_bit(protocol.number().into(), Be16::new(port));
                ours.ports[word as usize] |= mask;
            }
        }
        ours
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_have_their_bits() {
        let addresses = ["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let filter = Filter {
            addresses: addresses.into(),
            routed: addresses.into(),
            ..Filter::default()
        };
        for address in addresses {
            let (word, mask) = match address {
                IpAddr::V4(v4) => flow::ours_bit(Addr4::from_octets(v4.octets())),
                IpAddr::V6(_) => flow::ours_bit(Addr16::from(address)),
            };
            assert_ne!(filter.value().words[word as usize] & mask, 0);
            let (word, mask) = match address {
                IpAddr::V4(v4) => flow::routed_bit(Addr4::from_octets(v4.octets())),
                IpAddr::V6(_) => flow::routed_bit(Addr16::from(address)),
            };
            assert_ne!(filter.value().routed[word as usize] & mask, 0);
        }
        let none = Filter::default().value();
        assert!(
            none.words
                .iter()
                .chain(&none.ports)
                .chain(&none.routed)
                .all(|word| *word == 0)
        );
    }

    #[test]
    fn ports_have_bits_of_their_protocol_and_port_0_has_all() {
        let bits = |ports: &[(Protocol, u16)]| {
            let filter = Filter {
                ports: ports.iter().copied().collect(),
                ..Filter::default()
            };
            let value = filter.value();
            let set = |proto, port| {
                let (word, mask) = flow::port_bit(proto, Be16::new(port));
                value.ports[word as usize] & mask != 0
            };
            let of = |proto| (0..=u16::MAX).filter(|port| set(proto, *port)).count();
            (set(6, 443), set(17, 443), of(6), of(17))
        };
        assert_eq!(bits(&[(Protocol::Tcp, 443)]), (true, false, 1, 0));
        assert_eq!(
            bits(&[(Protocol::Udp, 443), (Protocol::Udp, 53)]),
            (false, true, 0, 2)
        );
        assert_eq!(bits(&[(Protocol::Udp, 0)]), (false, true, 0, 65_536));
    }
}
