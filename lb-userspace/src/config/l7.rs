//! `[l7]`: how the L7 shim serves routes. The agent checks it and tells it to the shims.

pub use lb_route::{
    AccessLog, Acme, DEFAULT_CONNECTIONS, DEFAULT_DIRECTORY, DEFAULT_PORTS, DEFAULT_RETRY, L7, L7Timeouts,
    MAX_CONNECTIONS, TlsVersion,
};
