//! The admin API: HTTP over a Unix socket for the command line, and read-only health and metrics over TCP.
//!
//! It owns nothing: it reads the published [`Status`] and the datapath's counters, and what changes something is sent
//! to the reconciler as a [`Command`]. No call that changes anything is reachable by TCP.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Instant};

use lb_common::maps;
use tokio::{
    net::TcpListener,
    sync::{broadcast, mpsc, watch},
};
use tokio_util::sync::CancellationToken;

pub mod api;
pub mod client;
mod event;
mod kernel;
mod routes;
pub mod select;
pub mod shims;
pub mod socket;
pub mod tap;

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod tests;

pub use kernel::Kernel;

use crate::{
    datapath::{MapError, announcements::AnnounceRequest, sweep::SweepError},
    reconcile::Command,
    status::Status,
};

/// Where the admin socket is unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/weir/weir.sock";

/// Where the admin API listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The Unix socket.
    pub socket: PathBuf,
    /// Group that may use it besides its owner.
    pub group: Option<String>,
    /// Where metrics and health are served; `None`: nowhere.
    pub metrics: Option<SocketAddr>,
}

/// The reading side of the datapath. Calls block for as long as the system calls take.
pub trait Readings: Send + Sync + 'static {
    /// Counters of the node, and of these services and backends.
    ///
    /// # Errors
    /// The kernel refused to read a map.
    fn counters(&self, services: &[u32], backends: &[u32]) -> Result<api::Reading, ReadError>;

    /// Live flows that match, at most `filter.limit`; whether there are more.
    ///
    /// # Errors
    /// The kernel refused to read a map.
    fn flows(&self, filter: &api::FlowFilter) -> Result<api::FlowList, ReadError>;
}

/// Why the datapath could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A map.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The flow tables.
    #[error(transparent)]
    Flows(#[from] SweepError),
}

/// What the API knows: ends of channels whose other ends are the agent's.
#[derive(Clone)]
pub struct Context {
    /// The agent's state.
    pub status: watch::Receiver<Status>,
    /// The datapath's numbers.
    pub readings: Arc<dyn Readings>,
    /// To the reconciler.
    pub commands: mpsc::Sender<Command>,
    /// To the follower of the network.
    pub announce: mpsc::Sender<AnnounceRequest>,
    /// Who serves the routes.
    pub shims: shims::Connected,
    /// Sampled events of the datapath.
    pub events: broadcast::Sender<maps::Event>,
    /// When the agent started: the zero of `taken_us`.
    pub started: Instant,
    /// Ends streams when the agent stops.
    pub stop: CancellationToken,
}

/// Why the admin API cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The Unix socket.
    #[error("admin socket {0}")]
    Socket(#[from] socket::SocketError),
    /// The metrics listener.
    #[error("metrics address {address}: {source}; choose another `admin.metrics` address")]
    Metrics {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// A listener failed while serving.
    #[error("admin API: {0}")]
    Serve(#[from] std::io::Error),
}

/// The bound but not yet serving API: whoever holds it knows that the socket is his.
#[derive(Debug)]
pub struct Admin {
    socket: socket::Socket,
    metrics: Option<TcpListener>,
}

impl Admin {
    /// Binds both listeners.
    ///
    /// # Errors
    /// See [`AdminError`]; another agent that answers on the socket is one.
    pub async fn bind(options: &Options) -> Result<Self, AdminError> {
        let socket = socket::Socket::bind(&options.socket, options.group.as_deref())?;
        let metrics = match options.metrics {
            None => None,
            Some(address) => Some(
                TcpListener::bind(address)
                    .await
                    .map_err(|source| AdminError::Metrics { address, source })?,
            ),
        };
        Ok(Self { socket, metrics })
    }

    /// Where metrics are served: the real port if port 0 was asked for.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics.as_ref().and_then(|l| l.local_addr().ok())
    }

    /// Serves until `context.stop` is cancelled and the calls under way are answered.
    ///
    /// # Errors
    /// A listener failed for good.
    pub async fn serve(mut self, context: Context) -> Result<(), AdminError> {
        let stop = context.stop.clone();
        let unix = async {
            match self.socket.take() {
                None => Ok(()),
                Some(listener) => {
                    axum::serve(listener, routes::unix(context.clone()))
                        .with_graceful_shutdown(stop.clone().cancelled_owned())
                        .await
                }
            }
        };
        let tcp = async {
            match self.metrics.take() {
                None => Ok(()),
                Some(listener) => {
                    axum::serve(listener, routes::tcp(context.clone()))
                        .with_graceful_shutdown(stop.clone().cancelled_owned())
                        .await
                }
            }
        };
        tokio::try_join!(unix, tcp)?;
        Ok(())
    }
}
