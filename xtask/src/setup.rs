//! `setup`: installs what is missing and says why; does nothing when nothing is missing.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{
    apt::{self, Package},
    needs::{self, Group},
    process, progress,
    toolchain::{Compiler, Route, Toolchain, find_linker},
    vm, workspace,
};

/// The linker that was tried with the compilers that `toolchain` accepts.
const BPF_LINKER: &str = "bpf-linker@0.13.0";

/// What to do where Debian's compiler cannot be installed, for example because an older one is there.
const NO_DEBIAN_COMPILER: &str = "Debian's compiler for the BPF programs cannot be installed; instead of it, `rustup \
    toolchain install nightly --component rust-src` will do";

/// Options of `setup`.
#[derive(clap::Args)]
pub struct Options {
    /// What to install for; all groups if none is named
    groups: Vec<Group>,
}

/// The command.
pub fn run(options: &Options) -> Result<()> {
    use clap::ValueEnum;
    let groups = match options.groups.as_slice() {
        [] => Group::value_variants(),
        named => named,
    };
    ensure(groups)?;
    println!("setup: complete");
    Ok(())
}

/// Makes sure that all that `groups` need is there. Silent and quick if it is.
pub fn ensure(groups: &[Group]) -> Result<()> {
    let missing: Vec<Package> = needs::missing(groups)
        .iter()
        .map(|need| Package {
            name: need.package.into(),
            why: need.why.into(),
        })
        .collect();
    apt::install(&missing)?;
    if groups.contains(&Group::Build) {
        ensure_bpf_toolchain()?;
    }
    if groups.contains(&Group::Lint) {
        ensure_clippy()?;
    }
    if groups.contains(&Group::Vm) {
        vm::ensure()?;
    }
    Ok(())
}

/// Debian's compiler and a linker made for it, unless some route is complete already.
fn ensure_bpf_toolchain() -> Result<()> {
    let Err(fault) = Toolchain::find() else {
        return Ok(());
    };
    // A compiler that only lacks the linker is kept, whichever it is; without apt only the user can go on.
    let compiler = Compiler::find(Route::Debian).or_else(|_| Compiler::find(Route::Nightly));
    let compiler = match compiler {
        Ok(compiler) => compiler,
        Err(_) if workspace::find_program("apt-get").is_none() => return Err(fault),
        Err(_) => {
            apt::install(&packages(
                &["rustc-web", "cargo-web", "rust-web-src"],
                "compiles the BPF programs",
            ))
            .context(NO_DEBIAN_COMPILER)?;
            Compiler::find(Route::Debian)
                .context("the packages rustc-web, cargo-web and rust-web-src did not help")?
        }
    };
    if find_linker(compiler.version.llvm).is_err() {
        install_linker(&compiler)?;
    }
    Toolchain::find().map(drop)
}

/// Builds bpf-linker against the LLVM that the compiler itself uses: about a minute.
fn install_linker(compiler: &Compiler) -> Result<()> {
    let llvm = compiler.version.llvm;
    let (dev, polly) = (format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev"));
    let prefix = format!("/usr/lib/llvm-{llvm}");
    let names = [dev.as_str(), polly.as_str(), "libzstd-dev", "zlib1g-dev"];
    apt::install(&packages(&names, "bpf-linker is built with it"))?;
    println!("setup: building {BPF_LINKER} for LLVM {llvm}: links the BPF programs");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = process::foreign_cargo(compiler.cargo.as_os_str());
    command
        .env("RUSTC", &compiler.rustc)
        .env("LLVM_PREFIX", &prefix)
        .env("PATH", format!("{prefix}/bin:{path}"))
        .args(["install", "--force", "--locked", "--no-default-features"])
        .args(["--features", &format!("llvm-{llvm}"), BPF_LINKER]);
    progress::cargo("setup: bpf-linker", &mut command).context("building bpf-linker failed")
}

/// clippy that belongs to the BPF compiler.
fn ensure_clippy() -> Result<()> {
    ensure_bpf_toolchain()?;
    let toolchain = Toolchain::find()?;
    if workspace::is_executable(&toolchain.clippy()) {
        return Ok(());
    }
    match toolchain.route {
        Route::Debian => apt::install(&packages(&["rust-web-clippy"], "lints the BPF programs")),
        Route::Nightly => {
            println!("setup: nightly's clippy is missing: lints the BPF programs");
            let mut rustup = Command::new("rustup");
            progress::quiet(
                "setup: nightly's clippy",
                rustup.args(["component", "add", "--toolchain", "nightly", "clippy"]),
            )
        }
    }?;
    if !workspace::is_executable(&toolchain.clippy()) {
        bail!(
            "{} is still missing after its installation",
            toolchain.clippy().display()
        );
    }
    Ok(())
}

fn packages(names: &[&str], why: &str) -> Vec<Package> {
    names
        .iter()
        .map(|name| Package {
            name: (*name).into(),
            why: why.into(),
        })
        .collect()
}
