//! What a node publishes, as etcd's keys hold it: JSON of facts about itself and about its containers. Never wishes: the
//! balancers read the labels, by their own rules.
//!
//! Unknown fields are ignored, so that nodes may be newer than balancers. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::{
    config::value::{self, Listen},
    source::{
        docker::{
            container::{Container, Health, NetworkMode, Routing, RunState},
            signal,
        },
        labels::is_ours,
    },
};

/// Where the keys of nodes begin, below the prefix.
pub const NODES: &str = "nodes/";
/// The key, below a node's, of [`About`].
pub const ABOUT: &str = "node";
/// Where the keys of its containers begin, below a node's. They sort before [`ABOUT`].
pub const CONTAINERS: &str = "containers/";

/// What is said of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Where its published ports and its host-network containers are reached.
    pub addresses: Vec<IpAddr>,
    /// Version of Weir that publishes.
    #[serde(default)]
    pub version: String,
    /// Boot of the machine: two machines of one name differ in it.
    #[serde(default)]
    pub boot: String,
    /// How long the keys outlive whoever publishes them, seconds.
    #[serde(default)]
    pub ttl_s: u64,
    /// Why its engine is not heard at the moment; its containers are those that were known last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

/// What is said of a container; its key has the id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Name.
    pub name: String,
    /// When it was created, microseconds since 1970.
    pub created_us: u64,
    /// Labels that mean something to Weir.
    pub labels: BTreeMap<String, String>,
    /// What it does.
    pub state: State,
    /// What its HEALTHCHECK says, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Fitness>,
    /// How it is connected.
    pub network: Network,
    /// Addresses by network.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub networks: BTreeMap<String, Vec<IpAddr>>,
    /// Ports that it exposes: `80/tcp`.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub exposed: BTreeSet<String>,
    /// Where the node publishes them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub published: BTreeMap<String, Vec<SocketAddr>>,
}

/// What a container does. One that does not run is not published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Running.
    Running,
    /// Frozen.
    Paused,
    /// Running, and told to stop.
    Stopping,
}

/// Docker's judgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fitness {
    /// No check has passed yet.
    Starting,
    /// Fit.
    Healthy,
    /// Unfit.
    Unhealthy,
}

/// How a container is connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// The node's own network.
    Host,
    /// No network.
    None,
    /// Inside the network of the container with this id.
    Container(String),
    /// On networks; created with this one.
    Named(String),
}

/// A text that is no facts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FactsError {
    /// No JSON, or another one.
    #[error("cannot be read: {0}")]
    Json(String),
    /// Not `80/tcp`.
    #[error("`{0}` is no port and protocol")]
    Port(String),
}

// === impl Facts ===

impl Facts {
    /// Of a container; `None` if nobody needs to know it.
    pub fn of(container: &Container) -> Option<Self> {
        let labels: BTreeMap<String, String> = container
            .labels
            .iter()
            .filter(|(label, _)| is_ours([label.as_str()].into_iter()))
            .map(|(label, text)| (label.clone(), text.clone()))
            .collect();
        if labels.is_empty() {
            return None;
        }
        let port = |(port, protocol): &(u16, _)| format!("{port}/{protocol}");
        Some(Self {
            name: container.name.clone(),
            created_us: container
                .created
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |age| u64::try_from(age.as_micros()).unwrap_or(u64::MAX)),
            labels,
            state: match (container.state, container.stopping) {
                (RunState::Stopped, _) => return None,
                (_, true) => State::Stopping,
                (RunState::Paused, _) => State::Paused,
                (RunState::Running, _) => State::Running,
            },
            health: container.health.map(|health| match health {
                Health::Starting => Fitness::Starting,
                Health::Healthy => Fitness::Healthy,
                Health::Unhealthy => Fitness::Unhealthy,
            }),
            network: match &container.network_mode {
                NetworkMode::Host => Network::Host,
                NetworkMode::None => Network::None,
                NetworkMode::Container(id) => Network::Container(id.clone()),
                NetworkMode::Network(name) => Network::Named(name.clone()),
                // The managers of a swarm tell of its tasks, to the balancers themselves.
                NetworkMode::Task { .. } => return None,
            },
            networks: container.networks.clone(),
            exposed: container.exposed.iter().map(port).collect(),
            published: container
                .published
                .iter()
                .map(|(at, places)| (port(at), places.clone()))
                .collect(),
        })
    }

    /// Reads a key's text.
    ///
    /// # Errors
    /// It is not what a node writes.
    pub fn parse(text: &str) -> Result<Self, FactsError> {
        let facts: Self = serde_json::from_str(text).map_err(|error| FactsError::Json(error.to_string()))?;
        let wrong = facts.exposed.iter().chain(facts.published.keys());
        match wrong.into_iter().find(|text| port(text).is_none()) {
            Some(text) => Err(FactsError::Port(text.clone())),
            None => Ok(facts),
        }
    }

    /// The container as the code for labels knows it. A port that is published on an address which is none of the
    /// `node`'s is not published: a node speaks for itself alone.
    pub fn container(&self, id: &str, node: &[IpAddr]) -> Container {
        let created = SystemTime::UNIX_EPOCH
            .checked_add(Duration::from_micros(self.created_us))
            .unwrap_or(SystemTime::UNIX_EPOCH);
        let own = |place: &&SocketAddr| place.ip().is_unspecified() || node.contains(&place.ip());
        Container {
            id: id.to_owned(),
            name: self.name.clone(),
            created,
            started: created,
            labels: self.labels.clone(),
            state: match self.state {
                State::Running | State::Stopping => RunState::Running,
                State::Paused => RunState::Paused,
            },
            health: self.health.map(|health| match health {
                Fitness::Starting => Health::Starting,
                Fitness::Healthy => Health::Healthy,
                Fitness::Unhealthy => Health::Unhealthy,
            }),
            stop_signal: signal::TERM,
            stopping: self.state == State::Stopping,
            network_mode: match &self.network {
                Network::Host => NetworkMode::Host,
                Network::None => NetworkMode::None,
                Network::Container(id) => NetworkMode::Container(id.clone()),
                Network::Named(name) => NetworkMode::Network(name.clone()),
            },
            routing: Routing::default(),
            networks: self.networks.clone(),
            exposed: self.exposed.iter().filter_map(|text| port(text)).collect(),
            published: self
                .published
                .iter()
                .filter_map(|(text, places)| {
                    let places: Vec<_> = places.iter().filter(own).copied().collect();
                    Some((port(text)?, places)).filter(|(_, places)| !places.is_empty())
                })
                .collect(),
        }
    }
}

/// `80/tcp`.
fn port(text: &str) -> Option<(u16, crate::model::Protocol)> {
    let Listen { port, protocol } = value::listen(text).ok()?;
    (port != 0).then_some((port, protocol))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Protocol, source::labels::tests::container};

    #[test]
    fn a_container_comes_back_as_it_was_without_what_nobody_needs() {
        let mut original = container(&[
            ("weir.service.web.listen", "80/tcp"),
            ("interlock.hostname", "vote"),
            ("com.example.secret", "hush"),
        ]);
        original.health = Some(Health::Unhealthy);
        original.stopping = true;
        original.published = BTreeMap::from([(
            (8080, Protocol::Tcp),
            vec![
                "0.0.0.0:18080".parse().unwrap(),
                "10.9.9.9:18080".parse().unwrap(),
                "192.0.2.7:18080".parse().unwrap(),
            ],
        )]);
        let text = serde_json::to_string(&Facts::of(&original).unwrap()).unwrap();
        assert!(!text.contains("hush"), "{text}");
        let back = Facts::parse(&text)
            .unwrap()
            .container(&original.id, &["192.0.2.7".parse().unwrap()]);
        let mut want = original.clone();
        want.labels.remove("com.example.secret");
        want.started = want.created;
        // Of the node's addresses, or of all of them; not of somebody else's.
        want.published.get_mut(&(8080, Protocol::Tcp)).unwrap().remove(1);
        assert_eq!(back, want);
    }

    #[test]
    fn who_says_nothing_to_weir_or_does_not_run_is_not_published() {
        assert_eq!(Facts::of(&container(&[("com.example", "x")])), None);
        let mut stopped = container(&[("weir.service.web.listen", "80/tcp")]);
        stopped.state = RunState::Stopped;
        assert_eq!(Facts::of(&stopped), None);
    }

    #[test]
    fn texts_that_no_node_writes_are_refused() {
        let good = r#"{"name":"a","created_us":1,"labels":{},"state":"running","network":"host","exposed":["80/tcp"],"more":1}"#;
        assert!(Facts::parse(good).is_ok(), "a newer node says more");
        for (text, fault) in [
            ("", "cannot be read"),
            ("{}", "missing field"),
            (&good.replace("running", "flying"), "unknown variant"),
            (&good.replace("80/tcp", "eighty"), "`eighty` is no port"),
            (&good.replace("80/tcp", "*/tcp"), "`*/tcp` is no port"),
        ] {
            let error = Facts::parse(text).unwrap_err().to_string();
            assert!(error.contains(fault), "{text}: {error}");
        }
    }
}
