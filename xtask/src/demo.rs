//! `demo`: builds everything and shows it with real containers.

use std::{os::unix::process::CommandExt, process::Command};

use anyhow::{Context, Result, bail};

use crate::{agent, needs::Group, setup, workspace};

/// The command. Returns only if the demo cannot be started: it takes the place of this process, so that Ctrl-C and the
/// exit code are its own.
pub fn run() -> Result<()> {
    if !workspace::is_root() {
        bail!("it makes namespaces, starts a Docker engine and loads BPF programs: run it as root");
    }
    setup::ensure(&[Group::Build, Group::Test, Group::E2e])?;
    let (agent, server) = (agent::build()?, agent::build_test_server()?);
    let demo = agent::build_test_program("weir-demo")?;
    let error = Command::new(&demo)
        .env("WEIR_BIN", agent)
        .env("WEIR_SERVER_BIN", server)
        .env("WEIR_BPF_OBJECT", workspace::bpf_object())
        .exec();
    Err(error).with_context(|| format!("cannot start {}", demo.display()))
}
