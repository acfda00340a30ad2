//! `[docker]` and `[[docker]]`.

use std::{
    net::IpAddr,
    ops::Range,
    path::{Path, PathBuf},
    time::Duration,
};

use toml::Spanned;

use super::{
    super::{
        Allowed, DEFAULT_DOCKER_ENDPOINT, DEFAULT_LIVENESS, DEFAULT_RESYNC, DockerConfig, Endpoint, Policy,
        raw::{Given, OneOrMany, RawDocker, Strings},
        value::{self, ValueError},
    },
    Check,
};

/// An engine that is listed or asked more often does nothing else.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);

/// All engines that are switched on.
pub(super) fn engines(
    check: &mut Check<'_>,
    raw: &OneOrMany<RawDocker>,
    policy: &Policy,
) -> Vec<DockerConfig> {
    each(
        check,
        "docker",
        raw,
        |raw| &raw.name,
        |check, at, raw, name| docker(check, at, raw, name, policy),
    )
}

/// The only one of a section, or each of several, which need names; `judge` is given what to call it in messages.
pub(super) fn each<'t, R, C>(
    check: &mut Check<'t>,
    section: &str,
    raw: &OneOrMany<R>,
    name_of: impl Fn(&R) -> &Given<String>,
    judge: impl Fn(&mut Check<'t>, &str, &R, Option<String>) -> Option<C>,
) -> Vec<C> {
    let key = format!("{section}.name");
    let named = match raw {
        OneOrMany::One(raw) => {
            let name = name_of(raw)
                .as_ref()
                .and_then(|name| check.keep(&key, name.span(), value::name(name.get_ref())));
            return judge(check, section, raw, name).into_iter().collect();
        }
        OneOrMany::Named(named) => named,
    };
    let mut all: Vec<C> = Vec::new();
    let mut names: Vec<String> = Vec::new();
    for spanned in named {
        let raw = spanned.get_ref();
        let Some(given) = name_of(raw) else {
            let remedy = format!("give each [[{section}]] a name of its own");
            check.missing(&key, Some(spanned.span()), &remedy);
            continue;
        };
        let name = check.keep(&key, given.span(), value::name(given.get_ref()));
        let Some(name) = name else { continue };
        if names.contains(&name) {
            let fault = format!("another [[{section}]] is named `{name}`");
            check.fault(key.as_str(), Some(given.span()), fault, "rename one of them");
            continue;
        }
        names.push(name.clone());
        let at = format!("{section}.{name}");
        all.extend(judge(check, &at, raw, Some(name)));
    }
    all
}

/// One engine; `at` is the section for messages.
fn docker(
    check: &mut Check<'_>,
    at: &str,
    raw: &RawDocker,
    name: Option<String>,
    policy: &Policy,
) -> Option<DockerConfig> {
    let key = |key: &str| format!("{at}.{key}");
    let text = raw.endpoint.as_ref();
    let endpoint = endpoint(
        check,
        &key("endpoint"),
        text.map_or(DEFAULT_DOCKER_ENDPOINT, |text| text.get_ref()),
        text.map(Spanned::span),
        [&raw.tls_ca, &raw.tls_cert, &raw.tls_key],
    );
    let remote = raw.remote.as_ref().is_some_and(|flag| *flag.get_ref());
    let node_addresses = check.list(&key("node-address"), raw.node_address.as_ref(), value::address);
    if let Some(flag) = raw
        .remote
        .as_ref()
        .filter(|_| remote && raw.node_address.is_none())
    {
        let remedy = "write the address at which published ports of that engine are reached";
        check.missing(&key("node-address"), Some(flag.span()), remedy);
    }
    let interval = value::duration_from(SHORTEST_INTERVAL);
    let docker = DockerConfig {
        name,
        endpoint,
        remote,
        node_addresses,
        resync: check.text_or(&key("resync"), &raw.resync, DEFAULT_RESYNC, &interval),
        liveness: check.text_or(&key("liveness"), &raw.liveness, DEFAULT_LIVENESS, &interval),
        keep: check.text_or(&key("keep"), &raw.keep, None, |text| interval(text).map(Some)),
        allow: allowed(
            check,
            at,
            [&raw.allow_vips, &raw.allow_ports, &raw.allow_services],
            policy,
        ),
    };
    let enabled = raw.enabled.as_ref().is_none_or(|flag| *flag.get_ref());
    enabled.then_some(docker)
}

/// What containers may claim, by the lists of VIPs, ports and services.
pub(super) fn allowed(
    check: &mut Check<'_>,
    at: &str,
    [vips, ports, services]: [&Given<Strings>; 3],
    policy: &Policy,
) -> Allowed {
    let vips = vips.as_ref().map(|list| {
        let mut addresses = Vec::new();
        for text in &list.get_ref().0 {
            match policy.choose_vip(Some(text)) {
                Ok(found) => addresses.extend(found),
                Err(error) => {
                    let remedy = error.remedy(&format!("{at}.allow-vips"));
                    check.fault(format!("{at}.allow-vips"), Some(list.span()), &error, remedy);
                }
            }
        }
        addresses
    });
    let ports = ports
        .as_ref()
        .map(|list| check.list(&format!("{at}.allow-ports"), Some(list), value::listen));
    let services = services
        .as_ref()
        .map(|list| check.list(&format!("{at}.allow-services"), Some(list), name_pattern));
    Allowed {
        vips,
        ports,
        services,
    }
}

/// A service name, or its beginning and `*`.
fn name_pattern(text: &str) -> Result<String, ValueError> {
    match text.strip_suffix('*') {
        Some("") => Ok(text.to_owned()),
        Some(beginning) => value::name(beginning).map(|_| text.to_owned()),
        None => value::name(text),
    }
}

/// Where an engine listens: `key` and `span` are for messages, `files` are CA, certificate and key.
pub(super) fn endpoint(
    check: &mut Check<'_>,
    key: &str,
    text: &str,
    span: Option<Range<usize>>,
    files: [&Given<String>; 3],
) -> Endpoint {
    let files = files.map(|given| given.as_ref().map(Spanned::get_ref));
    if let Some(path) = text.strip_prefix("unix://") {
        if !Path::new(path).is_absolute() {
            let fault = format!("`{text}` has no absolute path");
            check.fault(key, span, fault, format!("write `{DEFAULT_DOCKER_ENDPOINT}`"));
        } else if files.iter().any(Option::is_some) {
            check.fault(
                key,
                span,
                format!("`{text}`: tls files for a Unix socket"),
                "remove tls-ca, tls-cert and tls-key",
            );
        }
        return Endpoint::Unix(path.into());
    }
    let address = ["tcp://", "https://", "http://"]
        .iter()
        .find_map(|scheme| text.strip_prefix(scheme))
        .map(|rest| rest.trim_end_matches('/'))
        .filter(|rest| has_port(rest));
    let Some(address) = address else {
        let fault = format!("`{text}` is not an endpoint");
        check.fault(key, span, fault, "write `unix:///path` or `tcp://host:port`");
        return Endpoint::Unix(PathBuf::new());
    };
    let address = address.to_owned();
    match files {
        [Some(ca), Some(cert), Some(private)] if !text.starts_with("http://") => Endpoint::Tls {
            address,
            ca: ca.into(),
            cert: cert.into(),
            key: private.into(),
        },
        [None, None, None] if is_loopback(&address) && !text.starts_with("https://") => {
            Endpoint::Http(address)
        }
        _ => {
            check.fault(
                key,
                span,
                format!("`{text}`: an engine on the network must prove who it is, and so must we"),
                "use tcp:// and set all of tls-ca, tls-cert and tls-key",
            );
            Endpoint::Http(address)
        }
    }
}

pub(super) fn has_port(address: &str) -> bool {
    address
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && value::port(port).is_ok())
}

pub(super) fn is_loopback(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host == "localhost"
        || host
            .trim_matches(['[', ']'])
            .parse::<IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}
