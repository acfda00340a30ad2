//! `bench`: builds the programs and runs the benchmarks of `lb-tests`.

use std::process::Command;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::{agent, ebpf, needs::Group, process, release, setup, workspace};

/// Options of `bench`.
#[derive(clap::Args)]
pub struct Options {
    /// Benchmarks to run; all of them if none is named
    kinds: Vec<Kind>,
    /// Of `prog`: only the paths whose names contain this
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
}

/// A benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// ns per packet of every path through the programs
    Prog,
    /// Rates and CPU per request against other balancers
    Net,
    /// The L7 shim beside other proxies: rates, latency, CPU, memory, and failures during changes
    L7,
    /// Change latency, and failures during changes
    Update,
    /// Memory and sweep time at full size
    Scale,
    /// CPU, memory and change latency of an agent that reads 200 nodes
    Nodes,
}

/// The command.
pub fn run(options: &Options) -> Result<()> {
    if !workspace::is_root() {
        bail!("it makes namespaces and loads BPF programs: run it as root");
    }
    let kinds = match options.kinds.as_slice() {
        [] => Kind::value_variants(),
        named => named,
    };
    setup::ensure(&[Group::Build, Group::Bench])?;
    if kinds.contains(&Kind::Nodes) {
        // etcd is among what the tests with real engines need.
        setup::ensure(&[Group::E2e])?;
    }
    ebpf::build()?;
    let bench = agent::build_test_program("weir-bench")?;
    for kind in kinds {
        let name = kind
            .to_possible_value()
            .map_or_else(String::new, |v| v.get_name().to_owned());
        println!("=== bench {name}");
        let mut command = Command::new(&bench);
        command.current_dir(workspace::root());
        match kind {
            Kind::Prog => drop(ebpf::build_bench()?),
            Kind::L7 => {
                command.env("WEIR_L7_BIN", release::shim()?);
            }
            Kind::Net | Kind::Update | Kind::Nodes => {
                command.env("WEIR_BIN", release::agent()?);
            }
            Kind::Scale => {}
        }
        command.arg(name);
        if *kind == Kind::Prog {
            command.arg(&options.only);
        }
        process::run(&mut command)?;
    }
    Ok(())
}
