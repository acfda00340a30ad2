//! `run`: builds the BPF programs and the agent, then becomes the agent.

use std::{ffi::OsString, os::unix::process::CommandExt, process::Command};

use anyhow::{Context, Result};

use crate::release;

/// Options of `run`.
#[derive(clap::Args)]
pub struct Options {
    /// Arguments for `weir run`
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// The command. Returns only if the agent cannot be started.
pub fn run(options: &Options) -> Result<()> {
    let weir = release::programs()?;
    let error = Command::new(&weir).arg("run").args(&options.arguments).exec();
    Err(error).with_context(|| format!("cannot start {}", weir.display()))
}
