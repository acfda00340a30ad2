//! What the agent changed on the node outside its maps and links, so that `weir detach` can undo it, whoever runs it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

/// Changes to undo.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Changes {
    /// Sysctl name (`net.ipv4.…`) → value before the first change.
    pub sysctls: BTreeMap<String, String>,
    /// Addresses put on devices: (device, address).
    pub addresses: BTreeSet<(String, IpAddr)>,
    /// Managed neighbour entries made: (device, address).
    pub neighbours: BTreeSet<(String, IpAddr)>,
    /// Devices with filters of ours → whether the clsact qdisc is ours too.
    pub clsact: BTreeMap<String, bool>,
    /// Nothing to undo: the devices of the default route when there last was one, for an agent that starts while there is none.
    pub default_devices: BTreeSet<String>,
}

/// The file that holds [`Changes`], outside bpffs, which stores no files.
#[derive(Clone, Debug)]
pub struct StateFile {
    path: PathBuf,
    changes: Arc<Mutex<Changes>>,
}

impl StateFile {
    /// Reads `path`, or starts with nothing to undo when it does not exist.
    pub fn open(path: &Path) -> io::Result<Self> {
        let changes = match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| {
                let fault = format!(
                    "state file {}: {e}: remove it and undo its entries by hand",
                    path.display()
                );
                io::Error::new(io::ErrorKind::InvalidData, fault)
            })?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Changes::default(),
            Err(e) => return Err(e),
        };
        Ok(Self {
            path: path.to_owned(),
            changes: Arc::new(Mutex::new(changes)),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Changes> {
        // Every change is one assignment: a panic elsewhere leaves no half-made value behind.
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is to undo.
    pub fn get(&self) -> Changes {
        self.lock().clone()
    }

    /// Changes the record and writes it, before the change on the node is made: a crash then undoes too much
    /// rather than too little.
    pub fn update(&self, change: impl FnOnce(&mut Changes)) -> io::Result<()> {
        let mut guard = self.lock();
        let mut next = guard.clone();
        change(&mut next);
        if next == *guard {
            return Ok(());
        }
        if let Some(parent) = self.path.parent() {
            fs::create_dir_all(parent)?;
        }
        let temporary = self.path.with_extension("new");
        fs::write(&temporary, serde_json::to_vec_pretty(&next)?)?;
        fs::rename(&temporary, &self.path)?;
        *guard = next;
        Ok(())
    }

    /// Removes the file: all is undone.
    pub fn remove(&self) -> io::Result<()> {
        *self.lock() = Changes::default();
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_survive_the_process_and_go_with_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/state.json");
        let state = StateFile::open(&path).unwrap();
        state
            .update(|c| {
                c.sysctls.insert("net.x".into(), "1".into());
            })
            .unwrap();
        state
            .update(|c| {
                c.addresses.insert(("lo".into(), "10.0.0.1".parse().unwrap()));
            })
            .unwrap();
        assert_eq!(StateFile::open(&path).unwrap().get(), state.get());
        assert_eq!(state.get().addresses.len(), 1);
        state.remove().unwrap();
        assert_eq!(StateFile::open(&path).unwrap().get(), Changes::default());
    }

    #[test]
    fn a_damaged_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        fs::write(&path, "{").unwrap();
        assert!(
            StateFile::open(&path)
                .unwrap_err()
                .to_string()
                .contains("state.json")
        );
    }
}
