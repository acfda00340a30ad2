//! Real traffic through the real agent: client, balancer and backends in namespaces over veth.

mod lab;

use std::{collections::BTreeSet, net::SocketAddr};

use anyhow::{Context as _, Result};
use lab::{BULK, Lab, VIP4, VIP6, Wiring, serve_tcp, serve_udp, talk_tcp, talk_udp};
use lb_tests::weir::Weir;

/// Enough new flows that a backend left out by chance is out of the question: 4 × 0.75^64 < 1e-7.
const FLOWS: usize = 64;

/// Starts the same server on the same port of every backend.
fn serve(lab: &Lab, v6: bool, udp: bool) -> Result<u16> {
    // Every namespace has its own ports: what is free in the first is free in all.
    let mut port = 0;
    for (i, backend) in lab.backends.iter().enumerate() {
        port = if udp {
            serve_udp(backend, i, v6, port)?
        } else {
            serve_tcp(backend, i, v6, port)?
        };
    }
    Ok(port)
}

fn tcp(wiring: Wiring, backends: usize, v6: bool) -> Result<()> {
    let lab = Lab::new(wiring, backends)?;
    let port = serve(&lab, v6, false)?;
    let vip = if v6 { VIP6 } else { VIP4 };
    let weir = Weir::start(&lab.node, &lab.config(vip, "80/tcp", port))?;
    let to = SocketAddr::new(vip.parse()?, 80);
    talk_tcp(&lab.client, to, BULK).with_context(|| weir.explain())?;
    let answered = (0..FLOWS)
        .map(|_| talk_tcp(&lab.client, to, 100))
        .collect::<Result<BTreeSet<_>>>()?;
    assert_eq!(answered, (0..backends as u8).collect(), "every backend answers");
    Ok(())
}

fn udp(wiring: Wiring, backends: usize, v6: bool) -> Result<()> {
    let lab = Lab::new(wiring, backends)?;
    let port = serve(&lab, v6, true)?;
    let vip = if v6 { VIP6 } else { VIP4 };
    let weir = Weir::start(&lab.node, &lab.config(vip, "53/udp", port))?;
    let to = SocketAddr::new(vip.parse()?, 53);
    let mut answered = BTreeSet::new();
    for i in 0..FLOWS {
        // Every length from nothing to a full frame, so that odd ones and padding are among them.
        let question = lab::bytes(i as u64, i * 23);
        answered.insert(talk_udp(&lab.client, to, &question).with_context(|| weir.explain())?);
    }
    assert_eq!(answered, (0..backends as u8).collect(), "every backend answers");
    Ok(())
}

#[test]
fn tcp4_two_arm() -> Result<()> {
    tcp(Wiring::TwoArm, 2, false)
}

#[test]
fn tcp6_two_arm() -> Result<()> {
    tcp(Wiring::TwoArm, 4, true)
}

#[test]
fn tcp4_one_arm() -> Result<()> {
    tcp(Wiring::OneArm, 4, false)
}

#[test]
fn tcp6_one_arm() -> Result<()> {
    tcp(Wiring::OneArm, 2, true)
}

#[test]
fn udp4_two_arm() -> Result<()> {
    udp(Wiring::TwoArm, 4, false)
}

#[test]
fn udp6_one_arm() -> Result<()> {
    udp(Wiring::OneArm, 2, true)
}
