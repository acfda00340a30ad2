//! What the sources of Docker have in common: a line to the inbox that also tells whether anybody is heard, how long
//! what is known is kept when nobody is, and a task for each section of the configuration.

use std::{
    collections::BTreeSet,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{mpsc, watch},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{Freshness, Message, SourceId, Update};
use crate::config::Config;

/// First wait after a failure: an engine that restarts is back within a second.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
/// Signs of life are passed on no more often than this.
const FRESHNESS_INTERVAL: Duration = Duration::from_secs(1);

/// Nobody listens any more.
#[derive(Debug)]
pub(super) struct Gone;

/// To whom a source speaks, and in which words.
pub(super) trait Outlet: Send + Sync {
    /// What it says.
    type Said: Send;
    /// A complete list with nothing on it.
    fn nothing() -> Self::Said;
    /// The source is no more.
    fn end() -> Self::Said;
    /// How current the source is.
    fn freshness(freshness: Freshness) -> Self::Said;
    /// Says it.
    fn say(&self, source: &SourceId, said: Self::Said) -> impl Future<Output = Result<(), Gone>> + Send;
}

impl Outlet for mpsc::Sender<Message> {
    type Said = Update;

    fn nothing() -> Update {
        Update::Reset(Vec::new())
    }

    fn end() -> Update {
        Update::End
    }

    fn freshness(freshness: Freshness) -> Update {
        Update::Freshness(freshness)
    }

    async fn say(&self, source: &SourceId, update: Update) -> Result<(), Gone> {
        let message = Message {
            source: source.clone(),
            update,
        };
        self.send(message).await.map_err(|_| Gone)
    }
}

/// How a source speaks: mostly to the reconciler's inbox.
pub(super) struct Link<O = mpsc::Sender<Message>> {
    name: SourceId,
    /// Whom it hears, for the log: `Docker`.
    whom: &'static str,
    pub(super) to: O,
    freshness: Freshness,
    /// When the last sign of life was passed on.
    told: Option<Instant>,
    /// Since when nobody is heard.
    silent_since: Option<Instant>,
    /// What was known has been given up: nobody was heard for longer than it is kept.
    given_up: bool,
}

/// What remains of what is known while nobody is heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kept {
    /// All of it, for at least so long.
    For(Duration),
    /// Nothing: the inbox was told so just now.
    GivenUp,
}

/// Waits that grow, half fixed, half by chance: agents of many nodes must not knock in step.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
    last: Duration,
}

/// Runs `source` for every name that `names` finds in the configuration, and for those that come into it later. Each
/// goes on when its name is gone: it may come back. Ends with `stop`, or when nobody publishes configurations any more.
pub(super) fn spawn_each<F>(
    mut config: watch::Receiver<Arc<Config>>,
    stop: CancellationToken,
    names: impl Fn(&Config) -> Vec<String> + Send + 'static,
    source: impl Fn(String) -> F + Send + 'static,
) -> JoinHandle<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    let all = async move {
        let mut known = BTreeSet::new();
        let mut sources = JoinSet::new();
        loop {
            let now = names(&config.borrow_and_update());
            for name in now {
                if known.insert(name.clone()) {
                    sources.spawn(source(name));
                }
            }
            if config.changed().await.is_err() {
                while sources.join_next().await.is_some() {}
                return;
            }
        }
    };
    tokio::spawn(async move {
        stop.run_until_cancelled(all).await;
    })
}

// === impl Link ===

impl<O: Outlet> Link<O> {
    pub(super) fn new(name: String, whom: &'static str, to: O) -> Self {
        Self {
            name: SourceId(name),
            whom,
            to,
            freshness: Freshness::default(),
            told: None,
            silent_since: None,
            given_up: false,
        }
    }

    /// The source's name.
    pub(super) fn name(&self) -> &str {
        &self.name.0
    }

    /// Whether somebody is heard at present.
    pub(super) fn is_connected(&self) -> bool {
        self.freshness.connected
    }

    /// When the last complete list was read.
    pub(super) fn last_full_read(&self) -> Option<SystemTime> {
        self.freshness.last_full_read
    }

    /// Says something.
    pub(super) async fn send(&self, said: O::Said) -> Result<(), Gone> {
        self.to.say(&self.name, said).await
    }

    /// A complete list was read just now, and the inbox has it; of several endpoints it came `via` this one.
    pub(super) async fn listed(&mut self, via: Option<String>) -> Result<(), Gone> {
        self.freshness.last_full_read = Some(SystemTime::now());
        if self.freshness.via != via {
            self.freshness.via = via;
            self.told = None;
        }
        self.alive(Instant::now()).await
    }

    /// Somebody was heard at that time.
    pub(super) async fn alive(&mut self, heard: Instant) -> Result<(), Gone> {
        let news = !self.freshness.connected || self.freshness.fault.is_some();
        let lately = |told: Instant| heard.saturating_duration_since(told) < FRESHNESS_INTERVAL;
        if !news && self.told.is_some_and(lately) {
            return Ok(());
        }
        if !self.freshness.connected {
            let via = self.freshness.via.as_deref();
            tracing::info!(source = self.name.0, via, "{} is heard", self.whom);
        }
        self.told = Some(heard);
        self.silent_since = None;
        self.given_up = false;
        self.freshness.connected = true;
        self.freshness.fault = None;
        self.freshness.last_heard = Some(SystemTime::now());
        self.send(O::freshness(self.freshness.clone())).await
    }

    /// Nobody can be heard, for this reason.
    pub(super) async fn lost(&mut self, reason: &impl fmt::Display) -> Result<(), Gone> {
        let fault = Some(reason.to_string());
        // Once for each reason, not once for each try.
        if self.freshness.fault != fault {
            let source = &self.name.0;
            tracing::warn!(
                source,
                error = %reason,
                "{} cannot be heard; what is known stays as it is",
                self.whom
            );
        }
        self.freshness.connected = false;
        self.freshness.via = None;
        self.freshness.fault = fault;
        self.send(O::freshness(self.freshness.clone())).await
    }

    /// The source is taken out of the configuration, and all it said with it. It may come back.
    pub(super) async fn end(&mut self) -> Result<(), Gone> {
        (self.freshness, self.told) = (Freshness::default(), None);
        (self.silent_since, self.given_up) = (None, false);
        self.send(O::end()).await
    }

    /// What remains of what is known: nothing if nobody was heard for longer than `keep`.
    pub(super) async fn kept(&mut self, keep: Option<Duration>) -> Result<Kept, Gone> {
        let since = *self.silent_since.get_or_insert_with(Instant::now);
        let Some(keep) = keep.filter(|_| !self.given_up) else {
            return Ok(Kept::For(Duration::MAX));
        };
        let left = keep.saturating_sub(since.elapsed());
        if !left.is_zero() {
            return Ok(Kept::For(left));
        }
        self.given_up = true;
        let source = &self.name.0;
        tracing::warn!(
            source,
            ?keep,
            "{} was not heard for so long: its containers drain",
            self.whom
        );
        self.send(O::nothing()).await?;
        Ok(Kept::GivenUp)
    }
}

// === impl Backoff ===

impl Backoff {
    /// Waits that grow up to `last`.
    pub(super) fn new(last: Duration) -> Self {
        Self {
            next: FIRST_BACKOFF,
            last,
        }
    }

    /// All is well again.
    pub(super) fn reset(&mut self) {
        self.next = FIRST_BACKOFF;
    }

    /// Waits, at most for `limit`.
    pub(super) async fn wait(&mut self, limit: Duration) {
        sleep(self.next.mul_f64(0.5 + fastrand::f64() / 2.0).min(limit)).await;
        self.next = self.last.min(self.next * 2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link() -> (Link, mpsc::Receiver<Message>) {
        let (to, from) = mpsc::channel(16);
        (Link::new("docker".into(), "Docker", to), from)
    }

    fn freshness(from: &mut mpsc::Receiver<Message>) -> Option<Freshness> {
        match from.try_recv().ok()?.update {
            Update::Freshness(freshness) => Some(freshness),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn signs_of_life_are_passed_on_once_a_second_and_changes_at_once() {
        let (mut link, mut from) = link();
        link.listed(Some("tcp://m1:2376".into())).await.unwrap();
        let first = freshness(&mut from).unwrap();
        assert!(first.connected && first.last_full_read.is_some());
        assert_eq!(first.via.as_deref(), Some("tcp://m1:2376"));
        link.alive(Instant::now()).await.unwrap();
        assert_eq!(freshness(&mut from), None, "told just now");
        link.listed(Some("tcp://m2:2376".into())).await.unwrap();
        assert_eq!(
            freshness(&mut from).unwrap().via.as_deref(),
            Some("tcp://m2:2376")
        );
        tokio::time::advance(FRESHNESS_INTERVAL).await;
        link.alive(Instant::now()).await.unwrap();
        assert!(freshness(&mut from).is_some());
        link.lost(&"gone").await.unwrap();
        let lost = freshness(&mut from).unwrap();
        assert_eq!(
            (lost.connected, lost.fault.as_deref(), lost.via),
            (false, Some("gone"), None)
        );
        link.alive(Instant::now()).await.unwrap();
        let back = freshness(&mut from).unwrap();
        assert!(back.connected && back.fault.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_was_taken_away_comes_back_as_a_new_one() {
        let (mut link, mut from) = link();
        link.lost(&"gone").await.unwrap();
        assert!(freshness(&mut from).is_some());
        link.kept(Some(Duration::from_secs(5))).await.unwrap();
        link.end().await.unwrap();
        assert_eq!(from.try_recv().unwrap().update, Update::End);
        tokio::time::advance(Duration::from_secs(9)).await;
        // As long as a new one, and the same fault is told again.
        let keep = Some(Duration::from_secs(5));
        assert_eq!(link.kept(keep).await.unwrap(), Kept::For(Duration::from_secs(5)));
        link.listed(None).await.unwrap();
        assert!(freshness(&mut from).is_some_and(|told| told.connected));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_known_is_kept_for_the_configured_time_and_given_up_once() {
        let (mut link, mut from) = link();
        assert_eq!(link.kept(None).await.unwrap(), Kept::For(Duration::MAX));
        let keep = Some(Duration::from_secs(5));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(link.kept(keep).await.unwrap(), Kept::For(Duration::from_secs(3)));
        assert!(from.try_recv().is_err());
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(link.kept(keep).await.unwrap(), Kept::GivenUp);
        assert_eq!(from.try_recv().unwrap().update, Update::Reset(Vec::new()));
        assert_eq!(link.kept(keep).await.unwrap(), Kept::For(Duration::MAX), "once");
        // Heard again, the time begins anew.
        link.alive(Instant::now()).await.unwrap();
        assert_eq!(link.kept(keep).await.unwrap(), Kept::For(Duration::from_secs(5)));
    }
}
