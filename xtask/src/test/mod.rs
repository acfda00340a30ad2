//! `test`: runs the tiers one after the other and sums up. A tier that cannot run says why and has failed: to leave one
//! out, name the others.

use std::time::Instant;

use anyhow::{Result, bail};

use crate::{agent, ebpf, setup, vm, workspace};

pub mod cargo;
pub mod report;
mod tier;

use report::Count;
use tier::Tier;

/// Options of `test`.
#[derive(clap::Args)]
pub struct Options {
    /// Tiers to run; all of them if none is named
    tiers: Vec<Tier>,
    /// Only tests whose name contains this
    #[arg(long, value_name = "NAME")]
    filter: Option<String>,
}

/// The command. The last line it prints is `N passed, N failed`.
pub fn run(options: &Options) -> Result<()> {
    use clap::ValueEnum;
    let tiers = match options.tiers.as_slice() {
        [] => Tier::value_variants(),
        named => named,
    };
    let mut total = Count::default();
    for tier in tiers {
        let name = tier.name();
        println!("=== {name}");
        let start = Instant::now();
        let count = run_tier(*tier, options.filter.as_deref()).unwrap_or_else(|fault| {
            println!("{name} cannot run: {fault:#}");
            Count::fault()
        });
        let verdict = if count.failed == 0 { "ok" } else { "FAILED" };
        println!(
            "=== {name}: {verdict}, {count}, {:.1} s",
            start.elapsed().as_secs_f64()
        );
        total += count;
    }
    println!("{total}");
    if total.failed > 0 {
        std::process::exit(1);
    }
    Ok(())
}

fn run_tier(tier: Tier, filter: Option<&str>) -> Result<Count> {
    if tier.needs_root() && !workspace::is_root() {
        bail!("it makes namespaces and loads BPF programs: run it as root");
    }
    setup::ensure(tier.groups())?;
    // Everything but the core embeds the object, so the tests never see yesterday's programs.
    ebpf::build()?;
    if tier == Tier::Vm {
        return vm::run(filter);
    }
    let selection = tier.selection();
    cargo::build(&selection)?;
    let mut command = cargo::test(&selection, tier.threads(), filter);
    if tier.needs_agent() {
        command.env("WEIR_BIN", agent::build()?);
    }
    if tier == Tier::E2e {
        command.env("WEIR_SERVER_BIN", agent::build_test_server()?);
    }
    cargo::run(command)
}
