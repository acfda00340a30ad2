//! The Swarm source: reads services, tasks and nodes from one manager, and from another when it cannot answer.
//!
//! Swarm tells events of services and nodes, none of tasks: those are read every `poll`, and at once when an event
//! comes. Every reading is a complete list. A task that is told to stop is out of the list before its container is
//! stopped, and drains. Loss of all managers, or of their leader, removes nothing.

mod manager;
mod ports;
mod tasks;

use std::{collections::BTreeMap, convert::Infallible, path::PathBuf, pin::pin, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, StreamExt as _};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    Message, Object, Update,
    docker::engine::EngineError,
    link::{self, Backoff, Gone, Kept, Link},
};
use crate::{
    config::{Config, Endpoint, SwarmConfig},
    slot::ready,
};
use manager::{Manager, ManagerError, Snapshot};
use ports::KnownPorts;

/// Longest wait between two rounds of tries: leaders are elected within seconds.
const LAST_BACKOFF: Duration = Duration::from_secs(5);

/// Shortest time between two lists, whatever events say: a deployment makes a hundred of them.
const SHORTEST_GAP: Duration = Duration::from_millis(100);

/// Starts a source for every swarm of `config`, and for those that come into it later. Each follows its own section: its
/// source ends when the section is switched off or gone. Ends with `stop`, or when the inbox is gone.
pub fn spawn(
    config: watch::Receiver<Arc<Config>>,
    inbox: mpsc::Sender<Message>,
    stop: CancellationToken,
) -> JoinHandle<()> {
    let names = |config: &Config| config.swarm.iter().map(SwarmConfig::source).collect();
    link::spawn_each(config.clone(), stop, names, move |name| {
        Source::new(name, config.clone(), inbox.clone()).run()
    })
}

/// Why a session ended.
enum End {
    /// The section of the configuration has changed.
    Changed,
    /// The manager cannot be heard.
    Lost(ManagerError),
    /// Nobody listens any more.
    Gone,
}

impl<E: Into<ManagerError>> From<E> for End {
    fn from(error: E) -> Self {
        Self::Lost(error.into())
    }
}

impl From<Gone> for End {
    fn from(Gone: Gone) -> Self {
        Self::Gone
    }
}

/// Hears one swarm.
struct Source {
    config: watch::Receiver<Arc<Config>>,
    link: Link,
    /// Id of the swarm that was heard first.
    swarm: Option<String>,
    /// What was read last.
    snapshot: Option<Snapshot>,
    ports: KnownPorts,
    /// Where they are kept: beside the agent's socket.
    ports_file: PathBuf,
    /// What the inbox has been told; `None` before the first list.
    sent: Option<BTreeMap<String, Object>>,
}

impl Source {
    fn new(name: String, config: watch::Receiver<Arc<Config>>, inbox: mpsc::Sender<Message>) -> Self {
        let file = format!("{}.json", name.replace(':', "-"));
        let ports_file = config.borrow().admin.socket.with_file_name(file);
        let ports = KnownPorts::recall(&ports_file).unwrap_or_else(|error| {
            tracing::warn!(source = name, file = %ports_file.display(), %error, "ports that Swarm has forgotten are not known");
            KnownPorts::default()
        });
        Self {
            config,
            link: Link::new(name, "the swarm", inbox),
            swarm: None,
            snapshot: None,
            ports,
            ports_file,
            sent: None,
        }
    }

    /// The swarm's section in a configuration.
    fn section(&self, config: &Config) -> Option<SwarmConfig> {
        let own = |swarm: &&SwarmConfig| swarm.source() == self.link.name();
        config.swarm.iter().find(own).cloned()
    }

    fn forget(&mut self) {
        (self.swarm, self.snapshot, self.sent) = (None, None, None);
    }

    async fn run(mut self) {
        // Ends when nobody listens any more.
        let Err(Gone) = self.hear().await;
    }

    async fn hear(&mut self) -> Result<Infallible, Gone> {
        let mut backoff = Backoff::new(LAST_BACKOFF);
        // Of each endpoint that has failed since all was well.
        let mut faults: BTreeMap<String, String> = BTreeMap::new();
        let mut turn = 0;
        loop {
            let config = self.config.borrow_and_update().clone();
            let Some(swarm) = self.section(&config) else {
                self.forget();
                self.link.end().await?;
                self.config.changed().await.map_err(|_| Gone)?;
                continue;
            };
            let Some(endpoint) = swarm.endpoints.get(turn % swarm.endpoints.len().max(1)) else {
                // Valid by construction: a section has endpoints.
                self.config.changed().await.map_err(|_| Gone)?;
                continue;
            };
            let begun = Instant::now();
            let end = self.session(config, &swarm, endpoint).await;
            if self.link.is_connected() && begun.elapsed() > swarm.poll {
                faults.clear();
                backoff.reset();
            }
            match end {
                Ok(never) => match never {},
                Err(End::Gone) => return Err(Gone),
                Err(End::Changed) => (faults, turn) = (BTreeMap::new(), 0),
                Err(End::Lost(error)) => {
                    faults.insert(endpoint.to_string(), error.to_string());
                    let all: Vec<String> = faults.iter().map(|(at, why)| format!("{at}: {why}")).collect();
                    self.link.lost(&all.join("; ")).await?;
                    turn += 1;
                    let left = match self.link.kept(swarm.keep).await? {
                        Kept::For(left) => left,
                        Kept::GivenUp => {
                            self.forget();
                            Duration::MAX
                        }
                    };
                    // The next one is asked at once, until all of them have failed.
                    if faults.len() >= swarm.endpoints.len() {
                        backoff.wait(left).await;
                    }
                }
            }
        }
    }

    /// Hears one manager for as long as it answers.
    async fn session(
        &mut self,
        mut config: Arc<Config>,
        swarm: &SwarmConfig,
        endpoint: &Endpoint,
    ) -> Result<Infallible, End> {
        let manager = Manager::connect(endpoint, swarm.liveness).await?;
        let known = self.swarm.get_or_insert_with(|| manager.swarm.clone());
        if *known != manager.swarm {
            return Err(End::Lost(ManagerError::AnotherSwarm {
                found: manager.swarm,
                known: known.clone(),
            }));
        }
        let mut events = pin!(manager.events());
        let mut reading = Some(manager.clone().read().boxed());
        let mut next = Instant::now();
        // An event has come since the reading under way began.
        let mut stale = false;
        loop {
            tokio::select! {
                biased;
                event = events.next() => {
                    event.ok_or(EngineError::Ended)??;
                    (stale, next) = (reading.is_some(), Instant::now());
                }
                snapshot = ready(&mut reading) => {
                    let mut snapshot = snapshot?;
                    self.remember(&mut snapshot);
                    self.snapshot = Some(snapshot);
                    self.tell(swarm, &config).await?;
                    self.link.listed(Some(endpoint.to_string())).await?;
                    let gap = if std::mem::take(&mut stale) { SHORTEST_GAP } else { swarm.poll };
                    next = Instant::now() + gap;
                }
                changed = self.config.changed() => {
                    changed.map_err(|_| Gone)?;
                    config = self.config.borrow_and_update().clone();
                    if self.section(&config).as_ref() != Some(swarm) {
                        return Err(End::Changed);
                    }
                    self.tell(swarm, &config).await?;
                }
                () = sleep_until(next), if reading.is_none() => {
                    reading = Some(manager.clone().read().boxed());
                }
            }
        }
    }

    /// Adds the ports that Swarm has forgotten.
    fn remember(&mut self, snapshot: &mut Snapshot) {
        if self.ports.complete(snapshot)
            && let Err(error) = self.ports.keep(&self.ports_file)
        {
            let source = self.link.name();
            tracing::warn!(source, file = %self.ports_file.display(), %error, "ports of tasks cannot be kept");
        }
    }

    /// Tells what has changed, or everything the first time.
    async fn tell(&mut self, swarm: &SwarmConfig, config: &Config) -> Result<(), Gone> {
        let Some(snapshot) = &self.snapshot else {
            return Ok(());
        };
        let now = tasks::objects(snapshot, self.link.name(), &swarm.allow, &config.policy);
        match &self.sent {
            None => {
                let all = now.values().cloned().collect();
                self.link.send(Update::Reset(all)).await?;
            }
            Some(before) => {
                for (id, object) in &now {
                    if before.get(id) != Some(object) {
                        self.link.send(Update::Put(object.clone())).await?;
                    }
                }
                for id in before.keys().filter(|id| !now.contains_key(*id)) {
                    self.link.send(Update::Remove(id.clone())).await?;
                }
            }
        }
        self.sent = Some(now);
        Ok(())
    }
}
