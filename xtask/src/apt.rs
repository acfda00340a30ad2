//! Debian packages. Installing: nothing recommended, nothing removed, no service started. Unpacking: into a folder of ours,
//! whatever is installed.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command, sync::Once};

use anyhow::{Context, Result, bail};

use crate::{process, progress, workspace};

/// Makes apt see a machine without any package, so that its answer depends on the archive alone.
const NOTHING_INSTALLED: [&str; 4] = [
    "-o",
    "Dir::State::status=/dev/null",
    "-o",
    "Dir::Cache::pkgcache=",
];

/// A package and why it is installed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    pub name: String,
    pub why: String,
}

/// Installs `packages` after saying which and why. None is no work.
pub fn install(packages: &[Package]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    for package in packages {
        println!("setup: {} is missing: {}", package.name, package.why);
    }
    let names: Vec<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    require_apt(&names)?;
    update();
    let arguments = ["install", "--yes", "--no-install-recommends"];
    let simulation = process::capture(apt_get().arg("--simulate").args(arguments).args(&names))?;
    let removed = removals(&simulation);
    if !removed.is_empty() {
        bail!(
            "{} would remove {}, which may be in use: nothing is removed without being asked; remove them, or install a \
             version of {} that goes with them, then try again",
            names.join(" "),
            removed.join(" "),
            names.join(" "),
        );
    }
    let _quiet = NoServices::new()?;
    progress::quiet(
        "setup: installing packages",
        apt_get()
            .args(["-qq", "-o", "Dpkg::Use-Pty=0", "--no-remove"])
            .args(arguments)
            .args(&names),
    )
}

/// Brings apt's lists up to date, once in a run and if this user may. A source that fails is reported and is no failure: the
/// packages may come from another one, or be in the lists already.
pub fn update() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if !workspace::is_root() {
            return;
        }
        let updated = progress::quiet("setup: apt-get update", apt_get().args(["-qq", "update"]));
        if let Err(fault) = updated {
            eprintln!("setup: {fault:#}; going on with the lists that are there");
        }
    });
}

/// `package` and every package that it depends on, as `name=version`, as if none were installed.
pub fn closure(package: &str) -> Result<Vec<String>> {
    let simulation = process::capture(apt_get().args(NOTHING_INSTALLED).args([
        "--simulate",
        "install",
        "--no-install-recommends",
        package,
    ]))?;
    let packages = installations(&simulation);
    if packages.is_empty() {
        bail!("apt would install nothing for {package}");
    }
    Ok(packages)
}

/// Downloads `packages` (`name` or `name=version`) and unpacks them in `folder`, whose old content is removed. No maintainer script runs.
pub fn unpack(step: &str, packages: &[String], folder: &Path) -> Result<()> {
    workspace::remove_folder(folder)?;
    let archives = folder.join("archives");
    fs::create_dir_all(&archives).with_context(|| format!("cannot make {}", archives.display()))?;
    let mut download = apt_get();
    download
        .args(NOTHING_INSTALLED)
        // The user that apt would download as may not be able to write here.
        .args(["-o", "APT::Sandbox::User=root", "-qq", "download"])
        .args(packages)
        .current_dir(&archives);
    progress::quiet(&format!("{step}: download"), &mut download)?;
    let files = workspace::entries(&archives)?;
    if files.len() != packages.len() {
        bail!("apt downloaded {} of {} packages", files.len(), packages.len());
    }
    for archive in files {
        process::run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(folder))?;
    }
    workspace::remove_folder(&archives)
}

/// Fails with what the user has to do where there is no apt, or no right to use it.
fn require_apt(names: &[&str]) -> Result<()> {
    let list = names.join(" ");
    if workspace::find_program("apt-get").is_none() {
        bail!("this is no Debian machine; install what these Debian packages bring, then try again: {list}");
    }
    if !workspace::is_root() {
        bail!("installing needs root; run `cargo xtask setup` as root, or install: {list}");
    }
    Ok(())
}

/// `apt-get` without questions.
pub fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    // RUNLEVEL=1 makes invoke-rc.d leave services stopped, also where policy-rc.d is not asked.
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("RUNLEVEL", "1")
        // A machine that has just started may be installing upgrades.
        .args(["-o", "DPkg::Lock::Timeout=300"]);
    command
}

/// The packages that a simulated installation removes.
fn removals(simulation: &str) -> Vec<&str> {
    simulation
        .lines()
        .filter_map(|line| line.strip_prefix("Remv ")?.split_whitespace().next())
        .collect()
}

/// The packages that a simulated installation installs, as `name=version`.
fn installations(simulation: &str) -> Vec<String> {
    let package = |line: &str| {
        // `Inst name [installed version] (version source [architecture])`
        let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
        let version = rest.split_once('(')?.1.split_whitespace().next()?;
        Some(format!("{name}={version}"))
    };
    simulation.lines().filter_map(package).collect()
}

/// Forbids packages to start their services while it lives: the tests start engines of their own.
struct NoServices {
    /// Whether the file is ours to remove.
    ours: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl NoServices {
    fn new() -> Result<Self> {
        let path = Path::new(POLICY);
        if path.exists() {
            return Ok(Self { ours: false });
        }
        fs::write(path, "#!/bin/sh\nexit 101\n").with_context(|| format!("cannot write {POLICY}"))?;
        let guard = Self { ours: true };
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        Ok(guard)
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(POLICY)
        {
            eprintln!(
                "setup: cannot remove {POLICY}, which keeps services from starting: {error}; remove it"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removals_are_read_from_a_simulation() {
        let simulation = "Reading package lists...\nRemv qemu-utils [1:10.0.2]\nInst cpio (2.13 Debian:12.15/oldstable [amd64])\n";
        assert_eq!(removals(simulation), ["qemu-utils"]);
        assert!(removals("Inst cpio (2.13)\nConf cpio (2.13)\n").is_empty());
    }

    #[test]
    fn a_closure_is_read_from_a_simulation() {
        let simulation = "Building dependency tree...\nThe following NEW packages will be installed:\n  libc6\n\
            Inst libgcc-s1 (12.2.0-14+deb12u1 Debian:12.15/oldstable [amd64]) []\n\
            Inst libc6 [2.36-9] (2.36-9+deb12u14 Debian:12.15/oldstable [amd64])\n\
            Inst qemu-system-x86 (1:7.2+dfsg-7 Debian:12.15/oldstable, Debian-Security:12/oldstable-security [amd64])\n\
            Conf libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [amd64])\nRemv qemu-utils [1:10.0.2]\n";
        assert_eq!(
            installations(simulation),
            [
                "libgcc-s1=12.2.0-14+deb12u1",
                "libc6=2.36-9+deb12u14",
                "qemu-system-x86=1:7.2+dfsg-7"
            ]
        );
        assert!(installations("0 upgraded, 0 newly installed\n").is_empty());
    }
}
