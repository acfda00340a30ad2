//! Reading what libtest prints.

use std::{fmt, ops::AddAssign};

/// How many tests went how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub passed: u64,
    pub failed: u64,
}

impl Count {
    /// Something failed that is not a test: a build, a boot, a missing program.
    pub const fn fault() -> Self {
        Self { passed: 0, failed: 1 }
    }

    /// The counts of a line such as `test result: ok. 3 passed; 0 failed; 0 ignored; …`. An ignored test counts as failed:
    /// a tier is left out by naming the others, never silently.
    pub fn parse(line: &str) -> Option<Self> {
        let counts = line.trim().strip_prefix("test result: ")?.split_once(". ")?.1;
        let number = |word: &str| {
            counts
                .split("; ")
                .find_map(|part| part.strip_suffix(word)?.trim().parse::<u64>().ok())
        };
        Some(Self {
            passed: number(" passed")?,
            failed: number(" failed")? + number(" ignored")?,
        })
    }
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

/// Sums up one run of test binaries, line by line.
#[derive(Debug, Default)]
pub struct Summary {
    count: Count,
}

impl Summary {
    /// Takes a line of the output.
    pub fn line(&mut self, line: &str) {
        if let Some(count) = Count::parse(line) {
            self.count += count;
        }
    }

    /// The sum, once the run has ended. A run that failed without a failed test (it did not compile, it was killed), and a
    /// run without any test, count as one failure: neither has proved anything.
    pub fn end(self, success: bool) -> Count {
        let mut count = self.count;
        if count.failed == 0 && (!success || count.passed == 0) {
            count += Count::fault();
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OK: &str =
        "test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out; finished in 0.02s";
    const BAD: &str =
        "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s";

    fn summary(lines: &[&str], success: bool) -> Count {
        let mut summary = Summary::default();
        lines.iter().for_each(|line| summary.line(line));
        summary.end(success)
    }

    #[test]
    fn results_of_several_binaries_are_summed() {
        assert_eq!(
            summary(&["running 12 tests", OK, "", BAD], false),
            Count {
                passed: 13,
                failed: 2
            }
        );
        assert_eq!(summary(&[OK, OK], true).to_string(), "24 passed, 0 failed");
    }

    #[test]
    fn a_serial_console_ends_its_lines_by_carriage_return() {
        assert_eq!(
            Count::parse(&format!("{OK}\r")),
            Some(Count {
                passed: 12,
                failed: 0
            })
        );
    }

    #[test]
    fn an_ignored_test_is_a_failed_one() {
        let line = OK.replace("0 ignored", "1 ignored");
        assert_eq!(
            Count::parse(&line),
            Some(Count {
                passed: 12,
                failed: 1
            })
        );
    }

    #[test]
    fn a_build_failure_and_a_crash_are_failures() {
        assert_eq!(
            summary(&["error[E0425]: cannot find value"], false),
            Count { passed: 0, failed: 1 }
        );
        assert_eq!(
            summary(&[OK], false),
            Count {
                passed: 12,
                failed: 1
            }
        );
    }

    #[test]
    fn a_run_without_tests_proves_nothing() {
        let empty =
            "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(summary(&[empty], true), Count { passed: 0, failed: 1 });
        assert_eq!(
            summary(&[empty, OK], true),
            Count {
                passed: 12,
                failed: 0
            }
        );
    }

    #[test]
    fn other_lines_are_no_results() {
        assert_eq!(Count::parse("test result: maybe"), None);
        assert_eq!(Count::parse("test parse::refuses_garbage ... ok"), None);
    }
}
