//! Docker's events → what to do about each. Pure: no event touches the network here.
//!
//! Events of one container come in order. What Docker answers to an inspection is newer than the event that caused
//! it and older than the next one; a ticket tells answers that a later event has overtaken.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use bollard::models::{EventMessage, EventMessageTypeEnum};

use super::{
    container::{Container, RunState},
    signal,
};
use crate::source::labels::is_ours;

/// Actions asked of Docker. `exec_*` is not among them: a HEALTHCHECK makes three of those each time.
pub const ACTIONS: &[&str] = &[
    "start",
    "restart",
    "kill",
    "die",
    "destroy",
    "pause",
    "unpause",
    "health_status",
    "rename",
    "update",
    "connect",
    "disconnect",
];

/// An event that concerns a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The container.
    pub id: String,
    /// When, by Docker's clock.
    pub at: SystemTime,
    /// It has a label of ours; events of networks do not tell.
    pub ours: bool,
    /// What happened.
    pub kind: Kind,
}

/// What happened to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It was sent a signal.
    Kill(u8),
    /// It ended, or is gone altogether.
    Ended,
    /// It began to run.
    Started,
    /// Anything else: Docker must be asked.
    Changed,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    Ignore,
    /// Ask Docker about this container and hand the answer to [`Cache::on_inspected`].
    Inspect { id: String, ticket: u64 },
    /// Tell what this container wishes, from what is known already.
    Put(String),
    /// Tell that this container is gone.
    Remove(String),
}

/// What is known of every container with a label of ours.
#[derive(Debug, Default)]
pub struct Cache {
    containers: BTreeMap<String, Container>,
    /// Signals sent to a container during its life, each with the time of the last.
    kills: BTreeMap<String, BTreeMap<u8, SystemTime>>,
    /// The last inspection asked for and not yet answered.
    asked: BTreeMap<String, u64>,
    next_ticket: u64,
    /// While the complete list is being read: what events said meanwhile.
    listing: Option<Meanwhile>,
}

/// What events said while the complete list was being read.
#[derive(Debug, Default)]
struct Meanwhile {
    /// Containers that are known better than by the list.
    fresh: BTreeSet<String>,
    /// Containers that ended, and when.
    ended: BTreeMap<String, SystemTime>,
}

// === impl Event ===

impl Event {
    /// What Docker said; `None` when it concerns no container or nothing that matters.
    pub fn parse(message: &EventMessage) -> Option<Self> {
        let action = message.action.as_deref()?;
        // exec_create, exec_start, exec_die, export, extract-to-dir: nothing that begins so is of interest, and there
        // are hundreds a minute.
        if action.as_bytes().first() == Some(&b'e') {
            return None;
        }
        let actor = message.actor.as_ref()?;
        let attribute = |name: &str| actor.attributes.as_ref()?.get(name);
        let at = message.time_nano.and_then(|nanos| u64::try_from(nanos).ok());
        let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(at.unwrap_or_default());
        if message.typ == Some(EventMessageTypeEnum::NETWORK) {
            let id = attribute("container")?.clone();
            return matches!(action, "connect" | "disconnect").then_some(Self {
                id,
                at,
                ours: false,
                kind: Kind::Changed,
            });
        }
        let kind = match action {
            "kill" => Kind::Kill(signal::number(attribute("signal")?)?),
            "die" | "destroy" => Kind::Ended,
            "start" => Kind::Started,
            "restart" | "pause" | "unpause" | "rename" | "update" => Kind::Changed,
            // `health_status: healthy`
            other if other.starts_with("health_status") => Kind::Changed,
            _ => return None,
        };
        Some(Self {
            id: actor.id.clone()?,
            at,
            ours: is_ours(actor.attributes.iter().flatten().map(|(key, _)| key.as_str())),
            kind,
        })
    }
}

// === impl Cache ===

impl Cache {
    /// What an event calls for.
    pub fn on_event(&mut self, event: &Event) -> Action {
        let known = self.containers.get_mut(&event.id);
        if !event.ours && known.is_none() && !self.asked.contains_key(&event.id) {
            return Action::Ignore;
        }
        match event.kind {
            Kind::Kill(number) => {
                self.kills
                    .entry(event.id.clone())
                    .or_default()
                    .insert(number, event.at);
                match known {
                    // No question first: the container is closing its listener this very moment.
                    Some(container) if stopped_by(container, number, event.at) && !container.stopping => {
                        container.stopping = true;
                        Action::Put(event.id.clone())
                    }
                    Some(_) => Action::Ignore,
                    // An answer or a list is on its way and will meet the signal noted above.
                    None if self.asked.contains_key(&event.id) || self.listing.is_some() => Action::Ignore,
                    None => self.inspect(&event.id),
                }
            }
            // A late word about an earlier life.
            Kind::Ended if known.is_some_and(|container| event.at < container.started) => Action::Ignore,
            Kind::Ended => {
                self.kills.remove(&event.id);
                self.asked.remove(&event.id);
                if let Some(meanwhile) = &mut self.listing {
                    meanwhile.fresh.remove(&event.id);
                    meanwhile.ended.insert(event.id.clone(), event.at);
                }
                match self.containers.remove(&event.id) {
                    Some(_) => Action::Remove(event.id.clone()),
                    None => Action::Ignore,
                }
            }
            Kind::Started => {
                // Signals of an earlier life; a later one would have been heard later.
                self.kills.remove(&event.id);
                self.inspect(&event.id)
            }
            Kind::Changed => self.inspect(&event.id),
        }
    }

    fn inspect(&mut self, id: &str) -> Action {
        self.next_ticket += 1;
        self.asked.insert(id.to_owned(), self.next_ticket);
        Action::Inspect {
            id: id.to_owned(),
            ticket: self.next_ticket,
        }
    }

    /// What Docker's answer calls for; `None`: there is no such container.
    pub fn on_inspected(&mut self, id: &str, ticket: u64, answer: Option<Container>) -> Action {
        if self.asked.get(id) != Some(&ticket) {
            return Action::Ignore;
        }
        self.asked.remove(id);
        let answer = answer.filter(|container| {
            container.state != RunState::Stopped && is_ours(container.labels.keys().map(String::as_str))
        });
        match answer {
            Some(container) => {
                if let Some(meanwhile) = &mut self.listing {
                    meanwhile.fresh.insert(id.to_owned());
                }
                self.keep(container);
                Action::Put(id.to_owned())
            }
            None if self.containers.remove(id).is_some() => Action::Remove(id.to_owned()),
            None => Action::Ignore,
        }
    }

    /// Keeps a container; that it was told to stop stays true for this life of it.
    fn keep(&mut self, mut container: Container) {
        let told = self.kills.get(&container.id).is_some_and(|kills| {
            kills
                .iter()
                .any(|(number, at)| stopped_by(&container, *number, *at))
        });
        let before = self.containers.get(&container.id);
        container.stopping |= told || before.is_some_and(|b| b.stopping && b.started == container.started);
        self.containers.insert(container.id.clone(), container);
    }

    /// The complete list is about to be read: what is heard from now on may be newer than the list.
    pub fn begin_listing(&mut self) {
        self.asked.clear();
        self.listing = Some(Meanwhile::default());
    }

    /// Docker could not answer: what was known stays.
    pub fn on_unclear(&mut self, id: &str, ticket: u64) {
        if self.asked.get(id) == Some(&ticket) {
            self.asked.remove(id);
        }
    }

    /// The complete list has been read; of the `unclear` ones Docker could say nothing.
    pub fn finish_listing(&mut self, list: Vec<Container>, unclear: &[String]) {
        let meanwhile = self.listing.take().unwrap_or_default();
        let ids = list.iter().map(|container| &container.id);
        let listed: BTreeSet<String> = ids.chain(unclear).cloned().collect();
        self.containers
            .retain(|id, _| listed.contains(id) || meanwhile.fresh.contains(id));
        for container in list {
            let ended = meanwhile
                .ended
                .get(&container.id)
                .is_some_and(|at| *at >= container.started);
            if !ended && container.state != RunState::Stopped && !meanwhile.fresh.contains(&container.id) {
                self.keep(container);
            }
        }
        let (containers, asked) = (&self.containers, &self.asked);
        self.kills
            .retain(|id, _| containers.contains_key(id) || asked.contains_key(id));
    }

    /// One container.
    pub fn container(&self, id: &str) -> Option<&Container> {
        self.containers.get(id)
    }

    /// All containers.
    pub fn containers(&self) -> Vec<Container> {
        self.containers.values().cloned().collect()
    }
}

/// Whether this signal, sent then, ends this life of the container.
fn stopped_by(container: &Container, number: u8, at: SystemTime) -> bool {
    at >= container.started && signal::stops(number, container.stop_signal)
}

#[cfg(test)]
mod tests;
