//! Real containers of real Docker engines behind the real agent.

mod clock;
mod containers;
mod engines;
mod etcd;
mod faults;
mod health;
mod life;
mod networks;
mod nodes;
mod scale;
mod swarm;
mod voting;

use std::collections::BTreeSet;

use anyhow::Result;
use lb_tests::{
    docker::Engine,
    site::{LABEL, Site, serving, vip},
    weir::Weir,
};

/// Enough new flows that a backend of two or three is left out by chance less than once in a billion runs.
const FLOWS: usize = 64;

/// Names as a set.
fn names(all: &[&str]) -> BTreeSet<String> {
    all.iter().map(|&name| name.to_owned()).collect()
}

/// Starts `web-1` and on with the label of service `web`, and an agent that has found them all.
fn start<'s>(site: &'s Site, engine: &Engine, containers: usize) -> Result<Weir<'s>> {
    let all: Vec<String> = (1..=containers).map(|i| format!("web-{i}")).collect();
    for name in &all {
        engine.container(name, &["--label", LABEL])?;
    }
    let mut weir = Weir::start(&site.node, &site.config(engine))?;
    await_serving(&mut weir, &all.iter().map(String::as_str).collect::<Vec<_>>())?;
    Ok(weir)
}

/// Waits until new flows go to these backends and no others.
fn await_serving(weir: &mut Weir<'_>, all: &[&str]) -> Result<()> {
    let wanted = names(all);
    weir.await_status(&format!("serving by {wanted:?}"), |status| {
        serving(status) == wanted
    })
}

/// Who answers new connections of the client.
fn who_answers(site: &Site) -> Result<BTreeSet<String>> {
    (0..FLOWS)
        .map(|_| Ok(site.client.talk(vip(80))?.server))
        .collect()
}
