//! One worker for each processor: a thread with its own runtime, listeners, clients and connections to upstreams. Nothing on
//! the way of a request is shared with another worker but what is read.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
    time::Instant,
};

mod accept;
mod client;
mod http;
mod rest;

pub use client::Client;
use rest::{Rested, Resting};

use crate::{
    client::{ClientIo, Clock, Stage, Word},
    listen::{Gate, Nascent, PlaceReport},
    log::Log,
    served::{Served, Serving},
    stats::{Shard, Shards},
    tls::Tls,
    upstream::{Connector, Pool},
};

/// How often the coarse clock is set and silence looked for.
const SWEEP_EVERY: Duration = Duration::from_millis(250);
/// How long clients may find out by an answer that their idle connection is at its end, before it ends anyway.
const FAREWELL: Duration = Duration::from_secs(5);

/// What all workers share.
#[derive(Debug)]
pub struct Shared {
    /// What is served.
    pub serving: watch::Sender<Arc<Serving>>,
    /// Whether the process goes on.
    pub phase: watch::Sender<Phase>,
    /// What TLS is served by.
    pub tls: watch::Sender<Arc<Tls>>,
    /// What orders of certificates tell.
    pub acme: crate::acme::Board,
    /// Where the process listens.
    pub listening: watch::Sender<Vec<PlaceReport>>,
    /// Places for client connections.
    pub places: Arc<Semaphore>,
    /// The clock.
    pub clock: Arc<Clock>,
    /// Makes connections to upstreams.
    pub connector: Connector,
    /// The log of requests.
    pub log: Log,
    /// What is answered without a route.
    pub unrouted: Shards,
    /// Client connections: open now, and made.
    pub clients: Shards,
    /// When the process began to serve.
    pub since: std::time::SystemTime,
}

/// Whether a process goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It serves.
    Serving,
    /// It takes nothing new; what is under way may go on until then.
    Draining(Instant),
}

/// One worker.
#[derive(Debug)]
pub struct Worker {
    /// Its number.
    pub index: usize,
    /// What it shares.
    pub shared: Arc<Shared>,
    /// Idle connections to upstreams.
    pub pool: Pool,
    serving: RefCell<News>,
    draining: Cell<bool>,
    next_client: Cell<u64>,
    /// Whether a connection has let go what it does not need meanwhile.
    rested: Cell<bool>,
    resting: Resting,
    /// Clients whose connections or upgrades are open.
    clients: RefCell<HashMap<u64, Arc<Stage>>>,
    /// A client has gone while the process drains.
    emptied: tokio::sync::Notify,
    /// Whether the clients that were there when the process began to drain have gone, or have had their time.
    relieved: watch::Sender<bool>,
}

/// What is served, as one worker holds it: counted by this worker alone. The counters of the [`Arc`]s would be written by
/// every worker for every request.
#[derive(Debug)]
pub struct View {
    serving: Arc<Serving>,
    routes: Box<[LocalRoute]>,
}

/// What is served, for as long as it is looked at.
pub type Snapshot = Rc<View>;

/// A route, as one worker holds it.
pub type LocalRoute = Rc<Arc<Served>>;

/// What is served, as it was looked at last.
#[derive(Debug)]
struct News {
    news: watch::Receiver<Arc<Serving>>,
    last: Snapshot,
}

// === impl View ===

impl View {
    fn new(serving: Arc<Serving>) -> Snapshot {
        let routes = serving.routes.iter().map(|route| Rc::new(Arc::clone(route)));
        let routes = routes.collect();
        Rc::new(Self { serving, routes })
    }

    /// The route at this place of [`Serving::routes`].
    pub fn route(&self, place: usize) -> &LocalRoute {
        &self.routes[place]
    }
}

impl std::ops::Deref for View {
    type Target = Serving;

    fn deref(&self) -> &Serving {
        &self.serving
    }
}

// === impl Worker ===

impl Worker {
    /// The worker of this number.
    ///
    /// # Errors
    /// If no file descriptor is left.
    pub fn new(index: usize, shared: Arc<Shared>) -> io::Result<Rc<Self>> {
        let mut news = shared.serving.subscribe();
        let last = View::new(Arc::clone(&news.borrow_and_update()));
        let serving = RefCell::new(News { news, last });
        Ok(Rc::new(Self {
            index,
            shared,
            pool: Pool::default(),
            serving,
            draining: Cell::new(false),
            next_client: Cell::new(0),
            clients: RefCell::default(),
            rested: Cell::new(false),
            resting: Resting::new()?,
            emptied: tokio::sync::Notify::new(),
            relieved: watch::Sender::new(false),
        }))
    }

    /// What is served now. Costs a look at a number unless it has changed.
    pub fn serving(&self) -> Snapshot {
        let News { news, last } = &mut *self.serving.borrow_mut();
        if news.has_changed().unwrap_or(false) {
            *last = View::new(Arc::clone(&news.borrow_and_update()));
        }
        Rc::clone(last)
    }

    /// Whether connections shall end.
    pub fn is_draining(&self) -> bool {
        self.draining.get()
    }

    /// Numbers of what is answered without a route.
    pub fn stats(&self) -> &Shard {
        self.shared.unrouted.of(self.index)
    }

    /// Serves by these sockets until the process has drained. Must run on a runtime of this thread alone.
    ///
    /// # Errors
    /// If the system does not tell any more which clients speak.
    pub async fn run(self: Rc<Self>, mut listeners: mpsc::UnboundedReceiver<Nascent>) -> io::Result<()> {
        let mut accepting = JoinSet::new();
        let sweeping = tokio::task::spawn_local(Rc::clone(&self).sweep());
        let mut watching = tokio::task::spawn_local(rest::watch(Rc::clone(&self)));
        let mut phase = self.shared.phase.subscribe();
        let mut gates = Vec::new();
        let deadline = loop {
            if let Phase::Draining(deadline) = *phase.borrow_and_update() {
                break deadline;
            }
            tokio::select! {
                changed = phase.changed() => if changed.is_err() {
                    break Instant::now();
                },
                Some(nascent) = listeners.recv() => match nascent.adopt() {
                    Ok(listener) => {
                        gates.retain(|gate: &Arc<Gate>| !gate.is_given_up());
                        gates.push(Arc::clone(&listener.gate));
                        accepting.spawn_local(accept::accept(Rc::clone(&self), listener));
                    }
                    Err(error) => tracing::error!(worker = self.index, "cannot wait for connections: {error}"),
                },
                // One whose place was given up.
                Some(_) = accepting.join_next() => {}
                failed = &mut watching => return failed?,
            }
        };
        self.draining.set(true);
        for stage in self.clients.borrow().values() {
            if stage.speaks_h2() {
                stage.say(Word::Finish);
            }
        }
        if gates.iter().any(|gate| gate.waits_for_a_successor()) {
            self.relieve(deadline).await;
        }
        // They take what waits in their queues, and end; where no place is free they may not come to it.
        let _too_late =
            tokio::time::timeout_at(deadline, async { while accepting.join_next().await.is_some() {} }).await;
        let farewell = deadline.min(Instant::now() + FAREWELL);
        if !self.emptied_by(farewell, u64::MAX).await {
            self.finish(|_| true);
            if !self.emptied_by(deadline, u64::MAX).await {
                tracing::warn!(
                    worker = self.index,
                    connections = self.clients.borrow().len(),
                    "cut off at the deadline"
                );
                for stage in self.clients.borrow().values() {
                    stage.say(Word::End);
                }
            }
        }
        sweeping.abort();
        watching.abort();
        Ok(())
    }

    /// Takes a client in that says nothing.
    fn rest(&self, client: Client, io: ClientIo) {
        match self.resting.take(client, io) {
            Ok(()) => {
                self.rested.set(true);
                tracing::debug!("rests");
            }
            Err(error) => tracing::warn!("a silent connection is closed: {error}"),
        }
    }

    /// Ends clients that say nothing and are so.
    fn end_resting(self: &Rc<Self>, is_so: impl Fn(&Rested) -> bool) {
        if let Err(error) = self.resting.end(self, is_so) {
            tracing::error!("silent connections do not end: {error}");
        }
    }

    /// Has the connections of these clients end after what is under way.
    fn finish(self: &Rc<Self>, is_meant: impl Fn(u64) -> bool) {
        // Those that have just spoken are told with the others.
        self.end_resting(|rested| is_meant(rested.id()));
        for (id, stage) in &*self.clients.borrow() {
            if is_meant(*id) {
                stage.say(Word::Finish);
            }
        }
    }

    /// Waits until the clients of now have gone, while others come: nobody else accepts where they come to. They are told to
    /// end early enough that those who came late can end too.
    async fn relieve(self: &Rc<Self>, deadline: Instant) {
        let (now, old) = (Instant::now(), self.next_client.get());
        let last_call = deadline - FAREWELL.min(deadline.saturating_duration_since(now) / 2);
        if !self.emptied_by(last_call.min(now + FAREWELL), old).await {
            self.finish(|id| id < old);
            self.emptied_by(last_call, old).await;
        }
        self.relieved.send_replace(true);
    }

    /// Waits until no client is left that came before this one; whether that was in time.
    async fn emptied_by(&self, deadline: Instant, before: u64) -> bool {
        let is_empty = || {
            let is_old = |id: u64| id < before;
            !self.clients.borrow().keys().any(|id| is_old(*id))
                && !self.resting.any(|rested| is_old(rested.id()))
        };
        while !is_empty() {
            if tokio::time::timeout_at(deadline, self.emptied.notified())
                .await
                .is_err()
            {
                return is_empty();
            }
        }
        true
    }

    /// Ends connections that have been silent for too long.
    async fn sweep(self: Rc<Self>) {
        let mut ticks = tokio::time::interval(SWEEP_EVERY);
        for tick in 0_u64.. {
            ticks.tick().await;
            self.shared.clock.tick();
            let now = self.shared.clock.coarse_ms();
            let serving = self.serving();
            for stage in self.clients.borrow().values() {
                if stage.is_late(now, &serving.settings.timeouts) {
                    stage.say(Word::End);
                } else if stage.may_rest(now) {
                    stage.wake();
                }
            }
            self.end_resting(|rested| rested.is_late(now, &serving.settings.timeouts));
            if tick % 4 == 0 {
                if self.rested.take() {
                    crate::memory::give_back();
                }
                let known = |pool: u64| serving.upstreams.contains(&(pool >> 1));
                self.pool.sweep(now, known);
            }
        }
    }

    /// Ready when the upgraded connections of an upstream have to end.
    pub async fn doom(&self, upstream: Option<u64>) {
        let mut serving = self.shared.serving.subscribe();
        let mut phase = self.shared.phase.subscribe();
        loop {
            let clock = &self.shared.clock;
            let fate = upstream.and_then(|id| serving.borrow_and_update().fates.get(&id).copied());
            let by_fate = fate.map(|fate| {
                let over = Duration::from_millis(clock.coarse_ms().saturating_sub(fate.since_ms));
                Instant::now() + fate.drain.saturating_sub(over)
            });
            let by_phase = match *phase.borrow_and_update() {
                Phase::Draining(deadline) => Some(deadline),
                Phase::Serving => None,
            };
            let end = by_fate.into_iter().chain(by_phase).min();
            tokio::select! {
                () = async {
                    match end {
                        Some(end) => tokio::time::sleep_until(end).await,
                        None => std::future::pending().await,
                    }
                } => return,
                changed = serving.changed() => if changed.is_err() { return },
                changed = phase.changed() => if changed.is_err() { return },
            }
        }
    }
}
