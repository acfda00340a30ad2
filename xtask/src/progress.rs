//! Progress of steps that take long: what runs and for how long.
//!
//! A step that ends within a second prints nothing. On a terminal a longer one keeps one line up to date; elsewhere it prints a
//! line when it begins to be long, one every half minute, and one when it ends. All of it goes to stderr: stdout belongs to
//! results, such as the paths that `build` prints.

use std::{
    collections::VecDeque,
    env,
    io::{self, BufRead, BufReader, IsTerminal, PipeReader, Read, Write},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::process;

/// How often a step looks at the clock.
const TICK: Duration = Duration::from_secs(1);

/// Interval between two lines of a step where there is no terminal.
const INTERVAL: Duration = Duration::from_secs(30);

/// Lines of output that are shown when a quiet command fails.
const TAIL: usize = 60;

/// The words with which cargo begins a status line.
const CARGO_STATUS: [&str; 20] = [
    "Adding",
    "Blocking",
    "Building",
    "Checking",
    "Compiling",
    "Dirty",
    "Doc-tests",
    "Downloaded",
    "Downloading",
    "Executable",
    "Finished",
    "Fresh",
    "Ignored",
    "Installed",
    "Installing",
    "Locking",
    "Removing",
    "Replacing",
    "Running",
    "Updating",
];

/// Runs cargo as a step. Its status lines become the step's progress; warnings and errors are shown.
pub fn cargo(name: &str, command: &mut Command) -> Result<()> {
    let child = spawn_cargo(command)?;
    finish(name, command, child, Output::Cargo)
}

/// As [`cargo`]; returns what it printed on stdout.
pub fn cargo_stdout(name: &str, command: &mut Command) -> Result<String> {
    let (mut child, lines) = spawn_cargo(command.stdout(Stdio::piped()))?;
    let stdout = child.stdout.take().map(read_all);
    finish(name, command, (child, lines), Output::Cargo)?;
    let bytes = stdout.and_then(|reader| reader.join().ok()).unwrap_or_default();
    String::from_utf8(bytes).with_context(|| format!("{} printed no UTF-8", process::show(command)))
}

/// Runs a command as a step. Its output is shown only if it fails.
pub fn quiet(name: &str, command: &mut Command) -> Result<()> {
    let child = spawn(command.stdin(Stdio::null()), true)?;
    finish(name, command, child, Output::Hidden)
}

/// A duration as people say it: `48 s`, `3 m 12 s`.
pub fn duration(elapsed: Duration) -> String {
    match elapsed.as_secs() {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds => format!("{} m {} s", seconds / 60, seconds % 60),
    }
}

/// What the lines of a command are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Output {
    /// Status lines of cargo, warnings and errors.
    Cargo,
    /// Lines that matter only if the command fails.
    Hidden,
}

fn spawn_cargo(command: &mut Command) -> Result<(Child, Receiver<String>)> {
    if io::stderr().is_terminal() && env::var_os("CARGO_TERM_COLOR").is_none() {
        // Cargo itself sees a pipe and would print its errors without colours.
        command.env("CARGO_TERM_COLOR", "always");
    }
    spawn(command, false)
}

/// Starts `command`; the receiver gets the lines of its stderr, and of its stdout if `both`.
fn spawn(command: &mut Command, both: bool) -> Result<(Child, Receiver<String>)> {
    let (reader, writer) = io::pipe().context("cannot make a pipe")?;
    if both {
        command.stdout(writer.try_clone()?);
    }
    let child = command
        .stderr(writer)
        .spawn()
        .with_context(|| format!("cannot start {}", process::show(command)))?;
    // `command` holds the ends of the pipe that the child writes to. Without dropping them the reader would never see the end.
    command.stderr(Stdio::inherit());
    if both {
        command.stdout(Stdio::inherit());
    }
    Ok((child, read_lines(reader)))
}

/// Sends the lines that `reader` gets, until it ends.
fn read_lines(reader: PipeReader) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    });
    lines
}

fn read_all(mut stdout: ChildStdout) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // After an error the text is cut off, which its reader reports.
        let _ = stdout.read_to_end(&mut bytes);
        bytes
    })
}

/// Shows the progress of `child` until it ends.
fn finish(
    name: &str,
    command: &Command,
    (mut child, lines): (Child, Receiver<String>),
    output: Output,
) -> Result<()> {
    let mut step = Step::new(name, io::stderr().is_terminal());
    let mut tail = VecDeque::new();
    let ended: Option<ExitStatus> = loop {
        match lines.recv_timeout(TICK) {
            Ok(line) => match (output, cargo_status(&line)) {
                (Output::Cargo, None) => step.show(&line),
                (Output::Cargo, Some(status)) => step.status(status),
                (Output::Hidden, _) => {
                    tail.push_back(line);
                    if tail.len() > TAIL {
                        tail.pop_front();
                    }
                }
            },
            Err(RecvTimeoutError::Disconnected) => break None,
            Err(RecvTimeoutError::Timeout) => {
                // A process that the child left behind may keep the pipe open.
                if let Some(status) = child.try_wait()? {
                    break Some(status);
                }
            }
        }
        step.tick();
    };
    let status = match ended {
        Some(status) => status,
        None => child.wait()?,
    };
    if status.success() {
        step.end("done in");
        return Ok(());
    }
    for line in &tail {
        step.show(line);
    }
    step.end("failed after");
    bail!("{} failed: {status}", process::show(command));
}

/// The status that cargo prints in `line`, in lower case, such as `compiling hyper v1.8.1`; `None` for any other line.
fn cargo_status(line: &str) -> Option<String> {
    let plain = without_colours(line);
    let text = plain.trim();
    let (word, rest) = text.split_once(' ')?;
    // Status lines are indented, or exactly as wide as the column that they are set in.
    let is_status = plain.len() > text.len() || word.len() == 12;
    // Without the path of a crate of the workspace: `Compiling weir v0.1.0 (/home/…)`.
    let rest = rest.split(" (").next().unwrap_or(rest).trim_start();
    (is_status && CARGO_STATUS.contains(&word)).then(|| format!("{} {rest}", word.to_lowercase()))
}

/// `line` without the escape sequences that set colours.
fn without_colours(line: &str) -> String {
    let mut parts = line.split('\x1b');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        plain += part.split_once('m').map_or("", |(_, text)| text);
    }
    plain.trim_end().to_owned()
}

/// A step that runs.
struct Step<'a> {
    name: &'a str,
    terminal: bool,
    start: Instant,
    /// What it does at the moment.
    status: String,
    /// Crates that have been compiled or checked.
    crates: u32,
    /// When the last line was printed.
    printed: Option<Instant>,
}

impl<'a> Step<'a> {
    fn new(name: &'a str, terminal: bool) -> Self {
        Self {
            name,
            terminal,
            start: Instant::now(),
            status: String::new(),
            crates: 0,
            printed: None,
        }
    }

    fn status(&mut self, status: String) {
        if status.starts_with("compiling") || status.starts_with("checking") {
            self.crates += 1;
        }
        self.status = status;
    }

    /// Prints a line that is no progress.
    fn show(&mut self, line: &str) {
        self.clear();
        eprintln!("{}", line.trim_end());
    }

    /// Prints the progress if it is time to.
    fn tick(&mut self) {
        let now = Instant::now();
        let elapsed = now - self.start;
        if elapsed < TICK {
            return;
        }
        let interval = if self.terminal { TICK } else { INTERVAL };
        if self.printed.is_some_and(|printed| now - printed < interval) {
            return;
        }
        if self.terminal {
            // Cut so that it stays one line, which the next one can overwrite.
            let line: String = self.line(elapsed).chars().take(79).collect();
            eprint!("\r\x1b[K{line}");
            // A terminal that does not take it shows no progress.
            let _ = io::stderr().flush();
        } else if self.printed.is_none() {
            eprintln!("{} ...", self.name);
        } else {
            eprintln!("{}", self.line(elapsed));
        }
        self.printed = Some(now);
    }

    fn line(&self, elapsed: Duration) -> String {
        let mut line = format!("{}: {}", self.name, duration(elapsed));
        if self.crates > 0 {
            line += &format!(", crate {}", self.crates);
        }
        if !self.status.is_empty() {
            line += &format!(", {}", self.status);
        }
        line
    }

    /// Prints how it ended, if it was long.
    fn end(&mut self, how: &str) {
        self.clear();
        let elapsed = self.start.elapsed();
        if elapsed >= TICK {
            eprintln!("{}: {how} {}", self.name, duration(elapsed));
        }
    }

    /// Removes the progress from the terminal.
    fn clear(&mut self) {
        if self.terminal && self.printed.take().is_some() {
            eprint!("\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_lines_of_cargo_are_recognised_among_its_messages() {
        let status = |line| cargo_status(line);
        assert_eq!(
            status("   Compiling hyper v1.8.1").as_deref(),
            Some("compiling hyper v1.8.1")
        );
        assert_eq!(
            status("\x1b[1m\x1b[92m   Compiling\x1b[0m weir v0.1.0 (/src/weir)").as_deref(),
            Some("compiling weir v0.1.0")
        );
        assert_eq!(
            status("    Blocking waiting for file lock on build directory").as_deref(),
            Some("blocking waiting for file lock on build directory")
        );
        for line in [
            "warning: unused variable: `x`",
            "  --> src/main.rs:1:1",
            "   |",
            "Compiling is no status at the beginning of a line",
            "",
        ] {
            assert_eq!(status(line), None, "{line}");
        }
    }

    #[test]
    fn durations_are_said_in_minutes_and_seconds() {
        assert_eq!(duration(Duration::from_millis(48_900)), "48 s");
        assert_eq!(duration(Duration::from_secs(192)), "3 m 12 s");
        assert_eq!(duration(Duration::from_secs(3600)), "60 m 0 s");
    }

    #[test]
    fn progress_names_the_step_the_time_and_the_crate() {
        let mut step = Step::new("build: the L7 shim", false);
        assert_eq!(step.line(Duration::from_secs(30)), "build: the L7 shim: 30 s");
        step.status("compiling ring v0.17.14".into());
        step.status("compiling hyper v1.8.1".into());
        assert_eq!(
            step.line(Duration::from_secs(90)),
            "build: the L7 shim: 1 m 30 s, crate 2, compiling hyper v1.8.1"
        );
    }

    #[test]
    fn a_command_ends_with_its_status_and_gives_its_output() {
        let shell = |script: &str| {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", script]);
            command
        };
        assert_eq!(
            cargo_stdout("test", &mut shell("echo out; echo '   Compiling x v1' >&2")).unwrap(),
            "out\n"
        );
        quiet("test", &mut shell("echo hidden; echo hidden >&2")).unwrap();
        let error = quiet("test", &mut shell("exit 3")).unwrap_err().to_string();
        assert!(error.contains("sh -c") && error.contains('3'), "{error}");
    }

    #[test]
    fn a_process_that_is_left_behind_does_not_hold_up_the_step() {
        let start = Instant::now();
        let mut command = Command::new("/bin/sh");
        // The pause inherits the pipe and outlives its parent.
        command.args(["-c", "sleep 60 & exit 0"]);
        quiet("test", &mut command).unwrap();
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}
