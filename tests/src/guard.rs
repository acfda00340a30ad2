//! Child processes that end with the test, however it ends.

use std::{
    os::unix::process::CommandExt as _,
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};

/// A child process, killed and reaped on drop.
#[derive(Debug)]
pub struct Guard(Child);

impl Guard {
    /// Starts a command. Should this process die, the kernel kills the child.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        // SAFETY: one system call between fork and exec.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        let name = command.get_program().to_string_lossy().into_owned();
        Ok(Self(
            command.spawn().with_context(|| format!("cannot start {name}"))?,
        ))
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// The pipe to its input, once; dropping it is the end of the input.
    pub fn stdin(&mut self) -> Option<ChildStdin> {
        self.0.stdin.take()
    }

    /// The pipe from its output, once.
    pub fn stdout(&mut self) -> Option<ChildStdout> {
        self.0.stdout.take()
    }

    /// The pipe from its errors, once.
    pub fn stderr(&mut self) -> Option<ChildStderr> {
        self.0.stderr.take()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.0.id() as i32),
            signal,
        )?)
    }

    /// Waits until the process ends, at most so long; `None` if it still runs.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};
        if let Some(status) = self.0.try_wait()? {
            return Ok(Some(status));
        }
        // SAFETY: a system call without pointers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.0.id(), 0) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error()).context("pidfd_open");
        }
        // SAFETY: the kernel just gave it to us.
        let ended = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
            if let Some(status) = self.0.try_wait()? {
                return Ok(Some(status));
            }
            if left.is_zero() {
                return Ok(None);
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_waited_for_and_killed() {
        let mut short = Guard::spawn(&mut Command::new("true")).unwrap();
        assert!(short.wait(Duration::from_secs(10)).unwrap().unwrap().success());
        let mut long = Guard::spawn(Command::new("sleep").arg("600")).unwrap();
        assert!(long.wait(Duration::from_millis(1)).unwrap().is_none());
        let pid = long.pid();
        drop(long);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
}
