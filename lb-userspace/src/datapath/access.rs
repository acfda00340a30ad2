//! Allow and deny lists as a value: which clients of open flows are refused. The rule is that of the programs
//! (`lb_ebpf::create::admits`), which ask it of new flows alone.

use std::collections::{BTreeMap, HashMap};

use ipnet::IpNet;
use lb_common::{
    addr::Addr16,
    maps::{ACL_ALLOW, ACL_DENY},
};

/// Bits in front of an IPv4 address that is written IPv4-mapped.
const MAPPED_BITS: u8 = 96;

/// The lists of all services.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessLists {
    /// Raised with every change of what is in the maps: another number is another set of lists.
    pub version: u64,
    everybody: Prefixes,
    services: BTreeMap<u32, ServiceList>,
}

/// The lists of one service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct ServiceList {
    prefixes: Prefixes,
    /// Who is in no list is refused.
    default_deny: bool,
}

/// Prefixes by their length, longest first. IPv4 and IPv6 are in one tree, as in the map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Prefixes(Vec<(u8, HashMap<u128, u32>)>);

// === impl AccessLists ===

impl AccessLists {
    /// Lists with what is denied by every service.
    pub fn new<'a>(version: u64, everybody: impl Iterator<Item = &'a IpNet>) -> Self {
        Self {
            version,
            everybody: everybody.map(|prefix| (prefix, ACL_DENY)).collect(),
            services: BTreeMap::new(),
        }
    }

    /// Adds the lists of a service.
    pub fn insert<'a>(
        &mut self,
        service: u32,
        entries: impl Iterator<Item = (&'a IpNet, u32)>,
        default_deny: bool,
    ) {
        let prefixes = entries.collect();
        self.services.insert(
            service,
            ServiceList {
                prefixes,
                default_deny,
            },
        );
    }

    /// Whether they refuse nobody.
    pub fn is_empty(&self) -> bool {
        self.everybody.0.is_empty() && self.services.is_empty()
    }

    /// Whether a client may use a service.
    pub fn admits(&self, service: u32, client: &Addr16) -> bool {
        let client = u128::from_be_bytes(client.octets());
        if self.everybody.find(client) == Some(ACL_DENY) {
            return false;
        }
        let Some(list) = self.services.get(&service) else {
            return true;
        };
        match list.prefixes.find(client) {
            Some(ACL_ALLOW) => true,
            Some(ACL_DENY) => false,
            _ => !list.default_deny,
        }
    }
}

// === impl Prefixes ===

impl Prefixes {
    fn find(&self, client: u128) -> Option<u32> {
        let mut lengths = self.0.iter();
        lengths.find_map(|(bits, prefixes)| prefixes.get(&masked(client, *bits)).copied())
    }
}

impl<'a> FromIterator<(&'a IpNet, u32)> for Prefixes {
    fn from_iter<I: IntoIterator<Item = (&'a IpNet, u32)>>(entries: I) -> Self {
        let mut by_length: BTreeMap<u8, HashMap<u128, u32>> = BTreeMap::new();
        for (prefix, action) in entries {
            let (address, bits) = match prefix {
                IpNet::V4(v4) => (v4.addr().to_ipv6_mapped(), MAPPED_BITS + v4.prefix_len()),
                IpNet::V6(v6) => (v6.addr(), v6.prefix_len()),
            };
            let key = masked(u128::from(address), bits);
            by_length.entry(bits).or_default().insert(key, action);
        }
        Self(by_length.into_iter().rev().collect())
    }
}

/// The first `bits` of an address.
fn masked(address: u128, bits: u8) -> u128 {
    match bits {
        0 => 0,
        bits => address & u128::MAX << (128 - u32::from(bits)),
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn lists(everybody: &[&str], allow: &[&str], deny: &[&str]) -> AccessLists {
        let mut lists = AccessLists::new(1, nets(everybody).iter());
        let (allow, deny) = (nets(allow), nets(deny));
        let entries = allow.iter().map(|p| (p, ACL_ALLOW));
        let entries = entries.chain(deny.iter().map(|p| (p, ACL_DENY)));
        lists.insert(7, entries, !allow.is_empty());
        lists
    }

    fn admits(lists: &AccessLists, service: u32, client: &str) -> bool {
        lists.admits(service, &client.parse::<IpAddr>().unwrap().into())
    }

    #[test]
    fn without_lists_everybody_is_admitted() {
        let none = AccessLists::default();
        assert!(none.is_empty() && admits(&none, 7, "192.0.2.1") && admits(&none, 7, "2001:db8::1"));
    }

    #[test]
    fn the_longest_prefix_decides() {
        let lists = lists(
            &[],
            &["10.1.0.0/16", "2001:db8::1/128"],
            &["10.1.2.0/24", "2001:db8::/32"],
        );
        for (client, admitted) in [
            ("10.1.9.9", true),
            ("10.1.2.9", false),
            ("2001:db8::1", true),
            ("2001:db8::2", false),
            // There is an allow list, and it is in none.
            ("192.0.2.1", false),
        ] {
            assert_eq!(admits(&lists, 7, client), admitted, "{client}");
        }
        // Nobody else's lists.
        assert!(admits(&lists, 8, "10.1.2.9"));
    }

    #[test]
    fn a_deny_list_alone_admits_the_rest() {
        let lists = lists(&[], &[], &["192.0.2.10/32"]);
        assert!(!admits(&lists, 7, "192.0.2.10") && admits(&lists, 7, "192.0.2.11"));
    }

    #[test]
    fn the_firewall_comes_first_and_holds_for_services_without_lists() {
        let lists = lists(&["192.0.2.0/24"], &["192.0.2.10/32"], &[]);
        assert!(!admits(&lists, 7, "192.0.2.10") && !admits(&lists, 8, "192.0.2.10"));
        assert!(admits(&lists, 8, "192.0.3.10"));
    }

    #[test]
    fn all_of_ipv6_is_ipv4_too_as_in_the_map() {
        let lists = lists(&["::/0"], &[], &[]);
        assert!(!admits(&lists, 7, "192.0.2.1") && !admits(&lists, 7, "2001:db8::1"));
    }
}
