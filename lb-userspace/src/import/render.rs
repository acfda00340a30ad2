//! Lines → a configuration that `weir check` accepts: a line that it would refuse is commented out, and said.

use std::{collections::BTreeSet, fmt::Write as _, path::Path};

use toml::Value;

use super::{Remark, read::look};
use crate::config::{Config, ConfigFault};

/// Sections in their order.
const SECTIONS: &[&str] = &["", "docker", "admin", "l7", "l7.timeouts"];

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Line {
    section: &'static str,
    key: &'static str,
    value: Value,
    /// Commented out.
    off: bool,
}

/// The lines of a configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Lines(Vec<Line>);

impl Lines {
    /// Sets a key; what it is now, for people.
    pub(super) fn set(&mut self, section: &'static str, key: &'static str, value: Value) -> String {
        let line = Line {
            section,
            key,
            value,
            off: false,
        };
        let shown = line.shown();
        self.0
            .retain(|other| (other.section, other.key) != (section, key));
        self.0.push(line);
        shown
    }

    /// A key that somebody has to fill in.
    pub(super) fn suggest(&mut self, section: &'static str, key: &'static str, value: Value) {
        self.0.push(Line {
            section,
            key,
            value,
            off: true,
        });
    }

    pub(super) fn has(&self, section: &str, key: &str) -> bool {
        self.0
            .iter()
            .any(|line| line.section == section && line.key == key)
    }
}

impl Line {
    fn path(&self) -> String {
        match self.section {
            "" => self.key.to_owned(),
            section => format!("{section}.{}", self.key),
        }
    }

    fn is_https_port(&self) -> bool {
        (self.section, self.key) == ("l7", "https-port")
    }

    fn shown(&self) -> String {
        format!("{} = {}", self.path(), self.value)
    }
}

/// The text. Lines that would be refused are turned off one after the other, so this ends.
pub(super) fn render(mut lines: Lines, origin: &str, remarks: &mut Vec<Remark>) -> String {
    loop {
        let text = write(&lines, origin);
        let Err(errors) = Config::parse(Path::new("weir.toml"), &text) else {
            return text;
        };
        if !turn_off(&mut lines, &errors.faults, remarks) {
            return text;
        }
    }
}

/// Turns off what the faults are of. Without a good endpoint nothing of `[docker]` means what it did.
fn turn_off(lines: &mut Lines, faults: &[ConfigFault], remarks: &mut Vec<Remark>) -> bool {
    let mut any = false;
    let mut keys: BTreeSet<&str> = BTreeSet::new();
    for fault in faults {
        keys.insert(fault.key.as_str());
        if matches!(
            fault.key.as_str(),
            "docker" | "docker.endpoint" | "docker.node-address"
        ) {
            keys.insert("docker");
        }
        if let Some(line) = lines.0.iter().find(|line| !line.off && line.path() == fault.key) {
            let done = match line.is_https_port() {
                true => "It is 0 now",
                false => "The line is commented out",
            };
            let what = format!("{}; {}. {done}", fault.fault, fault.remedy);
            look(remarks, &line.shown(), &what);
        }
    }
    for line in lines.0.iter_mut().filter(|line| !line.off) {
        if keys.contains(line.path().as_str()) || (line.section == "docker" && keys.contains("docker")) {
            any = true;
            // Without the line it would be 443, which may be what the fault is of.
            if line.is_https_port() {
                line.value = Value::from(0);
            } else {
                line.off = true;
            }
        }
    }
    any
}

fn write(lines: &Lines, origin: &str) -> String {
    // A name from outside must not end the comment.
    let origin = origin.replace(char::is_control, "?");
    let mut text = format!(
        "# Made of the configuration of Interlock in {origin} by `weir import interlock`.\n\
         # Routes come from the labels of containers. Services of layer 4 need a VIP besides: docs/config.md.\n"
    );
    for section in SECTIONS {
        let mut own = lines.0.iter().filter(|line| line.section == *section).peekable();
        if own.peek().is_none() {
            continue;
        }
        if !section.is_empty() {
            // Writing to a String cannot fail.
            let _ = write!(text, "\n[{section}]\n");
        }
        for line in own {
            let off = if line.off { "# " } else { "" };
            let _ = writeln!(text, "{off}{} = {}", line.key, line.value);
        }
    }
    text
}
