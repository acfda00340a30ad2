//! Child processes: run them, or fail with the command that failed and how.

use std::{ffi::OsStr, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};

/// The host's cargo, free of what `cargo run` put into the environment for xtask itself.
pub fn cargo() -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(crate::workspace::root());
    remove_own_cargo_variables(&mut command);
    command
}

/// A command in the workspace that inherits nothing of the toolchain that runs xtask: neither rustup's choice nor flags
/// meant for the host. Another compiler would take them for its own.
pub fn foreign_cargo(program: &OsStr) -> Command {
    let mut command = Command::new(program);
    command.current_dir(crate::workspace::root());
    remove_own_cargo_variables(&mut command);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(chooses_host_toolchain) {
            command.env_remove(&name);
        }
    }
    command
}

/// Whether an environment variable picks the host's compiler, its flags or its target folder.
fn chooses_host_toolchain(name: &str) -> bool {
    matches!(
        name,
        "CARGO"
            | "RUSTC"
            | "RUSTDOC"
            | "RUSTFLAGS"
            | "RUSTDOCFLAGS"
            | "RUSTC_WRAPPER"
            | "RUSTC_WORKSPACE_WRAPPER"
            | "RUSTC_BOOTSTRAP"
            | "RUSTUP_TOOLCHAIN"
            | "CARGO_ENCODED_RUSTFLAGS"
            | "CARGO_TARGET_DIR"
            | "LD_LIBRARY_PATH"
    ) || name.starts_with("CARGO_BUILD_")
        || name.starts_with("CARGO_PROFILE_")
        || name.starts_with("CARGO_TARGET_")
}

fn remove_own_cargo_variables(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let own = |n: &str| {
            ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"]
                .iter()
                .any(|prefix| n.starts_with(prefix))
                || n == "CARGO_PRIMARY_PACKAGE"
        };
        if name.to_str().is_some_and(own) {
            command.env_remove(&name);
        }
    }
}

/// Runs it with its output on the terminal.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {}", show(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", show(command));
    }
    Ok(())
}

/// Runs it and returns what it printed; its errors are part of the error.
pub fn capture(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {}", show(command)))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed: {}: {}", show(command), output.status, errors.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{} printed no UTF-8", show(command)))
}

/// The command as one would type it.
pub fn show(command: &Command) -> String {
    let program = PathBuf::from(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    std::iter::once(name)
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_that_choose_the_hosts_compiler_are_recognised() {
        for name in [
            "RUSTUP_TOOLCHAIN",
            "RUSTC",
            "RUSTFLAGS",
            "CARGO_TARGET_DIR",
            "CARGO_PROFILE_RELEASE_LTO",
        ] {
            assert!(chooses_host_toolchain(name), "{name}");
        }
        for name in ["PATH", "HOME", "CARGO_HOME", "RUSTUP_HOME", "CARGO_NET_OFFLINE"] {
            assert!(!chooses_host_toolchain(name), "{name}");
        }
    }

    #[test]
    fn a_failing_command_names_itself_and_its_complaint() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo no such thing >&2; exit 3"]);
        let message = capture(&mut command).unwrap_err().to_string();
        assert!(
            message.contains("sh -c") && message.contains("no such thing") && message.contains('3'),
            "{message}"
        );
    }
}
