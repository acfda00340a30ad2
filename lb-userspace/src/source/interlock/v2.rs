//! `com.docker.lb.*`: the service labels of Interlock 2 and 3.

use std::collections::{BTreeMap, BTreeSet};

use super::{Parsed, Spec, fault::Fault, option::Lines, reader::Reader, value};
use crate::{
    config::value as common,
    route::{ANY_HOST, Balance, RouteSettings, RouteTls, WHOLE_HOST},
};

/// Every label begins with this.
pub const PREFIX: &str = "com.docker.lb.";
/// Every label.
pub const LABELS: &[&str] = &[
    "hosts",
    "port",
    "network",
    "service_cluster",
    "backend_mode",
    "context_root",
    "context_root_rewrite",
    "ssl_cert",
    "ssl_key",
    "ssl_passthrough",
    "ssl_only",
    "ssl_backend",
    "ssl_backend_tls_verify",
    "sticky_session_cookie",
    "ip_hash",
    "websocket_endpoints",
    "redirects",
    "default_backend",
];

/// What the labels say; `None` when there are none.
pub fn parse(labels: &BTreeMap<String, String>) -> Option<Parsed> {
    let mut read = Reader::new(labels, PREFIX);
    read.family().next()?;
    let mut lines = Lines::default();
    let hosts = hosts(&mut read);
    let path = read.value("context_root", WHOLE_HOST.into(), value::path);
    let upstream_tls = read.upstream_tls(&mut lines.remarks);
    let balance = match read.value("ip_hash", false, value::flag) {
        true => Balance::ClientIp,
        false => Balance::RoundRobin,
    };
    let redirects = read.value("redirects", Vec::new(), value::redirects);
    let settings = RouteSettings {
        rewrite: read.value("context_root_rewrite", false, value::flag),
        balance,
        sticky_cookie: read.value("sticky_session_cookie", None, value::cookie),
        tls: tls(&mut read),
        upstream_tls,
        websocket_endpoints: read.value("websocket_endpoints", BTreeSet::new(), paths),
        redirects: redirects.into_iter().collect(),
        cluster: read.text("service_cluster"),
    };
    let vip = read.value("backend_mode", false, |text| {
        common::one_of(text, &["task", "vip"], &[false, true])
    });
    if vip {
        lines.remarks.push(format!(
            "{PREFIX}backend_mode=vip is served as `task`: the containers are balanced themselves, not behind Docker's virtual address"
        ));
    }
    lines.remarks.extend(read.unknown_remarks(LABELS));
    let port = read.port();
    let check = lines.check(
        upstream_tls.map(|tls| tls.verify),
        hosts.first().map(String::as_str),
    );
    let mut hosts = hosts.into_iter();
    let spec = hosts.next().filter(|_| read.faults.is_empty()).map(|host| Spec {
        host,
        aliases: hosts.collect(),
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

/// The hosts in the order of the label; that of a default backend is every other one.
fn hosts(read: &mut Reader<'_>) -> Vec<String> {
    let default = read.value("default_backend", false, value::flag);
    let names = read.get("hosts").unwrap_or_default();
    let mut found: Vec<String> = Vec::new();
    for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        match value::host(name) {
            Ok(host) if found.contains(&host) => {}
            Ok(host) => found.push(host),
            Err(fault) => read.fault("hosts", fault),
        }
    }
    if default {
        found.push(ANY_HOST.into());
    }
    if found.is_empty() && read.faults.is_empty() {
        read.no_host("hosts", LABELS);
    }
    found
}

fn tls(read: &mut Reader<'_>) -> RouteTls {
    let only = read.value("ssl_only", false, value::flag);
    let certificate = read.value("ssl_cert", None, value::file);
    RouteTls {
        serve: only || certificate.is_some(),
        only,
        passthrough: read.value("ssl_passthrough", false, value::flag),
        certificate,
        key: read.value("ssl_key", None, value::file),
    }
}

/// A comma list of paths.
fn paths(text: &str) -> Result<BTreeSet<String>, Fault> {
    text.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .map(value::path)
        .collect()
}
