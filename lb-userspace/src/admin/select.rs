//! Which backend does an operator mean: pure resolution of what was typed against the agent's [`Status`].
//!
//! Forms: a container or backend name (`web-1`), `service/name` or `host/name` (`web/web-1`), an address and port
//! (`172.17.0.2:80`, `[fd00::2]:80`), an id of the maps (`17` or `#17`).

use std::{collections::BTreeSet, net::SocketAddr};

use super::api::{BackendName, Refusal};
use crate::{
    model::{Backend, ServiceAddress},
    status::{RouteStatus, Status},
};

/// Every backend that `text` can mean, in the order of `weir status`.
pub fn matches(status: &Status, text: &str) -> Vec<BackendName> {
    let address: Option<SocketAddr> = text.parse().ok();
    let id: Option<u32> = text.strip_prefix('#').unwrap_or(text).parse().ok();
    all(status)
        .filter(|b| {
            b.name == text
                || Some(b.address) == address
                || (id.is_some() && b.id == id)
                || text
                    .rsplit_once('/')
                    .is_some_and(|(service, name)| b.service == service && b.name == name)
        })
        .collect()
}

/// The one backend that `text` means, or with `every` all of them.
///
/// # Errors
/// Nothing matches, or several do and `every` is not set: the refusal lists what could have been meant.
pub fn resolve(status: &Status, text: &str, every: bool) -> Result<Vec<BackendName>, Refusal> {
    let found = matches(status, text);
    match found.len() {
        0 => Err(Refusal {
            error: format!("no backend is called {text:?}"),
            remedy: "name it by container name, service/name, address:port or id as `weir status` shows them"
                .into(),
            candidates: similar(status, text),
        }),
        1 => Ok(found),
        _ if every => Ok(found),
        n => Err(Refusal {
            error: format!("{text:?} means {n} backends"),
            remedy: "name one by its id (#17) or with its service or host in front (web/web-1), or take all of them with --all".into(),
            candidates: found,
        }),
    }
}

/// Ids of the services that are called `text`, or have it as address (`10.0.0.1:80/tcp`, `10.0.0.1:80`) or VIP.
pub fn services(status: &Status, text: &str) -> BTreeSet<u32> {
    status
        .services
        .iter()
        .filter(|s| s.name == text || address_matches(&s.address, text))
        .map(|s| s.id)
        .collect()
}

/// Backends whose name, service or address contains what was typed: a hint after a slip.
fn similar(status: &Status, text: &str) -> Vec<BackendName> {
    let text = text.to_lowercase();
    let words: Vec<&str> = text
        .split(['/', ':', '#'])
        .filter(|word| word.len() > 1)
        .collect();
    all(status)
        .filter(|b| {
            let whole = format!("{}/{} {}", b.service, b.name, b.address).to_lowercase();
            words.iter().any(|word| whole.contains(word))
        })
        .take(10)
        .collect()
}

fn address_matches(address: &ServiceAddress, text: &str) -> bool {
    address.to_string() == text
        || text.parse() == Ok(SocketAddr::new(address.vip, address.port))
        || text.parse() == Ok(address.vip)
}

/// Every backend of every service, then every upstream of every host.
pub fn all(status: &Status) -> impl Iterator<Item = BackendName> + '_ {
    let backends = status.services.iter().flat_map(|service| {
        service.backends.iter().map(|backend| BackendName {
            id: Some(backend.id),
            service: service.name.clone(),
            service_address: Some(service.address),
            name: backend.name.clone(),
            address: backend.address,
        })
    });
    // A host has an upstream once, however many of its paths lead there: it is drained from all of them.
    let upstreams: BTreeSet<_> = status
        .routes
        .iter()
        .flat_map(|RouteStatus { route, .. }| {
            let upstream = |upstream: &'_ Backend| (&route.host, upstream.address, upstream.name.clone());
            route.upstreams.iter().map(upstream)
        })
        .collect();
    let upstreams = upstreams.into_iter().map(|(host, address, name)| BackendName {
        id: None,
        service: host.clone(),
        service_address: None,
        name,
        address,
    });
    backends.chain(upstreams)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::fixture;

    fn ids(found: &[BackendName]) -> Vec<u32> {
        found.iter().filter_map(|b| b.id).collect()
    }

    #[test]
    fn every_form_finds_its_backend() {
        let status = fixture::status();
        for (text, expected) in [
            ("web-2", vec![12]),
            ("web/web-1", vec![11]),
            ("172.17.0.3:8080", vec![12]),
            ("[fd00::5]:53", vec![21]),
            ("12", vec![12]),
            ("#21", vec![21]),
            ("nothing", vec![]),
            ("dns/web-2", vec![]),
        ] {
            assert_eq!(ids(&matches(&status, text)), expected, "{text}");
        }
    }

    #[test]
    fn ambiguity_lists_the_candidates_and_is_overridden_by_all() {
        let status = fixture::status();
        // The container `web-1` serves `web` and `dns`.
        let refusal = resolve(&status, "web-1", false).unwrap_err();
        assert_eq!(ids(&refusal.candidates), [11, 22]);
        assert!(refusal.error.contains("means 2 backends"), "{}", refusal.error);
        assert_eq!(ids(&resolve(&status, "web-1", true).unwrap()), [11, 22]);
        assert_eq!(ids(&resolve(&status, "dns/web-1", false).unwrap()), [22]);
    }

    #[test]
    fn a_slip_is_answered_by_what_is_similar() {
        let status = fixture::status();
        let refusal = resolve(&status, "web/", true).unwrap_err();
        assert_eq!(ids(&refusal.candidates), [11, 12, 13, 22]);
        assert!(resolve(&status, "zzz", false).unwrap_err().candidates.is_empty());
    }

    #[test]
    fn services_are_found_by_name_address_and_vip() {
        let status = fixture::status();
        for text in ["web", "10.0.0.1:80/tcp", "10.0.0.1:80", "10.0.0.1"] {
            assert_eq!(services(&status, text), [1].into(), "{text}");
        }
        assert!(services(&status, "10.0.0.9").is_empty());
    }

    #[test]
    fn a_container_of_routes_alone_is_found() {
        let status = fixture::status();
        let host = &status.routes[0].route.host;
        let name = &status.routes[0].route.upstreams[0].name;
        for text in [name.clone(), format!("{host}/{name}")] {
            let found = resolve(&status, &text, false).unwrap();
            assert_eq!((found[0].id, &found[0].service), (None, host), "{text}");
        }
    }
}
