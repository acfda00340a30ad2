//! Weir's L7 shim: routes HTTP by host and path to the containers that the agent tells of.
//!
//! A process of its own without privileges: it knows nothing of BPF and of Docker. State comes in by [`feed`], becomes a
//! [`served::Serving`] that every [`worker`] reads, and [`proxy`] sends requests by it.

pub mod acme;
pub mod balance;
pub mod cli;
pub mod client;
pub mod feed;
pub mod handover;
pub mod listen;
pub mod log;
mod memory;
pub mod page;
pub mod proxy;
pub mod proxy_protocol;
pub mod served;
pub mod shim;
pub mod stats;
pub mod table;
pub mod tls;
pub mod upstream;
pub mod worker;
