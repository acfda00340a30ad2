//! Faults of keys that are there or shall be.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    time::Instant,
};

use lb_common::limits::MAX_ACL_ENTRIES;

use super::Desk;
use crate::{
    datapath::Capacities,
    desired::{Heard, OPERATOR_SOURCE},
    etcd::Key,
    model::Rejection,
    plan::preview::{Preview, preview},
    source::{Message, Object, SourceId, Update, etcd, file},
};

impl Desk {
    /// Everything wrong with these keys on this node.
    pub(super) fn judge(&self, keys: Vec<Key>) -> Vec<Rejection> {
        self.heard(self.objects(keys)).rejections().into_iter().collect()
    }

    fn objects(&self, keys: Vec<Key>) -> BTreeMap<String, Object> {
        etcd::mirror::Mirror::proposed(&self.etcd.prefix, keys)
            .outcome(&self.node)
            .objects
    }

    /// What the reconciler would hear of these keys and of this node's file.
    fn heard(&self, objects: BTreeMap<String, Object>) -> Heard {
        let mut heard = Heard::default();
        for (source, objects) in [
            (OPERATOR_SOURCE, file::objects(&self.node)),
            (etcd::SOURCE, objects.into_values().collect()),
        ] {
            heard.absorb(Message {
                source: SourceId(source.into()),
                update: Update::Reset(objects),
            });
        }
        heard.refresh(std::time::SystemTime::now());
        heard
    }

    /// The keys with this one changed: another text, or gone.
    fn changed(&self, name: &str, text: Option<&str>) -> Vec<Key> {
        let full = format!("{}{name}", self.root());
        let mut keys: Vec<Key> = self.keys.iter().filter(|key| key.name != full).cloned().collect();
        let old = self.key(name);
        keys.extend(text.map(|text| Key {
            name: full,
            text: text.to_owned(),
            // A new key is the youngest.
            created: old.map_or(i64::MAX, |key| key.created),
            revision: i64::MAX,
            lease: 0,
        }));
        keys
    }

    /// What is wrong with this change: every fault of the text, and every fault of another key that it makes.
    pub(super) fn faults_of_change(&self, name: &str, text: Option<&str>) -> Vec<Rejection> {
        let full = format!("{}{name}", self.root());
        let before = self.judge(self.keys.clone());
        let mut after = self.judge(self.changed(name, text));
        after.retain(|fault| is_of(fault, &full) || !before.contains(fault));
        after
    }

    /// What this change would do on a node with this configuration, as far as it depends on the file and on etcd.
    pub(super) fn preview(&self, name: &str, text: Option<&str>) -> Preview {
        let limits = &self.node.limits;
        let capacities = Capacities {
            services: limits.services,
            backends: limits.backends,
            ring_rows: limits.ring_rows,
            acl: MAX_ACL_ENTRIES,
            flows4: limits.flows4,
            flows6: limits.flows6,
        };
        let before = self.heard(self.objects(self.keys.clone()));
        let after = self.heard(self.objects(self.changed(name, text)));
        preview(before.desired(), after.desired(), &capacities, Instant::now())
    }
}

/// Whether a fault is of this key: its object begins with the key and a colon.
pub(super) fn is_of(fault: &Rejection, key: &str) -> bool {
    fault
        .object
        .strip_prefix(key)
        .is_some_and(|rest| rest.starts_with(':'))
}

/// Every fault, a line each.
pub(super) fn tell(faults: &[Rejection]) -> io::Result<()> {
    let mut err = io::stderr().lock();
    writeln!(err, "weir: {} fault(s), nothing was written", faults.len())?;
    for fault in faults {
        writeln!(err, "  {}: {}; {}", fault.object, fault.fault, fault.remedy)?;
    }
    Ok(())
}
