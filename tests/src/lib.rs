//! Harness of Weir's tests on the real kernel.
//!
//! `packet` builds frames, `world` says what the maps hold, `kernel` and `model` run one frame through the core as the
//! kernel and as the host compile it, `row` compares what came of it. `netns`, `guard` and `weir` are for tests with
//! real traffic, `listen` ends servers, `docker` and `load` are for those with real containers, `etcd`, `node` and `fleet` for those with
//! many nodes, `pki` and `pebble` for those with certificates; the demo is made of the same parts.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "a test harness reports a fault by panicking"
)]

pub mod devices;
pub mod docker;
pub mod etcd;
pub mod fleet;
pub mod frame;
pub mod guard;
pub mod kernel;
pub mod listen;
pub mod load;
pub mod model;
pub mod netns;
pub mod node;
pub mod packet;
pub mod pebble;
pub mod pki;
pub mod row;
pub mod site;
pub mod slots;
pub mod test_run;
pub mod weir;
pub mod world;
