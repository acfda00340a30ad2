//! Whose frames are balanced: those for the node, by whatever device, and no others.

use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context as _, Result};
use lb_tests::packet::{Mac, eth};

use crate::{
    lab::{Body, Lab, VIP4, Wiring, address_of},
    serve,
    talk::{BULK, PATIENCE, talk_tcp},
    vip,
};

const CLIENT: Mac = [0x02, 0, 0, 0, 0, 0x0c];
const NODE: Mac = [0x02, 0, 0, 0, 0, 0x01];
const OTHER: Mac = [0x02, 0, 0, 0, 0, 0x99];

fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// A switch that floods sends the frames of other machines here, too, and a trunk those of other networks.
fn only_frames_for_the_node(body: Body) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, body, 1)?;
    lab.node.ip(&format!("link set c0 address {}", text(NODE)))?;
    lab.client.ip(&format!("link set e0 address {}", text(CLIENT)))?;
    let backend = lab.backends[0].run(|| UdpSocket::bind(SocketAddr::new(address_of(0, false), 0)))?;
    backend.set_read_timeout(Some(PATIENCE))?;
    let weir = lab.start(&lab.config(VIP4, "53/udp", &[backend.local_addr()?]))?;
    let datagram = |to: Mac, port: u16, what: &str| {
        eth(CLIENT, to)
            .ip("192.0.2.10", VIP4)
            .udp(port, 53)
            .payload(what.as_bytes())
    };
    // They come by one queue: what comes after them proves that they did not come.
    let foreign = [
        datagram(OTHER, 5001, "for another machine"),
        datagram([0xff; 6], 5002, "for everybody"),
        datagram(NODE, 5003, "of VLAN 10").vlan(10),
        datagram(NODE, 5004, "of a VLAN in a VLAN").qinq(7).vlan(10),
    ];
    for frame in foreign {
        lab.client.send_frame("e0", &frame.build())?;
    }
    for what in ["for the node", "with a priority and no VLAN"] {
        let frame = match what {
            "for the node" => datagram(NODE, 5005, what),
            _ => datagram(NODE, 5006, what).vlan(0),
        };
        lab.client.send_frame("e0", &frame.build())?;
        let mut buffer = [0; 64];
        let length = backend
            .recv(&mut buffer)
            .with_context(|| format!("{what}: {}", weir.explain()))?;
        assert_eq!(String::from_utf8_lossy(&buffer[..length]), what);
    }
    Ok(())
}

#[test]
fn only_frames_for_the_node_by_xdp() -> Result<()> {
    only_frames_for_the_node(Body::Native)
}

#[test]
fn only_frames_for_the_node_by_generic_xdp() -> Result<()> {
    only_frames_for_the_node(Body::Generic)
}

#[test]
fn only_frames_for_the_node_by_tc_alone() -> Result<()> {
    only_frames_for_the_node(Body::Tc)
}

/// Moves the node's address towards the clients to another device.
fn move_address(lab: &Lab, device: &str) -> Result<()> {
    lab.node.ip("address del 192.0.2.1/24 dev c0")?;
    lab.node.ip(&format!("link set {device} up"))?;
    lab.node.address(device, "192.0.2.1/24")
}

/// The NIC is a port of a bridge, and frames are addressed to the bridge, whose MAC is another.
fn port_of_a_bridge(body: Body) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, body, 2)?;
    lab.node.bridge("br-up")?;
    lab.node.ip(&format!("link set br-up address {}", text(OTHER)))?;
    lab.node.ip("link set c0 master br-up")?;
    move_address(&lab, "br-up")?;
    let servers = serve(&lab, false, false)?;
    let weir = lab.start(&lab.config(VIP4, "80/tcp", &servers))?;
    talk_tcp(&lab.client, vip(false, 80), BULK).with_context(|| weir.explain())?;
    let counters = weir.counters()?;
    let by_xdp = counters["node"]["redirected"].as_u64().context("redirected")?;
    assert!(by_xdp > 0, "{counters}");
    if body == Body::Native {
        // The connection began at the bridge, before the backend's MAC was known: its replies go on by TC.
        let passed = counters["node"]["passed"].as_u64().context("passed")?;
        assert!(passed < by_xdp / 10, "XDP knows the bridge's MAC: {counters}");
    }
    Ok(())
}

#[test]
fn port_of_a_bridge_by_xdp() -> Result<()> {
    port_of_a_bridge(Body::Native)
}

#[test]
fn port_of_a_bridge_by_tc_alone() -> Result<()> {
    port_of_a_bridge(Body::Tc)
}

/// keepalived's VMAC: a macvlan on the NIC, with a MAC and an address of its own, named in `interfaces`.
#[test]
fn virtual_router_mac() -> Result<()> {
    let mut lab = Lab::new(Wiring::TwoArm, Body::Tc, 2)?;
    lab.node
        .ip("link add link c0 name vrrp.1 address 00:00:5e:00:01:01 type macvlan mode private")?;
    // Or the NIC would answer for the address, too.
    lab.node.sysctl("net.ipv4.conf.c0.arp_ignore", "1")?;
    move_address(&lab, "vrrp.1")?;
    lab.interfaces = "[\"b0\", \"vrrp.1\"]";
    let servers = serve(&lab, false, false)?;
    let weir = lab.start(&lab.config(VIP4, "80/tcp", &servers))?;
    talk_tcp(&lab.client, vip(false, 80), BULK).with_context(|| weir.explain())?;
    Ok(())
}
