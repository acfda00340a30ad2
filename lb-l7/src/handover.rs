//! A new process takes the listening sockets of the old one over, with the connections that wait in their queues: sockets that
//! the old one closed would take those with them.
//!
//! The old one listens on a Unix socket that only its own user can open. Whoever connects gets the sockets, says when it serves
//! by them, and only then does the old one stop accepting. A new one that fails before changes nothing.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, IoSlice, IoSliceMut, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
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

use crate::listen::{Place, Sockets};

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
    sockets: usize,
}

/// The sockets of an old process that waits until we serve.
#[derive(Debug)]
pub struct Taken {
    /// The sockets.
    pub sockets: Sockets,
    old: UnixStream,
}

/// Takes over from the process that answers at this path; `None` if nobody does.
///
/// # Errors
/// Somebody answers, and says what cannot be understood.
pub fn take(path: &Path) -> io::Result<Option<Taken>> {
    let Ok(old) = UnixStream::connect(path) else {
        return Ok(None);
    };
    old.set_read_timeout(Some(PATIENCE))?;
    old.set_write_timeout(Some(PATIENCE))?;
    let mut sockets = Sockets::default();
    while let (Some(place), received) = receive(&old)? {
        match sockets.0.iter_mut().find(|(known, _)| *known == place) {
            Some((_, all)) => all.extend(received),
            None => sockets.0.push((place, received)),
        }
    }
    Ok(Some(Taken { sockets, old }))
}

impl Taken {
    /// The sockets, and whom to tell when we serve.
    pub fn into_parts(self) -> (Sockets, Old) {
        (self.sockets, Old(self.old))
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

/// One message: where its sockets listen, and they.
fn receive(from: &UnixStream) -> io::Result<(Option<Place>, Vec<Socket>)> {
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
    let parcel: Parcel = serde_json::from_slice(&text[..length])?;
    if parcel.sockets != sockets.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "sockets got lost on their way",
        ));
    }
    // Each message is asked for: so none runs into the next.
    (&*from).write_all(b"\n")?;
    Ok((parcel.place, sockets))
}

/// The end of the old process.
#[derive(Debug)]
pub struct Giver {
    path: PathBuf,
    listener: UnixListener,
    sockets: Mutex<Vec<(Place, Vec<OwnedFd>)>>,
}

impl Giver {
    /// Waits at this path, in place of whoever waited there before.
    ///
    /// # Errors
    /// The folder is not there or not ours.
    pub fn new(path: &Path, sockets: Vec<(Place, Vec<OwnedFd>)>) -> io::Result<Self> {
        let next = path.with_extension("next");
        let _of_one_that_was_killed = fs::remove_file(&next);
        let listener = UnixListener::bind(&next)?;
        fs::set_permissions(&next, fs::Permissions::from_mode(0o600))?;
        fs::rename(&next, path)?;
        Ok(Self {
            path: path.into(),
            listener,
            sockets: Mutex::new(sockets),
        })
    }

    /// Nobody can take over any more: what is given away no longer would keep its place in the kernel.
    pub fn stop(&self) {
        self.sockets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
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
        let all = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        if all.is_empty() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        for (place, sockets) in all.iter() {
            for some in sockets.chunks(AT_ONCE) {
                send(&to, &mut answers, Some(*place), some)?;
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
    place: Option<Place>,
    sockets: &[OwnedFd],
) -> io::Result<()> {
    let text = serde_json::to_vec(&Parcel {
        place,
        sockets: sockets.len(),
    })?;
    let descriptors: Vec<RawFd> = sockets.iter().map(|fd| fd.as_raw_fd()).collect();
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

/// Tells systemd, if it started us and wants to know.
pub fn notify(text: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let told = notify_at(Path::new(&path), text);
    if let Err(error) = told {
        tracing::warn!("systemd is not told: {error}");
    }
}

fn notify_at(path: &Path, text: &str) -> io::Result<()> {
    use std::os::{linux::net::SocketAddrExt as _, unix::ffi::OsStrExt as _, unix::net::SocketAddr};
    let bytes = path.as_os_str().as_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(path)?,
    };
    let socket = std::os::unix::net::UnixDatagram::unbound()?;
    socket.send_to_addr(text.as_bytes(), &address).map(drop)
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
        let old = Sockets::bind(&[place], 100).unwrap();
        let bound = old.0[0].0;
        let giver = Arc::new(Giver::new(&path, old.copies().unwrap()).unwrap());
        let waiting = std::thread::spawn(move || giver.wait());
        // One that goes away in the middle is none.
        drop(UnixStream::connect(&path).unwrap());
        let client = std::net::TcpStream::connect(bound.address).unwrap();
        let taken = take(&path).unwrap().unwrap();
        drop(old);
        let [(same, sockets)] = &taken.sockets.0[..] else {
            panic!("{:?}", taken.sockets)
        };
        assert_eq!((*same, sockets.len()), (bound, 100));
        let accepted = sockets.iter().filter(|s| s.accept().is_ok()).count();
        assert_eq!(accepted, 1, "the connection of {client:?} is lost");
        assert!(!waiting.is_finished());
        taken.into_parts().1.serving().unwrap();
        waiting.join().unwrap();
    }

    #[test]
    fn systemd_is_told_by_a_datagram() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let systemd = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        notify_at(&path, "READY=1").unwrap();
        let mut text = [0; 64];
        let length = systemd.recv(&mut text).unwrap();
        assert_eq!(&text[..length], b"READY=1");
    }
}
