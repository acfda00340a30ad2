//! The programs of the host: the agent and the L7 shim, those of the tests, and the static server that the containers of the
//! tests run.

use std::{env, path::PathBuf};

use anyhow::Result;

use crate::{ebpf, process, progress, workspace};

/// Builds the agent with the programs of now inside, and the L7 shim beside it, both as the tests are, whose compiled
/// dependencies they share. Returns the path of the agent.
pub fn build() -> Result<PathBuf> {
    ebpf::build()?;
    let mut build = process::cargo();
    build.args(["build", "-p", "lb-userspace", "--bin", "weir"]);
    progress::cargo(
        "build: agent and L7 shim",
        build.args(["-p", "lb-l7", "--bin", "weir-l7"]),
    )?;
    Ok(workspace::host_binary("debug", "weir"))
}

/// Builds a program of the tests' crate, `weir-demo` or `weir-bench`, and returns its path.
pub fn build_test_program(name: &str) -> Result<PathBuf> {
    let mut build = process::cargo();
    build.args(["build", "-p", "lb-tests", "--bin", name]);
    progress::cargo(&format!("build: {name}"), &mut build)?;
    Ok(workspace::host_binary("debug", name))
}

/// Builds the test server, which runs in images that hold nothing else, and returns its path.
pub fn build_test_server() -> Result<PathBuf> {
    let target = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    // A folder of its own: other flags would throw the host's files out of the common one.
    let folder = workspace::target().join("static");
    let mut build = process::cargo();
    build
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .args(["build", "--release", "-p", "weir-test-server"])
        .args(ebpf::PLAIN_RELEASE)
        .args(["--target", &target, "--target-dir"])
        .arg(&folder);
    progress::cargo("build: test server", &mut build)?;
    Ok(folder.join(target).join("release/weir-test-server"))
}
