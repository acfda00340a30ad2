//! `weir run` and `weir detach`.

pub(super) mod translate;
mod wiring;

use std::{
    collections::BTreeSet,
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use tracing_subscriber::EnvFilter;

use super::{DetachArgs, Exit, RunArgs, print};
use crate::{
    admin::{
        DEFAULT_SOCKET,
        client::{Client, ClientError},
    },
    config::{Config, DEFAULT_PIN_PATH},
    datapath::detach as datapath,
    status::Status,
};

/// Runs the agent until SIGTERM or SIGINT.
pub(super) fn run(args: &RunArgs, socket: Option<&Path>) -> anyhow::Result<Exit> {
    let mut config = match Config::load(&args.config) {
        Ok(config) => config,
        Err(errors) => {
            writeln!(io::stderr(), "weir: {errors}")?;
            return Ok(Exit::BadConfig);
        }
    };
    if config.interfaces.is_empty() {
        writeln!(
            io::stderr(),
            "weir: {}: is the file of a node that publishes its containers: run `weir node`, or name `interfaces` to balance \
             here, too",
            args.config.display()
        )?;
        return Ok(Exit::BadConfig);
    }
    if let Some(socket) = socket {
        config.admin.socket = socket.to_owned();
    }
    log_to_stderr(args)?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(wiring::agent(config))?;
    Ok(Exit::Ok)
}

/// Takes the datapath off the node.
pub(super) fn detach(args: &DetachArgs, socket: Option<&Path>) -> anyhow::Result<Exit> {
    let (pin, configured, vips) = match &args.config {
        None => (
            PathBuf::from(DEFAULT_PIN_PATH),
            PathBuf::from(DEFAULT_SOCKET),
            BTreeSet::new(),
        ),
        Some(path) => match Config::load(path) {
            Ok(config) => {
                let vips = translate::vips(&config).collect();
                (config.bpf.pin_path, config.admin.socket, vips)
            }
            Err(errors) => {
                writeln!(io::stderr(), "weir: {errors}")?;
                return Ok(Exit::BadConfig);
            }
        },
    };
    let socket = socket.map_or(configured, Path::to_owned);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let report = runtime.block_on(async {
        match Client::new(&socket).get::<Status>("/v1/status").await {
            Err(ClientError::NotRunning(_)) => {}
            Err(error @ ClientError::Permission(_)) => return Err(error.into()),
            // Whatever the answer was: somebody gave one.
            Ok(_) | Err(_) => anyhow::bail!(
                "an agent answers on {}: stop it first (`systemctl stop weir`), or it would put everything back",
                socket.display()
            ),
        }
        datapath::detach(&pin, &Files::beside(&socket).state, &vips)
            .await
            .with_context(|| format!("detaching what is pinned under {}", pin.display()))
    })?;
    for line in &report.done {
        print(&format!("{line}\n"))?;
    }
    for line in report.advice() {
        print(&format!("{line}\n"))?;
    }
    if report.done.is_empty() && report.faults.is_empty() {
        print("nothing of Weir is on this node\n")?;
    }
    for fault in &report.faults {
        writeln!(io::stderr(), "weir: {fault}")?;
    }
    Ok(if report.faults.is_empty() {
        Exit::Ok
    } else {
        Exit::Failure
    })
}

/// Files that the agent keeps beside its socket: gone at boot, as is all that they speak of.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Files {
    /// What `weir detach` has to undo.
    state: PathBuf,
    /// What the operator has drained.
    drains: PathBuf,
    /// Until when leaving backends drain.
    deadlines: PathBuf,
    /// What the sources wish.
    wishes: PathBuf,
}

impl Files {
    fn beside(socket: &Path) -> Self {
        Self {
            state: socket.with_file_name("state.json"),
            drains: socket.with_file_name("drains"),
            deadlines: socket.with_file_name("deadlines"),
            wishes: socket.with_file_name("wishes"),
        }
    }
}

pub(super) fn log_to_stderr(args: &RunArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&args.log).with_context(|| {
        format!(
            "--log {:?} is no filter; write it as info, debug or weir=debug",
            args.log
        )
    })?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    let set = match args.log_json {
        true => log.json().try_init(),
        false => log
            .with_target(false)
            .with_ansi(super::stderr_colour())
            .try_init(),
    };
    set.map_err(|e| anyhow::anyhow!("logging: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_beside_the_socket() {
        let files = Files::beside(Path::new("/run/weir/weir.sock"));
        assert_eq!(files.state, Path::new("/run/weir/state.json"));
        assert_eq!(files.drains, Path::new("/run/weir/drains"));
    }

    #[test]
    fn a_bad_configuration_ends_before_anything_is_touched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weir.toml");
        std::fs::write(&path, "colour = 1\n").unwrap();
        let args = RunArgs {
            config: path.clone(),
            log_json: false,
            log: "info".into(),
        };
        assert_eq!(run(&args, None).unwrap(), Exit::BadConfig);
        assert_eq!(
            detach(&DetachArgs { config: Some(path) }, None).unwrap(),
            Exit::BadConfig
        );
    }
}
