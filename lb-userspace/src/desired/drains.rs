//! What the operator has drained: selectors of backends, kept in a small file so that a restart does not undo them.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::model::Backend;

/// The operator's drains by selector, see [`names`]: how long old flows may go on; `None` is the backend's own drain time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drains(pub BTreeMap<String, Option<Duration>>);

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
    /// The drain of this backend of this service, if there is one; of several the one with the shortest time.
    pub fn of(&self, service: &str, backend: &Backend) -> Option<Option<Duration>> {
        let hits = self
            .0
            .iter()
            .filter(|(selector, _)| names(selector, service, backend));
        hits.map(|(_, time)| *time)
            .min_by_key(|time| time.unwrap_or(backend.drain))
    }

    /// Reads the file: a line for each selector, then, after a tab, its time in milliseconds if it has one. A missing
    /// file is no drain.
    pub fn load(path: &Path) -> Result<Self, DrainsError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => {
                return Err(DrainsError {
                    path: path.into(),
                    operation: "reading",
                    source,
                });
            }
        };
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let drain = |line: &str| match line.split_once('\t') {
            Some((selector, time)) => (selector.to_owned(), time.parse().ok().map(Duration::from_millis)),
            None => (line.to_owned(), None),
        };
        Ok(Self(lines.map(drain).collect()))
    }

    /// Writes the file anew and renames it into place, so that a crash leaves the old or the new one.
    pub fn save(&self, path: &Path) -> Result<(), DrainsError> {
        let line = |(selector, time): (&String, &Option<Duration>)| match time {
            Some(time) => format!("{selector}\t{}\n", time.as_millis()),
            None => format!("{selector}\n"),
        };
        let text: String = self.0.iter().map(line).collect();
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

/// Whether `selector` names this backend of this service: its name, `address:port` or its address, in every service; or
/// one of these after `service/`, in that service only.
pub fn names(selector: &str, service: &str, backend: &Backend) -> bool {
    let this = |text: &str| {
        text == backend.name
            || text.parse() == Ok(backend.address)
            || text.parse() == Ok(backend.address.ip())
    };
    this(selector)
        || selector
            .rsplit_once('/')
            .is_some_and(|(of, backend)| of == service && this(backend))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Attachment;

    #[test]
    fn drains_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("drains");
        assert_eq!(Drains::load(&path).unwrap(), Drains::default());
        let time = Some(Duration::from_millis(1500));
        let drains = Drains([("web/web-1".into(), time), ("10.0.0.1:80".into(), None)].into());
        drains.save(&path).unwrap();
        assert_eq!(Drains::load(&path).unwrap(), drains);
    }

    #[test]
    fn an_unreadable_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Drains::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&*dir.path().to_string_lossy()), "{error}");
    }

    #[test]
    fn a_selector_with_a_service_names_its_backend_there_only() {
        let backend = Backend {
            address: ([10, 0, 0, 1], 80).into(),
            weight: 1,
            state: crate::model::BackendState::Active,
            reason: String::new(),
            drain: Duration::from_secs(30),
            name: "web-1".into(),
            check: None,
            attachment: Attachment::Address,
        };
        for (selector, web, dns) in [
            ("web-1", true, true),
            ("10.0.0.1:80", true, true),
            ("10.0.0.1", true, true),
            ("web/web-1", true, false),
            ("dns/10.0.0.1:80", false, true),
            ("web/10.0.0.1", true, false),
            ("web/web-2", false, false),
            ("10.0.0.1:81", false, false),
            ("web", false, false),
        ] {
            assert_eq!(names(selector, "web", &backend), web, "{selector}");
            assert_eq!(names(selector, "dns", &backend), dns, "{selector}");
        }
    }

    #[test]
    fn the_shortest_time_wins() {
        let mut backend = Backend {
            address: ([10, 0, 0, 1], 80).into(),
            weight: 1,
            state: crate::model::BackendState::Active,
            reason: String::new(),
            drain: Duration::from_secs(30),
            name: "web-1".into(),
            check: None,
            attachment: Attachment::Address,
        };
        let seconds = |s| Some(Duration::from_secs(s));
        let drains = Drains([("web-1".into(), None), ("web/web-1".into(), seconds(60))].into());
        assert_eq!(drains.of("web", &backend), Some(None));
        backend.drain = Duration::from_secs(90);
        assert_eq!(drains.of("web", &backend), Some(seconds(60)));
        backend.name = "web-2".into();
        assert_eq!(drains.of("web", &backend), None);
    }
}
