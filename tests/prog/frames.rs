//! Frames that are for this node and frames that are not: MACs, VLAN tags, and where replies come from.

use lb_common::maps::device_flags;
use lb_tests::{
    packet::{Mac, Packet, eth, flag},
    row::{Body, Expect, Row, row},
    world::{BRIDGE, NIC, NIC2, mac_of},
};

use crate::{
    flows::created,
    net::{ALL, B1_MAC, BPORT, CLIENT_MAC, CONTAINER_MAC, CPORT, Net, SPORT},
};

/// Another machine on the segment.
const OTHER: Mac = [0x06, 0, 0, 0, 0, 0x99];
/// Of the bridge or bond that a NIC belongs to.
const MASTER: Mac = [0x02, 0, 0, 0, 0, 0x77];
const BROADCAST: Mac = [0xff; 6];
/// All hosts, in IPv4.
const MULTICAST: Mac = [0x01, 0, 0x5e, 0, 0, 1];

pub fn rows() -> Vec<Row> {
    ALL.iter()
        .flat_map(|n| [addresses(*n), vlans(*n), replies(*n)].concat())
        .collect()
}

fn to(packet: &Packet, mac: Mac) -> Packet {
    packet.clone().eth(CLIENT_MAC, mac)
}

fn addresses(n: Net) -> Vec<Row> {
    let known = || n.one().conn(n.conn().established(), 1);
    let (open, data, reply) = (n.open(), n.request(flag::ACK), n.reply(flag::ACK));
    let echo = eth(CLIENT_MAC, OTHER).ip(n.client(), n.vip()).echo_request(1, 1);
    let error = eth(CLIENT_MAC, OTHER)
        .ip(n.stranger(), n.vip())
        .too_big(1280, &n.to_client(&reply), 28);
    let mut rows = Vec::new();
    for (whose, mac) in [
        ("another machine", OTHER),
        ("everybody", BROADCAST),
        ("a group", MULTICAST),
    ] {
        rows.push(
            row(format!("{n}: frames for the MAC of {whose} pass"), known())
                .comes(NIC, &to(&data, mac), Expect::pass())
                .comes(NIC, &to(&reply, mac), Expect::pass())
                .comes(
                    NIC,
                    &to(&open.clone().ports(CPORT + 1, SPORT), mac),
                    Expect::pass(),
                ),
        );
    }
    rows.push(
        row(
            format!("{n}: ICMP for the MAC of another machine passes"),
            known(),
        )
        .comes(NIC, &echo, Expect::pass())
        .comes(NIC, &error, Expect::pass()),
    );
    rows.push(
        row(
            format!("{n}: a frame for the MAC of another device of this node passes"),
            known(),
        )
        .comes(NIC, &to(&data, mac_of(NIC2)), Expect::pass()),
    );
    // TC meets these at the master, where they are for the device itself.
    let master = |what: &str, given| row(format!("{n}: a frame for the MAC of the master {what}"), given);
    rows.push(
        master("is of a known flow", known().mac(NIC, MASTER))
            .only(Body::XdpThenTc)
            .comes(
                NIC,
                &to(&data, MASTER),
                Expect::send(NIC, &n.to_b1(&data)).to_backend(1, &data),
            )
            .comes(
                NIC,
                &reply.clone().eth(B1_MAC, MASTER),
                Expect::send(NIC, &n.to_client(&reply)).to_client(1, &reply),
            ),
    );
    rows.push(
        master("opens a flow", n.one().mac(NIC, OTHER).mac(NIC, MASTER))
            .only(Body::XdpThenTc)
            .comes(
                NIC,
                &to(&open, MASTER),
                created(Expect::send(NIC, &n.to_b1(&open)), &open, &n.conn()),
            ),
    );
    rows.push(
        master("of another device passes", known().mac(NIC2, MASTER)).comes(
            NIC,
            &to(&data, MASTER),
            Expect::pass(),
        ),
    );
    // The client has moved to another device since.
    let other = data.clone().eth(CLIENT_MAC, mac_of(NIC2));
    rows.push(
        row(
            format!("{n}: a client that comes by another device is judged there"),
            known(),
        )
        .comes(NIC2, &data, Expect::pass())
        .comes(
            NIC2,
            &other,
            Expect::send(NIC, &n.to_b1(&data)).to_backend(1, &data),
        ),
    );
    rows
}

fn vlans(n: Net) -> Vec<Row> {
    let known = || n.one().conn(n.conn().established(), 1);
    let (open, data, reply) = (n.open(), n.request(flag::ACK), n.reply(flag::ACK));
    let mut tagged = row(format!("{n}: a frame with a VLAN tag passes"), known());
    for packet in [open, data.clone(), reply] {
        tagged = tagged
            .comes(NIC, &packet.clone().vlan(10), Expect::pass())
            .comes(NIC, &packet.clone().vlan(0), Expect::pass())
            .comes(NIC, &packet.clone().qinq(7).vlan(10), Expect::pass())
            .leaves(NIC, &packet.vlan(10), Expect::pass());
    }
    let echo = eth(CLIENT_MAC, mac_of(NIC))
        .ip(n.client(), n.vip())
        .echo_request(1, 1);
    vec![
        tagged.comes(NIC, &echo.vlan(10), Expect::pass()),
        row(
            format!("{n}: XDP leaves the frames of a trunk that hides their tags to TC"),
            known().device_flags(NIC, device_flags::VLAN_OFFLOAD),
        )
        .comes_to_tc(
            NIC,
            &data,
            Expect::send(NIC, &n.to_b1(&data)).to_backend(1, &data),
        ),
    ]
}

fn replies(n: Net) -> Vec<Row> {
    let local = n
        .service()
        .local(n.container(), BPORT)
        .conn(n.direct(n.container()).established(), 1);
    let answer = n.packet((n.container(), BPORT), (n.client(), CPORT), flag::ACK);
    let out = answer
        .clone()
        .eth(mac_of(NIC), CLIENT_MAC)
        .addresses(n.vip(), n.client())
        .ports(SPORT, CPORT)
        .ttl(63);
    let reply = n.reply(flag::ACK);
    let at_nic2 = reply.clone().eth(B1_MAC, mac_of(NIC2));
    let node = n
        .service()
        .node(n.node(), BPORT)
        .conn(n.direct(n.node()).established(), 1);
    let forged = n.packet((n.node(), BPORT), (n.client(), CPORT), flag::ACK);
    vec![
        row(format!("{n}: a container answers from its bridge alone"), local)
            .comes(NIC, &answer, Expect::pass())
            .comes(
                BRIDGE,
                &answer.clone().eth(CONTAINER_MAC, mac_of(BRIDGE)),
                Expect::send(NIC, &out).to_client(1, &answer),
            ),
        row(
            format!("{n}: a remote backend answers by any uplink and by no bridge"),
            n.one().conn(n.conn().established(), 1),
        )
        .comes(BRIDGE, &reply.clone().eth(B1_MAC, mac_of(BRIDGE)), Expect::pass())
        .comes(
            NIC2,
            &at_nic2,
            Expect::send(NIC, &n.to_client(&reply)).to_client(1, &reply),
        ),
        row(
            format!("{n}: nobody outside answers for the node's own process"),
            node,
        )
        .comes(NIC, &forged, Expect::pass())
        .comes(
            BRIDGE,
            &forged.clone().eth(CLIENT_MAC, mac_of(BRIDGE)),
            Expect::pass(),
        ),
        row(
            format!("{n}: a container whose record is gone still answers"),
            n.service()
                .local(n.container(), BPORT)
                .epoch(7)
                .conn(n.direct(n.container()).established(), 1),
        )
        .comes(
            BRIDGE,
            &answer.clone().eth(CONTAINER_MAC, mac_of(BRIDGE)),
            Expect::send(NIC, &out).to_client(1, &answer),
        ),
    ]
}
