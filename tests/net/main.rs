//! Real traffic through the real agent: client, balancer and backends in namespaces over veth.

#![expect(clippy::expect_used, reason = "helpers of tests fail as tests do")]

mod bans;
mod changes;
mod devices;
mod errors;
mod events;
mod frames;
mod health;
mod lab;
mod load;
mod local;
mod pins;
mod pmtu;
mod policy;
mod room;
mod talk;
mod ucp;
mod unit;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result};
use lab::{Body, Lab, VIP4, VIP6, Wiring, address_of};
use lb_tests::weir::Weir;
use talk::{BULK, bytes, serve_tcp, serve_udp, talk_tcp, talk_udp};

/// Enough new flows that a backend left out by chance is out of the question: 4 × 0.75^64 < 1e-7.
const FLOWS: usize = 64;

/// Starts the same TCP or UDP server on the same port of every backend; their addresses.
fn serve(lab: &Lab, v6: bool, udp: bool) -> Result<Vec<SocketAddr>> {
    // Every namespace has its own ports: what is free in the first is free in all.
    let mut port = 0;
    for (i, backend) in lab.backends.iter().enumerate() {
        let address = SocketAddr::new(address_of(i, v6), port);
        let server = if udp {
            serve_udp(backend, i, address)?
        } else {
            serve_tcp(backend, i, address)?
        };
        port = server.port();
    }
    Ok(lab.servers(v6, port))
}

/// The VIP of a family, and the socket address of a port of it.
fn vip(v6: bool, port: u16) -> SocketAddr {
    let vip: IpAddr = if v6 { VIP6 } else { VIP4 }.parse().expect("an address");
    SocketAddr::new(vip, port)
}

/// Which backends answered so many short conversations.
fn answered(weir: &Weir<'_>, client: &lb_tests::netns::Namespace, to: SocketAddr) -> Result<BTreeSet<u8>> {
    (0..FLOWS)
        .map(|_| talk_tcp(client, to, 100).map(|answer| answer.index))
        .collect::<Result<_>>()
        .with_context(|| weir.explain())
}

fn tcp(wiring: Wiring, body: Body, v6: bool) -> Result<()> {
    let lab = Lab::new(wiring, body, 2)?;
    let servers = serve(&lab, v6, false)?;
    let to = vip(v6, 80);
    let weir = lab.start(&lab.config(&to.ip().to_string(), "80/tcp", &servers))?;
    talk_tcp(&lab.client, to, BULK).with_context(|| weir.explain())?;
    assert_eq!(
        answered(&weir, &lab.client, to)?,
        [0, 1].into(),
        "both backends answer"
    );
    let status = weir.status()?;
    let attachments = status["attachments"].as_array().context("attachments")?;
    assert!(!attachments.is_empty());
    for attachment in attachments.iter().filter(|a| a["device"] != "lo") {
        assert_eq!(attachment["xdp"], body.xdp_in_status(), "{attachment:#}");
    }
    Ok(())
}

fn udp(wiring: Wiring, body: Body, v6: bool) -> Result<()> {
    let lab = Lab::new(wiring, body, 4)?;
    let servers = serve(&lab, v6, true)?;
    let to = vip(v6, 53);
    let weir = lab.start(&lab.config(&to.ip().to_string(), "53/udp", &servers))?;
    let mut answered = BTreeSet::new();
    for i in 0..FLOWS {
        // Every length from nothing to a full frame, so that odd ones and padding are among them.
        let question = bytes(i as u64, i * 23);
        answered.insert(talk_udp(&lab.client, to, &question).with_context(|| weir.explain())?);
    }
    assert_eq!(answered, (0..4).collect(), "every backend answers");
    Ok(())
}

#[test]
fn tcp4_two_arm() -> Result<()> {
    tcp(Wiring::TwoArm, Body::Native, false)
}

#[test]
fn tcp6_two_arm_by_tc_alone() -> Result<()> {
    tcp(Wiring::TwoArm, Body::Tc, true)
}

#[test]
fn tcp4_one_arm_by_tc_alone() -> Result<()> {
    tcp(Wiring::OneArm, Body::Tc, false)
}

#[test]
fn tcp4_two_arm_by_generic_xdp() -> Result<()> {
    tcp(Wiring::TwoArm, Body::Generic, false)
}

#[test]
fn tcp6_one_arm() -> Result<()> {
    tcp(Wiring::OneArm, Body::Native, true)
}

#[test]
fn udp4_two_arm_by_tc_alone() -> Result<()> {
    udp(Wiring::TwoArm, Body::Tc, false)
}

#[test]
fn udp6_one_arm() -> Result<()> {
    udp(Wiring::OneArm, Body::Native, true)
}
