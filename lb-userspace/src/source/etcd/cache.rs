//! The last good read, kept for the next start: a node must serve although etcd is down when it starts.

use std::{
    fs, io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

use crate::config::Config;

/// The file cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {}: {source}; without it a start without etcd knows nothing of its keys", .path.display())]
pub struct CacheError {
    path: PathBuf,
    operation: &'static str,
    source: io::Error,
}

/// Where it is kept.
pub fn path(config: &Config) -> PathBuf {
    let named = config.etcd.as_ref().and_then(|etcd| etcd.cache.clone());
    named.unwrap_or_else(|| config.admin.socket.with_file_name("etcd.json"))
}

/// Reads it. Nothing, if there is none or it is of other keys than `ours` tells.
///
/// # Errors
/// It is there and cannot be read.
pub fn recall<T: DeserializeOwned>(path: &Path, ours: impl Fn(&T) -> bool) -> Result<Option<T>, CacheError> {
    let fault = |source| CacheError {
        path: path.to_owned(),
        operation: "reading",
        source,
    };
    let text = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(fault)?,
    };
    let kept = serde_json::from_slice(&text).map_err(|error| fault(error.into()))?;
    Ok(Some(kept).filter(ours))
}

/// Writes it anew and renames it into place.
///
/// # Errors
/// It cannot be written; the old one is still there.
pub fn keep(path: &Path, read: &impl Serialize) -> Result<(), CacheError> {
    let new = path.with_extension("new");
    let write = || {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        io::Write::write_all(&mut file, &serde_json::to_vec(read)?)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(|source| CacheError {
        path: path.to_owned(),
        operation: "writing",
        source,
    })
}
