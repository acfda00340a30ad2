//! QEMU for the vm tier: the one on PATH if it works, else Debian's, unpacked under `target/vm/qemu` and never installed.
//!
//! It is unpacked together with every package it depends on, libc and its loader included, and shares no file with the
//! machine. So it conflicts with nothing that is installed, such as a `qemu-utils` of another release, and an upgrade of
//! the machine's libraries cannot break it.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::{apt, process, workspace};

/// The Debian package, and the program in it.
const PACKAGE: &str = "qemu-system-x86";
const PROGRAM: &str = "qemu-system-x86_64";

/// Folders of libraries in the unpacked packages, relative to their root.
const LIBRARIES: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

/// The loader that belongs to the unpacked libc: in one of [`LIBRARIES`].
const LOADER: &str = "ld-linux-x86-64.so.2";

/// Folders of firmware in the unpacked packages.
const FIRMWARE: [&str; 3] = ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"];

/// The machine of the guests: software emulation (TCG), since nested virtualisation is missing on many machines.
const MACHINE: [&str; 15] = [
    "-M",
    "q35",
    "-accel",
    "tcg",
    "-cpu",
    "max",
    "-smp",
    "1",
    "-m",
    "2048",
    "-display",
    "none",
    "-no-reboot",
    "-nic",
    "none",
];

/// A QEMU that has been seen to work.
#[derive(Clone, Debug)]
pub enum Qemu {
    /// A program of this machine.
    Installed(PathBuf),
    /// Packages, unpacked below this folder.
    Unpacked(PathBuf),
}

impl Qemu {
    /// The first QEMU that works: on PATH, in the store, or unpacked now.
    pub fn ensure() -> Result<Self> {
        if let Some(program) = workspace::find_program(PROGRAM) {
            let installed = Self::Installed(program);
            match installed.probe() {
                Ok(()) => return Ok(installed),
                Err(fault) => println!("setup: the installed {PROGRAM} is not used: {fault:#}"),
            }
        }
        let stored = Self::Unpacked(store());
        if store().exists() {
            match stored.probe() {
                Ok(()) => return Ok(stored),
                Err(fault) => println!("setup: {} is unpacked again: {fault:#}", store().display()),
            }
        }
        unpack(&store())?;
        Ok(stored)
    }

    /// QEMU with the machine of the guests, without kernel and console.
    pub fn command(&self) -> Command {
        let mut command = match self {
            Self::Installed(program) => Command::new(program),
            Self::Unpacked(root) => unpacked_command(root),
        };
        command.args(MACHINE);
        command
    }

    /// Makes the machine, without starting its processor: this loads all libraries, modules and firmware.
    fn probe(&self) -> Result<()> {
        let mut command = self.command();
        let mut child = command
            .args(["-S", "-serial", "none", "-monitor", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", process::show(&command)))?;
        if let Some(mut monitor) = child.stdin.take() {
            // A QEMU that has ended says why on stderr.
            let _ = monitor.write_all(b"quit\n");
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            bail!("{PROGRAM} does not run: {}: {}", output.status, errors.trim());
        }
        Ok(())
    }
}

/// Where QEMU is unpacked.
fn store() -> PathBuf {
    workspace::target().join("vm/qemu")
}

/// Unpacks QEMU and its dependencies in `store`, which has all of it or does not exist.
fn unpack(store: &Path) -> Result<()> {
    println!("setup: {PACKAGE} is missing: the vm tier boots kernels in it; unpacked, not installed");
    let unfinished = store.with_extension("unfinished");
    apt::update();
    let packages = apt::closure(PACKAGE)?;
    apt::unpack("setup: QEMU for the vm tier", &packages, &unfinished)?;
    Qemu::Unpacked(unfinished.clone())
        .probe()
        .context("the unpacked QEMU does not work")?;
    workspace::remove_folder(store)?;
    fs::rename(&unfinished, store).with_context(|| format!("cannot make {}", store.display()))
}

/// The unpacked program, run by the loader and the libraries unpacked beside it. It looks for its modules and firmware
/// relative to the executable, which is the loader here, so it gets their paths.
fn unpacked_command(root: &Path) -> Command {
    let libraries = LIBRARIES.map(|folder| root.join(folder));
    let mut loaders = libraries.iter().map(|folder| folder.join(LOADER));
    let mut command = Command::new(loaders.find(|file| file.exists()).unwrap_or_default());
    let path: Vec<_> = libraries.iter().map(|folder| folder.to_string_lossy()).collect();
    command
        .env("QEMU_MODULE_DIR", root.join("usr/lib/x86_64-linux-gnu/qemu"))
        .args(["--library-path", &path.join(":")])
        .arg(root.join("usr/bin").join(PROGRAM));
    for folder in FIRMWARE {
        command.arg("-L").arg(root.join(folder));
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unpacked_qemu_runs_by_its_own_loader_libraries_and_firmware() {
        let root = std::env::temp_dir().join(format!("weir-xtask-qemu-{}", std::process::id()));
        let loader = root.join("usr/lib/x86_64-linux-gnu").join(LOADER);
        fs::create_dir_all(loader.parent().unwrap()).unwrap();
        fs::write(&loader, "").unwrap();
        let command = Qemu::Unpacked(root.clone()).command();
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(command.get_program(), loader);
        let arguments: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        let text = arguments.join(" ");
        let root = root.display();
        assert!(
            text.starts_with(&format!(
                "--library-path {root}/lib/x86_64-linux-gnu:{root}/usr/lib/x86_64-linux-gnu \
                 {root}/usr/bin/qemu-system-x86_64 -L {root}/usr/share/qemu "
            )),
            "{text}"
        );
        assert!(text.ends_with(&MACHINE.join(" ")), "{text}");
    }

    #[test]
    fn a_qemu_that_is_not_whole_does_not_count() {
        let fault = Qemu::Unpacked("/nonexistent".into()).probe().unwrap_err();
        assert!(fault.to_string().contains("cannot start"), "{fault:#}");
        let fault = Qemu::Installed("/bin/false".into()).probe().unwrap_err();
        assert!(fault.to_string().contains("does not run"), "{fault:#}");
    }
}
