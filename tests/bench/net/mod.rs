//! Requests per second and CPU per request of five balancers in front of four web servers, in turns.

pub mod balancer;
pub mod rig;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::Result;

use balancer::Balancer;
use rig::{Load, Rig, VIP};

/// Turns of every balancer, if there is time.
const ROUNDS: usize = 3;
/// No round starts later than this.
const LIMIT: Duration = Duration::from_secs(150);
/// Seconds of each load.
const SECONDS: u32 = 2;
/// Name, path, and whether each request has a connection of its own.
const LOADS: [(&str, &str, bool); 3] = [
    ("new connections", "/", true),
    ("keep-alive requests", "/", false),
    ("64 KiB transfers", "/64k", false),
];

/// What was found, by load and balancer, a value a round.
type Found = BTreeMap<(usize, Balancer), Vec<Load>>;

pub fn run() -> Result<()> {
    let rig = Rig::new()?;
    let mut found = Found::new();
    let start = Instant::now();
    for round in (0..ROUNDS).take_while(|_| start.elapsed() < LIMIT) {
        // Each round begins with another one, so that none has always the same predecessor.
        for turn in 0..Balancer::ALL.len() {
            let balancer = Balancer::ALL[(round + turn) % Balancer::ALL.len()];
            let _running = balancer.start(&rig)?;
            for (index, (_, path, close)) in LOADS.iter().enumerate() {
                let load = rig.load(VIP.parse()?, path, *close, SECONDS)?;
                found.entry((index, balancer)).or_default().push(load);
            }
        }
        eprintln!("round {} of {ROUNDS}", round + 1);
    }
    for (index, (name, ..)) in LOADS.iter().enumerate() {
        table(name, index, &found);
    }
    Ok(())
}

/// Median over the rounds, and the ratios to nftables in the same round: median, lowest and highest.
fn table(name: &str, index: usize, found: &Found) {
    let reference = &found[&(index, Balancer::Nft)];
    println!(
        "\n{name}, median of {} rounds of {SECONDS} s; ratios to nftables in the same round: median (lowest–highest)\n\
         {:<18} {:>9} {:>20} {:>12} {:>20} {:>7}",
        reference.len(),
        "balancer",
        "per s",
        "rate/nft",
        "CPU µs/req",
        "CPU/nft",
        "errors"
    );
    for balancer in Balancer::ALL {
        let loads = &found[&(index, balancer)];
        let ratio =
            |of: fn(&Load) -> f64| spread(loads.iter().zip(reference).map(|(l, r)| of(l) / of(r)).collect());
        let median = |of: fn(&Load) -> f64| middle(loads.iter().map(of).collect());
        println!(
            "{:<18} {:>9.0} {:>20} {:>12.1} {:>20} {:>7}",
            balancer.name(),
            median(|l| l.rate),
            ratio(|l| l.rate),
            median(|l| l.cpu),
            ratio(|l| l.cpu),
            loads.iter().map(|l| l.errors).sum::<u64>()
        );
    }
}

pub fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

pub fn spread(values: Vec<f64>) -> String {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(0.0, f64::max);
    format!("{:.2} ({low:.2}–{high:.2})", middle(values))
}
