//! Everything under a prefix and every change of it, for as long as anybody wants to know.

use std::time::Duration;

use etcd_client::{EventType, WatchResponse, WatchStream};
use futures_util::{FutureExt as _, future::BoxFuture};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};

use super::{Change, EtcdError, Rounds, Session, Snapshot, session::key};
use crate::{config::EtcdConfig, slot::ready};

/// Messages that may wait for a reader that is busy; then the watch waits, too.
const WAITING: usize = 256;
/// What is heard of etcd.
#[derive(Debug)]
pub enum Heard {
    /// Everything, read anew: at first, after every loss, and when changes were compacted away.
    Snapshot(Snapshot),
    /// Changes in the order of their revisions; those of one revision come together.
    Changes(Vec<Change>),
    /// Nothing has changed: etcd and its quorum say so.
    Alive,
    /// No word from any endpoint at the moment; it is tried on and on, and a [`Heard::Snapshot`] is next.
    Lost(String),
}

/// Follows everything under a prefix. Ends when the receiver is dropped.
pub fn follow(config: EtcdConfig, prefix: String) -> mpsc::Receiver<Heard> {
    let (to, receiver) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        let gone = to.clone();
        let follower = Follower { config, prefix, to };
        tokio::select! {
            () = gone.closed() => {}
            ReaderGone = follower.run() => {}
        }
    });
    receiver
}

/// Nobody wants to know any more.
struct ReaderGone;

/// Why a session is over.
enum End {
    Fault(EtcdError),
    ReaderGone,
}

impl From<EtcdError> for End {
    fn from(fault: EtcdError) -> Self {
        Self::Fault(fault)
    }
}

impl From<ReaderGone> for End {
    fn from(ReaderGone: ReaderGone) -> Self {
        Self::ReaderGone
    }
}

struct Follower {
    config: EtcdConfig,
    prefix: String,
    to: mpsc::Sender<Heard>,
}

impl Follower {
    async fn run(self) -> ReaderGone {
        let mut rounds = Rounds::new(&self.config);
        while let Some(endpoint) = rounds.endpoint() {
            let started = Instant::now();
            let Err(end) = self.session(&endpoint).await;
            let End::Fault(fault) = end else {
                return ReaderGone;
            };
            let (told, wait) = rounds.ended(fault, started.elapsed());
            if self.tell(Heard::Lost(told)).await.is_err() {
                return ReaderGone;
            }
            sleep(wait).await;
        }
        ReaderGone
    }

    async fn tell(&self, heard: Heard) -> Result<(), ReaderGone> {
        self.to.send(heard).await.map_err(|_| ReaderGone)
    }

    /// One session, from the full read on.
    async fn session(&self, endpoint: &str) -> Result<std::convert::Infallible, End> {
        let mut session = Session::open(&self.config, endpoint).await?;
        let snapshot = session.snapshot(&self.prefix).await?;
        let mut revision = snapshot.revision;
        let mut watch = session.watch(&self.prefix, revision + 1).await?;
        // The first word says that the watch is there, or why not.
        let silent = EtcdError::Silent {
            what: "watching",
            limit: self.config.timeout,
        };
        let first = tokio::time::timeout(self.config.timeout, watch.message()).await;
        let early = changes(first.map_err(|_| silent)?, revision)?;
        self.tell(Heard::Snapshot(snapshot)).await?;
        if !early.is_empty() {
            self.tell(Heard::Changes(early)).await?;
        }

        let mut heard = Instant::now();
        // Two signs of life: a read that a quorum answers, and a word on the watch, which may have died by itself.
        let mut proof: Option<BoxFuture<'static, Result<i64, EtcdError>>> = None;
        let mut word_due: Option<Instant> = None;
        loop {
            let quiet = heard + self.config.liveness;
            let asked = proof.is_some() || word_due.is_some();
            tokio::select! {
                message = watch.message() => {
                    word_due = None;
                    let changes = changes(message, revision)?;
                    if let Some(last) = changes.iter().map(Change::revision).max() {
                        (revision, heard) = (last, Instant::now());
                        self.tell(Heard::Changes(changes)).await?;
                    }
                }
                answer = ready(&mut proof) => drop(answer?),
                () = sleep_until(word_due.unwrap_or(quiet)), if word_due.is_some() => {
                    let limit = self.config.timeout;
                    return Err(EtcdError::Silent { what: "watching", limit }.into());
                }
                () = sleep_until(quiet), if !asked => {
                    ask_for_a_word(&mut watch, self.config.timeout).await?;
                    word_due = Some(Instant::now() + self.config.timeout);
                    let key = self.prefix.clone();
                    proof = Some(Session::prove(session.kv(), self.config.timeout, key).boxed());
                    continue;
                }
            }
            if asked && proof.is_none() && word_due.is_none() {
                heard = Instant::now();
                self.tell(Heard::Alive).await?;
            }
        }
    }
}

async fn ask_for_a_word(watch: &mut WatchStream, limit: Duration) -> Result<(), EtcdError> {
    let what = "watching";
    match tokio::time::timeout(limit, watch.request_progress()).await {
        Ok(asked) => asked.map_err(|source| EtcdError::Refused { what, source }),
        Err(_) => Err(EtcdError::Silent { what, limit }),
    }
}

/// The changes of a message of the watch.
fn changes(
    message: Result<Option<WatchResponse>, etcd_client::Error>,
    revision: i64,
) -> Result<Vec<Change>, EtcdError> {
    let message = message.map_err(|source| EtcdError::Refused {
        what: "watching",
        source,
    })?;
    let Some(message) = message else {
        return Err(EtcdError::Ended("the endpoint closed it".into()));
    };
    if message.compact_revision() > 0 {
        return Err(EtcdError::Compacted(revision));
    }
    if message.canceled() {
        return Err(EtcdError::Ended(message.cancel_reason().to_owned()));
    }
    let change = |event: &etcd_client::Event| {
        let key = key(event.kv()?);
        Some(match event.event_type() {
            EventType::Put => Change::Put(key),
            EventType::Delete => Change::Delete {
                name: key.name,
                revision: key.revision,
            },
        })
    };
    Ok(message.events().iter().filter_map(change).collect())
}

impl Change {
    /// Revision of the store at which it happened.
    pub fn revision(&self) -> i64 {
        match self {
            Self::Put(key) => key.revision,
            Self::Delete { revision, .. } => *revision,
        }
    }
}
