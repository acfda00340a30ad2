//! What each source last wished, kept beside the socket: like the maps it outlives the agent and not the next boot. An agent
//! that starts while an engine cannot be heard goes on with the engine's last word, as the agent before it did. It also tells
//! whose a backend was that is found in the maps: only what is nobody's may be a silent source's. The services that are
//! remembered without containers are kept here too.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufRead as _, BufReader, BufWriter, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::Instant,
};
use tracing::warn;

use crate::{
    desired::{Heard, Remembered},
    source::{Object, SourceId},
};

/// Shortest pause between two writings. What changed in the last one before a crash is corrected by the source's first list.
const EVERY: Duration = Duration::from_secs(1);
/// The pause is so many times as long as the loop was kept from its work: with very many objects it is longer.
const SHARE: u32 = 100;

/// What the file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Recollection {
    /// The objects of every source that has been read and may be silent at the next start.
    pub(super) objects: BTreeMap<SourceId, Vec<Object>>,
    /// The services that have no containers any more.
    pub(super) services: Vec<Remembered>,
}

impl Recollection {
    /// What the agent after this one has to know.
    pub(super) fn of(heard: &Heard) -> Self {
        Self {
            objects: heard.wishes(),
            services: heard.remembered(),
        }
    }
}

/// A line of the file.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Object { source: SourceId, object: Box<Object> },
    Service { service: Box<Remembered> },
}

/// The same without owning it.
#[derive(Serialize)]
#[serde(untagged)]
enum LineRef<'a> {
    Object {
        source: &'a SourceId,
        object: &'a Object,
    },
    Service {
        service: &'a Remembered,
    },
}

/// Why the file could not be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "last wishes of the sources in {path}: {operation} failed: {source}; make the directory writable for weir"
)]
pub(super) struct RecollectionError {
    path: PathBuf,
    operation: &'static str,
    source: io::Error,
}

/// Writes the file when it is due, beside the loop.
pub(super) struct Keeper {
    path: Option<PathBuf>,
    /// What the file holds, or will hold once it is written.
    version: u64,
    /// Not before.
    free: Instant,
    writing: Option<JoinHandle<()>>,
}

// === impl Keeper ===

impl Keeper {
    /// For a file that holds `version`.
    pub(super) fn new(path: Option<PathBuf>, version: u64) -> Self {
        Self {
            path,
            version,
            free: Instant::now(),
            writing: None,
        }
    }

    /// When `version` has to be written; `None`: it is.
    pub(super) fn due(&self, version: u64) -> Option<Instant> {
        (self.path.is_some() && version != self.version).then_some(self.free)
    }

    /// Writes if it is due. The loop goes on meanwhile.
    pub(super) fn keep(&mut self, version: u64, wishes: impl FnOnce() -> Recollection) {
        let due = self.due(version).is_some_and(|at| at <= Instant::now());
        if !due {
            return;
        }
        let began = Instant::now();
        self.free = began + EVERY;
        // A disk that is slower than that gets the next state, not a queue of them.
        if self.writing.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        if let Some(path) = self.path.clone() {
            self.version = version;
            let wishes = wishes();
            self.free = began + EVERY.max(began.elapsed() * SHARE);
            self.writing = Some(spawn_blocking(move || write(&path, &wishes)));
        }
    }

    /// Writes what is not written yet, at the end.
    pub(super) async fn finish(mut self, version: u64, wishes: impl FnOnce() -> Recollection) {
        if let Some(task) = self.writing.take()
            && let Err(fault) = task.await
        {
            warn!(%fault, "the last wishes of the sources were not written");
        }
        if let (Some(path), true) = (&self.path, version != self.version) {
            write(path, &wishes());
        }
    }
}

fn write(path: &Path, wishes: &Recollection) {
    if let Err(fault) = save(path, wishes) {
        warn!("{fault}");
    }
}

/// Writes the file anew and renames it into place, so that a crash leaves the old or the new one.
fn save(path: &Path, wishes: &Recollection) -> Result<(), RecollectionError> {
    let new = path.with_extension("new");
    let written = || -> io::Result<()> {
        let mut file = BufWriter::new(File::create(&new)?);
        let objects = wishes.objects.iter().flat_map(|(source, objects)| {
            let line = move |object| LineRef::Object { source, object };
            objects.iter().map(line)
        });
        let services = wishes.services.iter();
        for line in objects.chain(services.map(|service| LineRef::Service { service })) {
            serde_json::to_writer(&mut file, &line)?;
            file.write_all(b"\n")?;
        }
        file.flush()?;
        std::fs::rename(&new, path)
    };
    written().map_err(|source| RecollectionError {
        path: path.into(),
        operation: "writing",
        source,
    })
}

/// Reads the file; `None`: there is none. A line that is none of ours says nothing: another version wrote it.
pub(super) fn load(path: &Path) -> Result<Option<Recollection>, RecollectionError> {
    let fault = |source| RecollectionError {
        path: path.into(),
        operation: "reading",
        source,
    };
    let file = match File::open(path) {
        Ok(file) => BufReader::new(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fault(error)),
    };
    let mut wishes = Recollection::default();
    for line in file.split(b'\n') {
        match serde_json::from_slice(&line.map_err(fault)?) {
            Ok(Line::Object { source, object }) => wishes.objects.entry(source).or_default().push(*object),
            Ok(Line::Service { service }) => wishes.services.push(*service),
            Err(_) => {}
        }
    }
    Ok(Some(wishes))
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::model::{Protocol, Rejection, ServiceAddress, ServiceSettings};

    fn object(id: &str) -> Object {
        Object {
            id: id.into(),
            name: format!("container {id}"),
            created: SystemTime::UNIX_EPOCH + Duration::from_nanos(1_500_000_001),
            services: Vec::new(),
            routes: Vec::new(),
            rejections: vec![Rejection {
                source: "docker".into(),
                object: id.into(),
                fault: "two\nlines".into(),
                remedy: String::new(),
            }],
        }
    }

    #[test]
    fn what_is_written_is_read_again_and_foreign_lines_say_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wishes");
        assert_eq!(load(&path).unwrap(), None);
        let wishes = Recollection {
            objects: [
                (SourceId("docker:a".into()), vec![object("1"), object("2")]),
                (SourceId("docker:b".into()), vec![object("3")]),
            ]
            .into(),
            services: vec![Remembered {
                name: "web".into(),
                address: ServiceAddress {
                    vip: "203.0.113.10".parse().unwrap(),
                    port: 80,
                    protocol: Protocol::Tcp,
                },
                settings: ServiceSettings::default(),
                source: "docker:a".into(),
                created: SystemTime::UNIX_EPOCH,
                since: SystemTime::UNIX_EPOCH + Duration::from_secs(1_500_000_000),
            }],
        };
        save(&path, &wishes).unwrap();
        let text = std::fs::read(&path).unwrap();
        std::fs::write(
            &path,
            [b"{\"source\":\"docker\"}\n\xff\n".as_slice(), &text].concat(),
        )
        .unwrap();
        assert_eq!(load(&path).unwrap(), Some(wishes));
        let error = load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("reading failed"), "{error}");
    }

    #[tokio::test]
    async fn a_version_is_written_once_and_the_last_one_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wishes");
        let of = |id: &str| Recollection {
            objects: [(SourceId("docker".into()), vec![object(id)])].into(),
            services: Vec::new(),
        };
        let mut keeper = Keeper::new(Some(path.clone()), 0);
        assert_eq!(keeper.due(0), None);
        keeper.keep(1, || of("1"));
        assert_eq!(keeper.due(1), None);
        // Too early: it waits, and is written at the end all the same.
        keeper.keep(2, || panic!("not due"));
        assert!(keeper.due(2).is_some_and(|at| at > Instant::now()));
        keeper.finish(2, || of("2")).await;
        assert_eq!(load(&path).unwrap(), Some(of("2")));
    }
}
