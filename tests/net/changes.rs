//! What the service is judged by: nobody notices changes, restarts, refusals and faults.

use std::{
    net::{SocketAddr, TcpListener},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{listen::hang_up, load::RETRANSMITTED, weir::Weir};

use crate::{
    lab::{Body, Lab, VIP4, VIP6, Wiring, address_of, service},
    load::under_load,
    serve,
    talk::{PATIENCE, Talk, listen_tcp, serve_tcp},
    vip,
};

/// Backends of the service that changes.
const BACKENDS: usize = 6;
/// Rewrites of the configuration, each of which takes one backend away and brings another back.
const REWRITES: usize = 50;

/// The addresses that serve, as the agent's status has them: those with a share of the ring.
fn serving(status: &serde_json::Value) -> Vec<String> {
    let backends = status["services"][0]["backends"].as_array();
    backends
        .into_iter()
        .flatten()
        .filter(|backend| backend["ring_share"].as_u64().unwrap_or(0) > 0)
        .filter_map(|backend| backend["address"].as_str().map(str::to_owned))
        .collect()
}

/// Writes a configuration with these servers and waits until exactly they serve.
fn change(weir: &mut Weir<'_>, lab: &Lab, servers: &[SocketAddr]) -> Result<()> {
    weir.configure(&lab.config(VIP4, "80/tcp", servers))?;
    let wanted: Vec<String> = servers.iter().map(ToString::to_string).collect();
    weir.await_status("changed", |status| {
        let mut found = serving(status);
        found.sort();
        let mut wanted = wanted.clone();
        wanted.sort();
        found == wanted
    })
}

fn a_hundred_changes(body: Body) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, body, BACKENDS)?;
    let servers = serve(&lab, false, false)?;
    let without = |left_out: usize| -> Vec<SocketAddr> {
        let all = servers.iter().enumerate();
        all.filter(|(i, _)| *i != left_out)
            .map(|(_, server)| *server)
            .collect()
    };
    let mut weir = lab.start(&lab.config(VIP4, "80/tcp", &without(0)))?;
    let ((), met) = under_load(&lab.client, vip(false, 80), |_| {
        for i in 1..=REWRITES {
            change(&mut weir, &lab, &without(i % BACKENDS))?;
        }
        Ok(())
    })?;
    met.judge_with(&weir)
}

#[test]
fn nobody_notices_a_hundred_changes() -> Result<()> {
    a_hundred_changes(Body::Native)
}

#[test]
fn nobody_notices_a_hundred_changes_by_tc_alone() -> Result<()> {
    a_hundred_changes(Body::Tc)
}

/// A backend's listener goes away before anybody tells the agent: a quarter of the new connections meet a refusal, and
/// all succeed at once. (Of two backends, the ring would find no other for one refusal in 256.)
fn refused(body: Body, v6: bool) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, body, 4)?;
    let closing = listen_tcp(&lab.backends[0], SocketAddr::new(address_of(0, v6), 0))?;
    let port = closing.local_addr()?.port();
    for i in 1..4 {
        serve_tcp(&lab.backends[i], i, SocketAddr::new(address_of(i, v6), port))?;
    }
    let to = vip(v6, 80);
    let weir = lab.start(&lab.config(&to.ip().to_string(), "80/tcp", &lab.servers(v6, port)))?;
    let old = lab.client.run(|| reached(to, &closing))?;
    hang_up(&closing)?;
    let mut slowest = Duration::ZERO;
    lab.client.run(|| {
        for _ in 0..64 {
            let began = Instant::now();
            let mut talk = Talk::open(to).with_context(|| weir.explain())?;
            slowest = slowest.max(began.elapsed());
            talk.say(100).with_context(|| weir.explain())?;
            ensure!(talk.answer.index != 0, "a closed listener answered");
        }
        Ok(())
    })?;
    println!("slowest of 64 connections: {slowest:?}");
    ensure!(
        slowest < RETRANSMITTED,
        "a connection took {slowest:?}: {}",
        weir.explain()
    );
    let hidden = weir.counters()?["node"]["resteered"].as_u64();
    ensure!(
        hidden.is_some_and(|n| n > 2),
        "nobody was re-steered: {}",
        weir.explain()
    );
    drop(old);
    Ok(())
}

/// Connections to the VIP until the listener that nobody serves has one: it is known to be reached.
fn reached(to: SocketAddr, silent: &TcpListener) -> Result<Vec<std::net::TcpStream>> {
    silent.set_nonblocking(true)?;
    let mut kept = Vec::new();
    for _ in 0..64 {
        kept.push(std::net::TcpStream::connect_timeout(&to, PATIENCE)?);
        if let Ok((stream, _)) = silent.accept() {
            kept.push(stream);
            return Ok(kept);
        }
    }
    anyhow::bail!("the first backend was never reached")
}

#[test]
fn nobody_notices_a_closed_listener() -> Result<()> {
    refused(Body::Native, false)
}

#[test]
fn nobody_notices_a_closed_listener6_by_tc_alone() -> Result<()> {
    refused(Body::Tc, true)
}

/// The agent is killed, comes back, and is replaced by one with differently built programs.
#[test]
fn nobody_notices_a_killed_agent_and_an_upgrade() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Native, 4)?;
    let servers = serve(&lab, false, false)?;
    let mut weir = lab.start(&lab.config(VIP4, "80/tcp", &servers))?;
    let first = weir.programs()?;
    let ((), met) = under_load(&lab.client, vip(false, 80), |connections| {
        weir.kill();
        // The datapath alone: new connections go on without an agent.
        let (now, began) = (connections(), Instant::now());
        while connections() < now + 50 {
            ensure!(began.elapsed() < PATIENCE, "no connections without an agent");
            std::thread::yield_now();
        }
        weir.run()?;
        ensure!(
            weir.log().contains("adopted=true"),
            "the second agent has not adopted: {}",
            weir.log()
        );
        // It is in charge: a change takes effect.
        change(&mut weir, &lab, &servers[..3])?;
        weir.kill();
        weir.upgrade()?;
        weir.run()?;
        change(&mut weir, &lab, &servers)
    })?;
    let second = weir.programs()?;
    ensure!(
        first.len() == second.len() && first.iter().zip(&second).all(|(a, b)| a != b),
        "the programs were not replaced: {first:?} {second:?}"
    );
    met.judge_with(&weir)
}

/// A configuration with faults, and a flow table that is full, harm nothing else.
#[test]
fn faults_harm_nothing_else() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Native, 2)?;
    let (servers, servers6) = (serve(&lab, false, false)?, serve(&lab, true, false)?);
    let good = lab.head(&format!(
        "[vips.lab]\naddress = [\"{VIP4}\", \"{VIP6}\"]\n[limits]\nflows4 = 512\n"
    )) + &service("four", "80/tcp", &format!("vip = \"{VIP4}\""), &servers)
        + &service("six", "80/tcp", &format!("vip = \"{VIP6}\""), &servers6);
    let mut weir = lab.start(&good)?;

    let ((), met) = under_load(&lab.client, vip(true, 80), |_| {
        weir.configure(&good.replace("80/tcp", "eighty/tcp"))?;
        weir.await_status("told of the fault", |status| {
            status["rejections"].to_string().contains("eighty")
                || status["faults"].to_string().contains("eighty")
                || status["sources"].to_string().contains("eighty")
        })?;
        flood(&lab, &weir)
    })?;
    ensure!(full(&weir)? > 0, "the table was not full: {}", weir.explain());
    met.judge_with(&weir)?;
    weir.configure(&good)?;
    weir.await_status("well again", |status| !status.to_string().contains("eighty"))
}

/// Packets that were dropped because a flow table was full.
fn full(weir: &Weir<'_>) -> Result<u64> {
    let counters = weir.counters()?;
    counters["drops"]["flow_table_full"]
        .as_u64()
        .context("no such counter")
}

/// Opens IPv4 connections until there is no room for more; the open ones go on.
fn flood(lab: &Lab, weir: &Weir<'_>) -> Result<()> {
    let to = vip(false, 80);
    lab.client.run(|| {
        let mut talks = Vec::new();
        // Twice the capacity, and the hash table's per-CPU reserves.
        for _ in 0..2048 {
            match std::net::TcpStream::connect_timeout(&to, Duration::from_millis(300)) {
                Ok(stream) => talks.push(Talk::of(stream)?),
                Err(_) if full(weir)? > 0 => break,
                // Slow, not refused.
                Err(_) => {}
            }
        }
        ensure!(
            talks.len() > 256 && talks.len() < 2048,
            "{} connections fit",
            talks.len()
        );
        for talk in &mut talks {
            talk.say(64)
                .context("an open connection was harmed")
                .with_context(|| weir.explain())?;
        }
        Ok(())
    })
}
