//! The compiler that builds the BPF programs: it needs the source of `core` (rust-src), a way to use unstable features
//! and a bpf-linker whose LLVM is not older than its own.
//!
//! Two routes lead there. Debian packages a matched set (rustc-web, cargo-web, rust-web-src), used directly as
//! /usr/bin/cargo and /usr/bin/rustc so that rustup is not involved. Elsewhere it is rustup's nightly with rust-src.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, anyhow};

use crate::{process, workspace};

/// The oldest compiler that builds the workspace: `rust-version` in Cargo.toml.
const OLDEST: (u32, u32) = (1, 95);

/// Which compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Debian's packages; unstable features by RUSTC_BOOTSTRAP=1.
    Debian,
    /// rustup's nightly.
    Nightly,
}

/// A complete toolchain.
#[derive(Clone, Debug)]
pub struct Toolchain {
    pub route: Route,
    pub cargo: PathBuf,
    pub rustc: PathBuf,
    pub linker: PathBuf,
}

/// What `rustc -vV` says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompilerVersion {
    /// Its whole name, such as `1.95.0`.
    pub name: String,
    /// What it compiles for unless told otherwise.
    pub host: String,
    /// Major and minor.
    pub release: (u32, u32),
    /// Its LLVM's major version: what bpf-linker must be able to read.
    pub llvm: u32,
}

/// A compiler with the source of `core`, not yet with a linker.
#[derive(Clone, Debug)]
pub struct Compiler {
    pub route: Route,
    pub cargo: PathBuf,
    pub rustc: PathBuf,
    pub version: CompilerVersion,
}

impl Toolchain {
    /// The first route that is complete.
    pub fn find() -> Result<Self> {
        let mut faults = Vec::new();
        for route in [Route::Debian, Route::Nightly] {
            match Compiler::find(route).and_then(Self::complete) {
                Ok(toolchain) => return Ok(toolchain),
                Err(fault) => faults.push(format!("  {route:?}: {fault:#}")),
            }
        }
        Err(anyhow!(
            "no toolchain builds BPF programs here:\n{}\nOn Debian 12 run `cargo xtask setup` as root. Elsewhere run \
             `rustup toolchain install nightly --component rust-src` and `cargo install bpf-linker`.",
            faults.join("\n")
        ))
    }

    fn complete(compiler: Compiler) -> Result<Self> {
        let linker = find_linker(compiler.version.llvm)?;
        Ok(Self {
            route: compiler.route,
            cargo: compiler.cargo,
            rustc: compiler.rustc,
            linker,
        })
    }

    /// One of this toolchain's programs (`cargo`, `clippy`), set up for unstable features.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = process::foreign_cargo(program.as_os_str());
        command.env("CARGO", &self.cargo).env("RUSTC", &self.rustc);
        if self.route == Route::Debian {
            command.env("RUSTC_BOOTSTRAP", "1");
        }
        command
    }

    /// Its `cargo-clippy`, which may be missing.
    pub fn clippy(&self) -> PathBuf {
        self.cargo.with_file_name("cargo-clippy")
    }
}

impl Compiler {
    /// The compiler of `route`, if it is new enough and has the source of `core`.
    pub fn find(route: Route) -> Result<Self> {
        let (cargo, rustc) = match route {
            Route::Debian => (PathBuf::from("/usr/bin/cargo"), PathBuf::from("/usr/bin/rustc")),
            Route::Nightly => (rustup_which("cargo")?, rustup_which("rustc")?),
        };
        for program in [&cargo, &rustc] {
            if !workspace::is_executable(program) {
                return Err(anyhow!("{} is missing", program.display()));
            }
        }
        let ask =
            |arguments: &[&str]| process::capture(process::foreign_cargo(rustc.as_os_str()).args(arguments));
        let version = CompilerVersion::parse(&ask(&["-vV"])?)?;
        if version.release < OLDEST {
            let (major, minor) = version.release;
            return Err(anyhow!(
                "{} is {major}.{minor}, older than {}.{}",
                rustc.display(),
                OLDEST.0,
                OLDEST.1
            ));
        }
        let sysroot = ask(&["--print", "sysroot"])?;
        let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
        if !core.exists() {
            return Err(anyhow!("the source of core is missing ({})", core.display()));
        }
        Ok(Self {
            route,
            cargo,
            rustc,
            version,
        })
    }
}

impl CompilerVersion {
    /// Reads the output of `rustc -vV`.
    pub fn parse(text: &str) -> Result<Self> {
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .with_context(|| format!("`rustc -vV` has no line `{name}:`"))
        };
        let number = |part: Option<&str>| part.and_then(|p| p.trim().parse::<u32>().ok());
        let release = field("release")?;
        let mut parts = release.split('.');
        let (major, minor) = (number(parts.next()), number(parts.next()));
        let llvm = number(field("LLVM version")?.split('.').next());
        Ok(Self {
            name: release.trim().to_owned(),
            host: field("host")?.trim().to_owned(),
            release: major
                .zip(minor)
                .with_context(|| format!("cannot read the compiler's release `{release}`"))?,
            llvm: llvm.context("cannot read the compiler's LLVM version")?,
        })
    }
}

/// The bpf-linker on PATH or in cargo's folder, if it runs and its LLVM is not older than `llvm`.
pub fn find_linker(llvm: u32) -> Result<PathBuf> {
    let linker = workspace::find_program("bpf-linker").context("bpf-linker is missing")?;
    process::capture(Command::new(&linker).arg("--version"))?;
    // A released bpf-linker is static; nothing tells its LLVM then, and its own error has to do.
    let libraries = process::capture(Command::new("ldd").arg(&linker)).unwrap_or_default();
    match shared_llvm(&libraries) {
        Some(linked) if linked < llvm => Err(anyhow!(
            "{} uses LLVM {linked}, the compiler LLVM {llvm}: the linker could not read its output",
            linker.display()
        )),
        _ => Ok(linker),
    }
}

/// The major version of the shared LLVM among what `ldd` printed.
fn shared_llvm(ldd: &str) -> Option<u32> {
    let name = ldd.lines().find_map(|line| line.trim().strip_prefix("libLLVM"))?;
    let digits = name.trim_start_matches(".so").trim_start_matches(['.', '-']);
    digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn rustup_which(program: &str) -> Result<PathBuf> {
    let rustup = workspace::find_program("rustup").context("rustup is missing")?;
    let mut command = process::foreign_cargo(rustup.as_os_str());
    let path = process::capture(command.args(["which", "--toolchain", "nightly", program]))?;
    Ok(PathBuf::from(path.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\nbinary: rustc\n\
        commit-hash: ac68faa20c58cbccd01ee7208bf3b6e93a7d7f96\ncommit-date: 2026-05-25\nhost: x86_64-unknown-linux-gnu\n\
        release: 1.96.0\nLLVM version: 22.1.8\n";

    #[test]
    fn the_llvm_version_comes_from_the_compiler() {
        let version = CompilerVersion::parse(DEBIAN).unwrap();
        assert_eq!(
            version,
            CompilerVersion {
                name: "1.96.0".into(),
                host: "x86_64-unknown-linux-gnu".into(),
                release: (1, 96),
                llvm: 22
            }
        );
    }

    #[test]
    fn a_nightly_release_is_read() {
        let text = "host: aarch64-unknown-linux-gnu\nrelease: 1.97.0-nightly\nLLVM version: 23.0.0\n";
        let version = CompilerVersion::parse(text).unwrap();
        assert_eq!((version.release, version.llvm), ((1, 97), 23));
        assert_eq!(version.name, "1.97.0-nightly");
    }

    #[test]
    fn an_answer_without_llvm_is_refused() {
        let error = CompilerVersion::parse("host: a\nrelease: 1.96.0\n").unwrap_err();
        assert!(error.to_string().contains("LLVM version"), "{error}");
        assert!(CompilerVersion::parse("host: a\nrelease: ?\nLLVM version: 22.1\n").is_err());
    }

    #[test]
    fn the_linkers_llvm_is_read_from_its_libraries() {
        assert_eq!(
            shared_llvm("\tlibLLVM.so.22.1 => /usr/lib/llvm-22/lib/libLLVM.so.22.1 (0x7f)\n"),
            Some(22)
        );
        assert_eq!(
            shared_llvm("\tlibz.so.1 => /lib/libz.so.1\n\tlibLLVM-19.so.1 => /lib/libLLVM-19.so.1\n"),
            Some(19)
        );
        assert_eq!(shared_llvm("\tstatically linked\n"), None);
    }
}
