//! `[[services]]`: the same values as in labels, checked by the same functions.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use toml::Spanned;

use super::{
    super::{
        Policy, StaticService, health as value_health,
        raw::{Given, RawBackend, RawService},
        value,
    },
    Check, health, sections,
};
use crate::model::{
    Attachment, Backend, BackendState, Protocol, ServiceAddress, ServiceSettings, ServiceWish,
};

pub(super) fn services(
    check: &mut Check<'_>,
    given: &[Spanned<RawService>],
    policy: &Policy,
) -> Vec<StaticService> {
    let mut found: Vec<StaticService> = Vec::new();
    let mut owners: BTreeMap<ServiceAddress, String> = BTreeMap::new();
    for (index, raw) in given.iter().enumerate() {
        let Some(service) = service(check, &format!("services[{index}]"), raw, policy) else {
            continue;
        };
        let key = format!("services[{index}]");
        if found.iter().any(|other| other.name == service.name) {
            let fault = format!("`{}` is the name of another service already", service.name);
            check.fault(
                format!("{key}.name"),
                Some(raw.span()),
                fault,
                "give every service a name of its own",
            );
        }
        for wish in &service.wishes {
            if let Some(owner) = owners.insert(wish.address, service.name.clone()) {
                let fault = format!("{} is taken by service `{owner}`", wish.address);
                check.fault(
                    format!("{key}.listen"),
                    Some(raw.span()),
                    fault,
                    "choose another port or VIP",
                );
            }
        }
        found.push(service);
    }
    found
}

pub(super) fn service(
    check: &mut Check<'_>,
    key: &str,
    given: &Spanned<RawService>,
    policy: &Policy,
) -> Option<StaticService> {
    let raw = given.get_ref();
    let at = |name: &str| dotted(key, name);
    let name = match &raw.name {
        Some(name) => check.keep(&at("name"), name.span(), value::name(name.get_ref())),
        None => {
            check.missing(&at("name"), Some(given.span()), "write `name = \"web\"`");
            None
        }
    };
    if raw.listen.is_none() {
        check.missing(&at("listen"), Some(given.span()), "write `listen = [\"80/tcp\"]`");
    }
    let listens = check.list(&at("listen"), raw.listen.as_ref(), value::listen);
    let vips = vip(check, &at("vip"), given, policy);
    let settings = settings(check, key, raw, policy);
    let backends = backends(check, key, &raw.backends, policy);
    let backends = checked(check, &at("check"), given, backends, policy);

    let vips = vips?;
    let served: Vec<_> = vips
        .iter()
        .copied()
        .filter(|vip| backends.is_empty() || backends.iter().any(|b| b.address.is_ipv4() == vip.is_ipv4()))
        .collect();
    for backend in &backends {
        if !vips.iter().any(|vip| vip.is_ipv4() == backend.address.is_ipv4()) {
            let fault = format!(
                "no address of the VIP is of the family of backend {}",
                backend.address
            );
            let remedy = "give the VIP an address of that family, or remove the backend";
            check.fault(at("backends"), Some(given.span()), fault, remedy);
        }
    }
    let name = name?;
    // What all services get are checks by TCP: a service of UDP is checked so only where it says so itself.
    let named = raw.check.kind.is_some();
    let wishes = value::service_addresses(&served, &listens)
        .into_iter()
        .map(|address| ServiceWish {
            name: name.clone(),
            address,
            settings: settings.clone(),
            backends: backends
                .iter()
                .filter(|backend| backend.address.is_ipv4() == address.vip.is_ipv4())
                .map(|backend| Backend {
                    check: backend
                        .check
                        .clone()
                        .filter(|_| named || address.protocol == Protocol::Tcp),
                    ..backend.clone()
                })
                .collect(),
        })
        .collect();
    Some(StaticService { name, wishes })
}

/// The key of `name` within `key`, which is empty for a text that is one service.
fn dotted(key: &str, name: &str) -> String {
    if key.is_empty() {
        name.to_owned()
    } else {
        format!("{key}.{name}")
    }
}

/// The addresses of the VIP that is named, or of the only one there is.
fn vip(
    check: &mut Check<'_>,
    key: &str,
    given: &Spanned<RawService>,
    policy: &Policy,
) -> Option<Vec<std::net::IpAddr>> {
    let vip = given.get_ref().vip.as_ref();
    let span = vip.map_or(given.span(), Spanned::span);
    policy
        .choose_vip(vip.map(|text| text.get_ref().as_str()))
        .map_err(|error| check.fault(key, Some(span), &error, error.remedy("vip")))
        .ok()
}

fn settings(check: &mut Check<'_>, key: &str, raw: &RawService, policy: &Policy) -> ServiceSettings {
    let at = |name: &str| dotted(key, name);
    let base = policy.defaults.clone();
    // An empty list is the same as none: it is what remains when the last prefix is deleted.
    let given = |list: &Given<super::Strings>| list.as_ref().is_some_and(|list| !list.get_ref().0.is_empty());
    ServiceSettings {
        client_ip_affinity: check.text_or(
            &at("affinity"),
            &raw.affinity,
            base.client_ip_affinity,
            value::affinity,
        ),
        snat: check.text_or(&at("snat"), &raw.snat, base.snat, value::snat),
        allow: check.list(
            &at("allow"),
            raw.allow.as_ref().filter(|_| given(&raw.allow)),
            value::prefix,
        ),
        deny: check.list(
            &at("deny"),
            raw.deny.as_ref().filter(|_| given(&raw.deny)),
            value::prefix,
        ),
        timeouts: sections::timeouts(check, &at("timeouts"), &raw.timeouts, base.timeouts),
        when_empty: check.text_or(
            &at("when-empty"),
            &raw.when_empty,
            base.when_empty,
            value::when_empty,
        ),
        reset_unknown: raw
            .reset_unknown
            .as_ref()
            .map_or(base.reset_unknown, |flag| *flag.get_ref()),
        when_unhealthy: check.text_or(
            &at("when-unhealthy"),
            &raw.when_unhealthy,
            base.when_unhealthy,
            value_health::when_unhealthy,
        ),
        passive: {
            let passive = health::passive(check, &at("passive"), &raw.passive, &policy.checks.passive);
            let on = raw.passive.enabled.as_ref();
            on.map_or(base.passive.is_some(), |flag| *flag.get_ref())
                .then_some(passive)
        },
    }
}

/// The backends with the check of their service.
fn checked(
    check: &mut Check<'_>,
    key: &str,
    given: &Spanned<RawService>,
    backends: Vec<Backend>,
    policy: &Policy,
) -> Vec<Backend> {
    let raw = &given.get_ref().check;
    let made = health::active(check, key, raw, &policy.checks.check, &policy.checks.tls);
    let ports = backends.iter().map(|backend| backend.address.port());
    health::fits(check, key, raw, &made, ports, given.span());
    let made = (!made.kinds.is_empty()).then(|| Arc::new(made));
    let with = |backend| Backend {
        check: made.clone(),
        ..backend
    };
    backends.into_iter().map(with).collect()
}

fn backends(
    check: &mut Check<'_>,
    key: &str,
    given: &[Spanned<RawBackend>],
    policy: &Policy,
) -> Vec<Backend> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    for (index, backend) in given.iter().enumerate() {
        let raw = backend.get_ref();
        let at = |name: &str| format!("{}[{index}].{name}", dotted(key, "backends"));
        let drain = check.text_or(&at("drain"), &raw.drain, policy.drain, value::duration);
        let weight = match &raw.weight {
            Some(weight) => {
                let parsed = value::weight(&weight.get_ref().to_string());
                check
                    .keep(&at("weight"), weight.span(), parsed)
                    .unwrap_or(value::DEFAULT_WEIGHT)
            }
            None => value::DEFAULT_WEIGHT,
        };
        let Some(text) = &raw.address else {
            check.missing(
                &at("address"),
                Some(backend.span()),
                "write `address = \"10.0.0.5:8080\"`",
            );
            continue;
        };
        let address = match text.get_ref().parse::<SocketAddr>() {
            Ok(address) if value::is_unicast(address.ip()) => {
                SocketAddr::new(address.ip().to_canonical(), address.port())
            }
            _ => {
                let fault = format!("`{}` is not the address and port of a backend", text.get_ref());
                let remedy = "write `10.0.0.5:8080` or `[2001:db8::5]:8080`; port 0 keeps the client's port";
                check.fault(at("address"), Some(text.span()), fault, remedy);
                continue;
            }
        };
        if !seen.insert(address) {
            let fault = format!("{address} is a backend of this service already");
            check.fault(
                at("address"),
                Some(text.span()),
                fault,
                "remove one of them; a larger weight takes more flows",
            );
            continue;
        }
        found.push(Backend {
            address,
            weight,
            state: BackendState::Active,
            reason: String::new(),
            drain,
            name: raw
                .name
                .as_ref()
                .map_or_else(|| address.to_string(), |name| name.get_ref().clone()),
            check: None,
            attachment: Attachment::Address,
        });
    }
    found
}
