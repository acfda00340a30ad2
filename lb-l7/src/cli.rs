//! The command line of `weir-l7`, which `weir l7` runs.

use std::{io::IsTerminal as _, net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::{acme::Folder, memory, shim};

/// Where the agent tells its routes unless told otherwise.
const DEFAULT_SOCKET: &str = "/run/weir/l7.sock";

/// Weir's L7 shim: serves HTTP by the routes of Interlock's labels. Needs no privileges but its ports.
///
/// Routes and settings ([l7] of weir.toml) come from the agent on this node. While the agent is gone, what it said last is
/// served on, after a restart too.
#[derive(Clone, Debug, Parser)]
#[command(name = "weir-l7", bin_name = "weir l7", version, after_help = HELP)]
pub struct Cli {
    /// The socket on which the agent tells its routes
    #[arg(long, env = "WEIR_L7_AGENT", default_value = DEFAULT_SOCKET, value_name = "SOCKET")]
    pub agent: PathBuf,
    /// Serve the routes of this file (JSON) instead of an agent's; SIGHUP reads it again
    #[arg(long, value_name = "FILE", conflicts_with_all = ["agent", "state"])]
    pub routes: Option<PathBuf>,
    /// Keep the last good state in this file, and begin with it
    #[arg(long, env = "WEIR_L7_STATE", value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// Keep the account and the certificates of ACME in this folder; without it in `acme` beside the file of --state
    #[arg(long, env = "WEIR_L7_ACME", value_name = "FOLDER")]
    pub acme: Option<PathBuf>,
    /// Serve HTTP here instead of where [l7] says; may be given several times
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub http: Vec<SocketAddr>,
    /// Serve HTTPS here instead of where [l7] says; may be given several times
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub https: Vec<SocketAddr>,
    /// Take over from the shim that answers on this socket, and let the next one take over there
    #[arg(long, env = "WEIR_L7_HANDOVER", value_name = "SOCKET")]
    pub handover: Option<PathBuf>,
    /// Threads that serve; without it one for each processor
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub workers: Option<u16>,
    /// Write the log as lines of JSON
    #[arg(long)]
    pub log_json: bool,
    /// What to log: error, warn, info, debug, or a filter such as weir_l7=debug
    #[arg(long, env = "WEIR_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
}

const HELP: &str =
    "Signals: SIGTERM and SIGINT stop after what is under way has ended; a second one stops at once.
With --handover, SIGUSR2 starts the program anew (another version, after an upgrade), which takes over without a gap.
The log is written to standard error, the log of requests ([l7] access-log) to standard output.";

impl Cli {
    /// Where the account and the certificates of ACME are; `None`: nowhere.
    pub fn acme_folder(&self) -> Option<Folder> {
        let beside = || Some(self.state.as_ref()?.with_file_name("acme"));
        self.acme.clone().or_else(beside).map(|path| Folder::new(&path))
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    memory::small_pages();
    let cli = Cli::parse();
    start_log(&cli);
    match shim::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What is logged, by the words of the command line.
fn filter(words: &str) -> EnvFilter {
    let filter = EnvFilter::try_new(words).unwrap_or_else(|_| EnvFilter::new("info"));
    if words.contains("rustls") {
        return filter;
    }
    // It complains of every client that names itself wrongly: anybody could fill the log, and each line costs a handshake.
    EnvFilter::try_new(format!("rustls=error,{filter}")).unwrap_or(filter)
}

fn start_log(cli: &Cli) {
    let filter = filter(&cli.log);
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    if cli.log_json {
        log.json().init();
    } else {
        log.init();
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn clients_cannot_fill_the_log_unless_it_is_asked_for() {
        for (words, rustls) in [
            ("info", Some("rustls=error")),
            ("weir_l7=debug,warn", Some("rustls=error")),
            ("info,rustls=debug", Some("rustls=debug")),
            ("no=such=filter", Some("rustls=error")),
        ] {
            let filter = filter(words).to_string();
            assert_eq!(
                filter.split(',').find(|d| d.starts_with("rustls")),
                rustls,
                "{filter}"
            );
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from([
            "weir-l7",
            "--routes",
            "r.json",
            "--http",
            "127.0.0.1:0",
            "--http",
            "[::1]:80",
        ]);
        let cli = cli.unwrap();
        assert_eq!((cli.http.len(), cli.acme_folder()), (2, None));
        for (words, folder) in [
            (&["--state", "/var/s.json"][..], "/var/acme"),
            (&["--state", "/var/s.json", "--acme", "/a"], "/a"),
        ] {
            let cli = Cli::try_parse_from([&["weir-l7"][..], words].concat()).unwrap();
            assert_eq!(cli.acme_folder(), Some(Folder::new(folder.as_ref())));
        }
        for wrong in [
            &["--workers", "0"][..],
            &["--http", "80"],
            &["--routes", "a", "--state", "b"],
        ] {
            assert!(
                Cli::try_parse_from([&["weir-l7"][..], wrong].concat()).is_err(),
                "{wrong:?}"
            );
        }
    }
}
