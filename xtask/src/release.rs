//! The programs as they are released: what the L7 shim does most is laid out by a profile of it at work.
//!
//! A profile holds for one target and one compiler, by whose names the functions go. It lies in `lb-l7/profile/`, and
//! `cargo xtask profile` makes it anew: the same build with counters in it serves the loads of `bench l7`. Code that has
//! changed since is compiled as without one.

use std::{env, fs, path::PathBuf, process::Command};

use anyhow::{Context, Result};

use crate::{
    agent,
    apt::{self, Package},
    ebpf,
    needs::Group,
    process, progress, setup,
    toolchain::CompilerVersion,
    workspace,
};

/// Which programs.
#[derive(clap::Args)]
pub struct Options {
    /// Build for this target instead of this machine: x86_64-unknown-linux-musl is static
    #[arg(long, value_name = "TRIPLE")]
    target: Option<String>,
}

/// A compiler and what it compiles for.
struct Build {
    target: String,
    version: CompilerVersion,
}

/// The command `build`.
pub fn run(options: &Options) -> Result<()> {
    let weir = Build::new(options.target.clone())?.programs()?;
    println!("{}\n{}", weir.display(), weir.with_file_name("weir-l7").display());
    Ok(())
}

/// The command `profile`.
pub fn profile(options: &Options) -> Result<()> {
    setup::ensure(&[Group::Build, Group::Bench, Group::L7])?;
    Build::new(options.target.clone())?.profile()
}

/// Builds the agent for this machine and the shim beside it; the path of the agent.
pub fn programs() -> Result<PathBuf> {
    Build::new(None)?.programs()
}

/// Builds the agent for this machine; its path.
pub fn agent() -> Result<PathBuf> {
    Build::new(None)?.agent()
}

/// Builds the shim for this machine; its path.
pub fn shim() -> Result<PathBuf> {
    Build::new(None)?.shim()
}

impl Build {
    fn new(target: Option<String>) -> Result<Self> {
        let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let text = process::capture(Command::new(rustc).arg("-vV"))?;
        let version = CompilerVersion::parse(&text)?;
        let target = target.unwrap_or_else(|| version.host.clone());
        Ok(Self { target, version })
    }

    /// The path of the profile for this compiler.
    fn stored(&self) -> PathBuf {
        let CompilerVersion { name, llvm, .. } = &self.version;
        let name = format!("{}-{name}-llvm{llvm}.profdata", self.target);
        workspace::root().join("lb-l7/profile").join(name)
    }

    /// Builds both programs and puts them together; the path of the agent.
    fn programs(&self) -> Result<PathBuf> {
        let built = [self.agent()?, self.shim()?];
        let folder = workspace::target().join("dist").join(&self.target);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        for program in built {
            let name = program.file_name().context("a program has a name")?;
            let (here, unfinished) = (folder.join(name), folder.join("unfinished"));
            // Renamed into place: a program that runs cannot be written to.
            fs::copy(&program, &unfinished)
                .and_then(|_| fs::rename(&unfinished, &here))
                .with_context(|| format!("cannot copy {} to {}", program.display(), here.display()))?;
        }
        Ok(folder.join("weir"))
    }

    /// Builds the agent; its path.
    fn agent(&self) -> Result<PathBuf> {
        ebpf::build()?;
        // The kernel does its work: what link-time optimisation would bring is not worth its ten minutes.
        self.compile("lb-userspace", "weir", "agent", "", &ebpf::PLAIN_RELEASE)
    }

    /// Builds the shim, by the profile if there is one; its path.
    fn shim(&self) -> Result<PathBuf> {
        let profile = self.stored();
        if profile.exists() {
            let flags = format!("-C profile-use={}", profile.display());
            return self.compile("lb-l7", "weir-l7", "shim", &flags, &[]);
        }
        println!(
            "build: no profile by rustc {} for {}: the L7 shim takes a third more CPU of its own for a request. `cargo \
             xtask profile` makes one.",
            self.version.name, self.target
        );
        self.compile("lb-l7", "weir-l7", "shim", "", &[])
    }

    /// Makes the profile and keeps it.
    fn profile(&self) -> Result<()> {
        let counts = workspace::target().join("profile/counts");
        workspace::remove_folder(&counts)?;
        let flags = format!("-C profile-generate={}", counts.display());
        let counting = self.compile("lb-l7", "weir-l7", "profile", &flags, &[])?;
        let mut serve = Command::new(agent::build_test_program("weir-bench")?);
        serve.arg("l7-profile").current_dir(workspace::root());
        process::run(serve.env("WEIR_L7_BIN", counting))?;
        let stored = self.stored();
        let folder = stored.parent().context("a profile has a folder")?;
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let mut merge = Command::new(self.merger()?);
        // With what was never called, which is laid out as something rare.
        process::run(merge.args(["merge", "--output"]).args([&stored, &counts]))?;
        println!("profile: {}", stored.display());
        Ok(())
    }

    /// Compiles a program, each kind in a folder of its own: other flags would throw the others' files out, and other packages
    /// beside it would change the names of the functions in what they share. Its path.
    fn compile(
        &self,
        package: &str,
        program: &str,
        kind: &str,
        flags: &str,
        words: &[&str],
    ) -> Result<PathBuf> {
        let folder = workspace::target().join(kind);
        let given = env::var("RUSTFLAGS").unwrap_or_default();
        let mut build = process::cargo();
        build
            .env("RUSTFLAGS", format!("{given} {flags}").trim())
            .args(["build", "--release", "-p", package, "--bin", program])
            .args(words)
            .args(["--target", &self.target, "--target-dir"])
            .arg(&folder);
        progress::cargo(&format!("build: {program}, as released"), &mut build)?;
        Ok(folder.join(&self.target).join("release").join(program))
    }

    /// The program that merges counts: of the compiler's LLVM, since no other can read them.
    fn merger(&self) -> Result<PathBuf> {
        let llvm = self.version.llvm;
        let path = PathBuf::from(format!("/usr/lib/llvm-{llvm}/bin/llvm-profdata"));
        if !workspace::is_executable(&path) {
            apt::install(&[Package {
                name: format!("llvm-{llvm}"),
                why: "reads the counts of a profile".into(),
            }])?;
        }
        Ok(path)
    }
}
