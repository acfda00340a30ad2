//! Producers of wishes. A source knows nothing of maps: it sends [`Update`]s to one inbox.

pub mod docker;
pub mod etcd;
pub mod file;
pub mod interlock;
pub mod labels;
mod link;
pub mod nodes;
pub mod swarm;

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::{
    health::Verdict,
    model::{Rejection, ServiceWish},
    route::RouteWish,
};

/// Which source an update is from. Each source owns its objects: a `Reset` replaces them all.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SourceId(pub String);

/// One object of a source (a container, a service of the file) and all it wishes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// Stable identity within its source (container id, service name).
    pub id: String,
    /// Name for people.
    pub name: String,
    /// When it was created: of two that contradict each other the older one wins; then the smaller id.
    pub created: SystemTime,
    /// What it wishes of the kernel.
    pub services: Vec<ServiceWish>,
    /// What it wishes of the L7 shim.
    pub routes: Vec<RouteWish>,
    /// What of it was refused.
    pub rejections: Vec<Rejection>,
}

/// What a source says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// The complete list. The first one says that the source has been read; after a reconnect there is another.
    Reset(Vec<Object>),
    /// One object is new or has changed.
    Put(Object),
    /// One object is gone: its backends drain, then leave.
    Remove(String),
    /// The connection's state changed, or a sign of life came.
    Freshness(Freshness),
    /// The source is no more, and all its objects with it.
    End,
    /// Which backends are fit: from the health checks, which own no objects.
    Verdicts(Vec<Verdict>),
}

/// How current a source is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Freshness {
    /// Connected now.
    pub connected: bool,
    /// Last event or answer.
    pub last_heard: Option<SystemTime>,
    /// Last complete list.
    pub last_full_read: Option<SystemTime>,
    /// Why it is not connected, or what is wrong at the moment.
    pub fault: Option<String>,
    /// Which of several endpoints is used.
    pub via: Option<String>,
}

/// An update and where it is from; the inbox is `tokio::sync::mpsc::Sender<Message>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The source.
    pub source: SourceId,
    /// What it says.
    pub update: Update,
}
