//! The L7 shim as it runs: its own process, the agent's own stream, real clients and servers on loopback.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod acme;
mod activation;
mod agent;
mod bodies;
mod http2;
mod hygiene;
mod origin;
mod page;
mod places;
mod rig;
mod routing;
mod shim;
mod tls;
mod updates;
mod upgrades;
mod wire;
