//! New flows and known ones: where they go and how they are rewritten.

use lb_common::counter::{Counter, DropReason};
use lb_common::maps::{backend_state, service_flags};
use lb_tests::{
    packet::{Packet, ToIp as _, flag},
    row::{Expect, Row, row},
    world::{BRIDGE, Conn, MTU, NARROW, NARROW_MTU, NIC, NIC2, SYN_S, World, mac_of},
};

use crate::net::{
    ALL, B1_MAC, B2_MAC, BPORT, CLIENT_MAC, CONTAINER_MAC, CPORT, Net, SPORT, TCPS, UDP4, UDP6,
};

pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for n in ALL {
        rows.extend(remote(n));
        rows.extend(local(n));
        rows.extend(node(n));
        rows.extend(from_node(n));
        rows.extend(ports(n));
        rows.extend(headers(n));
        rows.extend(limits(n));
        rows.extend(snat(n));
    }
    rows.extend(checksums());
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
                .flows(&[&conn.clone().established()]),
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
    ]
}

fn headers(n: Net) -> Vec<Row> {
    let mut rows = Vec::new();
    let known = || n.one().conn(n.conn().established(), 1);
    let mut both = |what: &str, change: &dyn Fn(Packet) -> Packet| {
        let open = change(n.open());
        let reply = change(n.reply(flag::ACK));
        rows.push(row(format!("{n}: {what}: a new flow"), n.one()).comes(
            NIC,
            &open,
            created(Expect::send(NIC, &n.to_b1(&open)), &open, &n.conn()),
        ));
        rows.push(row(format!("{n}: {what}: the reply"), known()).comes(
            NIC,
            &reply,
            Expect::send(NIC, &n.to_client(&reply)).to_client(1, &reply),
        ));
    };
    both("one VLAN tag", &|p| p.vlan(100));
    both("two VLAN tags", &|p| p.qinq(7).vlan(100));
    both("payload of odd length", &|p| p.payload(b"seven b"));
    both("the largest packet", &|p| {
        let room = MTU as usize - p.clone().payload(b"").ip_len() as usize;
        p.payload(&vec![0xa5; room])
    });
    both("type of service", &|p| p.tos(0xb8));
    if n.v6 {
        both("hop-by-hop options", &|p| p.extension(0, 1));
        both("a routing header", &|p| p.extension(43, 3));
        both("destination options", &|p| p.extension(60, 2));
        both("three extension headers", &|p| {
            p.extension(0, 1).extension(43, 1).extension(60, 1)
        });
        both("an atomic fragment", &|p| {
            let all = if n.is_tcp() { 20 } else { 16 };
            p.fragment(0, all)
        });
    } else {
        both("four bytes of IP options", &|p| p.options(&[1, 1, 1, 0]));
        both("forty bytes of IP options", &|p| p.options(&[1; 40]));
        both("may be fragmented", &|p| p.may_fragment());
    }
    if n.is_tcp() {
        both("TCP options", &|p| {
            p.tcp_options(&[2, 4, 5, 0xb4, 1, 1, 4, 2, 1, 3, 3, 7])
        });
        both("forty bytes of TCP options", &|p| p.tcp_options(&[1; 40]));
    }
    rows
}

fn limits(n: Net) -> Vec<Row> {
    let (open, data) = (n.open(), n.request(flag::ACK));
    let known = || n.one().conn(n.conn().established(), 1);
    let narrow = n.service().remote(n.b1(), BPORT, NARROW, B1_MAC);
    let fits = {
        let room = NARROW_MTU as usize - data.clone().payload(b"").ip_len() as usize;
        data.clone().payload(&vec![7; room])
    };
    let too_long = data.clone().payload(&[7; 700]);
    // Twenty bytes beyond the IP header: enough for RFC 792, and up to the checksum that NAT on the way changes.
    let too_big = lb_tests::packet::eth(mac_of(NIC), CLIENT_MAC)
        .ip(n.vip(), n.client())
        .id(0)
        .too_big(NARROW_MTU as u16, &too_long, 20);
    let narrow_known = narrow.conn(n.conn().established(), 1);
    vec![
        row(format!("{n}: a new flow on its last hop ends here"), n.one()).comes(
            NIC,
            &open.clone().ttl(1),
            Expect::drop(DropReason::TtlExpired, 1),
        ),
        row(format!("{n}: a known flow on its last hop ends here"), known()).comes(
            NIC,
            &data.clone().ttl(1),
            Expect::drop(DropReason::TtlExpired, 1),
        ),
        row(format!("{n}: one hop left is enough"), known()).comes(
            NIC,
            &data.clone().ttl(2),
            Expect::send(NIC, &n.to_b1(&data).ttl(1)).to_backend(1, &data),
        ),
        row(
            format!("{n}: exactly the MTU of the way out passes"),
            narrow_known.clone(),
        )
        .comes(
            NIC,
            &fits,
            Expect::send(NARROW, &n.to_b1(&fits).eth(mac_of(NARROW), B1_MAC)).to_backend(1, &fits),
        ),
        row(
            format!("{n}: more than the MTU of the way out is answered by too big"),
            narrow_known,
        )
        .comes_to_tc(
            NIC,
            &too_long,
            Expect::send(NIC, &too_big).count(Counter::TooBigSent),
        ),
        row(format!("{n}: the flow table is full"), n.one().full()).comes(
            NIC,
            &open,
            Expect::drop(DropReason::FlowTableFull, 1),
        ),
        row(format!("{n}: a known flow goes on beside a full table"), {
            n.one().conn(n.conn().established(), 1).full()
        })
        .comes(
            NIC,
            &data,
            Expect::send(NIC, &n.to_b1(&data)).to_backend(1, &data),
        ),
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

fn checksums() -> Vec<Row> {
    let mut rows = Vec::new();
    let n = UDP4;
    let known = |n: Net| n.one().conn(n.conn().established(), 1);
    let (data, reply) = (n.request(0).no_checksum(), n.reply(0).no_checksum());
    rows.push(
        row(
            "udp4: no checksum stays no checksum towards the backend",
            known(n),
        )
        .comes(
            NIC,
            &data,
            Expect::send(NIC, &n.to_b1(&data)).to_backend(1, &data),
        ),
    );
    rows.push(
        row("udp4: no checksum stays no checksum towards the client", known(n)).comes(
            NIC,
            &reply,
            Expect::send(NIC, &n.to_client(&reply)).to_client(1, &reply),
        ),
    );
    for n in [UDP4, UDP6] {
        // A payload word that brings the sum of the translated packet to zero.
        let blank = n.request(0).payload(&[0, 0]);
        let data = blank
            .clone()
            .payload(&n.to_b1(&blank).l4_checksum().to_be_bytes());
        assert_eq!(n.to_b1(&data).l4_checksum(), 0xffff);
        rows.push(
            row(
                format!("{n}: a computed zero is sent as all ones, to the backend"),
                known(n),
            )
            .comes(
                NIC,
                &data,
                Expect::send(NIC, &n.to_b1(&data)).to_backend(1, &data),
            ),
        );
        let blank = n.reply(0).payload(&[0, 0]);
        let reply = blank
            .clone()
            .payload(&n.to_client(&blank).l4_checksum().to_be_bytes());
        assert_eq!(n.to_client(&reply).l4_checksum(), 0xffff);
        rows.push(
            row(
                format!("{n}: a computed zero is sent as all ones, to the client"),
                known(n),
            )
            .comes(
                NIC,
                &reply,
                Expect::send(NIC, &n.to_client(&reply)).to_client(1, &reply),
            ),
        );
    }
    for n in TCPS {
        // TCP knows no such exception: the zero stays.
        let blank = n.request(flag::ACK).payload(&[0, 0]);
        let data = blank
            .clone()
            .payload(&n.to_b1(&blank).l4_checksum().to_be_bytes());
        assert_eq!(n.to_b1(&data).l4_checksum(), 0);
        rows.push(
            row(format!("{n}: a checksum of zero is sent as zero"), known(n)).comes(
                NIC,
                &data,
                Expect::send(NIC, &n.to_b1(&data)).to_backend(1, &data),
            ),
        );
    }
    rows
}
