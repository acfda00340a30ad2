//! Boots a guest in QEMU and listens to it until it powers off.

use std::{
    io::{self, BufRead, BufReader},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{console::Console, kernel::Kernel, qemu::Qemu};
use crate::{process, test::report::Count};

/// A guest that says nothing for so long hangs. Loading the programs, all verified by an emulated CPU, is the longest pause.
const SILENCE: Duration = Duration::from_secs(300);

/// No guest runs longer, even if all share one processor of this machine.
const TOTAL: Duration = Duration::from_secs(1800);

/// Boots `kernel` with `image` in `qemu` and returns what `binaries` reported.
pub fn run(qemu: &Qemu, kernel: &Kernel, image: &Path, binaries: &[&str]) -> Result<Count> {
    let (_machine, lines) = boot(qemu, kernel, image)?;
    let mut console = Console::default();
    let start = Instant::now();
    loop {
        let left = TOTAL.saturating_sub(start.elapsed());
        match lines.recv_timeout(SILENCE.min(left)) {
            Ok(line) => {
                if console.line(&line) {
                    println!("{}: {}", kernel.release, line.trim_end());
                }
            }
            Err(RecvTimeoutError::Disconnected) => return console.finish(binaries),
            Err(RecvTimeoutError::Timeout) => {
                let seconds = start.elapsed().as_secs();
                bail!(
                    "the guest hangs after {seconds} s; the console's end:\n{}",
                    console.tail()
                );
            }
        }
    }
}

/// A running QEMU, killed when it is dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // An error says that it has ended by itself, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Makes the kernel kill the child if xtask dies without dropping its [`Machine`].
fn die_with_parent(command: &mut Command) {
    // SAFETY: prctl with these arguments only sets a flag of the calling process, and is async-signal-safe.
    let request = || match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: between fork and exec the closure makes one system call and neither allocates nor locks.
    unsafe { command.pre_exec(request) };
}

/// Starts QEMU; the receiver gets the console's lines and is closed when QEMU ends.
fn boot(qemu: &Qemu, kernel: &Kernel, image: &Path) -> Result<(Machine, Receiver<String>)> {
    let mut command = qemu.command();
    command
        .args(["-serial", "stdio", "-monitor", "none"])
        .arg("-kernel")
        .arg(kernel.image())
        .arg("-initrd")
        .arg(image)
        // A panic reboots at once, which -no-reboot turns into the end.
        .args(["-append", "console=ttyS0 quiet loglevel=2 panic=-1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    die_with_parent(&mut command);
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {}", process::show(&command)))?;
    let output = child.stdout.take().context("QEMU has an output")?;
    let machine = Machine(child);
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        // The console may carry bytes that are no text while the firmware runs.
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    });
    Ok((machine, lines))
}
