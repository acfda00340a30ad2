//! The questions that Weir asks of a Docker engine, each with a deadline.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use bollard::{
    API_DEFAULT_VERSION, Docker,
    errors::Error,
    models::EventMessage,
    query_parameters::{
        EventsOptionsBuilder, InspectContainerOptions, InspectNetworkOptions, ListContainersOptionsBuilder,
    },
};
use futures_util::{Stream, StreamExt as _, TryStreamExt as _, stream};

use super::{
    container::{Container, NoId},
    events::ACTIONS,
};
use crate::{
    causes::with_causes,
    config::Endpoint,
    pem::{self, PemError},
    source::labels::is_ours,
};

/// Longest wait for the answer to one question, seconds. A busy engine takes one; one that takes ten is as good as gone.
const REQUEST_TIMEOUT_S: u64 = 10;
/// Longest wait for the answer to a ping, which costs the engine nothing.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Inspections at a time while the complete list is read: enough to hide the latency, too few to be felt.
const CONCURRENT_INSPECTIONS: usize = 8;
/// Events this old are asked for again: a container that was told to stop before we listened is still stopping.
/// Docker keeps the last 256 events.
const LOOKBACK: Duration = Duration::from_secs(120);
/// `404`: the container is gone.
const NOT_FOUND: u16 = 404;

/// Why Docker cannot be heard. Always a reason to connect anew, never one to forget a container.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The engine, or the way to it.
    #[error("{question}: {}", with_causes(.source))]
    Docker { question: &'static str, source: Error },
    /// A certificate or key.
    #[error(transparent)]
    Tls(#[from] PemError),
    /// No answer to a ping.
    #[error("no sign of life within {} s", PING_TIMEOUT.as_secs())]
    Silent,
    /// The event stream ended.
    #[error("the event stream ended: the engine stopped or was restarted")]
    Ended,
    /// An answer that makes no sense.
    #[error(transparent)]
    NoId(#[from] NoId),
    /// The engine's clock cannot be read.
    #[error("the engine's time `{0}` cannot be read; is this endpoint really a Docker engine?")]
    Clock(String),
}

pub(in crate::source) fn asking(question: &'static str) -> impl Fn(Error) -> EngineError + Copy {
    move |source| EngineError::Docker { question, source }
}

impl EngineError {
    /// The engine is well but cannot answer this question: a container that is half removed, say.
    pub fn is_answer(&self) -> bool {
        matches!(
            self,
            Self::Docker {
                source: Error::DockerResponseServerError { .. },
                ..
            }
        )
    }
}

/// Connects and agrees on an API version.
pub(in crate::source) async fn dial(endpoint: &Endpoint) -> Result<Docker, EngineError> {
    let docker = match endpoint {
        Endpoint::Unix(path) => {
            Docker::connect_with_unix(&path.to_string_lossy(), REQUEST_TIMEOUT_S, API_DEFAULT_VERSION)
        }
        Endpoint::Http(address) => Docker::connect_with_http(
            &format!("tcp://{address}"),
            REQUEST_TIMEOUT_S,
            API_DEFAULT_VERSION,
        ),
        Endpoint::Tls {
            address,
            ca,
            cert,
            key,
        } => {
            // The library would go on without a file that it cannot use.
            pem::check(ca, Some((cert, key)))?;
            Docker::connect_with_ssl(
                &format!("tcp://{address}"),
                key,
                cert,
                ca,
                REQUEST_TIMEOUT_S,
                API_DEFAULT_VERSION,
            )
        }
    };
    let docker = docker.map_err(asking("connect"))?;
    docker.negotiate_version().await.map_err(asking("version"))
}

/// The complete list.
#[derive(Debug, Default)]
pub struct Listing {
    /// Every container with a label of ours that runs (or is paused).
    pub containers: Vec<Container>,
    /// Those of which the engine could say nothing: what was known of them stays.
    pub unclear: Vec<String>,
}

/// A connected engine.
#[derive(Clone, Debug)]
pub struct Engine {
    docker: Docker,
    /// Drivers of networks by id: they never change. `None`: the engine does not know the network any more.
    drivers: Arc<Mutex<HashMap<String, Option<String>>>>,
    /// The engine's clock at the time of connection.
    pub connected_at: SystemTime,
}

impl Engine {
    /// Connects, agrees on an API version and reads the engine's clock.
    pub async fn connect(endpoint: &Endpoint) -> Result<Self, EngineError> {
        let docker = dial(endpoint).await?;
        let info = docker.info().await.map_err(asking("info"))?;
        let text = info.system_time.unwrap_or_default();
        let time: jiff::Timestamp = text.parse().map_err(|_| EngineError::Clock(text))?;
        Ok(Self {
            docker,
            drivers: Arc::default(),
            connected_at: time.into(),
        })
    }

    /// Events from [`LOOKBACK`] before the connection on.
    pub fn events(&self) -> impl Stream<Item = Result<EventMessage, EngineError>> + use<> {
        let since = self
            .connected_at
            .checked_sub(LOOKBACK)
            .and_then(|since| since.duration_since(SystemTime::UNIX_EPOCH).ok())
            .unwrap_or_default();
        let filters = HashMap::from([
            ("type", vec!["container", "network"]),
            ("event", ACTIONS.to_vec()),
        ]);
        let options = EventsOptionsBuilder::new()
            .since(&since.as_secs().to_string())
            .filters(&filters)
            .build();
        self.docker.events(Some(options)).map_err(asking("events"))
    }

    /// The complete list.
    pub async fn list(self) -> Result<Listing, EngineError> {
        let options = ListContainersOptionsBuilder::new().all(false).build();
        let all = self
            .docker
            .list_containers(Some(options))
            .await
            .map_err(asking("list"))?;
        let ours = all.into_iter().filter_map(|summary| {
            let labels = summary.labels.as_ref()?;
            is_ours(labels.keys().map(String::as_str)).then_some(summary.id?)
        });
        let mut answers = stream::iter(ours.map(|id| {
            let engine = self.clone();
            async move { (engine.inspect(&id).await, id) }
        }))
        .buffer_unordered(CONCURRENT_INSPECTIONS);
        let mut listing = Listing::default();
        while let Some((answer, id)) = answers.next().await {
            match answer {
                Ok(container) => listing.containers.extend(container),
                Err(error) if error.is_answer() => {
                    tracing::warn!(container = id, %error, "what was known of it stays as it is");
                    listing.unclear.push(id);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(listing)
    }

    /// One container; `None` when there is none of this id.
    pub async fn inspect(&self, id: &str) -> Result<Option<Container>, EngineError> {
        match self
            .docker
            .inspect_container(id, None::<InspectContainerOptions>)
            .await
        {
            Ok(answer) => {
                let mut container: Container = answer.try_into()?;
                if is_ours(container.labels.keys().map(String::as_str)) {
                    for network in container.routing.networks.values_mut() {
                        network.driver = self.driver(&network.id).await?;
                    }
                }
                Ok(Some(container))
            }
            Err(Error::DockerResponseServerError {
                status_code: NOT_FOUND,
                ..
            }) => Ok(None),
            Err(error) => Err(asking("inspect")(error)),
        }
    }

    /// The driver of a network; `None` when the engine cannot tell.
    async fn driver(&self, network: &str) -> Result<Option<String>, EngineError> {
        let known = || self.drivers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(driver) = known().get(network) {
            return Ok(driver.clone());
        }
        // An attachment without a network: the container does not run yet.
        if network.is_empty() {
            return Ok(None);
        }
        let answer = self
            .docker
            .inspect_network(network, None::<InspectNetworkOptions>)
            .await;
        let driver = match answer.map_err(asking("network")) {
            Ok(answer) => answer.driver,
            Err(error) if error.is_answer() => None,
            Err(error) => return Err(error),
        };
        known().insert(network.to_owned(), driver.clone());
        Ok(driver)
    }

    /// Asks for a sign of life.
    pub async fn ping(self) -> Result<(), EngineError> {
        match tokio::time::timeout(PING_TIMEOUT, self.docker.ping()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(asking("ping")(error)),
            Err(_) => Err(EngineError::Silent),
        }
    }
}
