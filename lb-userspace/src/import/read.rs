//! Interlock's TOML as written: keys in any case, values as they are.

use toml::{Table, Value};

use super::{Fate, Remark, options};
use crate::config::value;

/// Why a text cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// No TOML.
    #[error("this is not the TOML of Interlock: line {line}, column {column}: {message}; correct it there")]
    Toml {
        line: usize,
        column: usize,
        message: String,
    },
}

/// One option that is written down.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Written {
    /// As it is written.
    pub name: String,
    /// Which option it is.
    pub option: &'static str,
    pub value: Value,
}

/// One `[[Extensions]]`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Extension {
    /// Lower case: `haproxy`, `nginx`, `beacon`, or something else.
    pub name: String,
    pub options: Vec<Written>,
}

/// The whole text.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Source {
    pub top: Vec<Written>,
    pub extensions: Vec<Extension>,
}

/// Reads the text; remarks are of what is no option.
pub(super) fn read(text: &str) -> Result<(Source, Vec<Remark>), ImportError> {
    let mut remarks = Vec::new();
    let table = parse(text, &mut remarks)?;
    let mut source = Source::default();
    for (name, value) in table {
        if name.eq_ignore_ascii_case("extensions") {
            let tables = match value {
                Value::Array(items) => items,
                single => vec![single],
            };
            for item in tables {
                match item {
                    Value::Table(table) => source.extensions.push(extension(table, &mut remarks)),
                    _ => look(&mut remarks, &name, "it is no table; write `[[Extensions]]`"),
                }
            }
        } else {
            keep(&mut source.top, name, value, true, &mut remarks);
        }
    }
    Ok((source, remarks))
}

/// Parses. Documents that lost their line breaks have several options on one line, the reference architecture's among
/// them: a line break is put where one is missing.
fn parse(text: &str, remarks: &mut Vec<Remark>) -> Result<Table, ImportError> {
    let mut text = text.to_owned();
    // At most one break for each key that there can be.
    for _ in 0..=text.matches('=').count() {
        let error = match text.parse::<Table>() {
            Ok(table) => return Ok(table),
            Err(error) => error,
        };
        let start = error.span().map_or(0, |span| span.start);
        let line = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let before = &text[line..start];
        let rest = text[start..].lines().next().unwrap_or_default();
        let is_key = rest.split_once('=').is_some_and(|(key, _)| {
            !key.trim().is_empty() && key.trim().bytes().all(|b| b.is_ascii_alphanumeric())
        });
        if before.contains('=') && before.ends_with(' ') && is_key {
            let key = rest.split_once('=').map_or("", |(key, _)| key.trim()).to_owned();
            look(
                remarks,
                &key,
                "it stands on the line of another option, where Interlock does not read it; it is read here",
            );
            text.insert(start, '\n');
            continue;
        }
        return Err(ImportError::Toml {
            line: text[..start].matches('\n').count() + 1,
            column: before.chars().count() + 1,
            message: error.message().to_owned(),
        });
    }
    Ok(Table::new())
}

fn extension(table: Table, remarks: &mut Vec<Remark>) -> Extension {
    let mut options = Vec::new();
    for (name, value) in table {
        keep(&mut options, name, value, false, remarks);
    }
    let name = options
        .iter()
        .find(|written| written.option == "Name")
        .and_then(|written| written.value.as_str())
        .unwrap_or_default()
        .to_ascii_lowercase();
    Extension { name, options }
}

fn keep(found: &mut Vec<Written>, name: String, value: Value, top: bool, remarks: &mut Vec<Remark>) {
    match options::find(&name, top) {
        Some(option) if found.iter().any(|other| other.option == option.name) => {
            look(
                remarks,
                &name,
                "it is written twice, in different cases; the other one counts",
            );
        }
        Some(option) => found.push(Written {
            name,
            option: option.name,
            value,
        }),
        None => {
            let known: Vec<&str> = options::OPTIONS
                .iter()
                .filter(|option| option.scope.is_top() == top)
                .map(|option| option.name)
                .collect();
            let hint = match value::nearest(&name, &known) {
                Some(near) => {
                    format!("Interlock has no such option and did not read it; did you mean {near}?")
                }
                None if options::find(&name, !top).is_some() => {
                    format!(
                        "Interlock did not read it here; it belongs {}",
                        if top {
                            "under `[[Extensions]]`"
                        } else {
                            "at the top"
                        }
                    )
                }
                None => "Interlock has no such option and did not read it".into(),
            };
            look(remarks, &name, &hint);
        }
    }
}

pub(super) fn look(remarks: &mut Vec<Remark>, option: &str, what: &str) {
    remarks.push(Remark {
        option: option.to_owned(),
        fate: Fate::Look(what.to_owned()),
    });
}
