//! `interlock.*`: the container labels of Interlock 1, with the meaning that its code gives them.

use std::collections::{BTreeMap, BTreeSet};

use super::{Parsed, Spec, fault::Fault, option::Lines, reader::Reader, value};
use crate::{
    config::value as common,
    route::{Balance, RouteSettings, RouteTls, UpstreamTls, WHOLE_HOST},
};

/// Every label begins with this.
pub const PREFIX: &str = "interlock.";
/// Every label; `[.N]` may be written several times, each with an ending of its own.
pub const LABELS: &[&str] = &[
    "hostname",
    "domain",
    "alias_domain[.N]",
    "network",
    "port",
    "ssl",
    "ssl_only",
    "ssl_cert",
    "ssl_cert_key",
    "ssl_backend",
    "ssl_backend_tls_verify",
    "context_root",
    "context_root_rewrite",
    "websocket_endpoint[.N]",
    "health_check",
    "health_check_interval",
    "balance_algorithm",
    "backend_option[.N]",
    "ip_hash",
    "ext.name",
    "app",
];
/// Labels of Interlock's own containers: they are no upstreams.
const INTERNAL: &[&str] = &["ext.name", "app"];
/// Domain of a container that names none.
const DEFAULT_DOMAIN: &str = "local";

/// What the labels say; `None` when there are none, or only those of Interlock's own containers.
pub fn parse(labels: &BTreeMap<String, String>) -> Option<Parsed> {
    let mut read = Reader::new(labels, PREFIX);
    if read
        .family()
        .all(|(label, _)| INTERNAL.contains(&&label[PREFIX.len()..]))
    {
        return None;
    }
    let mut lines = Lines::default();
    let host = host(&mut read);
    let path = read.value("context_root", WHOLE_HOST.into(), value::path);
    let rewrite = read.value("context_root_rewrite", false, value::flag);
    let tls = RouteTls {
        serve: read.value("ssl", false, value::flag),
        only: read.value("ssl_only", false, value::flag),
        passthrough: false,
        certificate: read.value("ssl_cert", None, value::file),
        key: read.value("ssl_cert_key", None, value::file),
    };
    let upstream_tls = upstream_tls(&mut read, &mut lines);
    let ip_hash = read.value("ip_hash", false, value::flag);
    for (label, text) in read.numbered("backend_option") {
        if let Err(fault) = lines.option(text) {
            read.faults.push((label.to_owned(), fault));
        }
    }
    // Labels of their own say more than a line among the options.
    if let Some(text) = read.get("balance_algorithm")
        && let Err(fault) = lines.balance(text)
    {
        read.fault("balance_algorithm", fault);
    }
    if ip_hash {
        lines.balance = Some(Balance::ClientIp);
    }
    if let Some(text) = read.get("health_check")
        && let Err(fault) = lines.health_check(text)
    {
        read.fault("health_check", fault);
    }
    if read.get("health_check_interval").is_some() {
        let interval = read.value("health_check_interval", value::DEFAULT_INTERVAL, value::interval);
        lines.interval = Some(interval);
    }
    let port = read.value("port", None, |text| match text {
        "" => Ok(None),
        text => common::port(text).map(Some),
    });
    let network = read
        .get("network")
        .filter(|name| !name.is_empty())
        .map(Into::into);
    let websocket_endpoints = websockets(&mut read);
    for (label, name) in read.unknown(LABELS) {
        lines.remarks.push(match common::nearest(name, LABELS) {
            Some(near) => {
                format!("{label} is no label of Interlock and has no effect; did you mean {PREFIX}{near}?")
            }
            None => format!("{label} is no label of Interlock and has no effect"),
        });
    }
    // An alias is a route of its own: a bad one costs no other.
    let whole = read.faults.is_empty();
    let mut aliases = BTreeSet::new();
    for (label, text) in read.numbered("alias_domain") {
        match value::host(text) {
            Ok(alias) => _ = aliases.insert(alias),
            Err(fault) => read.faults.push((label.to_owned(), fault)),
        }
    }
    let check = lines.check(upstream_tls.map(|tls| tls.verify), host.as_deref());
    let spec = host.filter(|_| whole).map(|host| Spec {
        host,
        aliases,
        path,
        settings: RouteSettings {
            rewrite,
            balance: lines.balance.unwrap_or_default(),
            sticky_cookie: lines.sticky_cookie,
            tls: RouteTls {
                serve: tls.serve || tls.only,
                ..tls
            },
            upstream_tls,
            websocket_endpoints,
            ..RouteSettings::default()
        },
        check,
        port,
        network,
        remarks: lines.remarks,
    });
    Some(Parsed {
        prefix: PREFIX,
        spec,
        faults: read.faults,
    })
}

/// `hostname.domain`, unless one of them is empty or they are the same.
fn host(read: &mut Reader<'_>) -> Option<String> {
    let Some(hostname) = read.get("hostname") else {
        let instead_of = read
            .unknown(LABELS)
            .into_iter()
            .find(|(_, name)| common::nearest(name, LABELS) == Some("hostname"))
            .map(|(label, _)| label.to_owned());
        let label = format!("{PREFIX}hostname");
        read.fault("hostname", Fault::NoHost { label, instead_of });
        return None;
    };
    let domain = read.get("domain").unwrap_or(DEFAULT_DOMAIN);
    let (whole, label) = match (hostname, domain) {
        ("", domain) => (domain.to_owned(), "domain"),
        (hostname, "") => (hostname.to_owned(), "hostname"),
        (hostname, domain) if hostname == domain => (domain.to_owned(), "domain"),
        (hostname, domain) => {
            let label = if value::host(hostname).is_ok() {
                "domain"
            } else {
                "hostname"
            };
            (format!("{hostname}.{domain}"), label)
        }
    };
    value::host(&whole).map_err(|fault| read.fault(label, fault)).ok()
}

fn upstream_tls(read: &mut Reader<'_>, lines: &mut Lines) -> Option<UpstreamTls> {
    let on = read.value("ssl_backend", false, value::flag);
    let verify = read.value("ssl_backend_tls_verify", false, value::verify);
    if on && !verify {
        lines.remarks.push(format!(
            "the certificate of the upstream is not verified, which is Interlock's default; {PREFIX}ssl_backend_tls_verify=required verifies it"
        ));
    }
    on.then_some(UpstreamTls { verify })
}

fn websockets(read: &mut Reader<'_>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (label, text) in read.numbered("websocket_endpoint") {
        match value::path(text) {
            Ok(path) => _ = found.insert(path),
            Err(fault) => read.faults.push((label.to_owned(), fault)),
        }
    }
    found
}
