//! The questions that Weir asks of a manager of a swarm.

use std::{collections::HashMap, time::Duration};

use bollard::{
    Docker,
    models::{EventMessage, Node, Service, Task},
    query_parameters::{
        EventsOptionsBuilder, ListNodesOptions, ListServicesOptions, ListTasksOptionsBuilder,
    },
};
use futures_util::{Stream, TryStreamExt as _};
use tokio::time::timeout;

use crate::{
    config::Endpoint,
    source::docker::engine::{EngineError, asking, dial},
};

/// Why a manager cannot be heard. Always a reason to ask another one, never one to forget a task.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// The engine, the way to it, or what it says: that it is no manager any more, that there is no leader.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The engine is well and no manager.
    #[error("it is not a manager of a swarm; name managers only, or promote it: `docker node promote`")]
    NotManager,
    /// A manager of something else. Its answers would take every backend away.
    #[error("it manages another swarm ({found}, not {known}); if the swarm was made anew, restart the agent")]
    AnotherSwarm { found: String, known: String },
    /// No answer in time.
    #[error("no answer within {} s", .0.as_secs_f32())]
    Silent(Duration),
}

/// All that Swarm says at one time.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Every service.
    pub services: Vec<Service>,
    /// Tasks that shall run. One that is told to stop is among them no more, long before its container ends.
    pub tasks: Vec<Task>,
    /// Every node.
    pub nodes: Vec<Node>,
}

/// A connected manager.
#[derive(Clone, Debug)]
pub struct Manager {
    docker: Docker,
    /// Longest wait for an answer.
    limit: Duration,
    /// Id of the swarm that it manages.
    pub swarm: String,
}

impl Manager {
    /// Connects and asks whether it is a manager; no answer takes longer than `limit`.
    pub async fn connect(endpoint: &Endpoint, limit: Duration) -> Result<Self, ManagerError> {
        let silent = |_| ManagerError::Silent(limit);
        let docker = timeout(limit, dial(endpoint)).await.map_err(silent)??;
        let info = timeout(limit, docker.info()).await.map_err(silent)?;
        let swarm = info.map_err(asking("info"))?.swarm.unwrap_or_default();
        let id = swarm.cluster.and_then(|cluster| cluster.id);
        match id.filter(|_| swarm.control_available == Some(true)) {
            Some(id) => Ok(Self {
                docker,
                limit,
                swarm: id,
            }),
            None => Err(ManagerError::NotManager),
        }
    }

    /// Events of services and nodes from now on. Of tasks there are none.
    pub fn events(&self) -> impl Stream<Item = Result<EventMessage, EngineError>> + use<> {
        let filters = HashMap::from([("type", vec!["service", "node"])]);
        let options = EventsOptionsBuilder::new().filters(&filters).build();
        self.docker.events(Some(options)).map_err(asking("events"))
    }

    /// Reads everything.
    pub async fn read(self) -> Result<Snapshot, ManagerError> {
        let shall_run = HashMap::from([("desired-state", vec!["running"])]);
        let options = ListTasksOptionsBuilder::new().filters(&shall_run).build();
        let questions = async {
            let (services, tasks, nodes) = tokio::join!(
                self.docker.list_services(None::<ListServicesOptions>),
                self.docker.list_tasks(Some(options)),
                self.docker.list_nodes(None::<ListNodesOptions>),
            );
            Ok(Snapshot {
                services: services.map_err(asking("services"))?,
                tasks: tasks.map_err(asking("tasks"))?,
                nodes: nodes.map_err(asking("nodes"))?,
            })
        };
        timeout(self.limit, questions)
            .await
            .unwrap_or(Err(ManagerError::Silent(self.limit)))
    }
}
