//! What is wrong with a configuration file: every fault at once, each with its place and its remedy.

use std::{fmt, ops::Range, path::PathBuf};

/// One fault of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigFault {
    /// The key, dotted (`vips.web.address`); empty when the file as a whole is meant.
    pub key: String,
    /// Line and column, both from 1, where the file says it; `None` for something that is missing.
    pub position: Option<(usize, usize)>,
    /// What is wrong.
    pub fault: String,
    /// What to do about it.
    pub remedy: String,
}

impl fmt::Display for ConfigFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((line, column)) = self.position {
            write!(f, "line {line}, column {column}: ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        write!(f, "{}; {}", self.fault, self.remedy)
    }
}

/// Every fault of one file, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    /// The file.
    pub path: PathBuf,
    /// At least one.
    pub faults: Vec<ConfigFault>,
}

impl std::error::Error for ConfigErrors {}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.faults.len();
        let plural = if count == 1 { "fault" } else { "faults" };
        write!(f, "{}: {count} {plural}", self.path.display())?;
        for fault in &self.faults {
            write!(f, "\n  {fault}")?;
        }
        Ok(())
    }
}

/// Line and column, both from 1, of a byte offset; columns count characters.
pub(super) fn position(text: &str, span: &Range<usize>) -> (usize, usize) {
    let before = text.get(..span.start).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |last| last.chars().count()) + 1;
    (line, column)
}
