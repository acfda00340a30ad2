//! Listeners that end when they are told to.

use std::{io, net::TcpListener, os::fd::AsRawFd as _};

use nix::sys::socket::{Shutdown, shutdown};

/// Ends listening at once, as the end of a server's process does, and gives the port free.
///
/// Closing the descriptor is not enough: a child that another test starts in this moment has a copy of it until it
/// executes its program, and so long the kernel accepts connections, to reset them afterwards.
///
/// # Errors
/// If it does not listen.
pub fn hang_up(listener: &TcpListener) -> io::Result<()> {
    Ok(shutdown(listener.as_raw_fd(), Shutdown::Both)?)
}
