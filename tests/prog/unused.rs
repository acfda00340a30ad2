//! Packets for a routed VIP that are no service's: refused or dropped, never passed.

use lb_common::{
    counter::{Counter, DropReason},
    maps::vip_flags,
};
use lb_tests::{
    packet::{Packet, eth, flag},
    row::{Expect, Row, row},
    world::{NIC, World, mac_of},
};

use crate::net::{ALL, B1_MAC, BPORT, CLIENT_MAC, CPORT, Net, SPORT, TCPS};

/// A port that no service has, and one that another VIP's service has.
const PORTS: [u16; 2] = [81, 82];

pub fn rows() -> Vec<Row> {
    let mut rows: Vec<Row> = ALL.iter().flat_map(|n| ports(*n)).collect();
    TCPS.iter().for_each(|n| rows.extend(others(*n)));
    rows
}

fn given(n: Net) -> World {
    n.one()
        .routed(0)
        .service(n.stranger(), PORTS[1], n.proto)
        .remote(n.b2(), BPORT, NIC, B1_MAC)
}

fn to(n: Net, port: u16, flags: u8) -> Packet {
    n.packet((n.client(), CPORT), (n.vip(), port), flags)
}

/// The refusal that a client gets.
fn refusal(n: Net, asked: &Packet, port: u16) -> Packet {
    let back = eth(mac_of(NIC), CLIENT_MAC).ip(n.vip(), n.client()).id(0);
    if n.is_tcp() {
        back.tcp(port, CPORT, flag::RST_ACK).seq(0, 1001).window(0)
    } else {
        back.port_unreachable(asked, 8)
    }
}

fn ports(n: Net) -> Vec<Row> {
    let mut rows = Vec::new();
    let dropped = Expect::drop_of_nobody(DropReason::UnusedPort);
    for port in PORTS {
        let asked = to(n, port, flag::SYN);
        let told = Expect::send(NIC, &refusal(n, &asked, port)).count(Counter::UnusedPortsRefused);
        let all = row(format!("{n}: port {port} of a routed VIP is refused"), given(n));
        rows.push(if n.is_tcp() {
            all.comes(NIC, &asked, told.count(Counter::ResetsSent))
        } else {
            all.comes_to_tc(NIC, &asked, told)
        });
        rows.push(
            row(
                format!("{n}: port {port} of a routed VIP is silent if told so"),
                given(n).routed(vip_flags::UNUSED_DROP),
            )
            .comes(NIC, &asked, dropped.clone()),
        );
        let silent = row(
            format!("{n}: port {port} of a routed VIP is silent once enough were refused"),
            given(n).answers_exhausted(),
        );
        rows.push(if n.is_tcp() {
            silent.comes(NIC, &asked, dropped.clone())
        } else {
            silent.comes_to_tc(NIC, &asked, dropped.clone())
        });
        rows.push(
            row(
                format!("{n}: port {port} of the node's own address passes"),
                n.one(),
            )
            .comes(NIC, &asked, Expect::pass()),
        );
        rows.push(
            row(
                format!("{n}: port {port} of a routed VIP in a frame for another machine passes"),
                given(n),
            )
            .comes(NIC, &asked.clone().eth(CLIENT_MAC, B1_MAC), Expect::pass()),
        );
        rows.push(
            row(
                format!("{n}: the node's own process is refused port {port} of a routed VIP"),
                given(n),
            )
            .leaves(
                NIC,
                &asked,
                Expect::loopback(&refusal(n, &asked, port))
                    .count(Counter::UnusedPortsRefused)
                    .and(Counter::ResetsSent.name(), u64::from(n.is_tcp())),
            ),
        );
    }
    if n.is_tcp() {
        rows.push(
            row(
                format!("{n}: a RST for an unused port of a routed VIP is not answered"),
                given(n),
            )
            .comes(NIC, &to(n, PORTS[0], flag::RST), dropped.clone()),
        );
        let ack = Expect::send(
            NIC,
            &eth(mac_of(NIC), CLIENT_MAC)
                .ip(n.vip(), n.client())
                .id(0)
                .tcp(PORTS[0], CPORT, flag::RST)
                .seq(2000, 0)
                .window(0),
        );
        rows.push(
            row(
                format!("{n}: an ACK for an unused port of a routed VIP is refused"),
                given(n),
            )
            .comes(
                NIC,
                &to(n, PORTS[0], flag::ACK),
                ack.count(Counter::UnusedPortsRefused).count(Counter::ResetsSent),
            ),
        );
    } else {
        let long = to(n, PORTS[0], 0).payload(&[7; 400]);
        let told = eth(mac_of(NIC), CLIENT_MAC)
            .ip(n.vip(), n.client())
            .id(0)
            .port_unreachable(&long, 20);
        rows.push(
            row(
                format!("{n}: the refusal of a long datagram quotes its start"),
                given(n),
            )
            .comes_to_tc(
                NIC,
                &long,
                Expect::send(NIC, &told).count(Counter::UnusedPortsRefused),
            ),
        );
    }
    rows
}

/// Other protocols, and what has no port.
fn others(n: Net) -> Vec<Row> {
    let frame = || eth(CLIENT_MAC, mac_of(NIC)).ip(n.client(), n.vip());
    let family = if n.v6 { "IPv6" } else { "IPv4" };
    let dropped = || Expect::drop_of_nobody(DropReason::UnusedPort);
    let error = frame().too_big(1280, &n.to_client(&n.reply(flag::ACK)), 28);
    let mut rows = vec![
        row(format!("{family}: GRE to a routed VIP goes nowhere"), given(n)).comes(
            NIC,
            &frame().protocol(47).payload(&[0x42; 32]),
            dropped(),
        ),
        row(
            format!("{family}: an ICMP error about nothing known to a routed VIP goes nowhere"),
            given(n),
        )
        .comes(NIC, &error, dropped()),
        row(
            format!("{family}: what a routed VIP itself sends passes"),
            given(n),
        )
        .comes(
            NIC,
            &n.packet((n.vip(), SPORT), (n.stranger(), CPORT), flag::SYN_ACK),
            Expect::pass(),
        ),
    ];
    if n.v6 {
        let solicitation = frame().ttl(255).icmp(135, 0, 0).payload(&[0x20; 24]);
        rows.push(
            row("IPv6: neighbour discovery of a routed VIP passes", given(n)).comes(
                NIC,
                &solicitation,
                Expect::pass(),
            ),
        );
    }
    rows
}
