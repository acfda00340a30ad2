//! `weir node`: publishes the containers of a Docker node, so that balancers on other machines reach them.
//!
//! It listens to the node's engine as a balancer does and writes the facts to etcd. It judges nothing, needs no privileges
//! but the engine's socket, and touches no packet.

pub mod facts;
pub mod ledger;
pub mod publish;

use std::{fs, sync::Arc};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Config, EtcdConfig, NodeConfig},
    source::docker,
};
use publish::Publisher;

/// Why this node publishes nothing.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A section is missing.
    #[error(
        "there is no section `[node]`: with it (it may be empty) the file is that of a node which publishes its containers"
    )]
    NoNode,
    /// The machine does not tell its boot.
    #[error("/proc/sys/kernel/random/boot_id: {0}; without it two machines of one name cannot be told apart")]
    Boot(#[from] std::io::Error),
}

/// Publishes until `stop`.
///
/// # Errors
/// The configuration is not that of a node.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), NodeError> {
    let (node, etcd, engine) = parts(&config)?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let publisher = Publisher::new(etcd, node, boot.trim().to_owned());
    // The file is read once: a restart within the lease's time changes nothing.
    let (_file, config) = watch::channel(Arc::new(config));
    publisher.run(docker::facts(engine, config), stop).await;
    Ok(())
}

/// The node, etcd, and the source that hears the engine. A file with `[node]` has all of them.
fn parts(config: &Config) -> Result<(NodeConfig, EtcdConfig, String), NodeError> {
    let node = config.node.clone().ok_or(NodeError::NoNode)?;
    let etcd = config.etcd.clone().ok_or(NodeError::NoNode)?;
    let mut engines = config.docker.iter().filter(|engine| !engine.remote);
    let engine = engines.next().ok_or(NodeError::NoNode)?;
    Ok((node, etcd, engine.source()))
}
