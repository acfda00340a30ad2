//! The agent's side of the kernel, on the real kernel: loading, adoption, maps, attachment, sweep, network, detach.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod adopt;
mod agent;
mod announce;
mod maps;
mod netns;
mod network;

use weir::datapath::{Capacities, load::Sizes};

/// Small maps: each test makes a set of its own.
fn sizes() -> Sizes {
    Sizes {
        limits: Capacities {
            services: 64,
            backends: 9000,
            ring_rows: 8,
            acl: 64,
            flows4: 4096,
            flows6: 1024,
        },
        events_bytes: 4096,
    }
}

/// The object that the agent carries.
fn object() -> &'static [u8] {
    weir::datapath::object::programs().unwrap()
}
