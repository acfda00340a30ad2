//! The containers of other machines, as `weir node` publishes them in etcd.
//!
//! Every node is a source of its own, `node:<name>`: the loss of one concerns its own containers alone. `nodes` is the
//! connection that they are all heard by. Loss of etcd removes nothing; see [`registry`] for what else does not.

pub mod registry;
#[cfg(test)]
mod tests;
mod view;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{Freshness, Message, SourceId, Update, etcd::cache};
use crate::{
    config::{Config, EtcdConfig},
    etcd::{Heard, follow},
};
use registry::{Node, Registry};
use view::{View, source, strangers};

/// Name of the connection; nodes are `node:<name>`.
pub const SOURCE: &str = "nodes";
/// Signs of life of nodes are passed on, and changes are kept for the next start, no more often than this.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// Whether this source is a node.
pub fn is_node(source: &SourceId) -> bool {
    source.0.starts_with("node:")
}

/// What was read last, and where it is kept.
#[derive(Debug)]
pub struct Recalled {
    registry: Registry,
    path: PathBuf,
    fault: Option<String>,
}

/// What an earlier agent read last; nothing where no nodes are read.
pub fn recall(config: &Config) -> Option<(EtcdConfig, Recalled)> {
    let etcd = config.etcd.clone().filter(|_| config.nodes.is_some())?;
    let path = cache::path(config).with_file_name("nodes.json");
    let empty = Registry::new(&etcd.prefix);
    let (kept, fault) = match cache::recall(&path, |kept: &Registry| kept.root() == empty.root()) {
        Ok(kept) => (kept, None),
        Err(error) => {
            tracing::warn!(source = SOURCE, "{error}");
            (None, Some(error.to_string()))
        }
    };
    let recalled = Recalled {
        registry: kept.map_or(empty, Registry::recalled),
        path,
        fault,
    };
    Some((etcd, recalled))
}

/// Starts the source; `config` is followed. Ends with `stop`, or when the inbox is gone.
pub fn spawn(
    etcd: EtcdConfig,
    recalled: Recalled,
    config: watch::Receiver<Arc<Config>>,
    inbox: mpsc::Sender<Message>,
    stop: CancellationToken,
) -> JoinHandle<()> {
    let now = Instant::now();
    let source = Source {
        config,
        inbox,
        freshness: Freshness {
            connected: false,
            last_heard: recalled.registry.read,
            last_full_read: recalled.registry.read,
            fault: recalled.fault,
            via: None,
        },
        listed: false,
        lost: false,
        registry: recalled.registry,
        cache: recalled.path,
        changed: false,
        kept: None,
        told: now,
    };
    tokio::spawn(async move {
        // Either way nobody needs to be told.
        let _ended = source.run(etcd, stop).await;
    })
}

/// Nobody listens any more.
struct InboxGone;

struct Source {
    config: watch::Receiver<Arc<Config>>,
    inbox: mpsc::Sender<Message>,
    registry: Registry,
    freshness: Freshness,
    /// The inbox knows that there was a list.
    listed: bool,
    /// The loss of etcd has been logged.
    lost: bool,
    cache: PathBuf,
    /// Something has changed since it was kept.
    changed: bool,
    kept: Option<Instant>,
    told: Instant,
}

impl Source {
    async fn run(mut self, etcd: EtcdConfig, stop: CancellationToken) -> Result<(), InboxGone> {
        if self.registry.read.is_some() {
            let fault = "not heard since the start; what was read last is in force";
            self.freshness.fault = Some(fault.into());
            self.tell().await?;
        }
        self.tell_freshness().await?;
        let mut heard = follow(etcd, self.registry.root().to_owned());
        loop {
            let config = self.config.borrow_and_update().clone();
            let Some(nodes) = &config.nodes else {
                // Taken out of the file: that is believed at the next start.
                tokio::select! {
                    changed = self.config.changed() => changed.map_err(|_| InboxGone)?,
                    () = stop.cancelled() => return Ok(()),
                }
                continue;
            };
            let far = Instant::now() + TELL_EVERY;
            let keep = self.kept.map_or_else(Instant::now, |kept| kept + TELL_EVERY);
            let due = self.registry.due(nodes.keep);
            tokio::select! {
                heard = heard.recv() => match heard {
                    Some(heard) => self.hear(heard, nodes.keep).await?,
                    None => return Ok(()),
                },
                changed = self.config.changed() => {
                    changed.map_err(|_| InboxGone)?;
                    self.registry.all_dirty();
                    self.tell().await?;
                }
                () = sleep_until(due.unwrap_or(far)), if due.is_some() => {
                    self.registry.settle(Instant::now(), nodes.keep);
                    self.tell().await?;
                    self.tell_freshness().await?;
                }
                () = sleep_until(keep), if self.changed => self.keep().await,
                () = stop.cancelled() => {
                    self.keep().await;
                    return Ok(());
                }
            }
        }
    }

    async fn hear(&mut self, heard: Heard, keep: Duration) -> Result<(), InboxGone> {
        let (now, today) = (Instant::now(), SystemTime::now());
        match heard {
            Heard::Snapshot(snapshot) => {
                self.registry.reset(snapshot, now, keep);
                self.freshness.last_full_read = Some(today);
            }
            Heard::Changes(changes) => self.registry.change(changes, now, keep),
            Heard::Alive => {}
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
        let held = self.registry.held();
        if held.is_some() && self.freshness.fault != held {
            tracing::error!(source = SOURCE, "{}", held.as_deref().unwrap_or_default());
        }
        self.lost = false;
        self.registry.read = Some(today);
        let renewed = !self.freshness.connected || self.freshness.fault != held;
        self.freshness.connected = true;
        self.freshness.last_heard = Some(today);
        self.freshness.fault = held;
        self.tell().await?;
        if renewed || now - self.told >= TELL_EVERY {
            self.told = now;
            self.tell_all_freshness().await?;
        }
        Ok(())
    }

    /// Says what is different.
    async fn tell(&mut self) -> Result<(), InboxGone> {
        let config = self.config.borrow().clone();
        let dirty = self.registry.take_dirty();
        self.changed |= dirty != registry::Dirty::default();
        for name in &dirty.forgotten {
            tracing::info!(node = name, "forgotten: it was not heard for `nodes.keep`");
            self.send(&source(name), Update::End).await?;
        }
        for name in &dirty.nodes {
            let Some(node) = self.registry.node(name) else {
                continue;
            };
            let view = View::new(name, node, &config);
            self.send(&view.site.source, Update::Reset(view.objects()))
                .await?;
            let freshness = self.node_freshness(node);
            if let Some(fault) = &freshness.fault {
                tracing::warn!(node = name, "{fault}");
            }
            self.send(&view.site.source, Update::Freshness(freshness)).await?;
        }
        for (name, id) in &dirty.containers {
            let Some(node) = self.registry.node(name) else {
                continue;
            };
            let view = View::new(name, node, &config);
            let object = node.containers.get(id).and_then(|entry| view.object(id, entry));
            let update = object.map_or_else(|| Update::Remove(id.clone()), Update::Put);
            self.send(&view.site.source, update).await?;
        }
        if !std::mem::replace(&mut self.listed, true) || dirty.strange {
            // After all nodes: whoever waits for this one has heard them.
            let update = Update::Reset(strangers(&self.registry).into_iter().collect());
            self.send(SOURCE, update).await?;
        }
        Ok(())
    }

    fn node_freshness(&self, node: &Node) -> Freshness {
        let about = node.about.as_ref();
        let fault = match (node.is_lost(), node.is_in_force()) {
            (true, true) => Some("lost by etcd together with most others: its containers stay for `nodes.keep`".into()),
            (true, false) => Some(
                "lost: nothing was heard of it for the time of its lease, its containers drain; look whether the machine \
                 and its `weir node` run and reach etcd"
                    .into(),
            ),
            _ => about
                .and_then(|about| about.fault.as_ref())
                .map(|fault| format!("its engine is not heard, what was known last is in force: {fault}")),
        };
        Freshness {
            connected: fault.is_none(),
            last_heard: self.registry.read.filter(|_| !node.is_lost()),
            last_full_read: self.freshness.last_full_read,
            fault,
            via: None,
        }
    }

    async fn tell_all_freshness(&self) -> Result<(), InboxGone> {
        for name in self.registry.names() {
            let Some(node) = self.registry.node(name).filter(|node| !node.is_lost()) else {
                continue;
            };
            let freshness = self.node_freshness(node);
            self.send(&source(name), Update::Freshness(freshness)).await?;
        }
        self.tell_freshness().await
    }

    async fn tell_freshness(&self) -> Result<(), InboxGone> {
        self.send(SOURCE, Update::Freshness(self.freshness.clone())).await
    }

    async fn send(&self, source: &str, update: Update) -> Result<(), InboxGone> {
        let message = Message {
            source: SourceId(source.into()),
            update,
        };
        self.inbox.send(message).await.map_err(|_| InboxGone)
    }

    /// Keeps what is known for the next start.
    async fn keep(&mut self) {
        (self.kept, self.changed) = (Some(Instant::now()), false);
        let (path, registry) = (self.cache.clone(), self.registry.clone());
        let kept = tokio::task::spawn_blocking(move || cache::keep(&path, &registry)).await;
        if let Ok(Err(fault)) = kept {
            tracing::warn!(source = SOURCE, "{fault}");
        }
    }
}
