//! The threads of the workers.

use std::{sync::Arc, thread::JoinHandle};

use anyhow::{Context as _, Result};
use tokio::{
    runtime::{Builder, LocalOptions},
    sync::mpsc,
};

use crate::{
    listen::Nascent,
    worker::{Shared, Worker},
};

/// Starts the thread of a worker.
pub(super) fn start(
    index: usize,
    sockets: mpsc::UnboundedReceiver<Nascent>,
    shared: Arc<Shared>,
) -> Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name(format!("worker-{index}"));
    let work = move || -> Result<()> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build_local(LocalOptions::default())?;
        Ok(runtime.block_on(Worker::new(index, shared)?.run(sockets))?)
    };
    let spawned = thread.spawn(move || {
        if let Err(error) = work() {
            tracing::error!("worker {index}: {error:#}");
            // Half of the connections would wait for nobody.
            std::process::exit(1);
        }
    });
    spawned.context("cannot start a thread")
}
