//! The ports of running tasks. Swarm forgets them when its leader changes (the new one hears of the tasks again, not of
//! their ports), though they stay what they are for as long as a task runs. They are kept in a file for the next agent.

use std::{collections::BTreeMap, fs, io, path::Path};

use bollard::models::PortStatus;

use super::manager::Snapshot;

/// What tasks have said of their ports, by their ids.
#[derive(Debug, Default, PartialEq)]
pub struct KnownPorts(BTreeMap<String, PortStatus>);

impl KnownPorts {
    /// What an earlier agent has kept: nothing, if there is no such file.
    ///
    /// # Errors
    /// It is there and cannot be read.
    pub fn recall(path: &Path) -> io::Result<Self> {
        match fs::read(path) {
            Ok(text) => Ok(Self(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    /// Keeps it for a later agent: written anew and renamed into place.
    ///
    /// # Errors
    /// It cannot be written; the old one is still there.
    pub fn keep(&self, path: &Path) -> io::Result<()> {
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(&self.0)?)?;
        fs::rename(&new, path)
    }

    /// Remembers what the tasks say, and says it for those that do not any more. True if there is something new to keep.
    pub fn complete(&mut self, snapshot: &mut Snapshot) -> bool {
        let mut known = BTreeMap::new();
        for task in &mut snapshot.tasks {
            let (Some(id), Some(status)) = (&task.id, &mut task.status) else {
                continue;
            };
            let says = |status: &PortStatus| status.ports.as_ref().is_some_and(|ports| !ports.is_empty());
            if !status.port_status.as_ref().is_some_and(says) {
                status.port_status = self.0.get(id).cloned();
            }
            if let Some(ports) = &status.port_status {
                known.insert(id.clone(), ports.clone());
            }
        }
        // Tasks that are gone never come back under their ids.
        let changed = known != self.0;
        self.0 = known;
        changed
    }
}
