//! The Docker source: connects, lists, follows events, and says what containers wish.
//!
//! Events are subscribed to before the list is read, so that nothing falls between. Loss of Docker removes nothing.
//! A connection ends at the latest after `resync`, and the next one begins with a complete list: an event that was
//! missed and a stream that died unnoticed are both repaired by then.

pub mod container;
mod engine;
mod events;
mod outlet;
pub(crate) mod signal;
mod site;

use std::{
    collections::BTreeSet,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    sync::{mpsc, watch},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{Freshness, Message, SourceId};
use crate::config::{Config, DockerConfig};
use container::Container;
use engine::{Engine, EngineError};
use events::{Action, Cache, Event, Kind};
pub use outlet::Heard;
use outlet::{Gone, Outlet};

/// First wait after a failure: an engine that restarts is back within a second.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
/// Longest wait between two tries.
const LAST_BACKOFF: Duration = Duration::from_secs(15);
/// Facts that may wait for a reader that is busy.
const WAITING: usize = 256;
/// Within this time from the connection an engine has repeated the old events that it was asked for.
const REPLAY: Duration = Duration::from_secs(5);
/// Signs of life are passed on no more often than this.
const FRESHNESS_INTERVAL: Duration = Duration::from_secs(1);

/// Starts a source for every engine of `config`, and for those that come into it later. Each follows its own engine's
/// section: other VIPs or defaults are applied to the containers that are known, another endpoint is connected to, and
/// the source of an engine that is switched off or gone says that it has nothing. Ends with `stop`, or when the inbox is
/// gone.
pub fn spawn(
    mut config: watch::Receiver<Arc<Config>>,
    inbox: mpsc::Sender<Message>,
    stop: CancellationToken,
) -> JoinHandle<()> {
    let engines = async move {
        let mut known = BTreeSet::new();
        let mut sources = JoinSet::new();
        loop {
            let now = config.borrow_and_update().clone();
            for engine in &now.docker {
                if known.insert(engine.source()) {
                    let to = Outlet::Wishes {
                        inbox: inbox.clone(),
                        view: None,
                    };
                    sources.spawn(Source::new(engine.source(), config.clone(), to).run());
                }
            }
            if config.changed().await.is_err() {
                while sources.join_next().await.is_some() {}
                return;
            }
        }
    };
    tokio::spawn(async move {
        stop.run_until_cancelled(engines).await;
    })
}

/// Hears the engine of this source and says what its containers are. Ends when the receiver is dropped.
pub fn facts(source: String, config: watch::Receiver<Arc<Config>>) -> mpsc::Receiver<Heard> {
    let (to, receiver) = mpsc::channel(WAITING);
    let gone = to.clone();
    let source = Source::new(source, config, Outlet::Facts(to));
    tokio::spawn(async move {
        tokio::select! {
            () = gone.closed() => {}
            () = source.run() => {}
        }
    });
    receiver
}

/// Why a connection ended.
enum End {
    /// It is time for a new one.
    Renew,
    /// Docker cannot be heard.
    Lost(EngineError),
    /// Nobody listens any more.
    Gone,
}

impl From<EngineError> for End {
    fn from(error: EngineError) -> Self {
        Self::Lost(error)
    }
}

impl From<Gone> for End {
    fn from(Gone: Gone) -> Self {
        Self::Gone
    }
}

/// Hears one engine.
struct Source {
    /// Its name.
    name: SourceId,
    config: watch::Receiver<Arc<Config>>,
    to: Outlet,
    cache: Cache,
    freshness: Freshness,
    /// Since when the engine is not heard.
    silent_since: Option<Instant>,
    /// Its containers have been given up: it was not heard for longer than they are kept.
    given_up: bool,
}

/// An answered inspection: container, ticket, answer.
type Inspected = (String, u64, Result<Option<Container>, EngineError>);

impl Source {
    fn new(name: String, config: watch::Receiver<Arc<Config>>, to: Outlet) -> Self {
        Self {
            name: SourceId(name),
            config,
            to,
            cache: Cache::default(),
            freshness: Freshness {
                connected: false,
                last_heard: None,
                last_full_read: None,
                fault: None,
            },
            silent_since: None,
            given_up: false,
        }
    }

    /// The engine's section in a configuration.
    fn section(&self, config: &Config) -> Option<DockerConfig> {
        let own = |engine: &&DockerConfig| engine.source() == self.name.0;
        config.docker.iter().find(own).cloned()
    }

    async fn run(mut self) {
        let mut backoff = FIRST_BACKOFF;
        loop {
            let config = self.config.borrow_and_update().clone();
            let Some(docker) = self.section(&config) else {
                self.cache = Cache::default();
                let silent = self.send(Heard::List(Vec::new())).await.is_err();
                if silent || self.config.changed().await.is_err() {
                    return;
                }
                continue;
            };
            let listed_before = self.freshness.last_full_read;
            match self.session(config, &docker).await {
                End::Renew => backoff = FIRST_BACKOFF,
                End::Gone => return,
                End::Lost(error) => {
                    if self.freshness.last_full_read != listed_before {
                        backoff = FIRST_BACKOFF;
                    }
                    let fault = Some(error.to_string());
                    // Once for each reason, not once for each try.
                    if self.freshness.fault != fault {
                        let source = &self.name.0;
                        tracing::warn!(source, %error, "Docker cannot be heard; what is known stays as it is");
                    }
                    self.freshness.connected = false;
                    self.freshness.fault = fault;
                    if self.send(Heard::Freshness(self.freshness.clone())).await.is_err() {
                        return;
                    }
                    let Ok(left) = self.give_up(docker.keep).await else {
                        return;
                    };
                    // Half fixed, half by chance: agents of many nodes must not knock in step.
                    sleep(backoff.mul_f64(0.5 + fastrand::f64() / 2.0).min(left)).await;
                    backoff = LAST_BACKOFF.min(backoff * 2);
                }
            }
        }
    }

    /// Gives the engine's containers up if it was not heard for longer than they are kept; the time left until then.
    async fn give_up(&mut self, keep: Option<Duration>) -> Result<Duration, Gone> {
        let since = *self.silent_since.get_or_insert_with(Instant::now);
        let Some(keep) = keep.filter(|_| !self.given_up) else {
            return Ok(Duration::MAX);
        };
        let left = keep.saturating_sub(since.elapsed());
        if left.is_zero() {
            self.given_up = true;
            self.cache = Cache::default();
            tracing::warn!(
                source = self.name.0,
                ?keep,
                "Docker was not heard for so long: its containers drain"
            );
            self.send(Heard::List(Vec::new())).await?;
            return Ok(Duration::MAX);
        }
        Ok(left)
    }

    async fn send(&self, heard: Heard) -> Result<(), Gone> {
        self.to.tell(&self.name, heard).await
    }

    /// One connection, from the first question to the time of the next complete list.
    async fn session(&mut self, mut config: Arc<Config>, docker: &DockerConfig) -> End {
        match self.converse(&mut config, docker).await {
            Ok(()) => End::Renew,
            Err(end) => end,
        }
    }

    async fn converse(&mut self, config: &mut Arc<Config>, docker: &DockerConfig) -> Result<(), End> {
        let engine = Engine::connect(&docker.endpoint).await?;
        self.to.see(site::site(config, docker), &config.policy);
        let mut stream = pin!(engine.events());
        self.cache.begin_listing();
        let mut listing = Some(engine.clone().list().boxed());
        let mut inspections: FuturesUnordered<BoxFuture<'static, Inspected>> = FuturesUnordered::new();
        let mut ping: Option<BoxFuture<'static, Result<(), EngineError>>> = None;
        let connected = Instant::now();
        let renew = connected + docker.resync;
        let (mut heard, mut told) = (connected, connected);

        loop {
            let quiet = heard + docker.liveness;
            tokio::select! {
                // Events first: `kill` is the one that cannot wait.
                biased;
                event = stream.next() => {
                    heard = Instant::now();
                    let message = event.ok_or(EngineError::Ended)??;
                    let Some(event) = Event::parse(&message) else { continue };
                    // Older ones are in the list; of signals alone it says nothing. What comes later is new, whatever its
                    // time: the engine's clock may have been set back.
                    let replayed = connected.elapsed() < REPLAY && event.at < engine.connected_at;
                    if replayed && !matches!(event.kind, Kind::Kill(_)) {
                        continue;
                    }
                    match self.cache.on_event(&event) {
                        Action::Inspect { id, ticket } => {
                            let engine = engine.clone();
                            inspections.push(async move {
                                let answer = engine.inspect(&id).await;
                                (id, ticket, answer)
                            }.boxed());
                        }
                        action => self.tell(action).await?,
                    }
                }
                Some((id, ticket, answer)) = inspections.next() => {
                    heard = Instant::now();
                    match answer {
                        Err(error) if error.is_answer() => {
                            let source = &self.name.0;
                            tracing::warn!(source, container = id, %error, "what was known of it stays as it is");
                            self.cache.on_unclear(&id, ticket);
                        }
                        answer => {
                            let action = self.cache.on_inspected(&id, ticket, answer?);
                            self.tell(action).await?;
                        }
                    }
                }
                list = ready(&mut listing) => {
                    heard = Instant::now();
                    let list = list?;
                    self.cache.finish_listing(list.containers, &list.unclear);
                    self.freshness.last_full_read = Some(SystemTime::now());
                    self.send(Heard::List(self.cache.containers())).await?;
                    self.tell_freshness().await?;
                    told = heard;
                }
                answer = ready(&mut ping) => {
                    answer?;
                    heard = Instant::now();
                }
                changed = self.config.changed() => {
                    changed.map_err(|_| End::Gone)?;
                    *config = self.config.borrow_and_update().clone();
                    if self.section(config).as_ref() != Some(docker) {
                        return Ok(());
                    }
                    self.to.see(site::site(config, docker), &config.policy);
                    if listing.is_none() {
                        self.send(Heard::List(self.cache.containers())).await?;
                    }
                }
                () = sleep_until(quiet), if ping.is_none() && listing.is_none() => {
                    ping = Some(engine.clone().ping().boxed());
                }
                () = sleep_until(renew), if listing.is_none() => return Ok(()),
            }
            if listing.is_none() && heard - told >= FRESHNESS_INTERVAL {
                self.tell_freshness().await?;
                told = heard;
            }
        }
    }

    /// Passes on what an event came to.
    async fn tell(&self, action: Action) -> Result<(), Gone> {
        match action {
            Action::Put(id) => match self.cache.container(&id) {
                Some(container) => self.send(Heard::Put(Box::new(container.clone()))).await,
                None => Ok(()),
            },
            Action::Remove(id) => self.send(Heard::Remove(id)).await,
            Action::Ignore | Action::Inspect { .. } => Ok(()),
        }
    }

    /// Docker was heard just now.
    async fn tell_freshness(&mut self) -> Result<(), Gone> {
        if !self.freshness.connected {
            tracing::info!(source = self.name.0, "Docker is heard");
        }
        self.silent_since = None;
        self.given_up = false;
        self.freshness.connected = true;
        self.freshness.fault = None;
        self.freshness.last_heard = Some(SystemTime::now());
        self.send(Heard::Freshness(self.freshness.clone())).await
    }
}

/// Waits for a future that may not be there (then for ever), and forgets it when it is done.
async fn ready<T>(slot: &mut Option<BoxFuture<'static, T>>) -> T {
    let Some(future) = slot else {
        return std::future::pending().await;
    };
    let answer = future.await;
    *slot = None;
    answer
}
