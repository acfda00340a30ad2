//! `lint`: formatting, then clippy on the host and on the BPF target. A warning is an error.

use anyhow::{Context, Result};

use crate::{ebpf, needs::Group, process, setup, toolchain::Toolchain};

/// The command.
pub fn run() -> Result<()> {
    process::run(process::cargo().args(["fmt", "--all", "--check"]))
        .context("run `cargo fmt` (and `rustup component add rustfmt` where it is missing)")?;
    // Before clippy: it runs the build scripts of the dependencies, which need the compiler of etcd's messages.
    setup::ensure(&[Group::Build, Group::Lint])?;
    process::run(process::cargo().args([
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--keep-going",
        "--",
        "-D",
        "warnings",
    ]))?;
    let toolchain = Toolchain::find()?;
    let mut clippy = toolchain.command(&toolchain.clippy());
    // Given by path, it wants its own name as the first argument, as cargo would give it.
    ebpf::in_bpf(clippy.args(["clippy", "--quiet", "--bins"]), &toolchain).args(["--", "-D", "warnings"]);
    process::run(&mut clippy)
}
