//! One check of one backend: real connections from the node's own address, in the agent's own namespace.

mod http;
#[cfg(test)]
mod tests;
mod tls;

use std::{io, net::SocketAddr, sync::Arc};

use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use crate::{
    causes::with_causes,
    model::{Check, CheckKind},
};

pub use tls::{Clients, TlsError};

/// What came of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every kind passed; what the last one saw.
    Passed(String),
    /// One kind failed, and how.
    Failed(String),
    /// It could not be made, for a reason of this node's own: it says nothing of the backend.
    Impossible(String),
}

/// Makes checks.
pub trait Probe: Clone + Send + Sync + 'static {
    /// Checks one backend. Ends within the check's timeout.
    fn probe(&self, backend: SocketAddr, check: Arc<Check>) -> impl Future<Output = Outcome> + Send;
}

/// The prober of the agent.
#[derive(Clone, Debug, Default)]
pub struct Network {
    clients: Arc<Clients>,
}

/// Why a check did not pass.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("{}", refusal(.0))]
    Connect(io::Error),
    #[error("TLS: {0}")]
    Handshake(io::Error),
    #[error("no HTTP answer: {}", with_causes(.0))]
    Http(#[from] hyper::Error),
    #[error("{0}")]
    Status(hyper::StatusCode),
    #[error("{status}, but the body does not contain `{text}`")]
    Body { status: hyper::StatusCode, text: String },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("no socket: {0}")]
    Socket(io::Error),
    #[error("the request cannot be written: {0}")]
    Request(#[from] hyper::http::Error),
}

// === impl Network ===

impl Probe for Network {
    async fn probe(&self, backend: SocketAddr, check: Arc<Check>) -> Outcome {
        let to = SocketAddr::new(backend.ip(), check.port.unwrap_or(backend.port()));
        let limit = check.timing.timeout;
        let mut at = None;
        let all = async {
            let mut seen = String::new();
            for kind in &check.kinds {
                at = Some(*kind);
                seen = self.try_kind(*kind, to, &check).await?;
            }
            Ok::<_, Fault>(seen)
        };
        let result = timeout(limit, all).await;
        let kind = at.map_or_else(String::new, |kind| format!("{kind}: "));
        match result {
            Ok(Ok(seen)) => Outcome::Passed(format!("{kind}{seen}")),
            Ok(Err(fault @ (Fault::Tls(_) | Fault::Socket(_) | Fault::Request(_)))) => {
                Outcome::Impossible(format!("{kind}{fault}"))
            }
            Ok(Err(fault)) => Outcome::Failed(format!("{kind}{fault}")),
            Err(_) => Outcome::Failed(format!("{kind}no answer within {limit:?}")),
        }
    }
}

impl Network {
    async fn try_kind(&self, kind: CheckKind, to: SocketAddr, check: &Check) -> Result<String, Fault> {
        match kind {
            CheckKind::Tcp => connect(to, check.on_link).await.map(|_| "connected".into()),
            CheckKind::Http => http::exchange(connect(to, check.on_link).await?, to, &check.http).await,
            CheckKind::Https => {
                let name = tls::server_name(&check.tls, to)?;
                let client = self.clients.client(check.tls.files.as_ref())?;
                let stream = connect(to, check.on_link).await?;
                let stream = tokio_rustls::TlsConnector::from(client)
                    .connect(name, stream)
                    .await
                    .map_err(Fault::Handshake)?;
                http::exchange(stream, to, &check.http).await
            }
        }
    }
}

/// A connection that is reset when it is done with: thousands of checks leave no sockets in TIME-WAIT. `on_link`: never by a
/// gateway, so that an address of this node's networks does not leave the node when its network is not there.
async fn connect(to: SocketAddr, on_link: bool) -> Result<TcpStream, Fault> {
    let socket = if to.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    };
    let socket = socket.map_err(Fault::Socket)?;
    socket.set_zero_linger().map_err(Fault::Socket)?;
    if on_link {
        setsockopt(&socket, sockopt::DontRoute, &true).map_err(|fault| Fault::Socket(fault.into()))?;
    }
    socket.connect(to).await.map_err(|error| match error.kind() {
        // The node has run out of ports or memory: nothing that the backend could help.
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::OutOfMemory => Fault::Socket(error),
        _ => Fault::Connect(error),
    })
}

/// The system's words without its numbers.
fn refusal(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".into(),
        io::ErrorKind::HostUnreachable => "host unreachable".into(),
        io::ErrorKind::NetworkUnreachable => "network unreachable".into(),
        io::ErrorKind::ConnectionReset => "connection reset".into(),
        io::ErrorKind::TimedOut => "connection timed out".into(),
        _ => error.to_string(),
    }
}
