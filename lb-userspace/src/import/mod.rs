//! Interlock's configuration → Weir's: every option is applied, or named with the reason why it is not needed here. Pure.
//!
//! [`interlock`] takes the text, wherever it is from: a file, the environment, or the key `interlock/v1/config` of a KV store.

mod apply;
pub mod options;
mod read;
mod render;
#[cfg(test)]
mod tests;

use std::{fmt, net::IpAddr};

pub use read::ImportError;

/// The key under which Interlock keeps its whole configuration in a KV store.
pub const KV_KEY: &str = "interlock/v1/config";

/// What an import came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// Weir's configuration; `weir check` accepts it.
    pub config: String,
    /// What became of each option.
    pub remarks: Vec<Remark>,
}

/// What became of one option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// The option as it is written.
    pub option: String,
    /// What became of it.
    pub fate: Fate,
}

/// What became of an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is this key now.
    Applied(String),
    /// It is not needed here: the reason.
    NotNeeded(String),
    /// Somebody has to look at it: why, and what to do.
    Look(String),
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.fate {
            Fate::Applied(key) => write!(f, "applied: {} is {key}", self.option),
            Fate::NotNeeded(why) => write!(f, "not needed here: {}, because {why}", self.option),
            Fate::Look(what) => write!(f, "look: {}: {what}", self.option),
        }
    }
}

/// Translates the TOML of Interlock 1. `origin` is for people; `node_addresses` are those at which the published ports
/// of a remote engine are reached, if the text does not say it.
///
/// # Errors
/// The text is no TOML.
pub fn interlock(text: &str, origin: &str, node_addresses: &[IpAddr]) -> Result<Imported, ImportError> {
    let (source, mut remarks) = read::read(text)?;
    let lines = apply::apply(&source, node_addresses, &mut remarks);
    let config = render::render(lines, origin, &mut remarks);
    Ok(Imported { config, remarks })
}
