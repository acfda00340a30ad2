//! `run`: builds the BPF programs and the agent, then becomes the agent.

use std::{ffi::OsString, os::unix::process::CommandExt, path::PathBuf, process::Command};

use anyhow::{Context, Result};

use crate::{ebpf, process, workspace};

/// Options of `run`.
#[derive(clap::Args)]
pub struct Options {
    /// Arguments for `weir run`
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// The command. Returns only if the agent cannot be started.
pub fn run(options: &Options) -> Result<()> {
    let weir = build_agent()?;
    let error = Command::new(&weir).arg("run").args(&options.arguments).exec();
    Err(error).with_context(|| format!("cannot start {}", weir.display()))
}

/// Builds the agent with the programs of now inside, as it is released, and returns its path.
pub fn build_agent() -> Result<PathBuf> {
    ebpf::build()?;
    process::run(process::cargo().args([
        "build",
        "--quiet",
        "--release",
        "-p",
        "lb-userspace",
        "--bin",
        "weir",
    ]))?;
    Ok(workspace::release_binary("weir"))
}
