//! How long a change takes from the event to the commit, and what it breaks.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use lb_tests::{netns::Namespace, weir::Weir};

use crate::net::{
    balancer::Balancer,
    rig::{BACKENDS, Rig, VIP},
};

/// Services of 100 backends each.
const SERVICES: [usize; 3] = [1, 100, 1_000];
/// Backends of each service.
const EACH: usize = 100;
/// Changes measured for each number of services.
const CHANGES: usize = 10;
/// How long one change may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Changes during one load, and the time between them.
const UNDER_LOAD: usize = 10;
const PAUSE: Duration = Duration::from_millis(400);
/// Seconds of load around them.
const SECONDS: u32 = 6;

pub fn run() -> Result<()> {
    println!(
        "change of one backend of one service, {CHANGES} changes; ms: median (lowest–highest)\n{:<10} {:>24} {:>24}",
        "services", "file renamed → commit", "first update → commit"
    );
    for services in SERVICES {
        match latency(services) {
            Ok((file, reconciler)) => println!("{services:<10} {file:>24} {reconciler:>24}"),
            Err(fault) => println!("{services:<10} {fault:#}"),
        }
    }
    failures()
}

/// From the file's new name to the log's line of the commit, and what the reconciler says of its own part.
fn latency(services: usize) -> Result<(String, String)> {
    let (node, world) = (Namespace::new("node")?, Namespace::new("world")?);
    node.veth("c0", &world, "e0")?;
    node.address("c0", "192.0.2.1/24")?;
    node.ip("neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev c0 nud permanent")?;
    node.ip("route add 10.2.0.0/16 via 192.0.2.2")?;
    let weir = Weir::start_with(&node, "native", &config(services, EACH))?;
    let (mut file, mut reconciler) = (Vec::new(), Vec::new());
    for change in 0..CHANGES {
        let before = commits(&weir.log()).len();
        let text = config(services, EACH - 1 + change % 2);
        let start = Instant::now();
        weir.configure(&text)?;
        let took = loop {
            if let Some(took) = commits(&weir.log()).get(before) {
                break *took;
            }
            if start.elapsed() > PATIENCE {
                bail!("change {change} is not in the maps after {PATIENCE:?}");
            }
            // The log tells nobody that it grows.
            std::thread::sleep(Duration::from_millis(1));
        };
        file.push(start.elapsed().as_secs_f64() * 1e3);
        reconciler.push(took as f64 / 1e3);
        // What follows from the change (the end of a drain) is not the next change.
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok((spread(file), spread(reconciler)))
}

/// The microseconds that the agent's lines about commits tell.
fn commits(log: &str) -> Vec<u64> {
    log.lines()
        .filter(|line| line.contains("programmed"))
        .filter_map(|line| {
            line.split_once("took_us=")?
                .1
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .collect()
}

/// So many services, the first with so many backends.
fn config(services: usize, first: usize) -> String {
    let mut text = format!(
        "interfaces = [\"c0\"]\n[limits]\nservices = 1024\nbackends = 131072\nring-rows = 3072\n\
         [defaults]\ndrain = \"0s\"\n[vips.bench]\naddress = \"{VIP}\"\n"
    );
    for service in 0..services {
        text.push_str(&format!(
            "[[services]]\nname = \"s{service}\"\nvip = \"bench\"\nlisten = [\"{}/tcp\"]\n",
            1 + service
        ));
        for backend in 0..if service == 0 { first } else { EACH } {
            text.push_str(&format!(
                "[[services.backends]]\naddress = \"10.2.0.{}:80\"\n",
                1 + backend
            ));
        }
    }
    text
}

fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    format!(
        "{:.1} ({:.1}–{:.1})",
        values[values.len() / 2],
        values[0],
        values[values.len() - 1]
    )
}

/// Requests that fail while servers leave and come back.
fn failures() -> Result<()> {
    let rig = Rig::new()?;
    println!(
        "\nfailed requests during {UNDER_LOAD} changes of the set of servers in {SECONDS} s of load\n{:<18} {:>24} {:>24}",
        "balancer", "a connection a request", "keep-alive"
    );
    for balancer in [
        Balancer::WeirXdp,
        Balancer::Nft,
        Balancer::Haproxy,
        Balancer::Nginx,
    ] {
        let mut found = Vec::new();
        for close in [true, false] {
            let mut running = balancer.start(&rig)?;
            let load = std::thread::scope(|scope| {
                let load = scope.spawn(|| rig.load(VIP.parse()?, "/", close, SECONDS));
                for change in 0..UNDER_LOAD {
                    std::thread::sleep(PAUSE);
                    running.change(BACKENDS - 1 + change % 2)?;
                }
                load.join().ok().context("the load panicked")?
            })?;
            found.push(format!(
                "{} of {:.0}",
                load.errors,
                load.rate * f64::from(SECONDS)
            ));
        }
        println!("{:<18} {:>24} {:>24}", balancer.name(), found[0], found[1]);
    }
    Ok(())
}
