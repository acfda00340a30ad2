//! What shall be in etcd of a node, what is, and the next step from the one to the other. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::facts::{ABOUT, About, CONTAINERS, Facts};
use crate::{
    etcd::{Key, Step},
    source::docker::{Heard, container::Container},
};

/// Changes in one step; etcd takes 128 unless it was told otherwise.
const STEP_KEYS: usize = 100;
/// Bytes in one step, well below the 1.5 MiB that etcd takes.
const STEP_BYTES: usize = 512 << 10;
/// Bytes of one text. A container whose labels are longer is not published: etcd would refuse the step, and with it all others.
const TEXT_BYTES: usize = 256 << 10;

/// The keys of one node.
#[derive(Debug)]
pub struct Ledger {
    /// `<prefix>/nodes/<node>/`.
    root: String,
    wanted: BTreeMap<String, String>,
    /// Text, and the lease that it lives under.
    written: BTreeMap<String, (String, i64)>,
    /// Keys that may differ.
    open: BTreeSet<String>,
    /// The engine has been read: what is not wanted may go.
    complete: bool,
}

// === impl Ledger ===

impl Ledger {
    /// Of the keys below `root`.
    pub fn new(root: String) -> Self {
        Self {
            root,
            wanted: BTreeMap::new(),
            written: BTreeMap::new(),
            open: BTreeSet::new(),
            complete: false,
        }
    }

    /// What all its keys begin with.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// Takes over what was heard of the engine.
    pub fn hear(&mut self, heard: Heard) {
        match heard {
            Heard::List(all) => {
                self.withdraw();
                for container in &all {
                    self.want(container);
                }
            }
            Heard::Put(container) => self.want(&container),
            Heard::Remove(id) => self.set(&format!("{CONTAINERS}{id}"), None),
            Heard::End => self.withdraw(),
            Heard::Freshness(_) => {}
        }
    }

    /// No container shall be there.
    pub fn withdraw(&mut self) {
        let about = format!("{}{ABOUT}", self.root);
        let gone = self.wanted.keys().chain(self.written.keys());
        self.open.extend(gone.filter(|key| **key != about).cloned());
        self.wanted.retain(|key, _| *key == about);
        self.complete = true;
    }

    /// This shall be said of the node.
    pub fn describe(&mut self, about: &About) {
        self.set(ABOUT, serde_json::to_string(about).ok());
    }

    fn want(&mut self, container: &Container) {
        let facts = Facts::of(container);
        let text = facts.and_then(|facts| serde_json::to_string(&facts).ok());
        let text = text.filter(|text| {
            let fits = text.len() <= TEXT_BYTES;
            if !fits {
                tracing::error!(
                    container = container.name,
                    "not published: its labels take {} bytes, more than the {TEXT_BYTES} of one key; shorten them",
                    text.len()
                );
            }
            fits
        });
        self.set(&format!("{CONTAINERS}{}", container.id), text);
    }

    fn set(&mut self, name: &str, text: Option<String>) {
        let key = format!("{}{name}", self.root);
        match text {
            Some(text) => self.wanted.insert(key.clone(), text),
            None => self.wanted.remove(&key),
        };
        self.open.insert(key);
    }

    /// Takes over what the store has.
    pub fn read(&mut self, keys: Vec<Key>) {
        let keys = keys.into_iter().map(|key| (key.name, (key.text, key.lease)));
        self.written = keys.collect();
        let all = self.wanted.keys().chain(self.written.keys());
        self.open = all.cloned().collect();
    }

    /// The next step under this lease; `None` when the store has what it shall have. What is said of the node comes last
    /// of all: when it is there, so are all its containers.
    pub fn next(&mut self, lease: i64) -> Option<Step> {
        let mut step = Step::default();
        let mut bytes = 0;
        let mut same = Vec::new();
        for key in &self.open {
            if step.put.len() + step.delete.len() >= STEP_KEYS || bytes >= STEP_BYTES {
                break;
            }
            let written = self.written.get(key);
            match self.wanted.get(key) {
                Some(text) if written.is_some_and(|(old, of)| old == text && *of == lease) => {
                    same.push(key.clone());
                }
                Some(text) => {
                    bytes += key.len() + text.len();
                    step.put.push((key.clone(), text.clone()));
                }
                None if written.is_none() => same.push(key.clone()),
                // Until the engine has been read, what an earlier one published stands, under this lease.
                None if !self.complete => match written {
                    Some((text, of)) if *of != lease => {
                        bytes += key.len() + text.len();
                        step.put.push((key.clone(), text.clone()));
                    }
                    _ => same.push(key.clone()),
                },
                None => step.delete.push(key.clone()),
            }
        }
        for key in same {
            self.open.remove(&key);
        }
        (step != Step::default()).then_some(step)
    }

    /// A step has been done.
    pub fn done(&mut self, step: Step, lease: i64) {
        for (key, text) in step.put {
            // It may be wanted otherwise by now.
            if self.wanted.get(&key).is_none_or(|wanted| *wanted == text) {
                self.open.remove(&key);
            }
            if self.complete && !self.wanted.contains_key(&key) {
                self.open.insert(key.clone());
            }
            self.written.insert(key, (text, lease));
        }
        for key in step.delete {
            if !self.wanted.contains_key(&key) {
                self.open.remove(&key);
            }
            self.written.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::labels::tests::container;

    const LABEL: (&str, &str) = ("weir.service.web.listen", "80/tcp");

    fn named(id: &str) -> Container {
        let mut container = container(&[LABEL]);
        container.id = id.into();
        container
    }

    fn list(ids: &[&str]) -> Heard {
        Heard::List(ids.iter().map(|id| named(id)).collect())
    }

    fn about() -> About {
        About {
            addresses: Vec::new(),
            version: String::new(),
            boot: "b".into(),
            ttl_s: 15,
            fault: None,
        }
    }

    /// A store, as far as the ledger knows one.
    type Store = BTreeMap<String, (String, i64)>;

    /// Does all steps; what was put and what was deleted.
    fn run(ledger: &mut Ledger, store: &mut Store, lease: i64) -> (Vec<String>, Vec<String>) {
        let short = |key: &String| key.rsplit('/').next().unwrap_or_default().to_owned();
        let (mut put, mut deleted) = (Vec::new(), Vec::new());
        while let Some(step) = ledger.next(lease) {
            assert!(step.put.len() + step.delete.len() <= STEP_KEYS);
            for (key, text) in &step.put {
                put.push(short(key));
                store.insert(key.clone(), (text.clone(), lease));
            }
            for key in &step.delete {
                deleted.push(short(key));
                store.remove(key);
            }
            ledger.done(step, lease);
        }
        (put, deleted)
    }

    fn keys(store: &Store) -> Vec<Key> {
        let key = |(name, (text, lease)): (&String, &(String, i64))| Key {
            name: name.clone(),
            text: text.clone(),
            created: 1,
            revision: 1,
            lease: *lease,
        };
        store.iter().map(key).collect()
    }

    #[test]
    fn only_what_differs_is_written_and_the_node_comes_last() {
        let (mut ledger, mut store) = (Ledger::new("/weir/nodes/n1/".into()), Store::new());
        ledger.describe(&about());
        ledger.hear(list(&["a", "b"]));
        let (put, deleted) = run(&mut ledger, &mut store, 7);
        assert_eq!(
            (put, deleted.len()),
            (vec!["a".into(), "b".into(), "node".into()], 0)
        );
        // The same again, and a container that nobody needs to know.
        ledger.hear(list(&["a", "b"]));
        ledger.hear(Heard::Put(Box::new(container(&[("com.example", "x")]))));
        assert_eq!(ledger.next(7), None);
        let mut paused = named("b");
        paused.state = crate::source::docker::container::RunState::Paused;
        ledger.hear(Heard::Put(Box::new(paused)));
        ledger.hear(Heard::Remove("a".into()));
        let (put, deleted) = run(&mut ledger, &mut store, 7);
        assert_eq!((put, deleted), (vec!["b".to_owned()], vec!["a".to_owned()]));
    }

    #[test]
    fn one_container_with_too_many_words_holds_up_no_other() {
        let mut ledger = Ledger::new("/weir/nodes/n/".into());
        let mut store = Store::new();
        let mut wordy = named("wordy");
        let label = "weir.service.web.allow".to_owned();
        wordy.labels.insert(label.clone(), "x".repeat(TEXT_BYTES));
        ledger.hear(Heard::List(vec![wordy.clone(), named("good")]));
        assert_eq!(run(&mut ledger, &mut store, 1).0, ["good"]);
        wordy.labels.insert(label, "x".repeat(TEXT_BYTES / 2));
        ledger.hear(Heard::Put(Box::new(wordy)));
        assert_eq!(run(&mut ledger, &mut store, 1).0, ["wordy"]);
    }

    #[test]
    fn a_new_lease_takes_everything_over() {
        let (mut ledger, mut store) = (Ledger::new("/weir/nodes/n1/".into()), Store::new());
        let ids: Vec<String> = (0..250).map(|id| format!("{id:03}")).collect();
        ledger.describe(&about());
        ledger.hear(list(&ids.iter().map(String::as_str).collect::<Vec<_>>()));
        assert_eq!(run(&mut ledger, &mut store, 7).0.len(), 251);
        let (put, deleted) = {
            ledger.read(keys(&store));
            run(&mut ledger, &mut store, 8)
        };
        assert_eq!((put.len(), deleted.len()), (251, 0));
        assert_eq!(put.last().map(String::as_str), Some("node"));
        // A store that was wiped.
        store.clear();
        ledger.read(Vec::new());
        assert_eq!(run(&mut ledger, &mut store, 9).0.len(), 251);
    }

    #[test]
    fn a_restart_writes_nothing_and_deletes_nothing_before_the_engine_was_read() {
        let (mut before, mut store) = (Ledger::new("/weir/nodes/n1/".into()), Store::new());
        before.describe(&about());
        before.hear(list(&["a", "b"]));
        run(&mut before, &mut store, 7);
        let mut after = Ledger::new("/weir/nodes/n1/".into());
        after.describe(&about());
        after.read(keys(&store));
        assert_eq!(after.next(7), None);
        // Under another lease they live on, too.
        after.read(keys(&store));
        assert_eq!(run(&mut after, &mut store, 8).0, ["a", "b", "node"]);
        after.hear(list(&["b"]));
        assert_eq!(run(&mut after, &mut store, 8).1, ["a"]);
        after.withdraw();
        assert_eq!(run(&mut after, &mut store, 8).1, ["b"]);
        assert_eq!(store.len(), 1, "the node itself");
    }

    #[test]
    fn what_changes_while_it_is_written_is_written_again() {
        let mut ledger = Ledger::new("/weir/nodes/n1/".into());
        ledger.hear(list(&["a"]));
        let step = ledger.next(7).unwrap();
        ledger.hear(Heard::Remove("a".into()));
        ledger.done(step, 7);
        let step = ledger.next(7).unwrap();
        assert_eq!((step.put.len(), step.delete.len()), (0, 1));
        ledger.hear(list(&["a"]));
        ledger.done(step, 7);
        assert_eq!(ledger.next(7).unwrap().put.len(), 1);
    }
}
