//! Running test binaries by cargo: shown as they go, counted as they end.

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result};

use super::report::{Count, Summary};
use crate::{process, progress};

/// Builds the tests of `selection`.
pub fn build(selection: &[String]) -> Result<()> {
    let mut command = process::cargo();
    command.args(["test", "--no-run"]).args(selection);
    progress::cargo("build: tests", &mut command)
}

/// `cargo test` of `selection`.
pub fn test(selection: &[String], threads: Option<u32>, filter: Option<&str>) -> Command {
    let mut command = process::cargo();
    command.args(["test", "--no-fail-fast"]).args(selection);
    command.arg("--").args(harness_arguments(threads, filter));
    command
}

/// What every test binary is told.
pub fn harness_arguments(threads: Option<u32>, filter: Option<&str>) -> Vec<String> {
    let threads = threads.map(|n| format!("--test-threads={n}"));
    threads.into_iter().chain(filter.map(str::to_owned)).collect()
}

/// Runs it, showing its output.
pub fn run(mut command: Command) -> Result<Count> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", process::show(&command)))?;
    let mut summary = Summary::default();
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines() {
            let line = line.context("cannot read the tests' output")?;
            println!("{line}");
            summary.line(&line);
        }
    }
    let status = child.wait()?;
    Ok(summary.end(status.success()))
}

/// Builds the test targets `names` of `lb-tests` and returns their executables, in the order of `names`.
pub fn build_tests(names: &[&str]) -> Result<Vec<PathBuf>> {
    let mut command = process::cargo();
    command.args(["test", "-p", "lb-tests", "--no-run"]);
    command.args(["--message-format", "json-render-diagnostics"]);
    for name in names {
        command.args(["--test", name]);
    }
    let messages = progress::cargo_stdout("build: tests", &mut command)?;
    names
        .iter()
        .map(|name| {
            executable(&messages, name)
                .with_context(|| format!("cargo built no test binary `{name}` of lb-tests"))
        })
        .collect()
}

/// The executable of the test target `name` among cargo's JSON messages.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find_map(|message| {
            let target = message.get("target")?;
            let is_test = target.get("kind")?.as_array()?.iter().any(|kind| kind == "test");
            let path = message.get("executable")?.as_str()?;
            (is_test && target.get("name")? == name).then(|| path.into())
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executable_of_a_test_target_is_found() {
        let messages = r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"prog"},"executable":null}
not json
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"net"},"executable":"/t/net-1"}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"prog"},"executable":"/t/prog-2"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(executable(messages, "prog"), Some("/t/prog-2".into()));
        assert_eq!(executable(messages, "vm"), None);
    }
}
