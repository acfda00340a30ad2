//! Harness of Weir's tests on the real kernel.
//!
//! `packet` builds frames, `world` says what the maps hold, `kernel` and `model` run one frame through the core as the
//! kernel and as the host compile it, `row` compares what came of it. `netns`, `guard` and `weir` are for tests with
//! real traffic.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "a test harness reports a fault by panicking"
)]

pub mod guard;
pub mod kernel;
pub mod model;
pub mod netns;
pub mod packet;
pub mod row;
pub mod weir;
pub mod world;
