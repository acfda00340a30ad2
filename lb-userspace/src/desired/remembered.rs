//! Services from labels that outlive their last container: with their settings, without backends.
//!
//! Without this, a service would end with its last container, and its clients would run into silence instead of the
//! answer that `when-empty` promises.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::{OPERATOR_SOURCE, Wanted};
use crate::{
    model::{ServiceAddress, ServiceSettings},
    source::etcd,
};

/// Which services are remembered, and for how long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// From the end of the last container on; zero: not at all.
    pub term: Duration,
    /// The configured VIPs: services of other addresses are forgotten at once.
    pub vips: BTreeSet<IpAddr>,
}

/// A service whose last container is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    /// Name for people.
    pub name: String,
    /// Address.
    pub address: ServiceAddress,
    /// Settings.
    pub settings: ServiceSettings,
    /// Source of its last container.
    pub source: String,
    /// When the object that it had its settings from was created.
    pub created: SystemTime,
    /// When its last container went.
    pub since: SystemTime,
}

/// The remembered services.
#[derive(Debug, Default)]
pub(super) struct RememberedServices {
    retention: Retention,
    services: BTreeMap<ServiceAddress, Remembered>,
}

// === impl Remembered ===

impl Remembered {
    fn expires(&self, term: Duration) -> SystemTime {
        self.since + term
    }
}

// === impl RememberedServices ===

impl RememberedServices {
    /// Sets the rules. Returns the services that they forget.
    pub(super) fn set_retention(&mut self, retention: Retention, today: SystemTime) -> Vec<ServiceAddress> {
        self.retention = retention;
        self.expire(today)
    }

    /// Takes over what an earlier agent remembered. Returns the services that are remembered now.
    pub(super) fn restore(&mut self, services: Vec<Remembered>, today: SystemTime) -> Vec<ServiceAddress> {
        for mut service in services {
            // A clock that was set back must not make the term longer.
            service.since = service.since.min(today);
            self.services.insert(service.address, service);
        }
        self.expire(today);
        self.services.keys().copied().collect()
    }

    /// Forgets what has expired or has lost its VIP, and returns it.
    pub(super) fn expire(&mut self, today: SystemTime) -> Vec<ServiceAddress> {
        let Retention { term, vips } = &self.retention;
        let gone: Vec<ServiceAddress> = self
            .services
            .values()
            .filter(|service| service.expires(*term) <= today || !vips.contains(&service.address.vip))
            .map(|service| service.address)
            .collect();
        for address in &gone {
            self.services.remove(address);
        }
        gone
    }

    /// A service without containers: remembered from now on if `last` is a service from labels. Returns the service as it
    /// is remembered, and whether it was not before.
    pub(super) fn keep(
        &mut self,
        address: ServiceAddress,
        last: Option<&Wanted>,
        today: SystemTime,
    ) -> (Option<&Remembered>, bool) {
        let new = match last {
            Some(last) if !self.services.contains_key(&address) => self.admits(last),
            _ => false,
        };
        if let Some(last) = last.filter(|_| new) {
            let remembered = Remembered {
                name: last.service.name.clone(),
                address,
                settings: last.service.settings.clone(),
                source: last.source.clone(),
                created: last.created,
                since: today,
            };
            self.services.insert(address, remembered);
        }
        (self.services.get(&address), new)
    }

    /// What the operator takes out of a file or of etcd is meant to be gone, and so is what has expired.
    fn admits(&self, last: &Wanted) -> bool {
        let from_labels = last.source != OPERATOR_SOURCE && last.source != etcd::SOURCE;
        from_labels
            && last.kept_until.is_none()
            && !self.retention.term.is_zero()
            && self.retention.vips.contains(&last.service.address.vip)
    }

    /// It has containers again; whether it was remembered.
    pub(super) fn forget(&mut self, address: &ServiceAddress) -> bool {
        self.services.remove(address).is_some()
    }

    /// When the next one expires.
    pub(super) fn next_expiry(&self) -> Option<SystemTime> {
        self.services
            .values()
            .map(|service| service.expires(self.retention.term))
            .min()
    }

    /// When this one expires.
    pub(super) fn expiry(&self, address: &ServiceAddress) -> Option<SystemTime> {
        Some(self.services.get(address)?.expires(self.retention.term))
    }

    /// All of them, for the next agent.
    pub(super) fn all(&self) -> impl Iterator<Item = &Remembered> {
        self.services.values()
    }
}
