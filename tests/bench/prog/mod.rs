//! Nanoseconds per packet of the XDP and TC bodies, by `BPF_PROG_TEST_RUN`.
//!
//! What is repeated is a program that restores the packet and tail-calls the body (`lb-ebpf/src/bench.rs`). Rounds of
//! the body and of an empty program take turns, so that both see the same machine; a row is the difference of the
//! two in one round.

mod cases;
mod rig;

use anyhow::Result;

use cases::{Case, Figures};
use rig::Rig;

/// Pairs of runs per case.
const ROUNDS: usize = 15;

/// Measures the cases whose names contain `only`.
pub fn run(only: &str) -> Result<()> {
    let mut rig = Rig::new()?;
    println!("instructions that the verifier walked:");
    for (name, count) in rig.instructions()? {
        println!("  {name:<16} {count:>8}");
    }
    println!(
        "\nns per packet, net of an empty program in the same round, {ROUNDS} rounds\n\
         {:<48} {:>6} {:>6} {:>6} {:>7} {:>7}",
        "path", "min", "median", "empty", "Katran", "ratio"
    );
    for case in cases::all().into_iter().filter(|case| case.name.contains(only)) {
        let figures = measure(&mut rig, &case)?;
        println!("{}", line(&case, &figures));
    }
    Ok(())
}

fn measure(rig: &mut Rig, case: &Case) -> Result<Figures> {
    rig.prepare(case)?;
    let mut net = Vec::new();
    let mut empty = Vec::new();
    for _ in 0..ROUNDS {
        let body = rig.time(case, true)?;
        let nothing = rig.time(case, false)?;
        net.push(body - nothing);
        empty.push(nothing);
    }
    Ok(Figures::of(net, empty))
}

fn line(case: &Case, figures: &Figures) -> String {
    let peer = case.katran.map_or_else(
        || format!("{:>7} {:>7}", "–", "–"),
        |ns| format!("{ns:>7} {:>7.2}", figures.median / f64::from(ns)),
    );
    format!(
        "{:<48} {:>6.0} {:>6.0} {:>6.0} {peer}",
        case.name, figures.min, figures.median, figures.empty
    )
}
