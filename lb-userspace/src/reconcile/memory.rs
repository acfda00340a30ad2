//! Until when leaving backends drain, kept in a small file beside the socket: like the maps it outlives the agent and not
//! the next boot. Without it, every restart of the agent would give them their whole drain time again.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lb_common::maps::backend_state;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::{
    model::BackendState,
    plan::{About, Note, Programmed},
};

/// Draining backends by id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory(BTreeMap<u32, Remembered>);

/// What is kept of one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Remembered {
    epoch: u32,
    deadline: Instant,
    about: About,
}

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    id: u32,
    /// Only the same user of the id is meant.
    epoch: u32,
    name: String,
    weight: u32,
    drain_ms: u64,
    leaving: bool,
    reason: String,
    /// End of draining, milliseconds since the boot: the time of day may be set.
    deadline_ms: u64,
}

/// Why the file could not be used.
#[derive(Debug, thiserror::Error)]
#[error("drain deadlines in {path}: {operation} failed: {source}; make the directory writable for weir")]
pub(super) struct MemoryError {
    path: PathBuf,
    operation: &'static str,
    source: io::Error,
}

// === impl Memory ===

impl Memory {
    /// What is to be remembered of a model.
    pub fn of(programmed: &Programmed) -> Self {
        let draining = programmed.waiting_slots().filter_map(|(id, slot)| {
            let about = programmed.about.get(&id)?;
            let remembered = Remembered {
                epoch: slot.record.epoch,
                deadline: slot
                    .deadline
                    .filter(|_| slot.record.state == backend_state::DRAINING)?,
                about: about.clone(),
            };
            Some((id, remembered))
        });
        Self(draining.collect())
    }

    /// Writes the file anew and renames it into place. The file has times since the boot, the model instants: `now` and
    /// `uptime` are the same moment.
    pub fn save(&self, path: &Path, now: Instant, uptime: Duration) -> Result<(), MemoryError> {
        let lines = self.0.iter().map(|(id, one)| Line {
            id: *id,
            epoch: one.epoch,
            name: one.about.name.clone(),
            weight: one.about.weight,
            drain_ms: milliseconds(one.about.drain),
            leaving: one.about.leaving,
            reason: one.about.reason.clone(),
            deadline_ms: milliseconds(uptime + one.deadline.saturating_duration_since(now)),
        });
        let text: Result<Vec<String>, _> = lines.map(|line| serde_json::to_string(&line)).collect();
        let new = path.with_extension("new");
        text.map_err(io::Error::from)
            .and_then(|lines| fs::write(&new, lines.join("\n")))
            .and_then(|()| fs::rename(&new, path))
            .map_err(|source| MemoryError {
                path: path.into(),
                operation: "writing",
                source,
            })
    }

    /// Reads the file and gives the model back what it says of backends that still drain. A missing file says nothing,
    /// and neither does a line that is no line of ours.
    pub fn recall(
        path: &Path,
        programmed: &mut Programmed,
        now: Instant,
        uptime: Duration,
    ) -> Result<(), MemoryError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => {
                return Err(MemoryError {
                    path: path.into(),
                    operation: "reading",
                    source,
                });
            }
        };
        for line in text
            .lines()
            .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        {
            let same = programmed.slots.get(&line.id).is_some_and(|slot| {
                slot.record.epoch == line.epoch && slot.record.state == backend_state::DRAINING
            });
            if !same {
                continue;
            }
            let left = Duration::from_millis(line.deadline_ms).saturating_sub(uptime);
            let about = About {
                name: line.name,
                weight: line.weight,
                state: BackendState::Draining,
                reason: line.reason,
                drain: Duration::from_millis(line.drain_ms),
                leaving: line.leaving,
                since: now,
            };
            programmed.note(&Note::About { id: line.id, about });
            programmed.note(&Note::Deadline {
                id: line.id,
                deadline: Some(now + left),
            });
        }
        Ok(())
    }
}

/// Time since the boot, suspension included.
pub(super) fn uptime() -> Duration {
    // There is no Linux without this clock; a deadline that seems far off is cut by nobody but the flows' own end.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use lb_common::{addr::Be16, maps};

    use super::*;
    use crate::datapath::Dump;

    fn maps_with(backends: &[(u32, u32)]) -> Dump {
        let backend = |(id, state): &(u32, u32)| {
            let backend = maps::Backend {
                addr: std::net::IpAddr::from([10, 0, 0, *id as u8]).into(),
                port: Be16::new(80),
                state: *state,
                epoch: 100 + id,
                service: 1,
                ..maps::Backend::default()
            };
            (*id, backend)
        };
        Dump {
            backends: backends.iter().map(backend).collect(),
            ..Dump::default()
        }
    }

    #[test]
    fn a_restart_gives_no_more_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deadlines");
        let (now, uptime) = (Instant::now(), Duration::from_secs(1_000));
        let about = About {
            name: "web-1".into(),
            weight: 3,
            state: BackendState::Draining,
            reason: "removed".into(),
            drain: Duration::from_secs(30),
            leaving: true,
            since: now,
        };
        let mut before = Programmed::adopt(
            &maps_with(&[
                (1, backend_state::DRAINING),
                (2, backend_state::DRAINING),
                (3, backend_state::ACTIVE),
            ]),
            now,
        );
        Memory::recall(&path, &mut before, now, uptime).unwrap();
        for id in [1, 2, 3] {
            before.note(&Note::About {
                id,
                about: about.clone(),
            });
        }
        for id in [1, 2] {
            let deadline = Some(now + Duration::from_secs(30));
            before.note(&Note::Deadline { id, deadline });
        }
        Memory::of(&before).save(&path, now, uptime).unwrap();

        // Twelve seconds later the second id has another user.
        let (now, uptime) = (now + Duration::from_secs(12), uptime + Duration::from_secs(12));
        let mut maps = maps_with(&[(1, backend_state::DRAINING), (2, backend_state::DRAINING)]);
        maps.backends.get_mut(&2).unwrap().epoch += 1;
        let mut after = Programmed::adopt(&maps, now);
        Memory::recall(&path, &mut after, now, uptime).unwrap();
        assert_eq!(after.slots[&1].deadline, Some(now + Duration::from_secs(18)));
        assert_eq!(after.about[&1], About { since: now, ..about });
        assert_eq!(after.slots[&2].deadline, None);
        assert!(!after.about.contains_key(&2));

        // A deadline that passed while no agent ran is over.
        let mut late = Programmed::adopt(&maps, now);
        Memory::recall(&path, &mut late, now, uptime + Duration::from_secs(3600)).unwrap();
        assert_eq!(late.slots[&1].deadline, Some(now));
    }

    #[test]
    fn a_file_of_another_kind_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deadlines");
        fs::write(&path, "{\"id\": 1}\nnonsense\n").unwrap();
        let now = Instant::now();
        let mut model = Programmed::adopt(&maps_with(&[(1, backend_state::DRAINING)]), now);
        Memory::recall(&path, &mut model, now, uptime()).unwrap();
        assert_eq!(model.slots[&1].deadline, None);
        let error = Memory::recall(dir.path(), &mut model, now, uptime()).unwrap_err();
        assert!(error.to_string().contains("reading failed"), "{error}");
    }
}
