//! What `cargo xtask demo` shows: real containers behind a VIP in one terminal. Ends with a failure if one request did.

#![expect(clippy::print_stdout, reason = "it is a show")]

mod http;
mod show;
mod story;

use std::{
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Result, bail};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Set by Ctrl-C. Everything is taken down by leaving the scopes it belongs to, never by ending the process.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupt(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Fails once the user has had enough.
fn go_on() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

fn main() -> ExitCode {
    let action = SigAction::new(
        SigHandler::Handler(interrupt),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler stores to an atomic and nothing else.
        if let Err(fault) = unsafe { sigaction(signal, &action) } {
            eprintln!("demo: {signal}: {fault}");
            return ExitCode::FAILURE;
        }
    }
    match story::tell() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if INTERRUPTED.load(Ordering::Relaxed) => {
            println!("\nInterrupted. Containers, engine, agent and networks of the demo are gone.");
            ExitCode::from(130)
        }
        Err(fault) => {
            eprintln!("\ndemo: {fault:#}");
            ExitCode::FAILURE
        }
    }
}
