//! `weir node`.

use std::io::{self, Write as _};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{Exit, RunArgs, run::log_to_stderr};
use crate::{config::Config, node};

pub(super) const HELP: &str = "The file has the sections [node], [etcd] and, if Docker listens elsewhere, [docker]; \
`weir check FILE` tells its faults. A restart within `node.ttl` changes nothing for anybody.";

/// Publishes until SIGTERM or SIGINT.
pub(super) fn node(args: &RunArgs) -> anyhow::Result<Exit> {
    let config = match Config::load(&args.config) {
        Ok(config) => config,
        Err(errors) => {
            writeln!(io::stderr(), "weir: {errors}")?;
            return Ok(Exit::BadConfig);
        }
    };
    if config.node.is_none() {
        writeln!(
            io::stderr(),
            "weir: {}: {}",
            args.config.display(),
            node::NodeError::NoNode
        )?;
        return Ok(Exit::BadConfig);
    }
    log_to_stderr(args)?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(until_told(config))?;
    Ok(Exit::Ok)
}

async fn until_told(config: Config) -> anyhow::Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    let told = stop.clone();
    let work = node::run(config, stop);
    tokio::pin!(work);
    loop {
        tokio::select! {
            ended = &mut work => return Ok(ended?),
            _ = term.recv() => told.cancel(),
            _ = int.recv() => told.cancel(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_a_balancer_is_not_that_of_a_node() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weir.toml");
        let args = RunArgs {
            config: path.clone(),
            log_json: false,
            log: "info".into(),
        };
        for text in ["interfaces = \"lo\"\n", "[node]\n", "[node]\nname = \"a b\"\n"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(node(&args).unwrap(), Exit::BadConfig, "{text}");
        }
    }
}
