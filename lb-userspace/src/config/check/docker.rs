//! `[docker]`.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use toml::Spanned;

use super::{
    super::{
        DEFAULT_DOCKER_ENDPOINT, DEFAULT_LIVENESS, DEFAULT_RESYNC, DockerConfig, Endpoint, raw::RawDocker,
        value,
    },
    Check,
};

/// An engine that is listed or asked more often does nothing else.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);

pub(super) fn docker(check: &mut Check<'_>, raw: &RawDocker) -> Option<DockerConfig> {
    let endpoint = endpoint(check, raw);
    let remote = raw.remote.as_ref().is_some_and(|flag| *flag.get_ref());
    let node_addresses = check.list("docker.node-address", raw.node_address.as_ref(), value::address);
    if let Some(flag) = raw
        .remote
        .as_ref()
        .filter(|_| remote && raw.node_address.is_none())
    {
        let remedy = "write the address at which published ports of that engine are reached";
        check.missing("docker.node-address", Some(flag.span()), remedy);
    }
    let interval = value::duration_from(SHORTEST_INTERVAL);
    let docker = DockerConfig {
        endpoint,
        remote,
        node_addresses,
        resync: check.text_or("docker.resync", &raw.resync, DEFAULT_RESYNC, &interval),
        liveness: check.text_or("docker.liveness", &raw.liveness, DEFAULT_LIVENESS, &interval),
    };
    let enabled = raw.enabled.as_ref().is_none_or(|flag| *flag.get_ref());
    enabled.then_some(docker)
}

fn endpoint(check: &mut Check<'_>, raw: &RawDocker) -> Endpoint {
    let key = "docker.endpoint";
    let span = raw.endpoint.as_ref().map(Spanned::span);
    let text = raw
        .endpoint
        .as_ref()
        .map_or(DEFAULT_DOCKER_ENDPOINT, |text| text.get_ref());
    let files = [&raw.tls_ca, &raw.tls_cert, &raw.tls_key].map(|given| given.as_ref().map(Spanned::get_ref));
    if let Some(path) = text.strip_prefix("unix://") {
        if !Path::new(path).is_absolute() {
            let fault = format!("`{text}` has no absolute path");
            check.fault(key, span, fault, format!("write `{DEFAULT_DOCKER_ENDPOINT}`"));
        } else if files.iter().any(Option::is_some) {
            check.fault(
                "docker",
                span,
                "tls files for a Unix socket",
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
                "an engine on the network must prove who it is, and so must we",
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
