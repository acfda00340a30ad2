//! `demo`: builds everything and shows it with real containers.

use std::{os::unix::process::CommandExt, path::PathBuf};

use anyhow::{Context, Result, bail};

use crate::{agent, needs::Group, process, setup, workspace};

/// The command. Returns only if the demo cannot be started: it takes the place of this process, so that Ctrl-C and the
/// exit code are its own.
pub fn run() -> Result<()> {
    if !workspace::is_root() {
        bail!("it makes namespaces, starts a Docker engine and loads BPF programs: run it as root");
    }
    setup::ensure(&[Group::Build, Group::Test, Group::E2e])?;
    println!("demo: building; the first time takes some minutes");
    let (agent, server) = (agent::build()?, agent::build_test_server()?);
    process::run(process::cargo().args(["build", "--quiet", "-p", "lb-tests", "--bin", "weir-demo"]))?;
    let demo: PathBuf = workspace::host_binary("debug", "weir-demo");
    let error = std::process::Command::new(&demo)
        .env("WEIR_BIN", agent)
        .env("WEIR_SERVER_BIN", server)
        .env("WEIR_BPF_OBJECT", workspace::bpf_object())
        .exec();
    Err(error).with_context(|| format!("cannot start {}", demo.display()))
}
