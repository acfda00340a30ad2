//! A new process takes the listening sockets of the old one over, with the connections that wait in their queues: sockets that
//! the old one closed would take those with them.
//!
//! The old one listens on a Unix socket that only its own user can open. Whoever connects gets the sockets, says when it serves
//! by them, and only then does the old one stop accepting. A new one that fails before changes nothing.
//!
//! Sockets of systemd go the same way: it gives them only to processes that it starts itself.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, IoSlice, IoSliceMut, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, RawFd},
        unix::{
            fs::PermissionsExt as _,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};
use socket2::Socket;

use crate::listen::{Open, Place};

/// How long either side waits for the other: a new process reads its state meanwhile.
const PATIENCE: Duration = Duration::from_secs(10);
/// Descriptors in one message; the kernel takes 253.
const AT_ONCE: usize = 64;
/// What the new process says when it serves.
const SERVING: &[u8] = b"serving\n";
/// Longest description of sockets.
const LONGEST: usize = 4096;

/// What a message says of the sockets that come with it; an empty one is the last.
#[derive(Debug, Serialize, Deserialize)]
struct Parcel {
    place: Option<Place>,
    /// See [`Open`].
    #[serde(default)]
    asked: Option<Place>,
    #[serde(default)]
    is_kept: bool,
    sockets: usize,
}

/// The sockets of an old process that waits until we serve.
#[derive(Debug)]
pub struct Taken {
    /// Where it listens.
    pub places: Vec<Open>,
    old: UnixStream,
}

/// Takes over from the process that answers at this path; `None` if nobody does, or it ends before it gives anything.
///
/// # Errors
/// Somebody answers, and says what cannot be understood.
pub fn take(path: &Path) -> io::Result<Option<Taken>> {
    let Ok(old) = UnixStream::connect(path) else {
        return Ok(None);
    };
    old.set_read_timeout(Some(PATIENCE))?;
    old.set_write_timeout(Some(PATIENCE))?;
    let mut parcels: Vec<(Parcel, Vec<Socket>)> = Vec::new();
    loop {
        let (parcel, received) = match receive(&old) {
            Err(error) if parcels.is_empty() && is_end(&error) => {
                tracing::warn!("the shim before ended when it was asked for its sockets: {error}");
                return Ok(None);
            }
            received => received?,
        };
        if parcel.place.is_none() {
            break;
        }
        match parcels.iter_mut().find(|(known, _)| known.place == parcel.place) {
            Some((_, all)) => all.extend(received),
            None => parcels.push((parcel, received)),
        }
    }
    let open = |(parcel, sockets): (Parcel, Vec<Socket>)| {
        let place = parcel.place?;
        Some(Open {
            asked: parcel.asked.unwrap_or(place),
            place,
            is_kept: parcel.is_kept,
            sockets: Arc::new(sockets),
        })
    };
    let places = parcels.into_iter().filter_map(open).collect();
    Ok(Some(Taken { places, old }))
}

impl Taken {
    /// Where it listens, and whom to tell when we serve.
    pub fn into_parts(self) -> (Vec<Open>, Old) {
        (self.places, Old(self.old))
    }
}

/// An old process that waits until we serve.
#[derive(Debug)]
pub struct Old(UnixStream);

impl Old {
    /// Tells it that it may go.
    ///
    /// # Errors
    /// It has gone already.
    pub fn serving(mut self) -> io::Result<()> {
        self.0.write_all(SERVING)
    }
}

/// Whether the other process has gone, or wants to.
fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// One message: where its sockets listen, and they.
fn receive(from: &UnixStream) -> io::Result<(Parcel, Vec<Socket>)> {
    let mut text = [0; LONGEST];
    let mut room = nix::cmsg_space!([RawFd; AT_ONCE]);
    let mut parts = [IoSliceMut::new(&mut text)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut room), flags)?;
    let mut sockets = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            // SAFETY: the kernel has just made each of them for us, and nobody else knows them.
            sockets.extend(
                descriptors
                    .into_iter()
                    .map(|fd| unsafe { Socket::from_raw_fd(fd) }),
            );
        }
    }
    let length = message.bytes;
    if length == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let parcel: Parcel = serde_json::from_slice(&text[..length])?;
    if parcel.sockets != sockets.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "sockets got lost on their way",
        ));
    }
    // Each message is asked for: so none runs into the next.
    (&*from).write_all(b"\n")?;
    Ok((parcel, sockets))
}

/// The end of the old process.
#[derive(Debug)]
pub struct Giver {
    path: PathBuf,
    listener: UnixListener,
    places: Mutex<Vec<Open>>,
}

impl Giver {
    /// Waits at this path, in place of whoever waited there before.
    ///
    /// # Errors
    /// The folder is not there or not ours.
    pub fn new(path: &Path, places: Vec<Open>) -> io::Result<Self> {
        let next = path.with_extension("next");
        let _of_one_that_was_killed = fs::remove_file(&next);
        let listener = UnixListener::bind(&next)?;
        fs::set_permissions(&next, fs::Permissions::from_mode(0o600))?;
        fs::rename(&next, path)?;
        Ok(Self {
            path: path.into(),
            listener,
            places: Mutex::new(places),
        })
    }

    /// Has other places to give from now on.
    pub fn has(&self, places: Vec<Open>) {
        *self.places.lock().unwrap_or_else(PoisonError::into_inner) = places;
    }

    /// Nobody can take over any more: what is given away no longer would keep its place in the kernel.
    pub fn stop(&self) {
        self.has(Vec::new());
        let _ = fs::remove_file(&self.path);
    }

    /// Blocks until another process serves by our sockets.
    pub fn wait(self: Arc<Self>) {
        loop {
            let given = self.listener.accept().and_then(|(stream, _)| self.give(stream));
            match given {
                Ok(()) => return,
                Err(error) => tracing::warn!("nobody has taken over: {error}; serving on"),
            }
        }
    }

    fn give(&self, to: UnixStream) -> io::Result<()> {
        to.set_read_timeout(Some(PATIENCE))?;
        to.set_write_timeout(Some(PATIENCE))?;
        let mut answers = BufReader::new(to.try_clone()?);
        // Nobody who changes them shall wait for the other process.
        let all = self.places.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if all.is_empty() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        for open in &all {
            for some in open.sockets.chunks(AT_ONCE) {
                send(&to, &mut answers, Some(open), some)?;
            }
        }
        drop(all);
        send(&to, &mut answers, None, &[])?;
        let mut word = [0; SERVING.len()];
        answers.read_exact(&mut word)?;
        if word != SERVING {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(())
    }
}

fn send(
    to: &UnixStream,
    answers: &mut BufReader<UnixStream>,
    open: Option<&Open>,
    sockets: &[Socket],
) -> io::Result<()> {
    let text = serde_json::to_vec(&Parcel {
        place: open.map(|open| open.place),
        asked: open.map(|open| open.asked),
        is_kept: open.is_some_and(|open| open.is_kept),
        sockets: sockets.len(),
    })?;
    let descriptors: Vec<RawFd> = sockets.iter().map(|socket| socket.as_raw_fd()).collect();
    let control = [ControlMessage::ScmRights(&descriptors)];
    let control = if descriptors.is_empty() {
        &[][..]
    } else {
        &control[..]
    };
    sendmsg::<()>(
        to.as_raw_fd(),
        &[IoSlice::new(&text)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    let mut line = String::new();
    answers.read_line(&mut line)?;
    if line == "\n" {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_arrive_with_what_waits_in_their_queues() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handover.sock");
        assert!(take(&path).unwrap().is_none());
        let place = Place {
            address: "127.0.0.1:0".parse().unwrap(),
            tls: false,
        };
        let mut old = Open::bind(place, 100).unwrap();
        let bound = old.place;
        let giver = Arc::new(Giver::new(&path, Vec::new()).unwrap());
        // What systemd keeps stays what it is.
        old.is_kept = true;
        giver.has(vec![old]);
        let waiting = std::thread::spawn(move || giver.wait());
        // One that goes away in the middle is none.
        drop(UnixStream::connect(&path).unwrap());
        let client = std::net::TcpStream::connect(bound.address).unwrap();
        let taken = take(&path).unwrap().unwrap();
        let [same] = &taken.places[..] else {
            panic!("{:?}", taken.places)
        };
        assert_eq!((same.asked, same.place, same.is_kept), (place, bound, true));
        assert_eq!(same.sockets.len(), 100);
        let accepted = same.sockets.iter().filter(|s| s.accept().is_ok()).count();
        assert_eq!(accepted, 1, "the connection of {client:?} is lost");
        assert!(!waiting.is_finished());
        taken.into_parts().1.serving().unwrap();
        waiting.join().unwrap();
    }

    #[test]
    fn one_that_ends_when_it_is_asked_is_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handover.sock");
        let dying = UnixListener::bind(&path).unwrap();
        let ends = std::thread::spawn(move || drop(dying.accept().unwrap()));
        assert!(take(&path).unwrap().is_none());
        ends.join().unwrap();
        // As does one that has nothing to give any more.
        let giver = Arc::new(Giver::new(&path, Vec::new()).unwrap());
        std::thread::spawn(move || giver.wait());
        assert!(take(&path).unwrap().is_none());
    }
}
