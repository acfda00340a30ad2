//! Options → lines of Weir's configuration.

use std::{net::IpAddr, time::Duration};

use toml::Value;

use super::{
    Fate, Remark, options,
    read::{Extension, Source, Written, look},
    render::Lines,
};
use crate::config::{l7::MAX_CONNECTIONS, value};

/// Interlock polls no more often than this.
const SHORTEST_POLL: Duration = Duration::from_secs(2);
/// What the options of a proxy are when nothing, or 0, is said.
const DEFAULT_CONNECTIONS: i64 = 1024;
const DEFAULT_PORT: i64 = 80;
const HAPROXY_CONNECT_MS: i64 = 5_000;
const HAPROXY_IDLE_MS: i64 = 10_000;
const NGINX_TIMEOUT_S: i64 = 600;

/// Every option that is applied as a line; what becomes of each goes to the remarks.
pub(super) fn apply(source: &Source, node_addresses: &[IpAddr], remarks: &mut Vec<Remark>) -> Lines {
    let mut lines = Lines::default();
    lines.set("", "interfaces", Value::from(vec!["auto"]));
    let proxy = source.extensions.iter().find(|extension| is_proxy(extension));
    let told = proxy.and_then(|proxy| string(&proxy.options, "BackendOverrideAddress"));
    let overridden: Option<IpAddr> = told.and_then(|text| text.parse().ok());
    docker(source, overridden, node_addresses, &mut lines, remarks);
    metrics(source, &mut lines, remarks);
    for written in &source.top {
        if !remarks.iter().any(|remark| remark.option == written.name) {
            remark(remarks, written, None);
        }
    }
    for extension in &source.extensions {
        match proxy {
            Some(first) if std::ptr::eq(first, extension) => {
                apply_proxy(extension, overridden, &mut lines, remarks)
            }
            _ => others(extension, proxy, remarks),
        }
    }
    if proxy.is_none() {
        look(
            remarks,
            "Extensions",
            "none of them is a proxy (haproxy, nginx), without which Interlock balances nothing: [l7] is left out",
        );
    }
    lines
}

fn is_proxy(extension: &Extension) -> bool {
    matches!(extension.name.as_str(), "haproxy" | "nginx")
}

fn get<'w>(options: &'w [Written], name: &str) -> Option<&'w Written> {
    options.iter().find(|written| written.option == name)
}

/// A text that says something.
fn string<'w>(options: &'w [Written], name: &str) -> Option<&'w str> {
    let text = get(options, name)?.value.as_str()?.trim();
    (!text.is_empty()).then_some(text)
}

/// A number that says something: 0 is what is not said.
fn number(options: &[Written], name: &str) -> Option<i64> {
    let value = &get(options, name)?.value;
    let number = value
        .as_integer()
        .or_else(|| value.as_str()?.trim().parse().ok())?;
    (number != 0).then_some(number)
}

/// Says what becomes of an option that is not applied.
fn remark(remarks: &mut Vec<Remark>, written: &Written, extension: Option<&str>) {
    let fate = match options::find(&written.name, extension.is_none()) {
        Some(option) => options::not_needed(option, extension),
        None => return,
    };
    remarks.push(Remark {
        option: written.name.clone(),
        fate,
    });
}

fn applied(remarks: &mut Vec<Remark>, written: &Written, to: String) {
    remarks.push(Remark {
        option: written.name.clone(),
        fate: Fate::Applied(to),
    });
}

/// `DockerURL`, the TLS files, `PollInterval`, and the address of published ports.
fn docker(
    source: &Source,
    overridden: Option<IpAddr>,
    node_addresses: &[IpAddr],
    lines: &mut Lines,
    remarks: &mut Vec<Remark>,
) {
    let top = &source.top;
    let host = match string(top, "DockerURL") {
        Some(url) => {
            let written = get(top, "DockerURL");
            let endpoint = lines.set("docker", "endpoint", Value::from(url));
            if let Some(written) = written {
                applied(remarks, written, endpoint);
                if url.contains('$') {
                    look(
                        remarks,
                        &written.name,
                        "a shell left a variable in it: write the host name itself",
                    );
                }
            }
            network_host(url)
        }
        None => None,
    };
    tls(source, host.is_some(), lines, remarks);
    if let Some(host) = host {
        let own = host.parse::<IpAddr>().ok();
        let known: Vec<IpAddr> = match (overridden, node_addresses, own) {
            (Some(address), ..) => vec![address],
            (None, [], Some(own)) => vec![own],
            (None, given, _) => given.to_vec(),
        };
        let texts: Vec<String> = known.iter().map(ToString::to_string).collect();
        if texts.is_empty() {
            lines.suggest("docker", "remote", Value::from(true));
            lines.suggest("docker", "node-address", Value::from(vec!["192.0.2.20"]));
            look(
                remarks,
                "DockerURL",
                &format!(
                    "containers of {host} are reached by the ports that they publish on their node, whose address no option says: \
                     import again with --node-address, or fill in docker.remote and docker.node-address"
                ),
            );
        } else {
            lines.set("docker", "remote", Value::from(true));
            lines.set("docker", "node-address", Value::from(texts));
        }
    } else if let Some(address) = overridden {
        lines.set("docker", "node-address", Value::from(vec![address.to_string()]));
    }
    if let (Some(text), Some(written)) = (string(top, "PollInterval"), get(top, "PollInterval")) {
        match value::duration(text) {
            Ok(interval) => {
                let interval = shown(interval.max(SHORTEST_POLL));
                let to = lines.set("docker", "resync", Value::from(interval));
                applied(
                    remarks,
                    written,
                    format!("{to}; events are followed besides, and tell sooner"),
                );
            }
            Err(error) => look(remarks, &written.name, &format!("{error}; {}", error.remedy())),
        }
    }
}

/// The host of an engine that is on another node.
fn network_host(url: &str) -> Option<&str> {
    let address = ["tcp://", "https://", "http://"]
        .iter()
        .find_map(|scheme| url.strip_prefix(scheme))?;
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_matches(['[', ']']);
    let local = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    (!local).then_some(host)
}

fn tls(source: &Source, network: bool, lines: &mut Lines, remarks: &mut Vec<Remark>) {
    let files = [
        ("TLSCACert", "tls-ca"),
        ("TLSCert", "tls-cert"),
        ("TLSKey", "tls-key"),
    ];
    let all = files
        .iter()
        .all(|(option, _)| string(&source.top, option).is_some());
    for (option, key) in files {
        let (Some(path), Some(written)) = (string(&source.top, option), get(&source.top, option)) else {
            continue;
        };
        if !network {
            remarks.push(Remark {
                option: written.name.clone(),
                fate: Fate::NotNeeded("the engine is reached on this node itself".into()),
            });
        } else if all {
            let to = lines.set("docker", key, Value::from(path));
            applied(
                remarks,
                written,
                format!("{to}; it was a path in Interlock's container: the file must be there for Weir too"),
            );
        } else {
            look(
                remarks,
                &written.name,
                "all of TLSCACert, TLSCert and TLSKey are needed: both sides prove who they are",
            );
        }
    }
}

/// `ListenAddr` and `EnableMetrics`: Interlock's own HTTP server had metrics alone.
fn metrics(source: &Source, lines: &mut Lines, remarks: &mut Vec<Remark>) {
    let enabled = get(&source.top, "EnableMetrics");
    let on = enabled.is_some_and(|written| written.value.as_bool() == Some(true));
    let listen = get(&source.top, "ListenAddr");
    match (on, string(&source.top, "ListenAddr"), listen) {
        (true, Some(address), Some(written)) => {
            let address = match address.strip_prefix(':') {
                Some(port) => format!("0.0.0.0:{port}"),
                None => address.to_owned(),
            };
            let to = lines.set("admin", "metrics", Value::from(address));
            lines.set("admin", "allow-remote", Value::from(true));
            applied(remarks, written, to);
        }
        (false, Some(_), Some(written)) => remarks.push(Remark {
            option: written.name.clone(),
            fate: Fate::NotNeeded(
                "nothing but metrics was served there, which were off; Weir's are on 127.0.0.1:9475".into(),
            ),
        }),
        _ => {}
    }
    if let Some(written) = enabled {
        match on {
            true => applied(remarks, written, "admin.metrics, which is always on".into()),
            false => remarks.push(Remark {
                option: written.name.clone(),
                fate: Fate::NotNeeded("metrics are made only when they are asked for".into()),
            }),
        }
    }
}

/// The first proxy: its options are those of the shim.
fn apply_proxy(
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
fn others(extension: &Extension, proxy: Option<&Extension>, remarks: &mut Vec<Remark>) {
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

/// A time as Weir's configuration has it.
fn shown(time: Duration) -> String {
    let ms = time.as_millis();
    match ms % 1000 {
        0 => format!("{}s", ms / 1000),
        _ => format!("{ms}ms"),
    }
}
