//! Listening sockets: one for each worker and place, so that the kernel spreads connections and no worker waits for
//! another. Where systemd made a single one, the workers share it.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use lb_route::L7;
use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};

mod activation;
mod gate;
mod places;

pub use activation::{Activated, activated};
pub use gate::{Gate, Listener, Nascent};
pub use places::{PlaceReport, Places, follow};

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

/// A place that is listened at.
#[derive(Clone, Debug)]
pub struct Open {
    /// The place as it was asked for: its port may be 0, its address `::` where IPv6 is switched off.
    pub asked: Place,
    /// The place.
    pub place: Place,
    /// systemd made the sockets and has them too: what waits in their queues outlives this process.
    pub is_kept: bool,
    /// Its sockets.
    pub sockets: Arc<Vec<Socket>>,
}

/// Why nobody listens.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {}: {source}; {}", place.address, remedy(.source))]
pub struct ListenError {
    /// Where.
    pub place: Place,
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

/// Where the settings say to listen.
pub fn configured(settings: &L7) -> Vec<Place> {
    let of = |port: Option<u16>, tls: bool| {
        let addresses = settings.listen.iter();
        let place = move |ip: &IpAddr, port| Place {
            address: SocketAddr::new(*ip, port),
            tls,
        };
        let places = port.map(|port| addresses.map(move |ip| place(ip, port)));
        places.into_iter().flatten()
    };
    of(settings.http_port, false)
        .chain(of(settings.https_port, true))
        .collect()
}

// === impl Open ===

impl Open {
    /// Listens at a place, with a socket for each worker. With port 0 all get the same port.
    ///
    /// # Errors
    /// See [`ListenError`]; nothing is listened to then.
    pub fn bind(asked: Place, workers: usize) -> Result<Self, ListenError> {
        let fail = |source| ListenError { place: asked, source };
        let mut address = asked.address;
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
        Ok(Self {
            asked,
            place: Place { address, ..asked },
            is_kept: false,
            sockets: Arc::new(sockets),
        })
    }

    /// Whether connections to an address come here, though it was not asked for: systemd's sockets are not ours to move.
    fn covers(&self, address: SocketAddr) -> bool {
        let own = self.place.address;
        let every = own.ip().is_unspecified() && (own.is_ipv6() || address.is_ipv4());
        self.is_kept && own.port() == address.port() && (every || own.ip() == address.ip())
    }

    /// Has every connection that is accepted here end when its client takes nothing, or is gone, for so long: accepted
    /// sockets inherit it.
    ///
    /// # Errors
    /// The system refuses.
    fn limit_silence(&self, silence: Duration) -> io::Result<()> {
        let keepalive = TcpKeepalive::new().with_time(silence).with_interval(PROBE_EVERY);
        for socket in &*self.sockets {
            socket.set_tcp_user_timeout(Some(silence))?;
            socket.set_tcp_keepalive(&keepalive)?;
        }
        Ok(())
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
    prepare(&socket)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(QUEUE)?;
    Ok(socket)
}

/// What every listening socket needs, whoever made it.
fn prepare(socket: &Socket) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    // Inherited by what is accepted: small answers go out at once.
    socket.set_tcp_nodelay(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_has_a_socket_at_the_same_port() {
        let asked = Place {
            address: "127.0.0.1:0".parse().unwrap(),
            tls: false,
        };
        let open = Open::bind(asked, 3).unwrap();
        assert_eq!(open.asked, asked);
        assert!(open.place.address.port() != 0);
        let own = |s: &Socket| s.local_addr().unwrap().as_socket();
        assert!(open.sockets.iter().all(|s| own(s) == Some(open.place.address)));
        assert_eq!(open.sockets.len(), 3);
    }

    #[test]
    fn a_port_of_another_program_is_named_with_a_remedy() {
        let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let place = Place {
            address: other.local_addr().unwrap(),
            tls: false,
        };
        let error = Open::bind(place, 1).unwrap_err().to_string();
        assert!(
            error.contains(&place.address.to_string()) && error.contains("another program"),
            "{error}"
        );
    }

    #[test]
    fn only_kept_sockets_stand_for_other_addresses() {
        let at = |address: &str, is_kept| {
            let place = Place {
                address: address.parse().unwrap(),
                tls: false,
            };
            Open {
                asked: place,
                place,
                is_kept,
                sockets: Arc::default(),
            }
        };
        let covers = |own: &str, other: &str| at(own, true).covers(other.parse().unwrap());
        assert!(covers("[::]:80", "192.0.2.1:80") && covers("[::]:80", "[2001:db8::1]:80"));
        assert!(covers("0.0.0.0:80", "192.0.2.1:80") && !covers("0.0.0.0:80", "[2001:db8::1]:80"));
        assert!(covers("192.0.2.1:80", "192.0.2.1:80") && !covers("192.0.2.1:80", "[::]:80"));
        assert!(!covers("[::]:80", "[::]:81"));
        assert!(!at("[::]:80", false).covers("[::]:80".parse().unwrap()));
    }

    #[test]
    fn each_port_is_served_at_each_address() {
        let settings: L7 =
            serde_json::from_str(r#"{"listen":["::1","127.0.0.1"],"http_port":8080,"https_port":8443}"#)
                .unwrap();
        let places: Vec<String> = configured(&settings)
            .iter()
            .map(|place| format!("{} {}", place.address, place.tls))
            .collect();
        assert_eq!(
            places,
            [
                "[::1]:8080 false",
                "127.0.0.1:8080 false",
                "[::1]:8443 true",
                "127.0.0.1:8443 true"
            ]
        );
        let none: L7 = serde_json::from_str(r#"{"http_port":null,"https_port":null}"#).unwrap();
        assert!(configured(&none).is_empty());
    }
}
