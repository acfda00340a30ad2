//! Why labels are refused, and what to do about it.

use std::net::IpAddr;

use crate::{
    config::{
        VipError,
        health::CheckError,
        value::{self, Listen, ValueError},
    },
    model::ServiceAddress,
    source::docker::container::Elsewhere,
};

/// Why a service is refused. `Display` is the fault, [`Refusal::remedy`] what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("{0}")]
    Value(#[from] ValueError),
    #[error("{0}")]
    Vip(#[from] VipError),
    #[error("{0}")]
    Check(#[from] CheckError),
    #[error("there is no label `{prefix}{text}`")]
    Unknown {
        prefix: String,
        text: String,
        known: &'static [&'static str],
    },
    #[error("the service does not say where it listens")]
    NoListen,
    #[error("the container port is not clear: {}", if .exposed.is_empty() { "the container exposes none" } else { "it exposes several" })]
    Port { exposed: Vec<Listen> },
    #[error("`{0}` listens on every port, but only single ports are published by a remote engine")]
    EveryPortRemote(Listen),
    #[error("port {0} is not published, and the engine is on another node")]
    Unpublished(Listen),
    #[error(
        "port {port} is {}",
        match .elsewhere {
            None => "not published on the nodes",
            Some(Elsewhere::Mesh) => "published in Swarm's ingress mesh, not on the nodes",
            Some(Elsewhere::Untold) => "published on the nodes, but Swarm does not tell at which port",
        }
    )]
    NotOnNode {
        port: Listen,
        elsewhere: Option<Elsewhere>,
    },
    #[error("the container is on several networks ({})", .0.join(", "))]
    NetworkChoice(Vec<String>),
    #[error("the container is not on network `{network}`")]
    NoNetwork { network: String, known: Vec<String> },
    #[error("network `{network}` is an overlay network, which is not entered")]
    Overlay { network: String, bridges: Vec<String> },
    #[error(
        "network `{0}` gives the container no gateway, and `snat` is never: its replies would not come back"
    )]
    NoGateway(String),
    #[error("the container shares the network of container {0}")]
    SharedNetwork(String),
    #[error("the container has no network")]
    NoAddress,
    #[error("the address of the engine's node is not known")]
    NoNodeAddress,
    #[error("no address of the VIP is of a family that the container has ({})", list(.0))]
    Family(Vec<IpAddr>),
    #[error("containers of engine `{engine}` may not claim {what}")]
    NotAllowed { what: String, engine: String },
    #[error("{address} is claimed by service `{other}` of the same container")]
    Twice { address: ServiceAddress, other: String },
}

impl Refusal {
    /// The setting that the remedy begins with, of a refusal of the way to a container.
    pub fn setting(&self) -> &'static str {
        match self {
            Self::NoGateway(_) => "snat",
            _ => "network",
        }
    }

    /// What to do; `prefix` is what the labels of this service or route begin with.
    pub fn remedy(&self, prefix: &str) -> String {
        match self {
            Self::Value(error) => error.remedy(),
            Self::Vip(error) => error.remedy(&format!("{prefix}vip")),
            Self::Check(error) => error.remedy(&format!("{prefix}check"), &format!("{prefix}check-port")),
            Self::Unknown {
                prefix: family,
                text,
                known,
            } => match value::nearest(text, known) {
                Some(word) => format!("did you mean `{family}{word}`?"),
                None => format!("known after `{family}`: {}", known.join(", ")),
            },
            Self::NoListen => format!("add the label {prefix}listen=80/tcp"),
            Self::Port { exposed } if exposed.is_empty() => {
                format!("set {prefix}port to the port that the container listens on")
            }
            Self::Port { exposed } => {
                format!("set {prefix}port to one of: {}", list(exposed))
            }
            Self::EveryPortRemote(_) => "name the ports, or run an agent on the container's node".into(),
            Self::Unpublished(_) => "publish it, or run an agent on the container's node".into(),
            Self::NotOnNode {
                elsewhere: Some(Elsewhere::Untold),
                ..
            } => {
                "name the port (`published=`), or have new tasks made: `docker service update --force`".into()
            }
            Self::NotOnNode { port, .. } => format!(
                "publish it in mode host: `--publish mode=host,target={},protocol={}`, or `mode: host` in a stack file",
                port.port, port.protocol
            ),
            Self::NetworkChoice(known) => {
                format!("set {prefix}network to one of: {}", known.join(", "))
            }
            Self::NoNetwork { known, .. } if known.is_empty() => "connect the container to it".into(),
            Self::NoNetwork { known, .. } => format!("name one of: {}", known.join(", ")),
            Self::Overlay { bridges, .. } if bridges.is_empty() => {
                "connect the container to a bridge network as well, and name that one".into()
            }
            Self::Overlay { bridges, .. } => {
                format!("set {prefix}network to one of: {}", bridges.join(", "))
            }
            Self::NoGateway(_) => format!(
                "set {prefix}snat to auto, or connect the container to a network that is not internal"
            ),
            Self::SharedNetwork(_) => "put the labels on that container".into(),
            Self::NoAddress => "connect the container to a network".into(),
            Self::NoNodeAddress => "set docker.node-address in the agent's configuration".into(),
            Self::Family(_) => {
                "give the VIP or the container's network an address of the other family".into()
            }
            Self::NotAllowed { .. } => {
                "change the label, or the engine's allow-services, allow-vips or allow-ports in the \
                                        agent's configuration"
                    .into()
            }
            Self::Twice { .. } => "choose another port or VIP for one of them".into(),
        }
    }
}

fn list(items: &[impl ToString]) -> String {
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}
