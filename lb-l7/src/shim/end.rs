//! What ends the process: signals, and another process that has taken over.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{info, warn};

use crate::handover::Giver;

/// What systemd told this process alone, about sockets that it passed: a successor gets them from us.
const OF_SYSTEMD: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// Tells systemd, if it started us and wants to know.
pub(super) fn notify(what: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(what) {
        warn!("systemd is not told: {error}");
    }
}

/// Waits until the process has to end; whether because another one has taken over.
pub(super) async fn until_the_end(stop: &mut Stop, giver: Option<Arc<Giver>>) -> Result<bool> {
    let Some(giver) = giver else {
        stop.asked().await;
        return Ok(false);
    };
    let (given, mut is_given) = tokio::sync::oneshot::channel();
    // Not of the runtime, which would wait for it at the end.
    std::thread::Builder::new()
        .name("handover".into())
        .spawn(move || {
            giver.wait();
            let _the_process_may_have_ended = given.send(());
        })?;
    let program = std::env::current_exe().context("the path of this program")?;
    let mut successor = None::<tokio::process::Child>;
    loop {
        let ended = async {
            match &mut successor {
                Some(child) => child.wait().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = stop.term.recv() => return Ok(false),
            _ = stop.int.recv() => return Ok(false),
            _ = &mut is_given => return Ok(true),
            status = ended => {
                warn!(?status, "the new process has ended before it served; serving on");
                successor = None;
            }
            _ = stop.anew.recv() => {
                info!("starting anew");
                let mut command = tokio::process::Command::new(&program);
                for variable in OF_SYSTEMD {
                    command.env_remove(variable);
                }
                match command.args(std::env::args_os().skip(1)).spawn() {
                    Ok(child) => successor = Some(child),
                    Err(error) => warn!("cannot start {}: {error}; serving on", program.display()),
                }
            }
        }
    }
}

/// The signals that end the process.
pub(super) struct Stop {
    term: Signal,
    int: Signal,
    /// To start the program anew.
    anew: Signal,
}

impl Stop {
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            anew: signal(SignalKind::user_defined2())?,
        })
    }

    pub(super) async fn asked(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}
