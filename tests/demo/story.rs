//! The demo, chapter by chapter.

use std::{collections::BTreeSet, time::Instant};

use anyhow::{Result, bail, ensure};
use lb_tests::{
    docker::{Engine, IMAGE},
    load::{Load, Report},
    site::{CLIENT, LABEL, NODE, Site, VIP, serving, vip},
    weir::Weir,
};

use crate::{
    go_on, http,
    show::{bars, chapter, command, grouped, live, live_head, output, say},
};

/// Clients that connect, ask, close, and connect again.
pub const WORKERS: usize = 6;
/// Clients that stay on one connection.
const KEEPERS: usize = 2;
/// Requests between two lines of the live table.
pub const A_WHILE: u64 = 400;

/// All of it. An error is a failed request, or a step that could not be shown.
pub fn tell() -> Result<()> {
    say(&format!(
        "Weir: one address in front of many containers, balanced in the kernel

  client                     node                                    containers
  {CLIENT:<14} ---------> {NODE}: dockerd, agent `weir` ----> web-1, web-2, ...

All three are made of network namespaces on this machine; Docker is a second, real engine
of the demo's own. Clients connect to {VIP}:80. No machine has that address: the node's
kernel sends each connection on to a container. No port is published, and up to chapter 5,
which is about HTTP by host, no proxy runs."
    ));
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    go_on()?;
    let mut weir = first_containers(&site, &engine)?;
    scaling(&site, &engine, &mut weir)?;
    agent_killed(&site, &mut weir)?;
    status(&weir)?;
    http::routes(&site, &engine, &mut weir)?;
    say("\nNot one request failed. Everything that was made for the demo is removed now.");
    Ok(())
}

/// Starts a container, showing the command.
fn run(engine: &Engine, name: &str) -> Result<()> {
    go_on()?;
    engine.container(name, &["--label", LABEL])
}

fn await_serving(weir: &mut Weir<'_>, all: &[String]) -> Result<()> {
    let wanted: BTreeSet<String> = all.iter().cloned().collect();
    go_on()?;
    weir.await_status(&format!("serving by {wanted:?}"), |status| {
        serving(status) == wanted
    })
}

fn containers(from: usize, to: usize) -> Vec<String> {
    (from..=to).map(|i| format!("web-{i}")).collect()
}

fn first_containers<'s>(site: &'s Site, engine: &Engine) -> Result<Weir<'s>> {
    chapter(1, "Two containers, one label");
    say("A label is all that a container needs to be found:\n");
    for name in containers(1, 2) {
        command(&format!("docker run -d --name {name} --label {LABEL} {IMAGE}"));
        run(engine, &name)?;
    }
    let config = site.config(engine);
    say("\nThe agent is told which address it may use:\n");
    command("cat weir.toml");
    output(&config);
    command("weir run --config weir.toml &");
    let mut weir = Weir::start(&site.node, &config)?;
    await_serving(&mut weir, &containers(1, 2))?;

    say("\nThe client asks. Each answer is the container's name and the client as the container sees it:\n");
    let url = format!("http://{VIP}/");
    for _ in 0..4 {
        go_on()?;
        command(&format!("curl {url}"));
        let answer = site
            .client
            .command("curl")
            .args(["-s", "--max-time", "20", &url])
            .output()?;
        let text = String::from_utf8_lossy(&answer.stdout).into_owned();
        ensure!(answer.status.success(), "curl {url} failed: {}", answer.status);
        ensure!(
            text.contains(CLIENT),
            "the container did not see the client's address: {text}"
        );
        output(&text);
    }
    say(&format!(
        "\n{CLIENT} is the client's real address: no proxy is in between that would put its own there."
    ));
    Ok(weir)
}

fn scaling(site: &Site, engine: &Engine, weir: &mut Weir<'_>) -> Result<()> {
    chapter(2, "From 2 containers to 10 and back to 2, under load");
    say(&format!(
        "{WORKERS} clients connect, ask, close and connect again without a pause worth speaking of. A refused,
reset or lost connection counts as failed.\n"
    ));
    let load = Load::start(&site.client, vip(80), WORKERS, 0);
    let start = Instant::now();
    live_head();
    let line = |count: usize, what: &str| live(start, count, &load.report(), what);
    a_while(&load, A_WHILE)?;
    line(2, "");
    for (i, name) in containers(3, 10).iter().enumerate() {
        run(engine, name)?;
        line(3 + i, &format!("docker run {name}"));
    }
    await_serving(weir, &containers(1, 10))?;
    let before = load.report();
    a_while(&load, 5 * A_WHILE)?;
    line(10, "all ten serve");
    let by_ten = load.report().since(&before);
    for (i, name) in containers(3, 10).iter().rev().enumerate() {
        go_on()?;
        engine.docker(&["stop", name])?;
        line(9 - i, &format!("docker stop {name}"));
    }
    await_serving(weir, &containers(1, 2))?;
    a_while(&load, A_WHILE)?;
    line(2, "");
    say("\nWho answered while all ten served:\n");
    bars(&by_ten);
    say(
        "\nA container that is told to stop gets no new connections from that moment on; those it has, it finishes.",
    );
    judge(load)
}

fn agent_killed(site: &Site, weir: &mut Weir<'_>) -> Result<()> {
    chapter(3, "The agent is killed");
    say(&format!(
        "The agent only writes down which containers there are; the kernel does the balancing. So its death is
not noticed, neither by {WORKERS} clients as before nor by {KEEPERS} that stay on one connection all the time.\n"
    ));
    let load = Load::start(&site.client, vip(80), WORKERS, KEEPERS);
    let start = Instant::now();
    live_head();
    let line = |what: &str| live(start, 2, &load.report(), what);
    a_while(&load, A_WHILE)?;
    line("");
    weir.kill();
    line("kill -9 weir");
    for _ in 0..3 {
        a_while(&load, A_WHILE)?;
        line("no agent");
    }
    go_on()?;
    weir.run()?;
    line("weir run: takes over what it finds in the kernel");
    await_serving(weir, &containers(1, 2))?;
    a_while(&load, A_WHILE)?;
    line("");
    judge(load)
}

fn status(weir: &Weir<'_>) -> Result<()> {
    chapter(4, "What the operator sees");
    command("weir status");
    let shown = weir.cli(&["status"])?;
    ensure!(
        shown.status.success(),
        "weir status: {}",
        String::from_utf8_lossy(&shown.stderr)
    );
    output(&String::from_utf8_lossy(&shown.stdout));
    Ok(())
}

/// Lets the load go on for so many requests.
pub fn a_while(load: &Load, requests: u64) -> Result<()> {
    go_on()?;
    load.await_more(requests)
}

/// Ends a load and fails if one of its requests did.
pub fn judge(load: Load) -> Result<()> {
    go_on()?;
    let report: Report = load.stop();
    go_on()?;
    let total = grouped(report.total());
    let Some(first) = report.failures.first() else {
        say(&format!("\n{total} requests, 0 failed."));
        return Ok(());
    };
    let count = report.failures.len();
    bail!("{total} requests went well, {count} failed; the first: {first}")
}
