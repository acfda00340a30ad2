//! The static test server: what the containers of tier e2e and of the demo run.

use std::path::PathBuf;

use anyhow::Result;

use crate::{process, workspace};

/// Builds it and returns its path.
pub fn build() -> Result<PathBuf> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    // A folder of its own: other flags would throw everybody else's files out of the common one.
    let folder = workspace::target().join("static");
    process::run(
        process::cargo()
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .args([
                "build",
                "--quiet",
                "--release",
                "-p",
                "weir-test-server",
                "--target",
                &target,
            ])
            .arg("--target-dir")
            .arg(&folder),
    )?;
    Ok(folder.join(target).join("release/weir-test-server"))
}
