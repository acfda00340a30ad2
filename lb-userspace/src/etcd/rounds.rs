//! From endpoint to endpoint, for whoever needs etcd all the time.

use std::time::Duration;

use super::{EtcdError, NoEndpoint};
use crate::config::EtcdConfig;

/// First wait after every endpoint has failed.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
/// Longest wait between two rounds; a session that lasted longer was a good one.
const LAST_BACKOFF: Duration = Duration::from_secs(5);

/// Which endpoint is next, and when.
#[derive(Debug)]
pub struct Rounds {
    endpoints: Vec<String>,
    at: usize,
    backoff: Duration,
    /// The last fault of each endpoint since one was good.
    faults: Vec<(String, EtcdError)>,
}

// === impl Rounds ===

impl Rounds {
    /// Begins anywhere: nodes shall not all be with the first one.
    pub fn new(config: &EtcdConfig) -> Self {
        Self {
            at: fastrand::usize(..config.endpoints.len().max(1)),
            endpoints: config.endpoints.clone(),
            backoff: FIRST_BACKOFF,
            faults: Vec::new(),
        }
    }

    /// The endpoint to use now; `None` only where a configuration names none, which is refused when it is read.
    pub fn endpoint(&self) -> Option<String> {
        self.endpoints.get(self.at % self.endpoints.len().max(1)).cloned()
    }

    /// A session with the endpoint has ended after such a time: what to tell of it, and how long to wait before the next.
    pub fn ended(&mut self, fault: EtcdError, lasted: Duration) -> (String, Duration) {
        let Some(endpoint) = self.endpoint() else {
            return (fault.to_string(), LAST_BACKOFF);
        };
        tracing::debug!(endpoint, %fault, "etcd: the session has ended");
        let good = lasted > LAST_BACKOFF;
        if good {
            (self.backoff, self.faults) = (FIRST_BACKOFF, Vec::new());
        }
        if !matches!(fault, EtcdError::Compacted(_)) {
            self.at += 1;
        }
        self.faults.retain(|(of, _)| *of != endpoint);
        self.faults.push((endpoint, fault));
        let all_failed = self.faults.len() == self.endpoints.len();
        let told = NoEndpoint(std::mem::take(&mut self.faults));
        let text = told.to_string();
        self.faults = told.0;
        if !all_failed || good {
            return (text, Duration::ZERO);
        }
        // Half fixed, half by chance: many nodes must not knock in step.
        let wait = self.backoff.mul_f64(0.5 + fastrand::f64() / 2.0);
        self.backoff = LAST_BACKOFF.min(self.backoff * 2);
        (text, wait)
    }
}
