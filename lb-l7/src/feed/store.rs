//! The state in a file: the last good one for the next start.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use lb_route::State;
use serde::de::DeserializeOwned;

/// Why a state cannot be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file.
    #[error("{}: {fault}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        fault: io::Error,
    },
    /// What is in it.
    #[error("{}: {fault}; write {{\"routes\": [{{\"host\": \"a.example\", \"upstreams\": [{{\"address\": \"127.0.0.1:8080\"}}]}}]}}", path.display())]
    Text {
        /// Which.
        path: PathBuf,
        /// What is wrong, and where.
        fault: serde_json::Error,
    },
}

/// The file of the last good state.
#[derive(Clone, Debug)]
pub struct Store(PathBuf);

/// Reads a file of JSON.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, StoreError> {
    let text = fs::read(path).map_err(|fault| StoreError::Io {
        path: path.into(),
        fault,
    })?;
    serde_json::from_slice(&text).map_err(|fault| StoreError::Text {
        path: path.into(),
        fault,
    })
}

impl Store {
    /// In this file.
    pub fn new(path: &Path) -> Self {
        Self(path.into())
    }

    /// The last good state; `None` if there is none that can be read.
    pub fn load(&self) -> Option<State> {
        match read(&self.0) {
            Ok(state) => Some(state),
            Err(StoreError::Io { fault, .. }) if fault.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!("the last good state is lost: {error}");
                None
            }
        }
    }

    /// Keeps a state, in one step: a crash leaves the one before.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, state: &State) -> Result<(), StoreError> {
        let fail = |fault| StoreError::Io {
            path: self.0.clone(),
            fault,
        };
        let text = serde_json::to_vec(state).map_err(|e| fail(e.into()))?;
        // Two processes have the file while one takes over from the other.
        let next = self.0.with_extension(format!("{}.next", std::process::id()));
        fs::write(&next, text)
            .and_then(|()| fs::rename(&next, &self.0))
            .map_err(fail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_kept_and_a_broken_file_is_no_state() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(&dir.path().join("state.json"));
        assert_eq!(store.load(), None);
        let state: State = serde_json::from_str(r#"{"routes":[{"host":"a","upstreams":[]}]}"#).unwrap();
        store.save(&state).unwrap();
        assert_eq!(store.load(), Some(state));
        fs::write(dir.path().join("state.json"), "{\"routes\":").unwrap();
        assert_eq!(store.load(), None);
        let error = read::<State>(&dir.path().join("state.json"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("line 1"), "{error}");
    }
}
