//! Who is told of an engine's containers, and in which words.

use tokio::sync::mpsc;

use super::container::Container;
use crate::{
    config::Policy,
    source::{
        Freshness, Message, SourceId, Update,
        labels::{self, Site},
        link::{self, Gone},
    },
};

/// What is heard of an engine: facts, not wishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Every container with a label of ours that runs or is paused.
    List(Vec<Container>),
    /// One container is new or has changed.
    Put(Box<Container>),
    /// One container is gone, by id.
    Remove(String),
    /// The connection's state changed, or a sign of life came.
    Freshness(Freshness),
    /// The engine is heard no more, by configuration.
    End,
}

/// Who is told.
pub(super) enum Outlet {
    /// This node's reconciler: what containers wish, under this policy.
    Wishes {
        inbox: mpsc::Sender<Message>,
        /// Where the containers are, and what they may claim; `None` before the first connection.
        view: Option<Box<(Site, Policy)>>,
    },
    /// Whoever tells other nodes: what containers are.
    Facts(mpsc::Sender<Heard>),
}

// === impl Outlet ===

impl Outlet {
    /// From now on containers are looked at so.
    pub(super) fn see(&mut self, site: Site, policy: &Policy) {
        if let Self::Wishes { view, .. } = self {
            *view = Some(Box::new((site, policy.clone())));
        }
    }
}

impl link::Outlet for Outlet {
    type Said = Heard;

    fn nothing() -> Heard {
        Heard::List(Vec::new())
    }

    fn end() -> Heard {
        Heard::End
    }

    fn freshness(freshness: Freshness) -> Heard {
        Heard::Freshness(freshness)
    }

    async fn say(&self, source: &SourceId, heard: Heard) -> Result<(), Gone> {
        let (inbox, view) = match self {
            Self::Facts(to) => return to.send(heard).await.map_err(|_| Gone),
            Self::Wishes { inbox, view } => (inbox, view.as_ref()),
        };
        let wish = |container: &Container| {
            let (site, policy) = &**view?;
            labels::object(container, site, policy)
        };
        let update = match heard {
            Heard::List(all) => Update::Reset(all.iter().filter_map(wish).collect()),
            Heard::Put(container) => match wish(&container) {
                Some(object) => Update::Put(object),
                None => return Ok(()),
            },
            Heard::Remove(id) => Update::Remove(id),
            Heard::Freshness(freshness) => Update::Freshness(freshness),
            Heard::End => Update::End,
        };
        let message = Message {
            source: source.clone(),
            update,
        };
        inbox.send(message).await.map_err(|_| Gone)
    }
}
