//! Where the state comes from: the agent's stream, or a file. What was good last is kept whatever happens to either.

use lb_route::State;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing::{info, warn};

mod agent;
mod file;
mod store;

pub use agent::follow;
pub use file::{FileFault, read};
pub use store::{Store, StoreError};

use crate::cli::Cli;

/// Begins to hear what the command line says; `None` until something has been heard.
///
/// # Errors
/// The file with routes cannot be read, or SIGHUP not be waited for.
pub fn begin(cli: &Cli) -> anyhow::Result<watch::Receiver<Option<State>>> {
    let (states, state) = watch::channel(None::<State>);
    // Without a file there is nothing to read again; it ends nobody all the same.
    let mut hangup = signal(SignalKind::hangup())?;
    if let Some(path) = &cli.routes {
        let (first, faults) = read(path, None)?;
        for fault in faults {
            warn!("{fault}");
        }
        states.send_replace(Some(first));
        let path = path.clone();
        tokio::task::spawn_local(async move {
            while hangup.recv().await.is_some() {
                let now = read(&path, states.borrow().as_ref());
                match now {
                    Ok((state, faults)) => {
                        for fault in faults {
                            warn!("{fault}; what was served of it before is served on");
                        }
                        states.send_replace(Some(state));
                    }
                    Err(error) => warn!("{error}; serving on by what was read before"),
                }
            }
        });
        return Ok(state);
    }
    let store = cli.state.as_deref().map(Store::new);
    if let Some(last) = store.as_ref().and_then(Store::load) {
        info!(routes = last.routes.len(), "beginning with what was heard last");
        states.send_replace(Some(last));
    }
    let socket = cli.agent.clone();
    tokio::task::spawn_local(async move {
        let publish = |state: &State| {
            states.send_replace(Some(state.clone()));
            if let Some(store) = &store
                && let Err(error) = store.save(state)
            {
                warn!("the state is not kept for the next start: {error}");
            }
        };
        follow(&socket, publish).await;
    });
    Ok(state)
}
