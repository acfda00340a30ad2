//! The options of the extensions: the first proxy's are those of the shim.

use std::{net::IpAddr, time::Duration};

use toml::Value;

use super::{applied, get, is_proxy, number, remark, shown, string};
use crate::{
    config::l7::MAX_CONNECTIONS,
    import::{
        Remark, options,
        read::{Extension, Written, look},
        render::Lines,
    },
};

/// What the options of a proxy are when nothing, or 0, is said.
const DEFAULT_CONNECTIONS: i64 = 1024;
const DEFAULT_PORT: i64 = 80;
const HAPROXY_CONNECT_MS: i64 = 5_000;
const HAPROXY_IDLE_MS: i64 = 10_000;
const NGINX_TIMEOUT_S: i64 = 600;

/// The first proxy: its options are those of the shim.
pub(super) fn first(
    extension: &Extension,
    overridden: Option<IpAddr>,
    lines: &mut Lines,
    remarks: &mut Vec<Remark>,
) {
    for written in &extension.options {
        match translated(written, extension) {
            Some(Ok((section, key, value))) => {
                let to = lines.set(section, key, value);
                applied(remarks, written, to);
            }
            Some(Err(what)) => look(remarks, &written.name, &what),
            None if written.option == "BackendOverrideAddress" && overridden.is_some() => {
                applied(remarks, written, "docker.node-address".into());
            }
            None if written.option == "BackendOverrideAddress"
                && string(&extension.options, written.option).is_some() =>
            {
                look(
                    remarks,
                    &written.name,
                    "it is no IP address: write the address in docker.node-address",
                );
            }
            None => remark(remarks, written, Some(&extension.name)),
        }
    }
    for (section, key, value) in defaults(extension) {
        if !lines.has(section, key) {
            lines.set(section, key, value);
        }
    }
}

type Translated = (&'static str, &'static str, Value);

/// The line of an option; `None`: it says nothing, or there is none.
fn translated(written: &Written, extension: &Extension) -> Option<Result<Translated, String>> {
    let read = options::find(&written.name, false)?;
    if !read.scope.is_read_by(&extension.name) {
        return None;
    }
    let options = &extension.options;
    let line = |section, key, value: Value| Some(Ok((section, key, value)));
    let time = |key, unit: fn(u64) -> Duration| match number(options, written.option) {
        Some(time) => match u64::try_from(time).ok().filter(|time| *time < 1 << 32) {
            Some(time) => line("l7.timeouts", key, Value::from(shown(unit(time)))),
            None => Some(Err(format!("{time} is no time"))),
        },
        None => None,
    };
    let whole = |key, most: i64| match number(options, written.option) {
        Some(number) if (1..=most).contains(&number) => line("l7", key, Value::from(number)),
        Some(number) => Some(Err(format!("{number} is out of range: write 1 to {most}"))),
        None => None,
    };
    let path = |key| match string(options, written.option) {
        Some(path) if path.starts_with('/') => line("l7", key, Value::from(path)),
        Some(path) => Some(Err(format!(
            "`{path}` is no absolute path: write one in l7.{key}"
        ))),
        None => None,
    };
    match written.option {
        "MaxConn" => whole("max-connections", MAX_CONNECTIONS.into()),
        "Port" => whole("http-port", u16::MAX.into()),
        "SSLPort" => whole("https-port", u16::MAX.into()),
        "SSLCertPath" => path("certificates"),
        "SSLCert" => path("default-certificate"),
        "ConnectTimeout" => time("connect", Duration::from_millis),
        "ServerTimeout" => time("server", Duration::from_millis),
        "ClientTimeout" => time("client", Duration::from_millis),
        "ProxyConnectTimeout" => time("connect", Duration::from_secs),
        "SendTimeout" => time("client", Duration::from_secs),
        // One silence of the upstream: the longer one, so that nothing is cut off that was not before.
        "ProxySendTimeout" | "ProxyReadTimeout" => {
            let of = |name| number(options, name).unwrap_or(NGINX_TIMEOUT_S);
            let longer = u64::try_from(of("ProxySendTimeout").max(of("ProxyReadTimeout"))).unwrap_or(0);
            time("server", Duration::from_secs).map(|line| {
                line.map(|(section, key, _)| (section, key, Value::from(shown(Duration::from_secs(longer)))))
            })
        }
        "SSLOpts" | "SSLProtocols" => {
            let text = string(options, written.option)?;
            let newest = match written.option {
                "SSLOpts" => text.contains("force-tlsv13") || text.contains("ssl-min-ver TLSv1.3"),
                _ => text.split_whitespace().all(|version| version == "TLSv1.3"),
            };
            let least = if newest { "1.3" } else { "1.2" };
            line("l7", "min-tls", Value::from(least))
        }
        _ => None,
    }
}

/// What Interlock does when an option is absent, where Weir would do something else.
fn defaults(extension: &Extension) -> Vec<Translated> {
    let (connect, idle) = match extension.name.as_str() {
        "nginx" => (
            Duration::from_secs(NGINX_TIMEOUT_S as u64),
            Duration::from_secs(NGINX_TIMEOUT_S as u64),
        ),
        _ => (
            Duration::from_millis(HAPROXY_CONNECT_MS as u64),
            Duration::from_millis(HAPROXY_IDLE_MS as u64),
        ),
    };
    vec![
        ("l7", "http-port", Value::from(DEFAULT_PORT)),
        ("l7", "https-port", Value::from(0)),
        ("l7", "max-connections", Value::from(DEFAULT_CONNECTIONS)),
        ("l7.timeouts", "connect", Value::from(shown(connect))),
        ("l7.timeouts", "client", Value::from(shown(idle))),
        ("l7.timeouts", "server", Value::from(shown(idle))),
    ]
}

/// An extension that is not the first proxy.
pub(super) fn others(extension: &Extension, proxy: Option<&Extension>, remarks: &mut Vec<Remark>) {
    if !is_proxy(extension) && extension.name != "beacon" {
        let what = "Interlock has no such extension: it counted for nothing";
        look(remarks, &format!("Extensions `{}`", extension.name), what);
        return;
    }
    for written in &extension.options {
        let first = proxy
            .and_then(|proxy| get(&proxy.options, written.option))
            .map(|first| &first.value);
        let counts = is_proxy(extension) && matches!(translated(written, extension), Some(Ok(_)));
        if counts && first != Some(&written.value) {
            look(
                remarks,
                &written.name,
                &format!(
                    "it is of a second proxy ({}), and a node has one shim: the first one's counts",
                    extension.name
                ),
            );
        } else {
            remark(remarks, written, Some(&extension.name));
        }
    }
}
