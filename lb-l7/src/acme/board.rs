//! What orders tell to workers and to the status page.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

/// Shared by the orders, the workers and the page. Requests look at it only if they are the authority's.
#[derive(Debug, Default)]
pub struct Board {
    thumbprint: RwLock<Option<Arc<str>>>,
    troubles: Mutex<BTreeMap<String, Trouble>>,
}

/// Orders of a host that failed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trouble {
    /// How many, since the shim began.
    pub failures: u64,
    /// What was wrong last; `None`: it has gone well since.
    pub fault: Option<String>,
}

// === impl Board ===

impl Board {
    /// The thumbprint of the account's key (RFC 8555, 8.1), once there is an account.
    pub fn thumbprint(&self) -> Option<Arc<str>> {
        self.thumbprint
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Tells the thumbprint.
    pub fn tell_thumbprint(&self, thumbprint: Option<Arc<str>>) {
        *self.thumbprint.write().unwrap_or_else(PoisonError::into_inner) = thumbprint;
    }

    /// Notes a failure; without a host: of the account or of the folder, which is one for all of them.
    pub fn failed(&self, host: &str, fault: String) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        let trouble = troubles.entry(host.to_owned()).or_default();
        trouble.failures += 1;
        trouble.fault = Some(fault);
    }

    /// Notes that it goes well.
    pub fn well(&self, host: &str) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(trouble) = troubles.get_mut(host) {
            trouble.fault = None;
        }
    }

    /// Forgets the faults of hosts that get no certificates any more; their numbers stay.
    pub fn keep(&self, hosts: &BTreeSet<String>) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = troubles
            .iter_mut()
            .filter(|(host, _)| !host.is_empty() && !hosts.contains(*host));
        for (_, trouble) in gone {
            trouble.fault = None;
        }
    }

    /// Everything that has failed, by host; the empty one is the account.
    pub fn troubles(&self) -> BTreeMap<String, Trouble> {
        self.troubles
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_and_faults_end() {
        let board = Board::default();
        board.failed("a", "no".into());
        board.failed("a", "still no".into());
        board.failed("b", "no".into());
        board.failed("", "no account".into());
        let of = |host: &str| board.troubles()[host].clone();
        assert_eq!((of("a").failures, of("a").fault), (2, Some("still no".into())));
        board.well("a");
        board.well("unknown");
        assert_eq!((of("a").failures, of("a").fault), (2, None));
        board.keep(&BTreeSet::from(["a".to_owned()]));
        assert_eq!((of("b").failures, of("b").fault), (1, None));
        assert_eq!(of("").fault, Some("no account".into()));
        assert_eq!(board.troubles().len(), 3);
    }
}
