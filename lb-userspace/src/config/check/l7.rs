//! `[l7]`.

use std::{path::PathBuf, time::Duration};

use toml::Spanned;

use super::{
    super::{
        l7::{L7, L7Timeouts, MAX_CONNECTIONS, TlsVersion},
        raw::{Given, RawL7},
        value,
    },
    Check, sections,
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
    };
    L7 {
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
        min_tls,
        timeouts,
    }
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
