//! `build-ebpf`: compiles the binary of `lb-ebpf` for the BPF target and puts the object where the agent embeds it.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result};

use crate::{elf, needs::Group, progress, setup, toolchain::Toolchain, workspace};

const TARGET: &str = "bpfel-unknown-none";

/// The newest instruction set that kernel 6.1, the oldest supported, runs: v3 has 32-bit jumps and atomics.
const CPU: &str = "v3";

/// Builds the object, installing the toolchain if it is missing, and returns the object's path.
pub fn build() -> Result<PathBuf> {
    build_binary("weir-ebpf")
}

/// Builds the object of the programs that measure the others; its path.
pub fn build_bench() -> Result<PathBuf> {
    build_binary("weir-bench")
}

fn build_binary(name: &str) -> Result<PathBuf> {
    setup::ensure(&[Group::Build])?;
    let toolchain = Toolchain::find()?;
    let mut command = toolchain.command(&toolchain.cargo);
    command.args(["build", "--bin", name]);
    progress::cargo("build: BPF programs", in_bpf(&mut command, &toolchain))?;
    let built = build_dir().join(TARGET).join("release").join(name);
    let bytes = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    elf::check_bpf_object(&bytes).with_context(|| built.display().to_string())?;
    publish(
        &bytes,
        workspace::bpf_object().with_file_name(format!("{name}.o")),
    )
}

/// A release build without the link-time optimisation that the L7 shim is built with.
pub const PLAIN_RELEASE: [&str; 4] = [
    "--config",
    "profile.release.lto=false",
    "--config",
    "profile.release.codegen-units=16",
];

/// What cargo and clippy are told alike, so that they judge the same program.
pub fn in_bpf<'a>(command: &'a mut Command, toolchain: &Toolchain) -> &'a mut Command {
    let linker = toolchain.linker.display();
    command
        .env(
            "RUSTFLAGS",
            format!("-C debuginfo=2 -C link-arg=--btf -C target-cpu={CPU} -C panic=abort -C linker={linker}"),
        )
        .args(["--release", "-p", "lb-ebpf", "--features", "programs"])
        // bpf-linker optimises the whole by itself, from what cargo has not put together yet.
        .args(PLAIN_RELEASE)
        .args(["--target", TARGET, "-Z", "build-std=core", "--target-dir"])
        .arg(build_dir())
}

/// A target folder of its own: another compiler's files would throw the host's out of the common one.
fn build_dir() -> PathBuf {
    workspace::target().join("bpf-build")
}

/// Writes the object only if it has changed: the agent is compiled anew whenever the file is newer.
fn publish(bytes: &[u8], object: PathBuf) -> Result<PathBuf> {
    if fs::read(&object).is_ok_and(|old| old == bytes) {
        return Ok(object);
    }
    let dir = object.parent().context("the object has a folder")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    // Renamed into place, so that a build that runs meanwhile never embeds half of it.
    let unfinished = object.with_extension("unfinished");
    fs::write(&unfinished, bytes).with_context(|| format!("cannot write {}", unfinished.display()))?;
    fs::rename(&unfinished, &object).with_context(|| format!("cannot write {}", object.display()))?;
    println!("build-ebpf: {} ({} KiB)", object.display(), bytes.len() / 1024);
    Ok(object)
}
