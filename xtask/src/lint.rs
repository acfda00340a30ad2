//! `lint`: formatting, then clippy on the host and on the BPF target. A warning is an error.

use anyhow::{Context, Result};

use crate::{ebpf, needs::Group, process, progress, setup, toolchain::Toolchain};

/// The command.
pub fn run() -> Result<()> {
    process::run(process::cargo().args(["fmt", "--all", "--check"]))
        .context("run `cargo fmt` (and `rustup component add rustfmt` where it is missing)")?;
    // Before clippy: it runs the build scripts of the dependencies, which need the compiler of etcd's messages.
    setup::ensure(&[Group::Build, Group::Lint])?;
    let mut clippy = process::cargo();
    clippy.args(["clippy", "--workspace", "--all-targets", "--keep-going"]);
    progress::cargo("lint: workspace", clippy.args(["--", "-D", "warnings"]))?;
    let toolchain = Toolchain::find()?;
    let mut clippy = toolchain.command(&toolchain.clippy());
    // Given by path, it wants its own name as the first argument, as cargo would give it.
    ebpf::in_bpf(clippy.args(["clippy", "--bins"]), &toolchain).args(["--", "-D", "warnings"]);
    progress::cargo("lint: BPF programs", &mut clippy)
}
