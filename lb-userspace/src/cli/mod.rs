//! The command line.

use std::{
    io::{self, IsTerminal, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand};

mod check;
mod config;
mod etcd;
mod events;
mod flows;
mod humane;
mod import;
mod l7;
mod node;
mod operate;
mod rates;
mod routes;
mod run;
mod status;
mod table;
mod watch;

use crate::admin::{DEFAULT_SOCKET, client::Client};
use table::Look;

/// What the process tells its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// Tried and failed.
    Failure = 1,
    /// The command line is wrong; clap says so itself.
    Usage = 2,
    /// The configuration is wrong: nothing was tried.
    BadConfig = 64,
}

const EXIT_CODES: &str = "Exit codes:
  0   done
  1   failed: the message says why and what to do
  2   the command line is wrong
  64  the configuration is wrong: every fault is listed";

/// Weir: an L4 load balancer in the kernel, for Docker without Kubernetes.
#[derive(Debug, Parser)]
#[command(name = "weir", version, about, after_help = EXIT_CODES)]
pub struct Cli {
    /// The agent's Unix socket [default: /run/weir/weir.sock, for `run` what the configuration says]
    #[arg(long, env = "WEIR_SOCKET", global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent in the foreground
    Run(RunArgs),
    /// Publish this node's containers to etcd, for balancers on other machines; needs no privileges but Docker's socket
    #[command(after_help = node::HELP)]
    Node(RunArgs),
    /// Show services, backends, sources and what was refused
    Status(StatusArgs),
    /// Take new flows away from a backend; its old flows go on
    #[command(after_help = SELECTORS)]
    Drain(DrainArgs),
    /// Let a drained backend serve again
    #[command(after_help = SELECTORS)]
    Undrain(UndrainArgs),
    /// List live flows
    Flows(FlowsArgs),
    /// Follow the sampled event stream: new flows, drops, re-steers
    Events(EventsArgs),
    /// Tell the neighbours again which MAC the VIPs of this node have: gratuitous ARP, neighbour advertisements
    Announce(AnnounceArgs),
    /// Have the agent read the maps back and repair what differs
    Resync,
    /// Check a configuration file and list every fault
    Check {
        /// The file
        config: PathBuf,
    },
    /// Read and change what all nodes share: the keys in etcd
    #[command(after_help = config::HELP)]
    Config(config::ConfigArgs),
    /// Translate the configuration of another balancer
    #[command(subcommand)]
    Import(import::ImportCommand),
    /// Serve HTTP by the routes: the L7 shim, a process without privileges
    L7(l7::L7Args),
    /// Take the datapath off the node: programs, maps and addresses; ends every flow. The agent must be stopped
    Detach(DetachArgs),
}

const SELECTORS: &str = "A backend is named by its container name (web-1), service/name (web/web-1), \
address:port (172.17.0.2:8080) or id (#17), as `weir status` shows them.";

/// Arguments of `weir run` and `weir node`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The configuration file
    #[arg(long, default_value = "/etc/weir/weir.toml", value_name = "FILE")]
    pub config: PathBuf,
    /// Write the log as lines of JSON
    #[arg(long)]
    pub log_json: bool,
    /// What to log: error, warn, info, debug, trace, or a filter such as weir=debug
    #[arg(long, env = "WEIR_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
}

#[derive(Debug, Args)]
struct StatusArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Show it anew every so often until interrupted
    #[arg(long, value_name = "EVERY", num_args = 0..=1, default_missing_value = "2s",
          value_parser = humane::parse_span)]
    watch: Option<Duration>,
}

#[derive(Debug, Args)]
struct DrainArgs {
    /// Which backend
    backend: String,
    /// Drain every backend that matches
    #[arg(long)]
    all: bool,
    /// How long old flows may go on (30s, 5m) before they are reset; without it the backend's own drain time
    #[arg(long, value_name = "TIME", value_parser = humane::parse_span)]
    deadline: Option<Duration>,
}

#[derive(Debug, Args)]
struct UndrainArgs {
    /// Which backend
    backend: String,
    /// Undrain every backend that matches
    #[arg(long)]
    all: bool,
}

#[derive(Debug, Args)]
struct FlowsArgs {
    /// Only flows of this service (name or address)
    #[arg(long)]
    service: Option<String>,
    /// Only flows of this client
    #[arg(long, value_name = "ADDRESS")]
    client: Option<IpAddr>,
    /// Only flows of this backend
    #[arg(long)]
    backend: Option<String>,
    /// At most so many
    #[arg(long, default_value_t = 100)]
    limit: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct AnnounceArgs {
    /// This VIP alone; without it every VIP with `announce = "address"`
    #[arg(value_name = "ADDRESS")]
    vip: Option<IpAddr>,
}

#[derive(Debug, Args)]
struct EventsArgs {
    /// Print JSON, an event a line
    #[arg(long)]
    json: bool,
}

/// Arguments of `weir detach`.
#[derive(Debug, Args)]
pub struct DetachArgs {
    /// The configuration file that names the pin path; without it the default path is used
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let exit = match run_command(&cli) {
        Ok(exit) => exit,
        // Whoever read our output has seen enough (`weir flows | head`).
        Err(error) if broken_pipe(&error) => Exit::Ok,
        Err(error) => {
            // A closed stderr leaves nobody to tell.
            let _ = writeln!(io::stderr(), "weir: {error:#}");
            Exit::Failure
        }
    };
    ExitCode::from(exit as u8)
}

fn run_command(cli: &Cli) -> anyhow::Result<Exit> {
    let socket = cli.socket.as_deref();
    let client = Client::new(socket.unwrap_or(Path::new(DEFAULT_SOCKET)));
    match &cli.command {
        Command::Run(args) => run::run(args, socket),
        Command::Node(args) => node::node(args),
        Command::Detach(args) => run::detach(args, socket),
        Command::L7(args) => l7::become_shim(args, socket),
        Command::Check { config } => check::check(config, &mut io::stdout(), &mut io::stderr()),
        Command::Import(command) => block_on(import::run(command, &mut io::stdout(), &mut io::stderr())),
        Command::Status(args) => call(watch::status(&client, args)),
        Command::Drain(args) => call(operate::drain(&client, args)),
        Command::Undrain(args) => call(operate::undrain(&client, args)),
        Command::Flows(args) => call(flows::flows(&client, args)),
        Command::Events(args) => call(events::events(&client, args)),
        Command::Announce(args) => call(operate::announce(&client, args)),
        Command::Resync => call(operate::resync(&client)),
        Command::Config(args) => block_on(config::config(args)),
    }
}

/// Runs a command that asks etcd; one thread is enough for it.
fn block_on(work: impl Future<Output = anyhow::Result<Exit>>) -> anyhow::Result<Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime?.block_on(work)
}

/// Runs a call of the agent; one thread is enough for it.
fn call(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<Exit> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)?;
    Ok(Exit::Ok)
}

/// What standard output may look like: colours only on a terminal, and not if `NO_COLOR` is set (no-color.org).
fn look() -> Look {
    let terminal = io::stdout().is_terminal();
    Look {
        colour: terminal && colour_wanted(),
        width: terminal
            .then(|| terminal_size::terminal_size_of(io::stdout()))
            .flatten()
            .map(|(terminal_size::Width(columns), _)| usize::from(columns)),
    }
}

/// Whether the log may have colours.
fn stderr_colour() -> bool {
    io::stderr().is_terminal() && colour_wanted()
}

fn colour_wanted() -> bool {
    let no_colour = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|v| v == "dumb");
    !no_colour && !dumb
}

/// Writes to standard output; unlike `print!` an error is a value.
fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    Ok(print(&format!("{}\n", serde_json::to_string_pretty(value)?))?)
}

fn broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|e| e.downcast_ref::<io::Error>())
        .any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_documents_its_exit_codes() {
        Cli::command().debug_assert();
        let help = Cli::command().render_help().to_string();
        for exit in [Exit::Ok, Exit::Failure, Exit::Usage, Exit::BadConfig] {
            assert!(
                help.contains(&format!("\n  {} ", exit as u8)),
                "{exit:?} is missing in {help}"
            );
        }
    }

    #[test]
    fn arguments_are_read() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        let Command::Drain(args) = parse("weir drain web-1 --all --deadline 30s").unwrap().command else {
            panic!("not a drain")
        };
        assert_eq!((args.backend.as_str(), args.all), ("web-1", true));
        assert_eq!(args.deadline, Some(Duration::from_secs(30)));
        let Command::Status(args) = parse("weir status --watch").unwrap().command else {
            panic!("not a status")
        };
        assert_eq!(args.watch, Some(Duration::from_secs(2)));
        assert!(parse("weir l7 --help").is_ok() && parse("weir l7 --http 127.0.0.1:0 --routes x").is_ok());
        let cli = parse("weir flows --socket /tmp/x --limit 3").unwrap();
        assert_eq!(cli.socket.as_deref(), Some(Path::new("/tmp/x")));
        for wrong in [
            "weir",
            "weir drain",
            "weir status --watch 5",
            "weir flows --client web",
            "weir check",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
