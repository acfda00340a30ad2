//! Health: which backends are fit for new flows, as checks and the datapath see it.
//!
//! Whom to check is a value that the reconciler publishes ([`Targets`]); what comes of it are [`Verdict`]s in its inbox,
//! one input among others. [`Judge`] has the thresholds and [`pace`] the times, both pure; [`probe`] makes the real
//! connections, [`task`] runs them, and [`passive`] judges by what the datapath counts.

mod judge;
pub mod pace;
pub mod passive;
pub mod probe;
pub mod task;

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::SystemTime};

use serde::{Deserialize, Serialize};

pub use judge::{Judge, Standing};

use crate::model::{Check, Passive, ServiceAddress};

/// Name under which verdicts come into the inbox.
pub const SOURCE: &str = "health";
/// A whole share of new flows, in tenths.
pub const WHOLE: u8 = 10;

/// One backend of one service, or one upstream of the routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The service. `None`: the routes; their container says how an upstream is checked, so once is enough for all of them.
    pub service: Option<ServiceAddress>,
    /// The backend's address and port.
    pub backend: SocketAddr,
}

/// Whom to check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    /// Backends with an active check.
    pub active: BTreeMap<Key, Target>,
    /// Services with passive ejection.
    pub passive: BTreeMap<ServiceAddress, Passive>,
}

/// A backend to check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Tells the users of one address apart: a verdict about an earlier one is void.
    pub generation: u64,
    /// How.
    pub check: Arc<Check>,
    /// What it did when its check began.
    pub before: Before,
}

/// What a backend did before its check began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// It is new: it serves once it has passed.
    New,
    /// It served: it goes on until it has failed often enough.
    Served,
    /// It was there and did not serve: it stays out until it has passed often enough.
    Waited,
}

/// Who judges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum By {
    /// The active check.
    Check,
    /// What the datapath counts.
    Passive,
}

/// A judgement about one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whom.
    pub key: Key,
    /// [`Target::generation`] of an active check; 0 of the passive one.
    pub generation: u64,
    /// By whom.
    pub by: By,
    /// Fit for new flows.
    pub fit: bool,
    /// Tenths of its share, 1 to [`WHOLE`].
    pub tenths: u8,
    /// Why, for people.
    pub reason: String,
    /// Since when.
    pub since: SystemTime,
}

/// How the checks go, for status and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Backends with an active check.
    pub targets: usize,
    /// Checks under way.
    pub running: usize,
    /// Checks passed since the agent started.
    pub passed: u64,
    /// Checks failed since the agent started.
    pub failed: u64,
    /// Checks that could not be made for a reason of this node's own; they say nothing of the backend.
    pub impossible: u64,
    /// Backends ejected at the moment by what the datapath counts.
    pub ejected: usize,
    /// Why checks cannot be made.
    pub faults: Vec<String>,
}
