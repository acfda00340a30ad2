//! What etcd holds of ours, what of it is good, and what it comes to. Pure.
//!
//! A text with a fault leaves the last good one in force. A store that has been wiped says that there is nothing, and so
//! does one whose every key was deleted by mistake: deletions are believed only while `<prefix>/config` is there, or
//! some service is if there never was a `config`. Until then they are held back, see [`Mirror::held`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::{
    config::{Config, ConfigErrors, Policy, Shared, StaticService},
    etcd::{Change, Key, Snapshot},
    model::{Rejection, ServiceAddress},
    // Where the keys of nodes begin: not this source's.
    node::facts::NODES,
    source::Object,
};

/// The key, below the prefix, of what all nodes share.
pub const CONFIG: &str = "config";
/// Where the keys of services begin, below the prefix.
pub const SERVICES: &str = "services/";

/// Our part of the store as of the last read.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Mirror {
    /// `<prefix>/`.
    root: String,
    /// When etcd last said that this is the present.
    pub read: Option<SystemTime>,
    /// By the name below the prefix: `config`, `services/web`.
    keys: BTreeMap<String, Text>,
    /// Deletions are held back.
    holding: bool,
    /// Keys below the prefix that mean nothing: slips of somebody's pen.
    #[serde(skip)]
    strange: BTreeSet<String>,
    /// Nothing of it is in force.
    #[serde(skip)]
    proposed: bool,
    /// Policy by which the texts were judged.
    #[serde(skip)]
    judged_by: Option<Policy>,
}

/// One key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Text {
    text: String,
    created: i64,
    revision: i64,
    /// The last text without a fault and its revision, if it is not this one.
    good: Option<(String, i64)>,
    /// The store does not have it any more; that is not believed yet.
    missing: bool,
    /// What the text comes to under the policy of now.
    #[serde(skip)]
    verdict: Option<Verdict>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Verdict {
    service: Option<StaticService>,
    faults: Option<ConfigErrors>,
    /// It has faults, and the last good text does not.
    old_in_force: bool,
}

/// What the keys come to.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Services, and what of the keys was refused, by object id.
    pub objects: BTreeMap<String, Object>,
    /// What all nodes share.
    pub shared: Arc<Shared>,
}

// === impl Mirror ===

impl Mirror {
    /// Of the keys below `prefix`, none of them read yet.
    pub fn new(prefix: &str) -> Self {
        Self {
            root: format!("{prefix}/"),
            ..Self::default()
        }
    }

    /// Of keys that are judged before they are written: nothing else is in force.
    pub fn proposed(prefix: &str, keys: Vec<Key>) -> Self {
        let mut mirror = Self {
            proposed: true,
            ..Self::new(prefix)
        };
        keys.into_iter().for_each(|key| mirror.put(key));
        mirror
    }

    /// What all keys begin with.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// Takes over a complete read.
    pub fn reset(&mut self, snapshot: Snapshot) {
        for text in self.keys.values_mut() {
            text.missing = true;
        }
        self.strange.clear();
        for key in snapshot.keys {
            self.put(key);
        }
        self.settle();
    }

    /// Takes over changes.
    pub fn change(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Put(key) => self.put(key),
                Change::Delete { name, .. } => {
                    self.strange.remove(&name);
                    let text = self.name(&name).and_then(|name| self.keys.get_mut(&name));
                    if let Some(text) = text {
                        text.missing = true;
                    }
                }
            }
        }
        self.settle();
    }

    /// Whether any of these changes is none of a node's.
    pub fn concerns(&self, changes: &[Change]) -> bool {
        let of_node = |change: &Change| {
            let name = match change {
                Change::Put(key) => &key.name,
                Change::Delete { name, .. } => name,
            };
            let name = name.strip_prefix(&self.root);
            name.is_some_and(|name| name.starts_with(NODES))
        };
        !changes.iter().all(of_node)
    }

    /// The name below the prefix of a key of ours.
    fn name(&self, key: &str) -> Option<String> {
        let name = key.strip_prefix(&self.root)?;
        (name == CONFIG || name.starts_with(SERVICES)).then(|| name.to_owned())
    }

    fn put(&mut self, key: Key) {
        let Some(name) = self.name(&key.name) else {
            let name = key.name.strip_prefix(&self.root);
            if name.is_some_and(|name| !name.starts_with(NODES)) {
                self.strange.insert(key.name);
            }
            return;
        };
        let mut new = Text {
            text: key.text,
            created: key.created,
            revision: key.revision,
            good: None,
            missing: false,
            verdict: None,
        };
        if let Some(old) = self.keys.remove(&name) {
            if old.text == new.text {
                (new.good, new.verdict) = (old.good, old.verdict);
            } else {
                // Of texts that were never judged none is known to be good.
                let faulty = old.verdict.is_none_or(|verdict| verdict.faults.is_some());
                new.good = if faulty {
                    old.good
                } else {
                    Some((old.text, old.revision))
                };
            }
        }
        self.keys.insert(name, new);
    }

    /// Decides whether what is missing is to be believed, and forgets it if so.
    fn settle(&mut self) {
        let missing = self.missing();
        let config = self.keys.get(CONFIG);
        let config_is_there = config.is_some_and(|config| !config.missing);
        let loss = config.is_some() || missing == self.keys.len() || self.holding;
        self.holding = missing > 0 && !config_is_there && loss;
        if !self.holding {
            self.keys.retain(|_, text| !text.missing);
        }
    }

    fn missing(&self) -> usize {
        self.keys.values().filter(|text| text.missing).count()
    }

    /// Why deletions are held back, if they are.
    pub fn held(&self) -> Option<String> {
        self.holding.then(|| {
            let (root, missing) = (&self.root, self.missing());
            format!(
                "{root}{CONFIG} is not in etcd: {missing} deleted key(s) stay in force; put back what shall be and then \
                 {root}{CONFIG} (it may be empty), or that alone to confirm the deletion"
            )
        })
    }

    /// Keys of faulty texts for which no good one is known, and the revision of the oldest text that is: the store may
    /// remember an older one.
    pub fn without_good(&self) -> Vec<(String, i64)> {
        let lost = |text: &Text| {
            let faulty = |verdict: &Verdict| verdict.faults.is_some() && !verdict.old_in_force;
            !text.missing && text.verdict.as_ref().is_some_and(faulty)
        };
        let oldest = |text: &Text| {
            text.good
                .as_ref()
                .map_or(text.revision, |(_, revision)| *revision)
        };
        let lost = self.keys.iter().filter(|(_, text)| lost(text));
        lost.map(|(name, text)| (format!("{}{name}", self.root), oldest(text)))
            .collect()
    }

    /// Takes over an older text of a key, to be judged.
    pub fn remember(&mut self, older: Key) {
        let name = self.name(&older.name);
        if let Some(text) = name.and_then(|name| self.keys.get_mut(&name)) {
            (text.good, text.verdict) = (Some((older.text, older.revision)), None);
        }
    }

    /// Judges what has not been judged, and says what all of it comes to for a node with this configuration.
    pub fn outcome(&mut self, node: &Config) -> Outcome {
        let mut objects = BTreeMap::new();
        let shared = Arc::new(self.shared(node, &mut objects));
        // A shared part that was checked has no fault beside a file that was.
        let joined = node.with_shared(&shared);
        let policy = joined.as_ref().map_or(&node.policy, |joined| &joined.policy);
        self.judge(policy);
        for object in self.services().into_iter().chain(self.strangers()) {
            objects.insert(object.id.clone(), object);
        }
        Outcome { objects, shared }
    }

    /// What `<prefix>/config` says, or said when it was last good.
    fn shared(&mut self, node: &Config, objects: &mut BTreeMap<String, Object>) -> Shared {
        let Some(config) = self.keys.get_mut(CONFIG) else {
            return Shared::default();
        };
        let key = format!("{}{CONFIG}", self.root);
        match Shared::parse(&key, &config.text, node) {
            Ok(shared) => {
                config.verdict = Some(Verdict::default());
                shared
            }
            Err(faults) => {
                let good = config.good.as_ref();
                let old = good.and_then(|(text, _)| Shared::parse(&key, text, node).ok());
                let in_force = good.filter(|_| old.is_some()).map(|(_, revision)| *revision);
                let mut object = object(&key, CONFIG, config.created);
                object.rejections = rejections(&faults, self.proposed, in_force);
                objects.insert(object.id.clone(), object);
                config.verdict = Some(Verdict {
                    service: None,
                    faults: Some(faults),
                    old_in_force: old.is_some(),
                });
                old.unwrap_or_default()
            }
        }
    }

    fn judge(&mut self, policy: &Policy) {
        if self.judged_by.as_ref() != Some(policy) {
            self.judged_by = Some(policy.clone());
            for (_, text) in self.keys.iter_mut().filter(|(name, _)| *name != CONFIG) {
                text.verdict = None;
            }
        }
        for (name, text) in &mut self.keys {
            let Some(service) = name.strip_prefix(SERVICES) else {
                continue;
            };
            let key = format!("{}{name}", self.root);
            let parse = |text: &str| StaticService::parse(&key, service, text, policy);
            text.verdict.get_or_insert_with(|| match parse(&text.text) {
                Ok(service) => Verdict {
                    service: Some(service),
                    ..Verdict::default()
                },
                Err(faults) => {
                    let old = text.good.as_ref().and_then(|(good, _)| parse(good).ok());
                    Verdict {
                        old_in_force: old.is_some(),
                        service: old,
                        faults: Some(faults),
                    }
                }
            });
        }
    }

    /// Keys that mean nothing, by name.
    fn strangers(&self) -> Option<Object> {
        let rejection = |key: &String| Rejection {
            source: super::SOURCE.into(),
            object: key.clone(),
            fault: "is no key of Weir's".into(),
            remedy: format!(
                "write {0}{CONFIG} or {0}{SERVICES}<name>, and delete this one",
                self.root
            ),
        };
        let mut object = object(&self.root, "", 0);
        object.rejections = self.strange.iter().map(rejection).collect();
        (!self.strange.is_empty()).then_some(object)
    }

    /// The services, the oldest first: of two that claim the same address it has it.
    fn services(&self) -> Vec<Object> {
        let mut by_age: Vec<(&String, &Text)> =
            self.keys.iter().filter(|(name, _)| *name != CONFIG).collect();
        by_age.sort_by_key(|(name, text)| (text.created, *name));
        let mut owners: BTreeMap<ServiceAddress, &str> = BTreeMap::new();
        let mut objects = Vec::new();
        for (name, text) in by_age {
            let Some(verdict) = &text.verdict else { continue };
            let key = format!("{}{name}", self.root);
            let mut object = object(&key, name, text.created);
            if let Some(faults) = &verdict.faults {
                let good = text.good.as_ref().map(|(_, revision)| *revision);
                let in_force = good.filter(|_| verdict.old_in_force);
                object.rejections = rejections(faults, self.proposed, in_force);
            }
            for wish in verdict.service.iter().flat_map(|service| &service.wishes) {
                match owners.get(&wish.address) {
                    None => {
                        owners.insert(wish.address, name);
                        object.services.push(wish.clone());
                    }
                    Some(owner) => object.rejections.push(Rejection {
                        source: super::SOURCE.into(),
                        object: format!("{key}: listen"),
                        fault: format!(
                            "{} is taken by {}{owner}, which is older",
                            wish.address, self.root
                        ),
                        remedy: "choose another port or VIP".into(),
                    }),
                }
            }
            objects.push(object);
        }
        objects
    }
}

/// An object of a key. Its age makes it younger than the file and older than any container, and is the same everywhere.
fn object(key: &str, name: &str, created: i64) -> Object {
    let age = Duration::from_micros(created.unsigned_abs());
    Object {
        id: name.to_owned(),
        name: key.to_owned(),
        created: SystemTime::UNIX_EPOCH + age,
        services: Vec::new(),
        routes: Vec::new(),
        rejections: Vec::new(),
    }
}

/// Every fault of a text; `in_force` is the revision of the good one before.
fn rejections(errors: &ConfigErrors, proposed: bool, in_force: Option<i64>) -> Vec<Rejection> {
    let consequence = match in_force {
        _ if proposed => String::new(),
        Some(revision) => format!("; its text of revision {revision} stays in force"),
        None => "; it does nothing until then".into(),
    };
    let one = |fault: &crate::config::ConfigFault| {
        let place = fault.position.map(|(line, column)| format!(":{line}:{column}"));
        Rejection {
            source: super::SOURCE.into(),
            object: format!(
                "{}{}: {}",
                errors.path.display(),
                place.unwrap_or_default(),
                fault.key
            ),
            fault: fault.fault.clone(),
            remedy: format!("{}{consequence}", fault.remedy),
        }
    };
    errors.faults.iter().map(one).collect()
}
