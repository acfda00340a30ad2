//! `[l7]`.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use toml::Spanned;

use super::{
    super::{
        health,
        l7::{AccessLog, L7, L7Timeouts, MAX_CONNECTIONS, TlsVersion},
        raw::{Given, RawL7},
        value::{self, ValueError},
    },
    Check, acme, sections,
};

/// A shorter timeout ends what is alive.
const SHORTEST_TIMEOUT: Duration = Duration::from_millis(100);

pub(super) fn l7(check: &mut Check<'_>, raw: &RawL7) -> L7 {
    let base = L7::default();
    let http_port = port(raw.http_port.as_ref(), base.http_port);
    let https_port = port(raw.https_port.as_ref(), base.https_port);
    if http_port.is_some() && http_port == https_port {
        let span = raw
            .https_port
            .as_ref()
            .or(raw.http_port.as_ref())
            .map(Spanned::span);
        let fault = "HTTP and HTTPS have the same port";
        check.fault(
            "l7.https-port",
            span,
            fault,
            "give them different ports; 0 is none",
        );
    }
    let max_connections = match &raw.max_connections {
        Some(given) if (1..=MAX_CONNECTIONS).contains(given.get_ref()) => *given.get_ref(),
        Some(given) => {
            let fault = format!("{} is out of range", given.get_ref());
            let remedy = format!("choose 1 to {MAX_CONNECTIONS}");
            check.fault("l7.max-connections", Some(given.span()), fault, remedy);
            base.max_connections
        }
        None => base.max_connections,
    };
    let min_tls = check.text_or("l7.min-tls", &raw.min_tls, base.min_tls, |text| {
        value::one_of(text, &["1.2", "1.3"], &[TlsVersion::Tls12, TlsVersion::Tls13])
    });
    let mut timeout = |name: &str, given: &Given<String>, base: Duration| {
        let key = format!("l7.timeouts.{name}");
        check.text_or(&key, given, base, value::duration_from(SHORTEST_TIMEOUT))
    };
    let timeouts = L7Timeouts {
        connect: timeout("connect", &raw.timeouts.connect, base.timeouts.connect),
        client: timeout("client", &raw.timeouts.client, base.timeouts.client),
        server: timeout("server", &raw.timeouts.server, base.timeouts.server),
        header: timeout("header", &raw.timeouts.header, base.timeouts.header),
        request: timeout("request", &raw.timeouts.request, base.timeouts.request),
        drain: timeout("drain", &raw.timeouts.drain, base.timeouts.drain),
    };
    let logs = [AccessLog::Off, AccessLog::Json, AccessLog::Combined];
    let access_log = check.text_or("l7.access-log", &raw.access_log, base.access_log, |text| {
        value::one_of(text, &["off", "json", "combined"], &logs)
    });
    let listen = check.list("l7.listen", raw.listen.as_ref(), ip);
    L7 {
        listen: if listen.is_empty() { base.listen } else { listen },
        max_body: raw.max_body.filter(|most| *most > 0),
        hsts_s: raw.hsts.unwrap_or(base.hsts_s),
        redirect_to_https: check.list("l7.redirect-to-https", raw.redirect_to_https.as_ref(), host),
        cluster: raw.cluster.clone(),
        send_proxy_protocol: raw.send_proxy_protocol.unwrap_or(base.send_proxy_protocol),
        proxy_protocol: check.list("l7.proxy-protocol", raw.proxy_protocol.as_ref(), value::prefix),
        trusted_proxies: check.list("l7.trusted-proxies", raw.trusted_proxies.as_ref(), value::prefix),
        access_log,
        status_page: status_page(check, &raw.status_page),
        metrics: metrics(check, &raw.metrics),
        http_port,
        https_port,
        max_connections,
        certificates: path(
            check,
            "l7.certificates",
            &raw.certificates,
            "/etc/weir/certificates",
        ),
        default_certificate: path(
            check,
            "l7.default-certificate",
            &raw.default_certificate,
            "/etc/weir/default.pem",
        ),
        acme: raw.acme.as_ref().map(|given| acme::acme(check, given)),
        min_tls,
        timeouts,
    }
}

/// An address to listen on, `::` and `0.0.0.0` too.
fn ip(text: &str) -> Result<IpAddr, ValueError> {
    match text.parse() {
        Ok(address) => Ok(address),
        // It says what is wrong with one that is none.
        Err(_) => value::address(text),
    }
}

/// A host as routes have it: a name or an address without a port, `*.` and a name, or `*`.
fn host(text: &str) -> Result<String, ValueError> {
    let name = text.strip_prefix("*.").unwrap_or(text);
    if text != "*" {
        health::server_name(name)?;
    }
    Ok(text.to_lowercase())
}

fn status_page(check: &mut Check<'_>, given: &Given<String>) -> Option<String> {
    let text = given.as_ref()?;
    if let Some((host, _path)) = text.get_ref().split_once('/')
        && !host.is_empty()
    {
        return Some(text.get_ref().to_lowercase());
    }
    let fault = format!("`{}` is no host and path", text.get_ref());
    let remedy = "write `status.example.com/weir`, or `*/weir` for every host";
    check.fault("l7.status-page", Some(text.span()), fault, remedy);
    None
}

/// As of the agent, metrics are for the node itself: they name every route.
fn metrics(check: &mut Check<'_>, given: &Given<String>) -> Option<SocketAddr> {
    let text = given.as_ref()?;
    match text.get_ref().parse::<SocketAddr>() {
        Ok(address) if address.ip().is_loopback() => return Some(address),
        Ok(address) => {
            let fault = format!("{address} is not a loopback address, and metrics name every route");
            let remedy = "use 127.0.0.1 or [::1]";
            check.fault("l7.metrics", Some(text.span()), fault, remedy);
        }
        Err(_) => {
            let fault = format!("`{}` is not an address and port", text.get_ref());
            check.fault("l7.metrics", Some(text.span()), fault, "write `127.0.0.1:9642`");
        }
    }
    None
}

/// A port; 0 is none.
fn port(given: Option<&Spanned<u16>>, base: Option<u16>) -> Option<u16> {
    match given {
        Some(port) => Some(*port.get_ref()).filter(|port| *port != 0),
        None => base,
    }
}

fn path(check: &mut Check<'_>, key: &str, given: &Given<String>, example: &str) -> Option<PathBuf> {
    given.as_ref()?;
    Some(sections::absolute(check, key, given, example))
}
