//! Backends and clients on the balancer's own machine: containers, processes, hairpins.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use lb_tests::packet::ToIp as _;

use crate::{
    answered,
    lab::{Body, Lab, Wiring, container_address, service},
    serve,
    talk::{BULK, serve_tcp, talk_tcp},
    vip,
};

/// Containers behind one bridge and a remote backend serve one VIP: to a client outside, to each other, and to
/// themselves.
fn containers(body: Body, v6: bool) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, body, 1)?;
    let containers = lab.containers(2)?;
    let mut servers = serve(&lab, v6, false)?;
    for (i, container) in containers.iter().enumerate() {
        let address = SocketAddr::new(container_address(i, v6), 0);
        servers.push(serve_tcp(container, 1 + i, address)?);
    }
    let to = vip(v6, 80);
    let weir = lab.start(&lab.config(&to.ip().to_string(), "80/tcp", &servers))?;
    assert_eq!(
        answered(&weir, &lab.client, to)?,
        [0, 1, 2].into(),
        "all answer a client outside"
    );
    let outside = if v6 { "2001:db8:c::10" } else { "192.0.2.10" }.ip();
    let bridge = if v6 { "2001:db8:d::1" } else { "172.30.0.1" }.ip();
    for _ in 0..16 {
        let answer = talk_tcp(&lab.client, to, 100).with_context(|| weir.explain())?;
        let translated = answer.index == 0;
        assert_eq!(
            answer.seen == outside,
            !translated,
            "a container sees the client itself: {answer:?}"
        );
    }
    talk_tcp(&lab.client, to, BULK).with_context(|| weir.explain())?;
    for (i, container) in containers.iter().enumerate() {
        let own = container_address(i, v6);
        assert_eq!(
            answered(&weir, container, to)?,
            [0, 1, 2].into(),
            "all answer container {own}"
        );
        for _ in 0..16 {
            let answer = talk_tcp(container, to, 100).with_context(|| weir.explain())?;
            // Who is on the same bridge would answer by itself, past the balancer.
            assert!(
                answer.index == 0 || answer.seen == bridge,
                "{own} was told of {answer:?}"
            );
        }
    }
    talk_tcp(&containers[0], to, BULK).with_context(|| weir.explain())?;
    Ok(())
}

#[test]
fn containers4() -> Result<()> {
    containers(Body::Native, false)
}

#[test]
fn containers6_by_tc_alone() -> Result<()> {
    containers(Body::Tc, true)
}

/// A process of the balancer uses a VIP, which is on its interface or its own address, and every kind of backend
/// answers. What else is served on that address is none of the balancer's business.
fn host(body: Body, v6: bool, vips: &str, to: SocketAddr) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, body, 1)?;
    let containers = lab.containers(1)?;
    let mut servers = serve(&lab, v6, false)?;
    let address = SocketAddr::new(container_address(0, v6), 0);
    servers.push(serve_tcp(&containers[0], 1, address)?);
    let own = if v6 { "2001:db8:c::1" } else { "192.0.2.1" }.ip();
    servers.push(serve_tcp(&lab.node, 2, SocketAddr::new(own, 0))?);
    let weir = lab.start(&(lab.head(vips) + &service("lab", "80/tcp", "", &servers)))?;
    assert_eq!(
        answered(&weir, &lab.client, to)?,
        [0, 1, 2].into(),
        "all answer a client outside"
    );
    talk_tcp(&lab.client, to, BULK).with_context(|| weir.explain())?;
    assert_eq!(
        answered(&weir, &lab.node, to)?,
        [0, 1, 2].into(),
        "all answer the node itself"
    );
    talk_tcp(&lab.node, to, BULK).with_context(|| weir.explain())?;
    assert_eq!(
        answered(&weir, &containers[0], to)?,
        [0, 1, 2].into(),
        "all answer a container"
    );
    let other = serve_tcp(&lab.node, 9, SocketAddr::new(own, 0))?;
    for client in [&lab.client, &lab.node, &containers[0]] {
        let answer = talk_tcp(client, other, 100_000).with_context(|| weir.explain())?;
        assert_eq!(
            answer.index, 9,
            "another port of the node's address is the node's"
        );
    }
    Ok(())
}

const ANNOUNCED4: &str =
    "[vips.lab]\naddress = \"198.51.100.1\"\nannounce = \"address\"\ninterface = \"c0\"\n";
const ANNOUNCED6: &str =
    "[vips.lab]\naddress = \"2001:db8:f::1\"\nannounce = \"address\"\ninterface = \"c0\"\n";
const OWN4: &str = "[vips.lab]\naddress = \"192.0.2.1\"\nnode-address = true\n";

#[test]
fn host_uses_an_announced_vip4() -> Result<()> {
    host(Body::Native, false, ANNOUNCED4, vip(false, 80))
}

#[test]
fn host_uses_an_announced_vip6_by_tc_alone() -> Result<()> {
    host(Body::Tc, true, ANNOUNCED6, vip(true, 80))
}

#[test]
fn host_uses_its_own_address() -> Result<()> {
    host(Body::Native, false, OWN4, "192.0.2.1:80".parse()?)
}

#[test]
fn host_uses_its_own_address_by_tc_alone() -> Result<()> {
    host(Body::Tc, false, OWN4, "192.0.2.1:80".parse()?)
}
