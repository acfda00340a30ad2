//! The kernels of the vm tier: the newest build of each series that Debian has for cloud machines, unpacked under
//! `target/vm`, never installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{apt, process, workspace};

/// The series: 6.1 is the oldest kernel that Weir supports, 6.12 the newest long-term one that Debian 12 offers.
const SERIES: [&str; 2] = ["6.1", "6.12"];

/// An unpacked kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// Holds `boot/` and `lib/modules/`.
    pub root: PathBuf,
}

impl Kernel {
    /// The bootable image.
    pub fn image(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    /// `lib/modules/<release>`.
    pub fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }
}

/// One kernel of each series: the newest in the store, or else the newest that apt offers. `cargo clean` makes room for newer
/// ones.
pub fn ensure_all() -> Result<Vec<Kernel>> {
    let unpacked = unpacked_releases(&store())?;
    let find = |names: &[String]| SERIES.map(|series| newest(names, series));
    let mut releases = find(&unpacked);
    if releases.iter().any(Option::is_none) {
        // Old lists name packages that the archive has no more.
        apt::update();
        releases = find(&offered_releases()?);
    }
    SERIES
        .into_iter()
        .zip(releases)
        .map(|(series, release)| {
            let release = release.with_context(|| {
                format!("apt offers no linux-image-{series}*-cloud-amd64: are bookworm and bookworm-security configured?")
            })?;
            ensure(release)
        })
        .collect()
}

/// Where kernels are unpacked.
fn store() -> PathBuf {
    workspace::target().join("vm/kernels")
}

fn ensure(release: String) -> Result<Kernel> {
    let kernel = Kernel {
        root: store().join(&release),
        release,
    };
    if kernel.image().exists() {
        return Ok(kernel);
    }
    println!(
        "setup: kernel {} is missing: the vm tier boots it",
        kernel.release
    );
    // Unpacked beside and renamed, so that a kernel in the store is a whole one.
    let unfinished = store().join("unfinished");
    let package = format!("linux-image-{}", kernel.release);
    let step = format!("setup: kernel {}", kernel.release);
    apt::unpack(&step, std::slice::from_ref(&package), &unfinished)?;
    process::run(
        Command::new("depmod")
            .arg("-b")
            .arg(&unfinished)
            .arg(&kernel.release),
    )?;
    fs::rename(&unfinished, &kernel.root)?;
    if !kernel.image().exists() {
        bail!("package {package} has no kernel at {}", kernel.image().display());
    }
    Ok(kernel)
}

/// Releases in the store.
fn unpacked_releases(store: &Path) -> Result<Vec<String>> {
    if !store.exists() {
        return Ok(Vec::new());
    }
    let name = |path: PathBuf| Some(path.file_name()?.to_str()?.to_owned());
    Ok(workspace::entries(store)?.into_iter().filter_map(name).collect())
}

/// Releases that apt could download.
fn offered_releases() -> Result<Vec<String>> {
    let names = process::capture(Command::new("apt-cache").args(["pkgnames", "linux-image-6."]))?;
    Ok(names
        .lines()
        .filter_map(|name| name.strip_prefix("linux-image-"))
        .map(str::to_owned)
        .collect())
}

/// The newest of `releases` that is a signed cloud kernel of `series`.
fn newest(releases: &[String], series: &str) -> Option<String> {
    let candidates = releases.iter().filter(|release| {
        release.ends_with("-cloud-amd64")
            && release
                .strip_prefix(series)
                .is_some_and(|rest| rest.starts_with('.'))
    });
    candidates.max_by_key(|release| numbers(release)).cloned()
}

/// All numbers in a release, in order: 6.1.0-56-cloud-amd64 is newer than 6.1.0-9-cloud-amd64.
fn numbers(release: &str) -> Vec<u64> {
    release
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_cloud_kernel_of_a_series_is_chosen_by_number() {
        let releases = [
            "6.1.0-9-cloud-amd64",
            "6.1.0-56-cloud-amd64",
            "6.1.0-57-amd64",
            "6.1.0-58-cloud-amd64-unsigned",
            "6.10.11+bpo-cloud-amd64",
            "6.12.117+deb12-cloud-amd64",
            "6.12.99+deb12-cloud-amd64",
        ]
        .map(str::to_owned);
        assert_eq!(newest(&releases, "6.1").as_deref(), Some("6.1.0-56-cloud-amd64"));
        assert_eq!(
            newest(&releases, "6.12").as_deref(),
            Some("6.12.117+deb12-cloud-amd64")
        );
        assert_eq!(newest(&releases, "6.6"), None);
    }
}
