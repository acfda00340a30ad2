//! Weir's development commands: `cargo xtask <command>`. One module each; every command installs what it needs.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod agent;
mod apt;
mod bench;
mod demo;
mod ebpf;
mod elf;
mod lint;
mod needs;
mod process;
mod progress;
mod release;
mod run;
mod setup;
mod test;
mod toolchain;
mod vm;
mod workspace;

/// Weir's development commands
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing on a Debian 12 machine; nothing is done the second time
    Setup(setup::Options),
    /// Build the BPF programs into target/bpf/weir-ebpf.o
    BuildEbpf,
    /// Build the agent and the L7 shim as they are released, into target/dist/<target>
    Build(release::Options),
    /// Make the profile anew by which the L7 shim is compiled for a release
    Profile(release::Options),
    /// Build everything and run the agent: `cargo xtask run -- --config weir.toml`
    Run(run::Options),
    /// Show it: real containers behind a VIP, scaled under load, in namespaces that are removed afterwards
    Demo,
    /// Run the tests, all tiers or those named
    Test(test::Options),
    /// Measure: ns per packet, rates against other balancers, change latency, memory
    Bench(bench::Options),
    /// Check formatting, then clippy on the host crates and on the BPF programs; warnings are errors
    Lint,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            // Not by `main` returning it: with RUST_BACKTRACE set, anyhow would bury the message under a trace.
            eprintln!("xtask: {fault:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Setup(options) => setup::run(&options),
        Command::BuildEbpf => ebpf::build().map(drop),
        Command::Build(options) => release::run(&options),
        Command::Profile(options) => release::profile(&options),
        Command::Run(options) => run::run(&options),
        Command::Demo => demo::run(),
        Command::Test(options) => test::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Lint => lint::run(),
    }
}
