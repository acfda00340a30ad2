//! The event ring of the datapath, told to everybody who listens.

use std::{io, path::Path};

use aya::maps::{Map, MapData, MapError, RingBuf};
use lb_common::maps::Event;
use tokio::{io::unix::AsyncFd, sync::broadcast};

/// Why events cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The map.
    #[error("map EVENTS: {0}")]
    Map(#[from] MapError),
    /// Waiting for it.
    #[error("map EVENTS: waiting failed: {0}")]
    Wait(#[from] io::Error),
}

/// Reads `EVENTS` in the directory of pinned maps, as long as nobody stops it.
///
/// # Errors
/// The map is not there, or cannot be waited for.
pub async fn follow(maps: &Path, events: broadcast::Sender<Event>) -> Result<(), TapError> {
    let data = MapData::from_pin(maps.join("EVENTS"))?;
    let ring = RingBuf::try_from(Map::RingBuf(data))?;
    // SAFETY: the ring owns its map's descriptor, opened above, and keeps it open and the same for all its life.
    let registered = unsafe { AsyncFd::register(ring) };
    let mut ring = registered.map_err(|e| e.into_parts().1)?;
    loop {
        let mut guard = ring.readable_mut().await?;
        while let Some(record) = guard.get_inner_mut().next() {
            if let Some(event) = event(&record) {
                // Nobody listens: then it is nobody's loss.
                let _ = events.send(event);
            }
        }
        guard.clear_ready();
    }
}

/// A record of the ring; `None` if its size is another one, which only a foreign program could write.
fn event(record: &[u8]) -> Option<Event> {
    // SAFETY: the length is compared, `Event` is `Pod` (any bytes are a value), and the read is unaligned.
    (record.len() == size_of::<Event>()).then(|| unsafe { record.as_ptr().cast::<Event>().read_unaligned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_another_size_are_no_events() {
        let mut bytes = [0_u8; size_of::<Event>() + 1];
        bytes[36..40].copy_from_slice(&7_u32.to_ne_bytes());
        assert_eq!(event(&bytes), None);
        assert_eq!(event(&bytes[..size_of::<Event>()]).unwrap().kind, 7);
    }
}
