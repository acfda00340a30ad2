//! `[etcd]`.

use std::{path::PathBuf, time::Duration};

use toml::Spanned;

use super::{
    super::{
        DEFAULT_PREFIX, EtcdConfig, EtcdTls,
        raw::{Given, RawEtcd},
        shared::{DEFAULT_LIVENESS, DEFAULT_TIMEOUT},
        value::{self, ValueError},
    },
    Check, docker, sections,
};

/// A question that is given up sooner is asked again and again.
const SHORTEST_WAIT: Duration = Duration::from_millis(100);

pub(super) fn etcd(check: &mut Check<'_>, given: &Spanned<RawEtcd>) -> EtcdConfig {
    let raw = given.get_ref();
    if raw.endpoints.is_none() {
        let remedy = "write `endpoints = [\"https://10.0.0.1:2379\"]`";
        check.missing("etcd.endpoints", Some(given.span()), remedy);
    }
    let endpoints = check.list("etcd.endpoints", raw.endpoints.as_ref(), |text| {
        Ok::<_, ValueError>(text.trim_end_matches('/').to_owned())
    });
    let span = raw.endpoints.as_ref().map(Spanned::span);
    for endpoint in &endpoints {
        let plain = endpoint.strip_prefix("http://");
        let address = plain.or_else(|| endpoint.strip_prefix("https://"));
        let (fault, remedy) = match address {
            Some(address) if !docker::has_port(address) || address.contains(['/', '@', ' ']) => (
                "is not an endpoint",
                "write `https://host:port`; etcd's client port is 2379",
            ),
            None => ("is not an endpoint", "write `https://host:port`"),
            Some(address) if plain.is_some() && !docker::is_loopback(address) => (
                "would send every rule and password in the open",
                "write `https://` and set `ca`; `http://` is for loopback",
            ),
            Some(_) if plain.is_none() && raw.ca.is_none() => (
                "must prove who it is",
                "set `ca` to the certificate of the authority that signed its own",
            ),
            Some(_) => continue,
        };
        check.fault(
            "etcd.endpoints",
            span.clone(),
            format!("`{endpoint}` {fault}"),
            remedy,
        );
    }
    let ca = path(check, "etcd.ca", &raw.ca);
    let identity = pair(check, ("cert", &raw.cert), ("key", &raw.key));
    if let (None, Some(cert)) = (&raw.ca, &raw.cert) {
        check.missing(
            "etcd.ca",
            Some(cert.span()),
            "name the authority that signed the servers' certificates",
        );
    }
    let login = pair(check, ("user", &raw.user), ("password-file", &raw.password_file));
    let identity = identity.map(|(_, _)| {
        (
            path(check, "etcd.cert", &raw.cert).unwrap_or_default(),
            path(check, "etcd.key", &raw.key).unwrap_or_default(),
        )
    });
    let login = login.map(|(user, _)| {
        let file = path(check, "etcd.password-file", &raw.password_file);
        (user, file.unwrap_or_default())
    });
    let interval = value::duration_from(SHORTEST_WAIT);
    EtcdConfig {
        endpoints,
        tls: ca.map(|ca| EtcdTls { ca, identity }),
        login,
        prefix: prefix(check, &raw.prefix),
        timeout: check.text_or("etcd.timeout", &raw.timeout, DEFAULT_TIMEOUT, &interval),
        liveness: check.text_or("etcd.liveness", &raw.liveness, DEFAULT_LIVENESS, &interval),
        cache: path(check, "etcd.cache", &raw.cache),
    }
}

/// Two keys of which each means nothing without the other.
fn pair(
    check: &mut Check<'_>,
    (first, one): (&str, &Given<String>),
    (second, other): (&str, &Given<String>),
) -> Option<(String, String)> {
    match (one, other) {
        (Some(one), Some(other)) => Some((one.get_ref().clone(), other.get_ref().clone())),
        (Some(given), None) | (None, Some(given)) => {
            let missing = if one.is_some() { second } else { first };
            let remedy = format!("set both of `{first}` and `{second}`, or neither");
            check.missing(&format!("etcd.{missing}"), Some(given.span()), &remedy);
            None
        }
        (None, None) => None,
    }
}

fn path(check: &mut Check<'_>, key: &str, given: &Given<String>) -> Option<PathBuf> {
    let default = "/etc/weir/etcd/ca.pem";
    given.as_ref()?;
    Some(sections::absolute(check, key, given, default))
}

fn prefix(check: &mut Check<'_>, given: &Given<String>) -> String {
    let Some(text) = given else {
        return DEFAULT_PREFIX.into();
    };
    let prefix = text.get_ref();
    let parts = prefix.strip_prefix('/').map(|rest| rest.split('/'));
    let sound = |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_graphic());
    if !parts.is_some_and(|mut parts| parts.all(sound)) {
        let fault = format!("`{prefix}` is not a prefix of keys");
        check.fault(
            "etcd.prefix",
            Some(text.span()),
            fault,
            "write one like `/weir` or `/sites/north/weir`",
        );
    }
    prefix.clone()
}
