//! For which hosts certificates are ordered: pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::SystemTime,
};

use lb_route::{ANY_HOST, Acme, State};

/// What there is to do for a state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// How; `None`: nothing is ordered.
    pub settings: Option<Acme>,
    /// The hosts that get a certificate each, and for which the authority is answered.
    pub hosts: BTreeSet<String>,
    /// Wildcard hosts that would get one if HTTP-01 could prove them.
    pub unprovable: BTreeSet<String>,
    /// Until when the certificates of the folder are good, by host.
    pub issued: BTreeMap<String, SystemTime>,
}

// === impl Wanted ===

impl Wanted {
    /// The exact hosts of routes that the operator allows, that are no passed-on ones, and for which labels name no
    /// certificate and the folder of certificates has none (`has_own`).
    pub fn new(state: &State, has_own: impl Fn(&str) -> bool) -> Self {
        let Some(settings) = &state.settings.acme else {
            return Self::default();
        };
        let (mut hosts, mut unprovable) = (BTreeSet::new(), BTreeSet::new());
        let mut others = BTreeSet::new();
        for route in state.served() {
            let tls = &route.settings.tls;
            for host in std::iter::once(&route.host).chain(&route.aliases) {
                let host = host.to_ascii_lowercase();
                if tls.passthrough || tls.certificate.is_some() {
                    others.insert(host);
                } else if let Some(parent) = host.strip_prefix("*.") {
                    // A pattern allows what is below it, a wildcard stands for what is below it.
                    if settings.hosts.contains(&host) || settings.allows(parent) {
                        unprovable.insert(host);
                    }
                } else if host != ANY_HOST && is_name(&host) && settings.allows(&host) {
                    hosts.insert(host);
                }
            }
        }
        let is_ours = |host: &String| !others.contains(host) && !has_own(host);
        hosts.retain(is_ours);
        unprovable.retain(is_ours);
        Self {
            settings: Some(settings.clone()),
            hosts,
            unprovable,
            issued: BTreeMap::new(),
        }
    }
}

/// Whether a host is a name of the DNS for which there can be a certificate. It becomes the name of a file.
fn is_name(host: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.len() <= 253 && host.split('.').all(is_label) && host.parse::<Ipv4Addr>().is_err()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn state(acme: serde_json::Value, routes: serde_json::Value) -> State {
        let settings = json!({ "acme": acme, "cluster": "east" });
        serde_json::from_value(json!({ "settings": settings, "routes": routes })).unwrap()
    }

    #[test]
    fn hosts_without_a_certificate_that_the_operator_names_get_one() {
        let with = |host: &str, tls: serde_json::Value| json!({ "host": host, "upstreams": [], "settings": { "tls": tls } });
        let state = state(
            json!({ "hosts": ["*.example.com", "vote.test"] }),
            json!([
                { "host": "a.example.com", "aliases": ["vote.test", "alias.evil.test"], "upstreams": [] },
                { "host": "a.example.com", "path": "/x", "upstreams": [] },
                { "host": "Deep.b.example.com", "upstreams": [] },
                with("only.example.com", json!({ "only": true })),
                with("passed.example.com", json!({ "passthrough": true })),
                with("named.example.com", json!({ "certificate": "x.pem" })),
                { "host": "named.example.com", "path": "/other", "upstreams": [] },
                { "host": "own.example.com", "upstreams": [] },
                { "host": "evil.test", "upstreams": [] },
                { "host": "*", "upstreams": [] },
                { "host": "*.wild.example.com", "upstreams": [] },
                { "host": "*.example.com", "upstreams": [] },
                { "host": "*.evil.test", "upstreams": [] },
                { "host": "under_score.example.com", "upstreams": [] },
                { "host": "x..example.com", "upstreams": [] },
                { "host": "west.example.com", "upstreams": [], "settings": { "cluster": "west" } },
                { "host": "east.example.com", "upstreams": [], "settings": { "cluster": "east" } },
            ]),
        );
        let wanted = Wanted::new(&state, |host| host == "own.example.com");
        let hosts: Vec<&str> = wanted.hosts.iter().map(String::as_str).collect();
        assert_eq!(
            hosts,
            [
                "a.example.com",
                "deep.b.example.com",
                "east.example.com",
                "only.example.com",
                "vote.test"
            ]
        );
        let unprovable: Vec<&str> = wanted.unprovable.iter().map(String::as_str).collect();
        assert_eq!(unprovable, ["*.example.com", "*.wild.example.com"]);
    }

    #[test]
    fn without_settings_nothing_is_wanted() {
        let state: State =
            serde_json::from_value(json!({ "routes": [{ "host": "a.example", "upstreams": [] }] })).unwrap();
        assert_eq!(Wanted::new(&state, |_| false), Wanted::default());
    }

    #[test]
    fn addresses_and_what_leads_out_of_the_folder_are_no_names() {
        for host in ["a", "a.example", "xn--bcher-kva.example", "1.example"] {
            assert!(is_name(host), "{host}");
        }
        for host in [
            "",
            ".",
            "..",
            "a/b",
            "../a",
            "192.0.2.1",
            "[::1]",
            "-a.b",
            "a-.b",
            "a..b",
        ] {
            assert!(!is_name(host), "{host}");
        }
    }
}
