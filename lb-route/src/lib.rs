//! What the agent and the L7 shim share: routes, the settings of the shim, and the stream that carries both. Types only.

mod acme;
mod route;
mod settings;
mod stream;

pub use acme::{Acme, DEFAULT_DIRECTORY, DEFAULT_RETRY};
pub use route::{
    ANY_HOST, BackendState, Balance, Redirect, Route, RouteAddress, RouteSettings, RouteTls, Upstream,
    UpstreamTls, WHOLE_HOST,
};
pub use settings::{
    AccessLog, DEFAULT_CONNECTIONS, DEFAULT_PORTS, L7, L7Timeouts, MAX_CONNECTIONS, TlsVersion,
};
pub use stream::{ALIVE_EVERY, Message, SILENCE, SOCKET_NAME, State, WATCH_PATH};
