//! Tells the programs that next hops are kept up to date. When they have not been told for ten seconds, they ask the kernel.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use super::{
    batch::{open_program, run_program},
    load::{HEARTBEAT_PROGRAM, Pins},
};

/// Time between two signs of life.
pub const INTERVAL: Duration = Duration::from_secs(3);
/// Shortest packet that the kernel lets an XDP program be run with.
const MIN_PACKET: usize = 64;

/// The program that notes a sign of life: the flow clock is the kernel's own.
#[derive(Debug)]
pub struct Heartbeat(OwnedFd);

impl Heartbeat {
    /// Opens the pinned program.
    pub fn open(pins: &Pins) -> io::Result<Self> {
        open_program(&pins.programs().join(HEARTBEAT_PROGRAM)).map(Self)
    }

    /// Gives a sign of life. One that fails is made up for by the next.
    pub fn beat(&self) {
        match run_program(self.0.as_fd(), &[0; MIN_PACKET]) {
            Ok(_) => {}
            // A signal, or another test run on this CPU.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
            Err(e) => {
                tracing::warn!(error = %e, "program {HEARTBEAT_PROGRAM} could not be run: next hops are the kernel's after ten seconds")
            }
        }
    }
}
