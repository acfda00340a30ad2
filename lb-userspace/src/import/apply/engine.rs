//! The options at the top: the engine, and Interlock's own HTTP server.

use std::{net::IpAddr, time::Duration};

use toml::Value;

use super::{applied, get, shown, string};
use crate::{
    config::value,
    import::{
        Fate, Remark,
        read::{Source, look},
        render::Lines,
    },
};

/// Interlock polls no more often than this.
const SHORTEST_POLL: Duration = Duration::from_secs(2);
/// `DockerURL`, the TLS files, `PollInterval`, and the address of published ports.
pub(super) fn docker(
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
pub(super) fn metrics(source: &Source, lines: &mut Lines, remarks: &mut Vec<Remark>) {
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
    if let Some(written) = enabled.filter(|written| written.value.is_bool()) {
        match on {
            true => applied(remarks, written, "admin.metrics, which is always on".into()),
            false => remarks.push(Remark {
                option: written.name.clone(),
                fate: Fate::NotNeeded("metrics are made only when they are asked for".into()),
            }),
        }
    }
}
