//! The etcd source: one configuration for many nodes.
//!
//! Reads everything under the prefix, follows its changes, and says what they wish. What all nodes share goes to the
//! file source, which joins it with the node's own file. Loss of etcd removes nothing; see [`mirror`] for what else
//! does not.

pub mod cache;
pub mod mirror;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{Freshness, Message, Object, SourceId, Update};
use crate::{
    config::{Config, EtcdConfig, Shared},
    etcd::{Heard, Store, follow},
};
use mirror::Mirror;

/// Name of this source.
pub const SOURCE: &str = "etcd";
/// How many older texts of a key are looked at for a good one.
const LOOK_BACK: usize = 8;
/// The cache is written at once when a key has changed, and otherwise no more often than this, for its age.
const KEEP_EVERY: Duration = Duration::from_secs(60);

/// What was read last, and where it is kept.
#[derive(Debug)]
pub struct Recalled {
    mirror: Mirror,
    path: PathBuf,
    fault: Option<String>,
}

/// What an earlier agent read last, and the configuration with what was shared then; only the latter if `[etcd]` is
/// not there.
pub fn recall(config: Config) -> (Config, Option<Recalled>) {
    let Some(etcd) = &config.etcd else {
        return (config, None);
    };
    let path = cache::path(&config);
    let mut mirror = Mirror::new(&etcd.prefix);
    let mut fault = None;
    match cache::recall(&path, |kept: &Mirror| kept.root() == mirror.root()) {
        Ok(Some(kept)) => mirror = kept,
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(source = SOURCE, "{error}");
            fault = Some(error.to_string());
        }
    }
    let shared = mirror.outcome(&config).shared;
    let config = config.with_shared(&shared).unwrap_or(config);
    (config, Some(Recalled { mirror, path, fault }))
}

/// Starts the source. `shared` is told what `<prefix>/config` says; `config` is the node's, joined with that, and is
/// followed. Ends with `stop`, or when the inbox is gone.
pub fn spawn(
    etcd: EtcdConfig,
    recalled: Recalled,
    config: watch::Receiver<Arc<Config>>,
    shared: watch::Sender<Arc<Shared>>,
    inbox: mpsc::Sender<Message>,
    stop: CancellationToken,
) -> JoinHandle<()> {
    let source = Source {
        config,
        shared,
        inbox,
        sent: None,
        freshness: Freshness {
            connected: false,
            last_heard: recalled.mirror.read,
            last_full_read: recalled.mirror.read,
            fault: recalled.fault,
            via: None,
        },
        lost: false,
        mirror: recalled.mirror,
        cache: recalled.path,
        kept: Instant::now(),
    };
    tokio::spawn(async move {
        // Either way nobody needs to be told.
        let _ended = stop.run_until_cancelled(source.run(etcd)).await;
    })
}

/// Nobody listens any more.
struct InboxGone;

struct Source {
    config: watch::Receiver<Arc<Config>>,
    shared: watch::Sender<Arc<Shared>>,
    inbox: mpsc::Sender<Message>,
    mirror: Mirror,
    /// What the inbox has been told; `None` before the first list.
    sent: Option<BTreeMap<String, Object>>,
    freshness: Freshness,
    /// The loss of etcd has been logged.
    lost: bool,
    cache: PathBuf,
    kept: Instant,
}

impl Source {
    async fn run(mut self, etcd: EtcdConfig) -> Result<(), InboxGone> {
        if self.mirror.read.is_some() {
            let fault = "not heard since the start; what was read last is in force";
            self.freshness.fault = Some(fault.into());
            self.tell(true).await?;
        }
        self.tell_freshness().await?;
        let root = self.mirror.root().to_owned();
        let store = Store::new(etcd.clone());
        let mut heard = follow(etcd, root);
        loop {
            tokio::select! {
                Some(heard) = heard.recv() => self.hear(heard, &store).await?,
                changed = self.config.changed() => {
                    changed.map_err(|_| InboxGone)?;
                    if self.sent.is_some() {
                        self.tell(false).await?;
                    }
                }
                else => return Ok(()),
            }
        }
    }

    async fn hear(&mut self, heard: Heard, store: &Store) -> Result<(), InboxGone> {
        let now = SystemTime::now();
        let full = matches!(heard, Heard::Snapshot(_));
        match heard {
            Heard::Snapshot(snapshot) => {
                self.mirror.reset(snapshot);
                self.look_back(store).await;
                self.freshness.last_full_read = Some(now);
            }
            // What nodes publish is under the same prefix, and it is much.
            Heard::Changes(changes) if !self.mirror.concerns(&changes) => {
                self.be_connected(now);
                return Ok(());
            }
            Heard::Changes(changes) => self.mirror.change(changes),
            Heard::Alive => {
                self.be_connected(now);
                if self.kept.elapsed() > KEEP_EVERY {
                    self.keep();
                }
                return self.tell_freshness().await;
            }
            Heard::Lost(fault) => {
                // Once for each loss, not once for each try.
                if !std::mem::replace(&mut self.lost, true) {
                    tracing::warn!(source = SOURCE, "{fault}; what is known stays as it is");
                }
                self.freshness.connected = false;
                self.freshness.fault = Some(fault);
                return self.tell_freshness().await;
            }
        }
        self.be_connected(now);
        self.tell(full).await?;
        self.keep();
        self.tell_freshness().await
    }

    /// A node that starts while a text is faulty shall serve what all others do: it asks the store for the last good one.
    async fn look_back(&mut self, store: &Store) {
        let node = self.config.borrow().clone();
        let mut asked = BTreeSet::new();
        for _ in 0..LOOK_BACK {
            self.mirror.outcome(&node);
            for (key, revision) in self.mirror.without_good() {
                if !asked.insert((key.clone(), revision)) {
                    continue;
                }
                match store.past(&key, revision - 1).await {
                    Ok(Some(older)) => self.mirror.remember(older),
                    Ok(None) => {}
                    Err(fault) => {
                        tracing::warn!(source = SOURCE, key, "its older texts cannot be read: {fault}");
                        return;
                    }
                }
            }
        }
    }

    fn be_connected(&mut self, now: SystemTime) {
        if !self.freshness.connected {
            tracing::info!(source = SOURCE, "etcd is heard");
        }
        let held = self.mirror.held();
        if held.is_some() && self.freshness.fault != held {
            tracing::error!(source = SOURCE, "{}", held.as_deref().unwrap_or_default());
        }
        self.lost = false;
        self.mirror.read = Some(now);
        self.freshness.connected = true;
        self.freshness.last_heard = Some(now);
        self.freshness.fault = held;
    }

    /// Says what the keys come to: all of it, or what is different.
    async fn tell(&mut self, full: bool) -> Result<(), InboxGone> {
        let node = self.config.borrow_and_update().clone();
        let outcome = self.mirror.outcome(&node);
        self.shared.send_if_modified(|old| {
            let differs = *old != outcome.shared;
            *old = outcome.shared;
            differs
        });
        let old = self.sent.replace(outcome.objects.clone());
        let mut updates = Vec::new();
        match old {
            Some(old) if !full => {
                let gone = old.keys().filter(|id| !outcome.objects.contains_key(*id));
                updates.extend(gone.cloned().map(Update::Remove));
                let new = outcome
                    .objects
                    .into_iter()
                    .filter(|(id, object)| old.get(id) != Some(object));
                updates.extend(new.map(|(_, object)| Update::Put(object)));
            }
            _ => updates.push(Update::Reset(outcome.objects.into_values().collect())),
        }
        for update in updates {
            self.send(update).await?;
        }
        Ok(())
    }

    async fn tell_freshness(&self) -> Result<(), InboxGone> {
        self.send(Update::Freshness(self.freshness.clone())).await
    }

    async fn send(&self, update: Update) -> Result<(), InboxGone> {
        let message = Message {
            source: SourceId(SOURCE.into()),
            update,
        };
        self.inbox.send(message).await.map_err(|_| InboxGone)
    }

    fn keep(&mut self) {
        self.kept = Instant::now();
        if let Err(fault) = cache::keep(&self.cache, &self.mirror) {
            tracing::warn!(source = SOURCE, "{fault}");
        }
    }
}
