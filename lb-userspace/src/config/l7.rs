//! `[l7]`: how the L7 shim serves routes. The agent checks it and tells it to the shims.

pub use lb_route::{
    AccessLog, DEFAULT_CONNECTIONS, DEFAULT_PORTS, L7, L7Timeouts, MAX_CONNECTIONS, TlsVersion,
};
