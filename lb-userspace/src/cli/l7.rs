//! `weir l7`: becomes the L7 shim, which is a program of its own beside this one.

use std::{
    ffi::OsString,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;

use super::Exit;
use crate::admin::shims::Shims;

/// Name of the program.
const PROGRAM: &str = "weir-l7";

/// Arguments of `weir l7`: those of the shim.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(super) struct L7Args {
    /// Arguments of the shim: see `weir l7 --help`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    arguments: Vec<OsString>,
}

/// Returns only if the shim cannot be started.
pub(super) fn become_shim(args: &L7Args, socket: Option<&Path>) -> anyhow::Result<Exit> {
    let beside = std::env::current_exe().map(|weir| weir.with_file_name(PROGRAM));
    let program = beside.ok().filter(|program| program.exists());
    let program = program.unwrap_or_else(|| PathBuf::from(PROGRAM));
    let mut command = Command::new(&program);
    if let Some(socket) = socket {
        command.arg("--agent").arg(Shims::path(socket));
    }
    let error = command.args(&args.arguments).exec();
    Err(error).with_context(|| {
        format!(
            "cannot start {}: install it beside weir (`cargo build -p lb-l7`)",
            program.display()
        )
    })
}
