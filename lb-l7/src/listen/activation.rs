//! Sockets that systemd made and keeps (`weir-l7.socket`): they outlive this process with the connections in their queues, so
//! that a restart, or a crash, refuses nobody.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{FromRawFd as _, OwnedFd},
    sync::Arc,
};

use lb_route::L7;
use socket2::{Socket, Type};

use super::{Open, Place, prepare};

/// Names of sockets (`FileDescriptorName=`) that say what is spoken on them.
const NAMES: [(&str, bool); 2] = [("http", false), ("https", true)];

/// Sockets of systemd, by the names that it gives them.
#[derive(Debug, Default)]
pub struct Activated(Vec<(Socket, String)>);

/// Why a socket of systemd cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Unfit {
    #[error("is no TCP socket; write `ListenStream=` with a port")]
    NoTcp,
    #[error("does not listen; write `Accept=no`")]
    NoListener,
    #[error("cannot be used: {0}")]
    System(String),
}

impl From<io::Error> for Unfit {
    fn from(error: io::Error) -> Self {
        Self::System(error.to_string())
    }
}

/// The sockets that systemd passed to this process, and not to one that it has started since: none without systemd. Must be
/// called once, before anything else is opened.
///
/// # Errors
/// The environment (`LISTEN_FDS` and its like) cannot be understood.
pub fn activated() -> io::Result<Activated> {
    let passed = sd_notify::listen_fds_with_names()?;
    // SAFETY: by systemd's protocol they are open and ours, and nobody else in this process has asked for them.
    let own = |(fd, name)| (Socket::from(unsafe { OwnedFd::from_raw_fd(fd) }), name);
    Ok(Activated(passed.map(own).collect()))
}

// === impl Activated ===

impl Activated {
    /// As places. Those that cannot be used are told, and closed.
    pub fn places(self, settings: &L7) -> Vec<Open> {
        let mut places: BTreeMap<Place, Vec<Socket>> = BTreeMap::new();
        for (socket, name) in self.0 {
            match place(&socket, &name, settings) {
                // systemd makes several of one place if it is told so (`ReusePort=`).
                Ok(place) => places.entry(place).or_default().push(socket),
                Err(unfit) => tracing::error!("the socket {name:?} of systemd {unfit}; it is not served"),
            }
        }
        let open = |(place, sockets)| Open {
            asked: place,
            place,
            is_kept: true,
            sockets: Arc::new(sockets),
        };
        places.into_iter().map(open).collect()
    }
}

/// Where a socket listens. Its name says what is spoken; with another name (the unit's, if none is given) the port does.
fn place(socket: &Socket, name: &str, settings: &L7) -> Result<Place, Unfit> {
    let address = socket.local_addr()?.as_socket().ok_or(Unfit::NoTcp)?;
    if socket.r#type()? != Type::STREAM {
        return Err(Unfit::NoTcp);
    }
    if !socket.is_listener()? {
        return Err(Unfit::NoListener);
    }
    prepare(socket)?;
    let known = NAMES.iter().find(|(known, _)| *known == name);
    let tls = known.map_or(settings.https_port == Some(address.port()), |(_, tls)| *tls);
    Ok(Place { address, tls })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    fn settings(https_port: u16) -> L7 {
        L7 {
            https_port: Some(https_port),
            ..L7::default()
        }
    }

    #[test]
    fn names_say_what_is_spoken_and_else_ports_do() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let socket = Socket::from(listener);
        let tls = |name: &str, https_port: u16| place(&socket, name, &settings(https_port)).unwrap().tls;
        assert!(tls("https", 1) && !tls("http", address.port()));
        assert!(tls("weir-l7.socket", address.port()) && !tls("weir-l7.socket", 1));
        assert_eq!(place(&socket, "http", &settings(1)).unwrap().address, address);
    }

    #[test]
    fn sockets_of_other_kinds_are_refused_and_the_others_kept() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let connected = TcpStream::connect(address).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let unix = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
        let of = |socket: &Socket| place(socket, "http", &settings(1));
        let (connected, unix) = (Socket::from(connected), Socket::from(OwnedFd::from(unix)));
        let udp = Socket::from(UdpSocket::bind("127.0.0.1:0").unwrap());
        assert_eq!(of(&connected), Err(Unfit::NoListener));
        assert_eq!((of(&unix), of(&udp)), (Err(Unfit::NoTcp), Err(Unfit::NoTcp)));

        let again = Socket::from(listener.try_clone().unwrap());
        let passed = Activated(vec![
            (udp, "http".into()),
            (Socket::from(listener), "http".into()),
            (again, "http".into()),
        ]);
        let [open] = &passed.places(&settings(1))[..] else {
            panic!("one place")
        };
        assert_eq!(
            (open.place.address, open.is_kept, open.sockets.len()),
            (address, true, 2)
        );
    }
}
