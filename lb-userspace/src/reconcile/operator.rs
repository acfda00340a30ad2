//! What the operator asks the reconciler for.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::Reconciler;
use crate::{
    datapath::MapError,
    desired::{Drains, DrainsError, names},
    model::Backend,
};

/// What the operator asks for.
#[derive(Debug)]
pub enum Command {
    /// Drain the backends that this names; answers how many there are now. Old flows may go on for `deadline`, or
    /// else for the drain time of each backend.
    Drain {
        backend: String,
        deadline: Option<Duration>,
        reply: oneshot::Sender<Result<usize, CommandError>>,
    },
    /// Let them serve again; answers how many drains were lifted.
    Undrain {
        backend: String,
        reply: oneshot::Sender<Result<usize, CommandError>>,
    },
    /// Read the maps back and plan everything anew.
    Resync {
        reply: oneshot::Sender<Result<usize, CommandError>>,
    },
}

/// Why a command was refused.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// Nothing has that name.
    #[error(
        "no backend is named {0}: give a name, an address or address:port as `weir status` shows it, or service/ and \
         one of them"
    )]
    Unknown(String),
    /// It was done, but a restart will undo it.
    #[error(transparent)]
    NotKept(#[from] DrainsError),
    /// The maps could not be read.
    #[error(transparent)]
    Maps(#[from] MapError),
}

impl Reconciler {
    /// Does what the operator asks, with the next pass, and answers.
    pub fn command(&mut self, command: Command, now: Instant) {
        let (reply, result) = match command {
            Command::Drain {
                backend,
                deadline,
                reply,
            } => (reply, self.drain(backend, deadline)),
            Command::Undrain { backend, reply } => (reply, self.undrain(&backend)),
            Command::Resync { reply } => {
                let result = self.resync(now).map(|()| self.programmed.services.len());
                (reply, result.map_err(Into::into))
            }
        };
        // The operator may have gone away without waiting for the answer.
        let _ = reply.send(result);
    }

    fn drain(&mut self, selector: String, deadline: Option<Duration>) -> Result<usize, CommandError> {
        let count = self.named(&selector).len();
        if count == 0 {
            return Err(CommandError::Unknown(selector));
        }
        let mut drains = self.heard.drains().clone();
        drains.0.insert(selector, deadline);
        self.keep_drains(drains)?;
        Ok(count)
    }

    fn undrain(&mut self, selector: &str) -> Result<usize, CommandError> {
        let mut drains = self.heard.drains().clone();
        let before = drains.0.len();
        let named = self.named(selector);
        drains.0.retain(|drain, _| {
            let of = |(service, backend): &(String, Backend)| names(drain, service, backend);
            drain != selector && !named.iter().any(of)
        });
        let lifted = before - drains.0.len();
        if lifted == 0 {
            return Err(CommandError::Unknown(selector.into()));
        }
        self.keep_drains(drains)?;
        Ok(lifted)
    }

    /// The backends that a selector names, each with the name of its service, and the upstreams, each with its host.
    fn named(&self, selector: &str) -> Vec<(String, Backend)> {
        let services = self.heard.desired().services.values().map(|w| &*w.service);
        let services = services.map(|service| (&service.name, &service.backends));
        let routes = self.heard.routes();
        let routes = routes.iter().map(|route| (&route.host, &route.upstreams));
        services
            .chain(routes)
            .flat_map(|(of, backends)| backends.iter().map(move |backend| (of, backend)))
            .filter(|(of, backend)| names(selector, of, backend))
            .map(|(of, backend)| (of.clone(), backend.clone()))
            .collect()
    }

    fn keep_drains(&mut self, drains: Drains) -> Result<(), DrainsError> {
        self.heard.set_drains(drains);
        match &self.options.drains {
            Some(path) => self.heard.drains().save(path),
            None => Ok(()),
        }
    }
}
