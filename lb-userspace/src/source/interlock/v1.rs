//! `interlock.*`: the container labels of Interlock 1, with the meaning that its code gives them.

use std::collections::{BTreeMap, BTreeSet};

use super::{Parsed, Spec, fault::Fault, option::Lines, reader::Reader, value};
use crate::route::{Balance, RouteSettings, RouteTls, WHOLE_HOST};

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
/// Domain of a container that names none.
const DEFAULT_DOMAIN: &str = "local";

/// What the labels say; `None` when there are none, or only those of Interlock's own containers.
pub fn parse(labels: &BTreeMap<String, String>) -> Option<Parsed> {
    let mut read = Reader::new(labels, PREFIX);
    if read.family().all(|(label, _)| is_internal(label)) {
        return None;
    }
    let host = host(&mut read);
    let path = read.value("context_root", WHOLE_HOST.into(), value::path);
    let mut lines = lines(&mut read);
    let upstream_tls = read.upstream_tls(&mut lines.remarks);
    lines.remarks.extend(read.unknown_remarks(LABELS));
    let check = lines.check(upstream_tls.map(|tls| tls.verify), host.as_deref());
    let settings = RouteSettings {
        rewrite: read.value("context_root_rewrite", false, value::flag),
        balance: lines.balance.unwrap_or_default(),
        sticky_cookie: lines.sticky_cookie,
        tls: tls(&mut read),
        upstream_tls,
        websocket_endpoints: each(&mut read, "websocket_endpoint", value::path),
        ..RouteSettings::default()
    };
    let port = read.port();
    // An alias is a route of its own: a bad one costs no other.
    let whole = read.faults.is_empty();
    let aliases = each(&mut read, "alias_domain", value::host);
    let spec = host.filter(|_| whole).map(|host| Spec {
        host,
        aliases,
        path,
        settings,
        check,
        port,
        network: read.text("network"),
        remarks: lines.remarks,
    });
    Some(Parsed {
        prefix: PREFIX,
        spec,
        faults: read.faults,
    })
}

/// Whether a label marks the containers of Interlock itself, which are no upstreams.
fn is_internal(label: &str) -> bool {
    label
        .strip_prefix(PREFIX)
        .is_some_and(|name| name == "app" || name.starts_with("ext."))
}

/// `hostname.domain`, unless one of them is empty or they are the same.
fn host(read: &mut Reader<'_>) -> Option<String> {
    let Some(hostname) = read.get("hostname") else {
        read.no_host("hostname", LABELS);
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

fn tls(read: &mut Reader<'_>) -> RouteTls {
    let only = read.value("ssl_only", false, value::flag);
    RouteTls {
        serve: read.value("ssl", false, value::flag) || only,
        only,
        passthrough: false,
        certificate: read.value("ssl_cert", None, value::file),
        key: read.value("ssl_cert_key", None, value::file),
    }
}

/// Everything that is a line of HAProxy's or nginx' configuration.
fn lines(read: &mut Reader<'_>) -> Lines {
    let mut lines = Lines::default();
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
    if read.value("ip_hash", false, value::flag) {
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
    lines
}

/// The good values of a label that may be written several times.
fn each(read: &mut Reader<'_>, name: &str, parse: fn(&str) -> Result<String, Fault>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (label, text) in read.numbered(name) {
        match parse(text) {
            Ok(value) => _ = found.insert(value),
            Err(fault) => read.faults.push((label.to_owned(), fault)),
        }
    }
    found
}
