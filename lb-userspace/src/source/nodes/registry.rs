//! Which nodes there are, what they say of their containers, and what of it is in force. Pure.
//!
//! A container that its node withdraws is gone. A node is there as long as its own key is; when that goes, the node is *lost*:
//! it died, or etcd did not hear of it for the time of its lease. One lost node drains at once. But when more than half of all
//! nodes are lost within `keep`, it is rather etcd that lost them: the containers of all of those stay in force (or are again)
//! until their nodes are back, or `keep` is over for each. After a wipe of the store they stay without a deadline.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{
    config::is_node_name,
    etcd::{Change, Key, Snapshot},
    node::facts::{ABOUT, About, CONTAINERS, Facts, NODES},
};

/// Nodes as of the last word of etcd.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Registry {
    /// `<prefix>/nodes/`.
    root: String,
    /// When etcd last said that this is the present.
    pub read: Option<SystemTime>,
    cluster: u64,
    revision: i64,
    /// The store is another one than it was, and half of the nodes have not been seen in it.
    wiped: bool,
    nodes: BTreeMap<String, Node>,
    /// Keys that mean nothing.
    #[serde(skip)]
    pub strange: BTreeSet<String>,
    #[serde(skip)]
    dirty: Dirty,
}

/// One node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Node {
    /// The last good word about it.
    pub about: Option<About>,
    /// What is wrong with its key.
    pub fault: Option<String>,
    /// By id.
    pub containers: BTreeMap<String, Entry>,
    /// Since when its key is not there.
    #[serde(skip)]
    lost: Option<Instant>,
    /// Its containers are in force.
    in_force: bool,
}

/// One container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Entry {
    /// The last good text.
    pub facts: Option<Facts>,
    /// What is wrong with the text.
    pub fault: Option<String>,
    /// The key is not there: it went together with its node.
    missing: bool,
}

/// What has to be told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Nodes of which all is told anew.
    pub nodes: BTreeSet<String>,
    /// Node and container.
    pub containers: BTreeSet<(String, String)>,
    /// Nodes that are forgotten.
    pub forgotten: BTreeSet<String>,
    /// The keys that mean nothing.
    pub strange: bool,
}

/// What a key is about.
enum Name {
    Node(String),
    Container(String, String),
}

// === impl Registry ===

impl Registry {
    /// Of the keys below `prefix`, none of them read yet.
    pub fn new(prefix: &str) -> Self {
        Self {
            root: format!("{prefix}/{NODES}"),
            ..Self::default()
        }
    }

    /// As it was kept by an earlier agent: what was in force then.
    pub fn recalled(mut self) -> Self {
        self.nodes.retain(|_, node| node.in_force);
        self.all_dirty();
        self
    }

    /// What all keys begin with.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// A node.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// All nodes, lost ones too.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.nodes.keys()
    }

    /// Takes over a complete read.
    pub fn reset(&mut self, snapshot: Snapshot, now: Instant, keep: Duration) {
        let another = self.cluster != 0 && snapshot.cluster != self.cluster;
        self.wiped |= another || snapshot.revision < self.revision;
        (self.cluster, self.revision) = (snapshot.cluster, snapshot.revision);
        let present: BTreeSet<&str> = snapshot.keys.iter().map(|key| key.name.as_str()).collect();
        let root = &self.root;
        let mut gone = Vec::new();
        for (name, node) in &self.nodes {
            let keys = node
                .containers
                .keys()
                .map(|id| format!("{root}{name}/{CONTAINERS}{id}"));
            let keys = keys.chain([format!("{root}{name}/{ABOUT}")]);
            gone.extend(keys.filter(|key| !present.contains(key.as_str())));
        }
        self.dirty.strange |= !self.strange.is_empty();
        self.strange.clear();
        let deleted = gone.into_iter().map(|name| Change::Delete {
            name,
            revision: snapshot.revision,
        });
        let put = snapshot.keys.into_iter().map(Change::Put);
        self.take(deleted.chain(put).collect(), now);
        self.settle(now, keep);
    }

    /// Takes over changes in the order of their revisions; the keys of a lease that ends go in one of them.
    pub fn change(&mut self, changes: Vec<Change>, now: Instant, keep: Duration) {
        let mut rest = changes.into_iter().peekable();
        while let Some(first) = rest.next() {
            let revision = first.revision();
            self.revision = self.revision.max(revision);
            let mut together = vec![first];
            while let Some(next) = rest.next_if(|next| next.revision() == revision) {
                together.push(next);
            }
            self.take(together, now);
        }
        self.settle(now, keep);
    }

    /// Takes over what happened at one moment.
    fn take(&mut self, changes: Vec<Change>, now: Instant) {
        // First which nodes there are: the containers of one that is lost have not been withdrawn.
        for change in &changes {
            if let Change::Delete { name, .. } = change
                && let Some(Name::Node(name)) = self.name(name)
                && let Some(node) = self.nodes.get_mut(&name)
            {
                node.lost.get_or_insert(now);
                self.dirty.nodes.insert(name);
            }
        }
        for change in changes {
            match change {
                Change::Put(key) => self.put(key),
                Change::Delete { name, .. } => match self.name(&name) {
                    Some(Name::Container(node, id)) => self.withdraw(&node, &id),
                    Some(Name::Node(_)) => {}
                    None => self.dirty.strange |= self.strange.remove(&name),
                },
            }
        }
    }

    fn name(&self, key: &str) -> Option<Name> {
        let (node, rest) = key.strip_prefix(&self.root)?.split_once('/')?;
        let good = |text: &str| is_node_name(text).then(|| text.to_owned());
        match rest.strip_prefix(CONTAINERS) {
            Some(id) => Some(Name::Container(good(node)?, good(id)?)),
            None => (rest == ABOUT).then_some(Name::Node(good(node)?)),
        }
    }

    fn put(&mut self, key: Key) {
        match self.name(&key.name) {
            None => self.dirty.strange |= self.strange.insert(key.name),
            Some(Name::Node(name)) => {
                let node = self.nodes.entry(name.clone()).or_default();
                let said = serde_json::from_str::<About>(&key.text);
                let fault = said.as_ref().err().map(ToString::to_string);
                let about = said.ok().or_else(|| node.about.clone());
                if (&node.about, &node.fault) != (&about, &fault) || node.lost.is_some() {
                    self.dirty.nodes.insert(name);
                }
                (node.about, node.fault) = (about, fault);
                if node.lost.take().is_some() {
                    // It writes its own key last: what is not there by now is gone.
                    node.containers.retain(|_, entry| !entry.missing);
                }
            }
            Some(Name::Container(name, id)) => {
                // Its own key comes after those of its containers; until then nothing of it is in force.
                let node = self.nodes.entry(name.clone()).or_default();
                let old = node.containers.remove(&id).unwrap_or_default();
                let read = Facts::parse(&key.text);
                let fault = read.as_ref().err().map(ToString::to_string);
                let new = Entry {
                    facts: read.ok().or_else(|| old.facts.clone()),
                    fault,
                    missing: false,
                };
                if new != old {
                    self.dirty.containers.insert((name, id.clone()));
                }
                node.containers.insert(id, new);
            }
        }
    }

    fn withdraw(&mut self, name: &str, id: &str) {
        let Some(node) = self.nodes.get_mut(name) else {
            return;
        };
        match node.containers.get_mut(id) {
            Some(entry) if node.lost.is_some() => entry.missing = true,
            Some(_) => {
                node.containers.remove(id);
                self.dirty.containers.insert((name.to_owned(), id.to_owned()));
            }
            None => {}
        }
    }

    /// Decides which nodes are in force; when the time of one is over it has to be called again, see [`Registry::due`].
    pub fn settle(&mut self, now: Instant, keep: Duration) {
        self.wiped &= self.most_are_lost();
        let over = |node: &Node| node.lost.is_some_and(|since| since + keep <= now);
        if !self.wiped {
            let gone = self.nodes.iter().filter(|(_, node)| over(node));
            let gone: Vec<String> = gone.map(|(name, _)| name.clone()).collect();
            for name in gone {
                self.nodes.remove(&name);
                self.dirty.forgotten.insert(name);
            }
        }
        self.nodes.retain(|_, node| !node.is_empty());
        let held = self.most_are_lost();
        for (name, node) in &mut self.nodes {
            let in_force = node.about.is_some() && (node.lost.is_none() || held);
            if in_force != node.in_force {
                node.in_force = in_force;
                self.dirty.nodes.insert(name.clone());
            }
        }
        self.dirty.forgotten.retain(|name| !self.nodes.contains_key(name));
    }

    fn most_are_lost(&self) -> bool {
        let known = self.nodes.values().filter(|node| node.about.is_some());
        let (mut all, mut lost) = (0, 0);
        for node in known {
            all += 1;
            lost += usize::from(node.lost.is_some());
        }
        2 * lost > all
    }

    /// When the time of the next lost node is over.
    pub fn due(&self, keep: Duration) -> Option<Instant> {
        let lost = self.nodes.values().filter_map(|node| node.lost);
        lost.min().filter(|_| !self.wiped).map(|since| since + keep)
    }

    /// Everything has to be told anew.
    pub fn all_dirty(&mut self) {
        self.dirty.nodes = self.nodes.keys().cloned().collect();
    }

    /// What has to be told since the last call.
    pub fn take_dirty(&mut self) -> Dirty {
        let mut dirty = std::mem::take(&mut self.dirty);
        let whole = &dirty.nodes;
        dirty.containers.retain(|(node, _)| !whole.contains(node));
        dirty
    }

    /// Why the containers of lost nodes are in force, if they are.
    pub fn held(&self) -> Option<String> {
        let held = self
            .nodes
            .values()
            .filter(|node| node.lost.is_some() && node.in_force)
            .count();
        let nodes = self.nodes.len();
        (held > 0).then(|| match self.wiped {
            true => format!(
                "etcd has been wiped: {held} of {nodes} nodes are not in it (any more); their containers stay in force until \
                 half of the nodes are back. Look whether `weir node` reaches etcd on them"
            ),
            false => format!(
                "{held} of {nodes} nodes were lost together, rather by etcd than by themselves; their containers stay in force \
                 for `nodes.keep`. Look whether `weir node` reaches etcd on them"
            ),
        })
    }
}

// === impl Node ===

impl Node {
    /// Nothing is known of it.
    fn is_empty(&self) -> bool {
        self.about.is_none() && self.fault.is_none() && self.containers.is_empty()
    }

    /// Its key is not there.
    pub fn is_lost(&self) -> bool {
        self.lost.is_some()
    }

    /// Its containers are in force.
    pub fn is_in_force(&self) -> bool {
        self.in_force
    }
}
