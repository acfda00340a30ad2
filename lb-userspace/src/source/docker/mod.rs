//! The Docker source: connects, lists, follows events, and says what containers wish.
//!
//! Events are subscribed to before the list is read, so that nothing falls between. Loss of Docker removes nothing.
//! A connection ends at the latest after `resync`, and the next one begins with a complete list: an event that was
//! missed and a stream that died unnoticed are both repaired by then.

pub mod container;
pub(super) mod engine;
mod events;
mod outlet;
pub(crate) mod signal;
mod site;

use std::{convert::Infallible, pin::pin, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    Message,
    link::{self, Backoff, Gone, Kept, Link},
};
use crate::{
    config::{Config, DockerConfig},
    slot::ready,
};
use container::Container;
use engine::{Engine, EngineError};
use events::{Action, Cache, Event, Kind};
pub use outlet::Heard;
use outlet::Outlet;

/// Longest wait between two tries.
const LAST_BACKOFF: Duration = Duration::from_secs(15);
/// Facts that may wait for a reader that is busy.
const WAITING: usize = 256;
/// Within this time from the connection an engine has repeated the old events that it was asked for.
const REPLAY: Duration = Duration::from_secs(5);

/// Starts a source for every engine of `config`, and for those that come into it later. Each follows its own engine's
/// section: other VIPs or defaults are applied to the containers that are known, another endpoint is connected to, and
/// the source of an engine that is switched off or gone ends. Ends with `stop`, or when the inbox is
/// gone.
pub fn spawn(
    config: watch::Receiver<Arc<Config>>,
    inbox: mpsc::Sender<Message>,
    stop: CancellationToken,
) -> JoinHandle<()> {
    let names = |config: &Config| config.docker.iter().map(DockerConfig::source).collect();
    link::spawn_each(config.clone(), stop, names, move |name| {
        let to = Outlet::Wishes {
            inbox: inbox.clone(),
            view: None,
        };
        Source::new(name, config.clone(), to).run()
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
    config: watch::Receiver<Arc<Config>>,
    link: Link<Outlet>,
    cache: Cache,
}

/// An answered inspection: container, ticket, answer.
type Inspected = (String, u64, Result<Option<Container>, EngineError>);

impl Source {
    fn new(name: String, config: watch::Receiver<Arc<Config>>, to: Outlet) -> Self {
        Self {
            config,
            link: Link::new(name, "Docker", to),
            cache: Cache::default(),
        }
    }

    /// The engine's section in a configuration.
    fn section(&self, config: &Config) -> Option<DockerConfig> {
        let own = |engine: &&DockerConfig| engine.source() == self.link.name();
        config.docker.iter().find(own).cloned()
    }

    async fn run(mut self) {
        // Ends when nobody listens any more.
        let Err(Gone) = self.hear().await;
    }

    async fn hear(&mut self) -> Result<Infallible, Gone> {
        let mut backoff = Backoff::new(LAST_BACKOFF);
        loop {
            let config = self.config.borrow_and_update().clone();
            let Some(docker) = self.section(&config) else {
                self.cache = Cache::default();
                self.link.end().await?;
                self.config.changed().await.map_err(|_| Gone)?;
                continue;
            };
            let listed_before = self.link.last_full_read();
            match self.session(config, &docker).await {
                End::Renew => backoff.reset(),
                End::Gone => return Err(Gone),
                End::Lost(error) => {
                    if self.link.last_full_read() != listed_before {
                        backoff.reset();
                    }
                    self.link.lost(&error).await?;
                    let left = match self.link.kept(docker.keep).await? {
                        Kept::For(left) => left,
                        Kept::GivenUp => {
                            self.cache = Cache::default();
                            Duration::MAX
                        }
                    };
                    backoff.wait(left).await;
                }
            }
        }
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
        self.link.to.see(site::site(config, docker), &config.policy);
        let mut stream = pin!(engine.events());
        self.cache.begin_listing();
        let mut listing = Some(engine.clone().list().boxed());
        let mut inspections: FuturesUnordered<BoxFuture<'static, Inspected>> = FuturesUnordered::new();
        let mut ping: Option<BoxFuture<'static, Result<(), EngineError>>> = None;
        let connected = Instant::now();
        let renew = connected + docker.resync;
        let mut heard = connected;

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
                            let source = self.link.name();
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
                    self.link.send(Heard::List(self.cache.containers())).await?;
                    self.link.listed(None).await?;
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
                    self.link.to.see(site::site(config, docker), &config.policy);
                    if listing.is_none() {
                        self.link.send(Heard::List(self.cache.containers())).await?;
                    }
                }
                () = sleep_until(quiet), if ping.is_none() && listing.is_none() => {
                    ping = Some(engine.clone().ping().boxed());
                }
                () = sleep_until(renew), if listing.is_none() => return Ok(()),
            }
            if listing.is_none() {
                self.link.alive(heard).await?;
            }
        }
    }

    /// Passes on what an event came to.
    async fn tell(&self, action: Action) -> Result<(), Gone> {
        match action {
            Action::Put(id) => match self.cache.container(&id) {
                Some(container) => self.link.send(Heard::Put(Box::new(container.clone()))).await,
                None => Ok(()),
            },
            Action::Remove(id) => self.link.send(Heard::Remove(id)).await,
            Action::Ignore | Action::Inspect { .. } => Ok(()),
        }
    }
}
