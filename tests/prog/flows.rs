//! New flows and known ones: where they go and how they are rewritten.

use lb_common::counter::{Counter, DropReason};
use lb_common::maps::{backend_state, service_flags};
use lb_tests::{
    packet::{Packet, ToIp as _, flag},
    row::{Expect, Row, row},
    world::{BRIDGE, Conn, NIC, NIC2, SYN_S, TCP, World, mac_of},
};

use crate::net::{ALL, B1_MAC, B2_MAC, BPORT, CLIENT_MAC, CONTAINER_MAC, CPORT, Net, SPORT};

pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for n in ALL {
        rows.extend(remote(n));
        rows.extend(local(n));
        rows.extend(node(n));
        rows.extend(from_node(n));
        rows.extend(ports(n));
        rows.extend(snat(n));
    }
    rows
}

/// A new flow to backend 1 of service 1.
pub fn created(expect: Expect, packet: &Packet, conn: &Conn) -> Expect {
    expect
        .new_flow(conn.service, conn.id)
        .to_backend(conn.id, packet)
        .flows(&[conn])
}

fn remote(n: Net) -> Vec<Row> {
    let open = n.open();
    let (data, reply) = (
        n.request(flag::ACK).payload(b"hello"),
        n.reply(flag::ACK).payload(b"world!!"),
    );
    let known = n.conn().established();
    let other_mac = [0x06, 0, 0, 0, 0, 0x0d];
    let by_nic2 = n.service().remote(n.b1(), BPORT, NIC2, B1_MAC);
    let to_nic2 = n.to_b1(&open).eth(mac_of(NIC2), B1_MAC);
    let unresolved = n.service().remote(n.b1(), BPORT, NIC, [0; 6]);
    vec![
        row(
            format!("{n}: a new flow goes to the only backend, both addresses translated"),
            n.one(),
        )
        .comes(
            NIC,
            &open,
            created(Expect::send(NIC, &n.to_b1(&open)), &open, &n.conn()),
        ),
        row(
            format!("{n}: a new flow to a backend behind another device"),
            by_nic2.clone(),
        )
        .comes(
            NIC,
            &open,
            created(Expect::send(NIC2, &to_nic2), &open, &n.conn()),
        ),
        row(
            format!("{n}: the reply of a backend behind another device"),
            by_nic2.conn(known.clone(), 1),
        )
        .comes(
            NIC2,
            &reply.clone().eth(B1_MAC, mac_of(NIC2)),
            Expect::send(NIC, &n.to_client(&reply)).to_client(1, &reply),
        ),
        row(
            format!("{n}: a packet of a known flow to its backend"),
            n.one().conn(known.clone(), 1),
        )
        .comes(
            NIC,
            &data,
            Expect::send(NIC, &n.to_b1(&data)).to_backend(1, &data),
        ),
        row(
            format!("{n}: a packet of a known flow to its client"),
            n.one().conn(known.clone(), 1),
        )
        .comes(
            NIC,
            &reply,
            Expect::send(NIC, &n.to_client(&reply)).to_client(1, &reply),
        ),
        row(
            format!("{n}: a known flow goes on while its backend drains"),
            n.one()
                .backend_state(backend_state::DRAINING)
                .conn(known.clone(), 1),
        )
        .comes(
            NIC,
            &data,
            Expect::send(NIC, &n.to_b1(&data)).to_backend(1, &data),
        ),
        row(
            format!("{n}: the reply of a draining backend goes on"),
            n.one()
                .backend_state(backend_state::DRAINING)
                .conn(known.clone(), 1),
        )
        .comes(
            NIC,
            &reply,
            Expect::send(NIC, &n.to_client(&reply)).to_client(1, &reply),
        ),
        row(
            format!("{n}: a client behind a new router is answered by way of that router"),
            n.one().conn(known.clone(), 1),
        )
        .comes(
            NIC,
            &data.clone().eth(other_mac, mac_of(NIC)),
            Expect::send(NIC, &n.to_b1(&data))
                .to_backend(1, &data)
                .count(Counter::HopsRelearned)
                .flows(&[&known.clone().hop(other_mac, NIC)]),
        )
        .comes(
            NIC,
            &reply,
            Expect::send(NIC, &n.to_client(&reply).eth(mac_of(NIC), other_mac)).to_client(1, &reply),
        ),
        row(
            format!("{n}: XDP leaves a backend without a known neighbour to TC"),
            unresolved,
        )
        .comes(
            NIC,
            &open,
            created(Expect::neighbour(NIC, &n.to_b1(&open)), &open, &n.conn()),
        ),
    ]
}

fn local(n: Net) -> Vec<Row> {
    let open = n.open();
    let given = n.service().local(n.container(), BPORT);
    let conn = n.direct(n.container());
    let out = open
        .clone()
        .addresses(n.client(), n.container())
        .ports(CPORT, BPORT)
        .ttl(63);
    let reply = n
        .packet((n.container(), BPORT), (n.client(), CPORT), flag::ACK)
        .eth(CONTAINER_MAC, mac_of(BRIDGE));
    let always = n
        .service()
        .flags(service_flags::SNAT_ALWAYS)
        .local(n.container(), BPORT);
    let snat = Conn {
        backend: (n.container(), BPORT),
        ..n.conn()
    };
    let known = conn.clone().established();
    vec![
        row(
            format!("{n}: a container on the bridge sees the client itself"),
            given.clone(),
        )
        .comes(NIC, &open, created(Expect::neighbour(BRIDGE, &out), &open, &conn)),
        row(
            format!("{n}: a known flow to a container"),
            given.clone().conn(known.clone(), 1),
        )
        .comes(
            NIC,
            &n.request(flag::ACK),
            Expect::neighbour(
                BRIDGE,
                &n.packet((n.client(), CPORT), (n.container(), BPORT), flag::ACK)
                    .ttl(63),
            )
            .to_backend(1, &n.request(flag::ACK)),
        ),
        row(
            format!("{n}: the reply of a container is rewritten at the bridge"),
            given.conn(known, 1),
        )
        .comes(
            BRIDGE,
            &reply,
            Expect::send(NIC, &n.to_client(&reply)).to_client(1, &reply),
        ),
        row(
            format!("{n}: snat = always translates the client towards a container too"),
            always,
        )
        .comes(
            NIC,
            &open,
            created(
                Expect::neighbour(BRIDGE, &out.clone().addresses(n.source(), n.container())),
                &open,
                &snat,
            ),
        ),
    ]
}

fn node(n: Net) -> Vec<Row> {
    let open = n.open();
    let given = n.service().node(n.node(), BPORT);
    let conn = n.direct(n.node());
    let out = open.clone().addresses(n.client(), n.node()).ports(CPORT, BPORT);
    let reply = n
        .packet((n.node(), BPORT), (n.client(), CPORT), flag::ACK)
        .eth(mac_of(NIC), CLIENT_MAC);
    let known = conn.clone().established();
    vec![
        row(
            format!("{n}: a process of the node sees the client itself"),
            given.clone(),
        )
        .comes(NIC, &open, created(Expect::node(&out), &open, &conn)),
        row(
            format!("{n}: the reply of the node is rewritten on its way out"),
            given.clone().conn(known.clone(), 1),
        )
        .leaves(
            NIC,
            &reply,
            Expect::stack(&reply.clone().addresses(n.vip(), n.client()).ports(SPORT, CPORT))
                .to_client(1, &reply),
        ),
        row(
            format!("{n}: another packet of the node leaves untouched"),
            given.conn(known, 1),
        )
        .leaves(
            NIC,
            &n.packet((n.node(), 9999), (n.client(), CPORT), flag::ACK)
                .eth(mac_of(NIC), CLIENT_MAC),
            Expect::pass(),
        ),
    ]
}

/// Processes of the node as clients: caught on their way out, answered by way of `lo`.
fn from_node(n: Net) -> Vec<Row> {
    let open = n
        .packet((n.node(), CPORT), (n.vip(), SPORT), flag::SYN)
        .eth(mac_of(NIC), [0; 6]);
    let conn = Conn {
        client: (n.node(), CPORT),
        ..n.conn()
    }
    .hop([0; 6], 0);
    let reply = n.reply(flag::SYN_ACK);
    let back = reply.clone().addresses(n.vip(), n.node()).ports(SPORT, CPORT);
    let local = n.service().local(n.container(), BPORT);
    let direct = Conn {
        client: (n.node(), CPORT),
        ..n.direct(n.container())
    }
    .source(n.node(), CPORT)
    .hop([0; 6], 0);
    let to_local = open
        .clone()
        .addresses(n.node(), n.container())
        .ports(CPORT, BPORT)
        .ttl(63);
    let own = n.service().node(n.node(), BPORT);
    let itself = Conn {
        backend: (n.node(), BPORT),
        ..direct.clone()
    };
    let to_itself = open.clone().addresses(n.node(), n.node()).ports(CPORT, BPORT);
    vec![
        row(
            format!("{n}: the node talks to a VIP, a remote backend answers"),
            n.one(),
        )
        .leaves(
            NIC,
            &open,
            created(Expect::send(NIC, &n.to_b1(&open)), &open, &conn),
        )
        .comes_to_tc(
            NIC,
            &reply,
            Expect::loopback(&back)
                .to_client(1, &reply)
                .handshake(1)
                .flows(&[&conn.clone().answered()]),
        ),
        row(
            format!("{n}: the node talks to a VIP served by a container"),
            local,
        )
        .leaves(
            NIC,
            &open,
            created(Expect::neighbour(BRIDGE, &to_local), &open, &direct),
        ),
        row(format!("{n}: the node talks to a VIP that it serves itself"), own).leaves(
            NIC,
            &open,
            created(Expect::loopback(&to_itself), &open, &itself),
        ),
    ]
}

fn ports(n: Net) -> Vec<Row> {
    let open = n.open();
    let keeps = n.service().remote(n.b1(), 0, NIC, B1_MAC);
    let any = World::new()
        .source(n.source())
        .service(n.vip(), 0, n.proto)
        .remote(n.b1(), 0, NIC, B1_MAC);
    let exact = any
        .clone()
        .service(n.vip(), SPORT, n.proto)
        .remote(n.b2(), BPORT, NIC, B2_MAC);
    let same = Conn {
        backend: (n.b1(), SPORT),
        ..n.conn()
    };
    let to_same = n.to_b1(&open).ports(CPORT, SPORT);
    let second = Conn {
        service: 2,
        ..n.conn2()
    };
    vec![
        row(
            format!("{n}: a backend of port 0 keeps the client's destination port"),
            keeps,
        )
        .comes(NIC, &open, created(Expect::send(NIC, &to_same), &open, &same)),
        row(
            format!("{n}: a service of port 0 takes every port of its VIP"),
            any,
        )
        .comes(NIC, &open, created(Expect::send(NIC, &to_same), &open, &same)),
        row(
            format!("{n}: a service of the very port goes before the one of port 0"),
            exact,
        )
        .comes(
            NIC,
            &open,
            created(Expect::send(NIC, &n.to_b2(&open)), &open, &second),
        ),
        row(format!("{n}: another port of the VIP is not ours"), n.one()).comes(
            NIC,
            &open.clone().ports(CPORT, 81),
            Expect::pass(),
        ),
        row(
            format!("{n}: a port that another VIP serves is not ours on this one"),
            n.one().service("203.0.113.99", 81, TCP),
        )
        .comes(NIC, &open.clone().ports(CPORT, 81), Expect::pass()),
    ]
}

fn snat(n: Net) -> Vec<Row> {
    let open = n.open();
    let outside = open.clone().ports(50_000, SPORT);
    let one_port = n.one().snat_ports(30_000, 30_000);
    let translated = n.conn().client_port(50_000).source(n.source(), 30_000);
    let other = "192.0.2.11".ip();
    let other = if n.v6 { "2001:db8:c::11".ip() } else { other };
    let takes = Conn {
        client: (other, 40_000),
        ..n.conn().established().source(n.source(), 30_000)
    };
    let two_ports = n.one().snat_ports(30_000, 30_001);
    let next = n.conn().client_port(50_000).source(n.source(), 30_001);
    let two_sources = World::new()
        .source(n.source())
        .source(n.source2())
        .service(n.vip(), SPORT, n.proto)
        .remote(n.b1(), BPORT, NIC, B1_MAC)
        .snat_ports(30_000, 30_000);
    let by_second = n.conn().client_port(50_000).source(n.source2(), 30_000);
    let data = n.request(flag::ACK);
    let direct_reply = n
        .packet((n.b1(), BPORT), (n.client(), CPORT), flag::ACK)
        .eth(B1_MAC, mac_of(NIC));
    let never = n
        .service()
        .flags(service_flags::SNAT_NEVER)
        .remote(n.b1(), BPORT, NIC, B1_MAC);
    // Old news: the handshake of a flow that was never finished ended long ago.
    let stale = Conn {
        state: 0,
        ..takes.clone()
    };
    let old = if n.is_tcp() { SYN_S + 5 } else { 95 };
    vec![
        row(
            format!("{n}: a client port outside the SNAT range is translated into it"),
            one_port.clone(),
        )
        .comes(
            NIC,
            &outside,
            created(
                Expect::send(NIC, &n.to_b1(&outside).ports(30_000, BPORT)),
                &outside,
                &translated,
            ),
        ),
        row(
            format!("{n}: a taken SNAT port is left alone"),
            two_ports.conn(takes.clone(), 1),
        )
        .comes(
            NIC,
            &outside,
            Expect::send(NIC, &n.to_b1(&outside).ports(30_001, BPORT))
                .new_flow(1, 1)
                .to_backend(1, &outside)
                .flows(&[&takes, &next]),
        ),
        row(
            format!("{n}: no SNAT port is free"),
            one_port.clone().conn(takes.clone(), 1),
        )
        .comes(NIC, &outside, Expect::drop(DropReason::SnatPortsExhausted, 1)),
        row(
            format!("{n}: the second source has a free port"),
            two_sources.conn(takes.clone(), 1),
        )
        .comes(
            NIC,
            &outside,
            Expect::send(
                NIC,
                &n.to_b1(&outside)
                    .addresses(n.source2(), n.b1())
                    .ports(30_000, BPORT),
            )
            .new_flow(1, 1)
            .to_backend(1, &outside)
            .flows(&[&takes, &by_second]),
        ),
        row(
            format!("{n}: the port of an expired flow is free"),
            one_port.conn(stale, old),
        )
        .comes(
            NIC,
            &outside,
            created(
                Expect::send(NIC, &n.to_b1(&outside).ports(30_000, BPORT)),
                &outside,
                &translated,
            )
            .count(Counter::FlowsReclaimed),
        ),
        row(
            format!("{n}: snat = never, the reply of a remote backend is routed through the node"),
            n.service()
                .direct(n.b1(), BPORT, NIC, B1_MAC)
                .conn(n.direct(n.b1()).established(), 1),
        )
        .comes(
            NIC,
            &direct_reply,
            Expect::send(NIC, &n.to_client(&direct_reply)).to_client(1, &direct_reply),
        ),
        row(
            format!("{n}: next hops are the maps' while the agent lives"),
            n.one().conn(n.conn().established(), 1).agent_silent_for(9),
        )
        .comes(
            NIC,
            &data,
            Expect::send(NIC, &n.to_b1(&data)).to_backend(1, &data),
        ),
        row(
            format!("{n}: next hops are the kernel's once the agent is silent"),
            n.one().conn(n.conn().established(), 1).agent_silent_for(12),
        )
        .comes(
            NIC,
            &data,
            Expect::neighbour(NIC, &n.to_b1(&data)).to_backend(1, &data),
        ),
        row(
            format!("{n}: so they are for new flows"),
            n.one().agent_silent_for(12),
        )
        .comes(
            NIC,
            &open,
            created(Expect::neighbour(NIC, &n.to_b1(&open)), &open, &n.conn()),
        ),
        row(format!("{n}: snat = never leaves the client's address"), never).comes(
            NIC,
            &open,
            created(
                Expect::send(NIC, &n.to_b1(&open).addresses(n.client(), n.b1())),
                &open,
                &n.direct(n.b1()),
            ),
        ),
    ]
}
