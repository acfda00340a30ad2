//! Connections to upstreams: each worker has its own, and keeps those that are idle.

use std::{cell::RefCell, collections::HashMap, task::Context};

mod connect;
mod link;

pub use connect::{ConnectError, Connector};
pub use link::{Exchanged, Link, LocalExec, UpstreamIo};

/// Idle connections of one upstream that a worker keeps.
const MOST_IDLE: usize = 256;
/// How long an idle connection is kept, milliseconds. Servers close theirs after 5 s (Node.js) to 75 s (nginx).
const IDLE_MS: u64 = 30_000;

/// The idle connections of one worker, by upstream.
#[derive(Debug, Default)]
pub struct Pool(RefCell<HashMap<u64, Vec<Link>>>);

impl Pool {
    /// An idle connection that its upstream has not closed as far as is known; the last used first.
    pub fn take(&self, upstream: u64) -> Option<Link> {
        let mut links = self.0.borrow_mut();
        let idle = links.get_mut(&upstream)?;
        while let Some(mut link) = idle.pop() {
            if !link.is_idle(&mut Context::from_waker(std::task::Waker::noop())) {
                continue;
            }
            if let Some(shared) = link.share() {
                idle.push(link);
                return Some(shared);
            }
            return Some(link);
        }
        None
    }

    /// Keeps one that is idle.
    pub fn put(&self, upstream: u64, mut link: Link, now_ms: u64) {
        link.idle_since_ms = now_ms;
        let mut links = self.0.borrow_mut();
        let idle = links.entry(upstream).or_default();
        if idle.len() < MOST_IDLE {
            idle.push(link);
        }
    }

    /// Lets all of an upstream go: one that failed says that the others have failed too.
    pub fn forget(&self, upstream: u64) {
        self.0.borrow_mut().remove(&upstream);
    }

    /// Lets go what its upstream has closed, what nobody has used for long, and what belongs to no upstream any more.
    pub fn sweep(&self, now_ms: u64, is_known: impl Fn(u64) -> bool) {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        self.0.borrow_mut().retain(|upstream, idle| {
            idle.retain_mut(|link| now_ms < link.idle_since_ms + IDLE_MS && link.is_idle(&mut cx));
            !idle.is_empty() && is_known(*upstream)
        });
    }

    /// How many are idle.
    pub fn len(&self) -> usize {
        self.0.borrow().values().map(Vec::len).sum()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
