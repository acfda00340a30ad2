//! What the operator has drained: selectors of backends, kept in a small file so that a restart does not undo them.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use crate::model::Backend;

/// The operator's drains: each names a backend by name, by address and port, or by address alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drains(pub BTreeSet<String>);

/// Why the file of drains could not be used.
#[derive(Debug, thiserror::Error)]
#[error("operator drains in {path}: {operation} failed: {source}; make the directory writable for weir")]
pub struct DrainsError {
    path: PathBuf,
    operation: &'static str,
    source: io::Error,
}

// === impl Drains ===

impl Drains {
    /// Whether a selector of the set names this backend.
    pub fn name(&self, backend: &Backend) -> bool {
        !self.0.is_empty() && self.0.iter().any(|selector| names(selector, backend))
    }

    /// Reads the file: a selector a line. A missing file is the empty set.
    pub fn load(path: &Path) -> Result<Self, DrainsError> {
        match fs::read_to_string(path) {
            Ok(text) => Ok(Self(
                text.lines()
                    .map(str::trim)
                    .filter(|l| !l.is_empty())
                    .map(Into::into)
                    .collect(),
            )),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(DrainsError {
                path: path.into(),
                operation: "reading",
                source,
            }),
        }
    }

    /// Writes the file anew and renames it into place, so that a crash leaves the old or the new one.
    pub fn save(&self, path: &Path) -> Result<(), DrainsError> {
        let text: String = self.0.iter().map(|selector| format!("{selector}\n")).collect();
        let new = path.with_extension("new");
        fs::write(&new, text)
            .and_then(|()| fs::rename(&new, path))
            .map_err(|source| DrainsError {
                path: path.into(),
                operation: "writing",
                source,
            })
    }
}

/// Whether `selector` names this backend: its name, `address:port`, or its address.
pub fn names(selector: &str, backend: &Backend) -> bool {
    if selector == backend.name {
        return true;
    }
    selector.parse() == Ok(backend.address) || selector.parse() == Ok(backend.address.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drains_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("drains");
        assert_eq!(Drains::load(&path).unwrap(), Drains::default());
        let drains = Drains(["web-1".into(), "10.0.0.1:80".into()].into());
        drains.save(&path).unwrap();
        assert_eq!(Drains::load(&path).unwrap(), drains);
    }

    #[test]
    fn an_unreadable_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Drains::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&*dir.path().to_string_lossy()), "{error}");
    }
}
