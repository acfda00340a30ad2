//! Listening sockets: one for each worker and address, so that the kernel spreads connections and no worker waits for
//! another.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};

/// Connections that may wait to be accepted; the kernel's own limit (net.core.somaxconn) is smaller or equal.
const QUEUE: i32 = 4096;
/// Time between two questions whether a silent client is still there.
const PROBE_EVERY: Duration = Duration::from_secs(15);

/// Where to listen, and what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Place {
    /// Address and port.
    pub address: SocketAddr,
    /// TLS is spoken there.
    pub tls: bool,
}

/// A socket for one worker.
#[derive(Debug)]
pub struct Listener {
    /// The socket.
    pub socket: tokio::net::TcpListener,
    /// TLS is spoken on it.
    pub tls: bool,
    /// Another process has it too: what waits in its queue is that one's.
    handed_over: Arc<AtomicBool>,
}

/// The sockets of the process by place, before workers have them.
#[derive(Debug, Default)]
pub struct Sockets(pub Vec<(Place, Vec<Socket>)>);

/// Why nobody listens.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {place}: {source}; {}", remedy(.source))]
pub struct ListenError {
    place: SocketAddr,
    source: io::Error,
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another program has the port: stop it, or choose another one (`http-port`, `https-port`, `listen` of [l7])"
        }
        io::ErrorKind::PermissionDenied => {
            "ports below 1024 need CAP_NET_BIND_SERVICE, as deploy/weir-l7.service gives it"
        }
        io::ErrorKind::AddrNotAvailable => "no device of this node has the address",
        _ => "see `listen` of [l7]",
    }
}

impl Sockets {
    /// Listens at every place, with a socket for each worker. Of a place with port 0 all get the same port.
    ///
    /// # Errors
    /// See [`ListenError`]; nothing is listened to then.
    pub fn bind(places: &[Place], workers: usize) -> Result<Self, ListenError> {
        Self::bind_with(places, workers, Self::default())
    }

    /// As [`Sockets::bind`], by the sockets of another process where it listens at these places. Its others are closed.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn bind_with(places: &[Place], workers: usize, mut others: Self) -> Result<Self, ListenError> {
        let mut sockets = Self::default();
        for place in places {
            let is_it = |(other, _): &(Place, Vec<Socket>)| {
                let (a, b) = (place.address, other.address);
                let any_port = a.port() == 0 && a.ip() == b.ip();
                place.tls == other.tls && (a == b || any_port)
            };
            match others.0.iter().position(is_it) {
                Some(at) => sockets.0.push(others.0.swap_remove(at)),
                None => sockets.add(*place, workers)?,
            }
        }
        Ok(sockets)
    }

    /// Listens at one more place.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn add(&mut self, place: Place, workers: usize) -> Result<(), ListenError> {
        let fail = |source| ListenError {
            place: place.address,
            source,
        };
        let mut address = place.address;
        let mut sockets = Vec::with_capacity(workers);
        for _ in 0..workers {
            let socket = match listen(address) {
                // IPv6 is switched off on some machines.
                Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) && is_any(address.ip()) => {
                    address = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port());
                    listen(address)
                }
                other => other,
            }
            .map_err(fail)?;
            let bound = socket.local_addr().map_err(fail)?;
            address = bound.as_socket().unwrap_or(address);
            sockets.push(socket);
        }
        self.0.push((
            Place {
                address,
                tls: place.tls,
            },
            sockets,
        ));
        Ok(())
    }

    /// The sockets as workers take them: each gets one of each place, or several where there are more.
    ///
    /// # Errors
    /// A socket cannot be waited for. Must run inside a tokio runtime for each worker: see [`Listener::adopt`].
    pub fn share(self, workers: usize, handed_over: &Arc<AtomicBool>) -> Vec<Vec<Nascent>> {
        let mut shares: Vec<Vec<Nascent>> = (0..workers).map(|_| Vec::new()).collect();
        for (place, sockets) in self.0 {
            for (index, socket) in sockets.into_iter().enumerate() {
                shares[index % workers].push(Nascent {
                    socket,
                    tls: place.tls,
                    handed_over: Arc::clone(handed_over),
                });
            }
        }
        shares
    }

    /// Has every connection that they accept end when its client takes nothing, or is gone, for so long: accepted sockets
    /// inherit it.
    ///
    /// # Errors
    /// The system refuses.
    pub fn limit_silence(&self, silence: Duration) -> io::Result<()> {
        let keepalive = TcpKeepalive::new().with_time(silence).with_interval(PROBE_EVERY);
        for socket in self.0.iter().flat_map(|(_, sockets)| sockets) {
            socket.set_tcp_user_timeout(Some(silence))?;
            socket.set_tcp_keepalive(&keepalive)?;
        }
        Ok(())
    }

    /// Copies of all sockets, for another process.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn copies(&self) -> io::Result<Vec<(Place, Vec<OwnedFd>)>> {
        let copy = |socket: &Socket| socket.try_clone().map(OwnedFd::from);
        let of = |(place, sockets): &(Place, Vec<Socket>)| {
            Ok((*place, sockets.iter().map(copy).collect::<io::Result<_>>()?))
        };
        self.0.iter().map(of).collect()
    }
}

/// A socket on its way to its worker.
#[derive(Debug)]
pub struct Nascent {
    socket: Socket,
    tls: bool,
    handed_over: Arc<AtomicBool>,
}

impl Nascent {
    /// Makes it one of the runtime that this runs in.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn adopt(self) -> io::Result<Listener> {
        Ok(Listener {
            socket: tokio::net::TcpListener::from_std(self.socket.into())?,
            tls: self.tls,
            handed_over: self.handed_over,
        })
    }
}

impl Listener {
    /// Whether another process has it too.
    pub fn is_handed_over(&self) -> bool {
        self.handed_over.load(Relaxed)
    }
}

fn is_any(ip: IpAddr) -> bool {
    ip.is_ipv6() && ip.is_unspecified()
}

fn listen(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if is_any(address.ip()) {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    // Inherited by what is accepted: small answers go out at once.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(QUEUE)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_has_a_socket_at_the_same_port() {
        let place = Place {
            address: "127.0.0.1:0".parse().unwrap(),
            tls: false,
        };
        let sockets = Sockets::bind(&[place], 3).unwrap();
        let (bound, all) = &sockets.0[0];
        assert!(bound.address.port() != 0);
        assert!(
            all.iter()
                .all(|s| s.local_addr().unwrap().as_socket() == Some(bound.address))
        );
        assert_eq!(
            sockets
                .share(2, &Arc::default())
                .iter()
                .map(Vec::len)
                .collect::<Vec<_>>(),
            [2, 1]
        );
    }

    #[test]
    fn a_port_of_another_program_is_named_with_a_remedy() {
        let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let place = Place {
            address: other.local_addr().unwrap(),
            tls: false,
        };
        let error = Sockets::bind(&[place], 1).unwrap_err().to_string();
        assert!(
            error.contains(&place.address.to_string()) && error.contains("another program"),
            "{error}"
        );
    }
}
