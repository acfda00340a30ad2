//! Whether XDP is worth its place on the interfaces: it forwards between clients and backends on other machines. Where all backends
//! are on this node it would parse each packet once more than TC, and take offloads from the whole machine.

use std::{collections::BTreeMap, net::IpAddr};

use super::attach::XdpChoice;

/// What the configuration says of backends on other machines. Containers that come and go change nothing here: attaching and
/// detaching resets the rings of real drivers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoteBackends {
    /// A part of the configuration that can bring some at any time.
    pub source: Option<String>,
    /// Backends of the file's services: address and the service's name. Those that are not on this node are remote.
    pub services: BTreeMap<IpAddr, String>,
}

/// How XDP is to be attached to the interfaces, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// How.
    pub choice: XdpChoice,
    /// Why, for people.
    pub why: String,
}

/// Decides. `is_remote` is asked of addresses of backends.
pub fn decide(choice: XdpChoice, remote: &RemoteBackends, is_remote: impl Fn(IpAddr) -> bool) -> Decision {
    let decision = |choice, why: String| Decision { choice, why };
    match choice {
        XdpChoice::Off => return decision(choice, "bpf.xdp = \"off\"".into()),
        XdpChoice::Native => return decision(choice, "bpf.xdp = \"native\"".into()),
        XdpChoice::Generic => return decision(choice, "bpf.xdp = \"generic\"".into()),
        XdpChoice::Auto => {}
    }
    if let Some(source) = &remote.source {
        return decision(choice, format!("{source} can bring remote backends"));
    }
    match remote.services.iter().find(|(address, _)| is_remote(**address)) {
        Some((address, service)) => decision(
            choice,
            format!("service {service} has the remote backend {address}"),
        ),
        None => decision(
            XdpChoice::Off,
            "no backend can be remote by the configuration".into(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xdp_is_for_remote_backends() {
        let services = RemoteBackends {
            source: None,
            services: [
                ("10.0.0.1".parse().unwrap(), "near".into()),
                ("10.0.0.2".parse().unwrap(), "far".into()),
            ]
            .into(),
        };
        let source = RemoteBackends {
            source: Some("[swarm]".into()),
            ..RemoteBackends::default()
        };
        let far = |ip: IpAddr| ip.to_string() == "10.0.0.2";
        let none = RemoteBackends::default();
        for (given, remote, choice, why) in [
            (XdpChoice::Auto, &none, XdpChoice::Off, "no backend can be remote"),
            (XdpChoice::Auto, &source, XdpChoice::Auto, "[swarm] can bring"),
            (
                XdpChoice::Auto,
                &services,
                XdpChoice::Auto,
                "service far has the remote backend 10.0.0.2",
            ),
            // Whoever names a mode gets it.
            (
                XdpChoice::Native,
                &none,
                XdpChoice::Native,
                "bpf.xdp = \"native\"",
            ),
            (XdpChoice::Generic, &none, XdpChoice::Generic, "generic"),
            (XdpChoice::Off, &source, XdpChoice::Off, "off"),
        ] {
            let decision = decide(given, remote, far);
            assert_eq!(decision.choice, choice, "{decision:?}");
            assert!(decision.why.contains(why), "{decision:?}");
        }
        let near = decide(XdpChoice::Auto, &services, |_| false);
        assert_eq!(near.choice, XdpChoice::Off);
    }
}
