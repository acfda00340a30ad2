//! Tells when files in folders change. Not by the `notify` of the agent: that is woken by every file that is opened there, which
//! may be a web server's many thousand a second.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
};

use futures_util::StreamExt as _;
use inotify::{Event, EventStream, Inotify, WatchDescriptor, WatchMask};
use tracing::warn;

/// What may make another certificate of a file. What is only written on, such as a log, is none that is complete.
const CHANGES: WatchMask = WatchMask::CREATE
    .union(WatchMask::CLOSE_WRITE)
    .union(WatchMask::ATTRIB)
    .union(WatchMask::DELETE)
    .union(WatchMask::MOVED_FROM)
    .union(WatchMask::MOVED_TO)
    .union(WatchMask::ONLYDIR);
/// Room for the events of one look, bytes: names are up to 255.
const ROOM: usize = 4096;

/// The folders that are watched.
pub struct Folders {
    events: EventStream<[u8; ROOM]>,
    /// `None`: it cannot be watched, which has been told.
    watched: BTreeMap<PathBuf, Option<WatchDescriptor>>,
}

impl Folders {
    /// None yet. Must run on a runtime.
    ///
    /// # Errors
    /// The system has no more watchers for this user.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            events: Inotify::init()?.into_event_stream([0; ROOM])?,
            watched: BTreeMap::new(),
        })
    }

    /// Watches these and no others. To be said again after changes: a folder may be another one of the same name.
    pub fn watch(&mut self, folders: BTreeSet<PathBuf>) {
        let mut watches = self.events.watches();
        let mut before = std::mem::take(&mut self.watched);
        for folder in folders {
            let known = before.remove(&folder);
            let watch = watches.add(&folder, CHANGES);
            if let (Err(error), None | Some(Some(_))) = (&watch, known) {
                warn!("changes in {} are noticed late: {error}", folder.display());
            }
            self.watched.insert(folder, watch.ok());
        }
        for gone in before.into_values().flatten() {
            let is_watched = self.watched.values().flatten().any(|watch| *watch == gone);
            if !is_watched {
                // One that has been removed is watched no more.
                let _ = watches.remove(gone);
            }
        }
    }

    /// Ready when something has changed.
    pub async fn changed(&mut self) -> Event<std::ffi::OsString> {
        match self.events.next().await {
            Some(Ok(event)) => event,
            // What cannot be read now cannot be read a moment later either.
            Some(Err(_)) | None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn files_that_are_read_or_written_on_are_no_change() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name| folder.path().join(name);
        fs::write(file("read"), "1").unwrap();
        let mut log = fs::File::create(file("log")).unwrap();
        let mut folders = Folders::new().unwrap();
        folders.watch([folder.path().into()].into());
        fs::read(file("read")).unwrap();
        io::Write::write_all(&mut log, b"line\n").unwrap();
        fs::write(file("new"), "1").unwrap();
        assert_eq!(folders.changed().await.name.unwrap(), "new");
    }

    #[tokio::test]
    async fn a_folder_that_is_put_in_the_place_of_another_is_watched() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("certs");
        let mut folders = Folders::new().unwrap();
        // Not there yet: told, and tried again.
        folders.watch([folder.clone()].into());
        for name in ["a", "b"] {
            fs::create_dir(&folder).unwrap();
            folders.watch([folder.clone()].into());
            fs::write(folder.join(name), "1").unwrap();
            while folders.changed().await.name.is_none_or(|found| found != name) {}
            fs::remove_dir_all(&folder).unwrap();
        }
        folders.watch(BTreeSet::new());
        assert!(folders.watched.is_empty());
    }
}
