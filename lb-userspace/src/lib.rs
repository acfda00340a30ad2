//! Weir's agent: source → desired → plan → apply → maps.
//!
//! `source` hears Docker and files, `desired` makes one wish of all that was heard, `plan` compares it with what is
//! programmed, `reconcile` owns the maps and applies the plan. `datapath` is the only part that talks to the kernel.

pub mod admin;
pub mod causes;
pub mod cli;
pub mod config;
pub mod datapath;
pub mod desired;
pub mod etcd;
pub mod health;
pub mod import;
pub mod metrics;
pub mod model;
pub mod node;
pub mod pem;
pub mod plan;
pub mod reconcile;
pub mod ring;
pub mod route;
mod slot;
pub mod source;
pub mod status;
