//! The vm tier: the test binaries `prog` and `vm` of lb-tests on other kernels.
//!
//! It is part of xtask and not of `tests/`, because it builds and carries test binaries rather than being one. For each
//! kernel (`kernel`) it packs an initramfs (`image`) with the binaries, the shared libraries they are linked to, and a few
//! tools, boots it (`guest`) in QEMU (`qemu`) by software emulation, and reads the results off the serial console (`console`). The
//! binaries are those that the host runs: nothing is compiled a second time. Any test binary of lb-tests can be added to
//! [`BINARIES`], if what it needs is in the guest.

use std::{path::PathBuf, thread};

use anyhow::{Context, Result};

use crate::test::{cargo, report::Count};

mod console;
mod guest;
mod image;
mod kernel;
mod qemu;

use kernel::Kernel;
use qemu::Qemu;

/// Test targets of lb-tests that run in every guest: the packet rows, and loading and attaching.
const BINARIES: [&str; 2] = ["prog", "vm"];

/// Makes sure that QEMU and the kernels are there.
pub fn ensure() -> Result<()> {
    Qemu::ensure()?;
    kernel::ensure_all()?;
    Ok(())
}

/// Runs the tier, all kernels side by side: a guest has one processor, and this machine has more. A kernel that does not
/// boot, panics or falls silent is a failure and does not keep the others from running.
pub fn run(filter: Option<&str>) -> Result<Count> {
    let paths = cargo::build_tests(&BINARIES)?;
    let binaries: Vec<_> = BINARIES.into_iter().zip(paths).collect();
    let binaries = binaries.as_slice();
    let (qemu, kernels) = (&Qemu::ensure()?, kernel::ensure_all()?);
    Ok(thread::scope(|scope| {
        let start = |kernel| scope.spawn(move || run_on(qemu, kernel, binaries, filter));
        let guests: Vec<_> = kernels.iter().map(start).collect();
        let mut total = Count::default();
        for guest in guests {
            // What panics has said so.
            total += guest.join().unwrap_or_else(|_| Count::fault());
        }
        total
    }))
}

/// Runs `binaries` on one kernel, and says what came of it.
fn run_on(qemu: &Qemu, kernel: &Kernel, binaries: &[(&str, PathBuf)], filter: Option<&str>) -> Count {
    let count = image::pack(kernel, binaries, filter)
        .with_context(|| format!("cannot make the guest of kernel {}", kernel.release))
        .and_then(|image| guest::run(qemu, kernel, &image, &BINARIES))
        .unwrap_or_else(|fault| {
            println!("kernel {}: {fault:#}", kernel.release);
            Count::fault()
        });
    println!("--- kernel {}: {count}", kernel.release);
    count
}
