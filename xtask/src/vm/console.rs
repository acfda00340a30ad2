//! What the guest says on its serial console, and how it is judged.

use anyhow::{Result, bail};

use crate::test::report::{Count, Summary};

/// `weir-guest: start <binary>`
pub const START: &str = "weir-guest: start";
/// `weir-guest: end <binary> <exit code>`
pub const END: &str = "weir-guest: end";
/// `weir-guest: module failed <file>`
pub const MODULE_FAILED: &str = "weir-guest: module failed";

/// Lines that are shown when a guest dies.
const TAIL: usize = 40;

/// Reads the console line by line.
#[derive(Debug, Default)]
pub struct Console {
    lines: Vec<String>,
    /// The binary that runs now.
    running: Option<(String, Summary)>,
    ended: Vec<String>,
    total: Count,
    fault: Option<String>,
}

impl Console {
    /// Takes a line. Returns whether a person wants to see it: the tests' own output.
    pub fn line(&mut self, line: &str) -> bool {
        let line = line.trim_end_matches('\r');
        self.lines.push(line.to_owned());
        if let Some(name) = after(line, START) {
            self.running = Some((name.to_owned(), Summary::default()));
        } else if let Some(rest) = after(line, END) {
            self.end(rest);
        } else if line.contains("Kernel panic") || after(line, MODULE_FAILED).is_some() {
            self.fault.get_or_insert_with(|| line.trim().to_owned());
        } else if let Some((_, summary)) = &mut self.running {
            summary.line(line);
            return true;
        }
        false
    }

    fn end(&mut self, rest: &str) {
        let (name, code) = rest.split_once(' ').unwrap_or((rest, ""));
        match self.running.take() {
            Some((running, summary)) if running == name => {
                self.total += summary.end(code == "0");
                self.ended.push(running);
            }
            _ => self.fault = Some(format!("`{name}` ended without having started")),
        }
    }

    /// The result once the guest is off: the sum, if every one of `binaries` has run to its end.
    pub fn finish(self, binaries: &[&str]) -> Result<Count> {
        let missing = binaries
            .iter()
            .find(|binary| !self.ended.iter().any(|ended| ended == *binary));
        let fault = match (&self.fault, &self.running, missing) {
            (Some(fault), ..) => fault.clone(),
            (_, Some((running, _)), _) => format!("the guest went off while `{running}` was running"),
            (_, _, Some(missing)) => format!("the guest never ran `{missing}`"),
            _ => return Ok(self.total),
        };
        bail!("{fault}; the console's end:\n{}", self.tail())
    }

    /// The last lines, for a person.
    pub fn tail(&self) -> String {
        self.lines[self.lines.len().saturating_sub(TAIL)..].join("\n")
    }
}

/// What follows `mark` in `line`: a kernel message without line end may stand before it.
fn after<'a>(line: &'a str, mark: &str) -> Option<&'a str> {
    Some(line.split_once(mark)?.1.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESULT: &str =
        "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s";

    fn read(lines: &[&str]) -> Result<Count> {
        let mut console = Console::default();
        for line in lines {
            console.line(&format!("{line}\r"));
        }
        console.finish(&["prog", "vm"])
    }

    #[test]
    fn results_of_all_binaries_are_summed() {
        let count = read(&[
            "[    0.1] booting",
            "weir-guest: start prog",
            RESULT,
            "weir-guest: end prog 0",
            "[    9.9] noise weir-guest: start vm",
            RESULT,
            "weir-guest: end vm 0",
            "[   10.0] reboot: Power down",
        ]);
        assert_eq!(count.unwrap(), Count { passed: 6, failed: 0 });
    }

    #[test]
    fn a_binary_that_crashed_is_a_failure() {
        let lines = [START, END].map(|mark| format!("{mark} vm"));
        let count = read(&[
            "weir-guest: start prog",
            RESULT,
            "weir-guest: end prog 139",
            &lines[0],
            RESULT,
            &format!("{} 0", lines[1]),
        ]);
        assert_eq!(count.unwrap(), Count { passed: 6, failed: 1 });
    }

    #[test]
    fn a_panic_fails_with_the_consoles_end() {
        let error = read(&[
            "weir-guest: start prog",
            "[ 3.1] Kernel panic - not syncing: oops",
            "Call Trace:",
        ])
        .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("Kernel panic") && text.ends_with("Call Trace:"),
            "{text}"
        );
    }

    #[test]
    fn a_guest_that_stops_early_fails() {
        assert!(
            read(&["weir-guest: start prog", RESULT])
                .unwrap_err()
                .to_string()
                .contains("while `prog` was running")
        );
        let error = read(&["weir-guest: start prog", RESULT, "weir-guest: end prog 0"]).unwrap_err();
        assert!(error.to_string().contains("never ran `vm`"), "{error}");
        assert!(read(&[]).is_err());
    }

    #[test]
    fn a_module_that_does_not_load_fails() {
        assert!(
            read(&["weir-guest: module failed veth.ko"])
                .unwrap_err()
                .to_string()
                .contains("veth.ko")
        );
    }

    #[test]
    fn only_the_tests_output_is_shown() {
        let mut console = Console::default();
        assert!(!console.line("[    0.1] booting"));
        assert!(!console.line("weir-guest: start prog"));
        assert!(console.line("test tcp ... ok"));
        assert!(!console.line("weir-guest: end prog 0"));
    }
}
