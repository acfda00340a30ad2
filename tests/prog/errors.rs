//! ICMP errors of our own, about packets of every shape.

use lb_common::counter::{Counter, DropReason};
use lb_tests::{
    packet::{Packet, eth, flag},
    row::{Expect, Row, row},
    world::{NARROW, NARROW_MTU, NIC, mac_of},
};

use crate::net::{ALL, B1_MAC, BPORT, CLIENT_MAC, Net, TCPS};

/// Bytes that are quoted beyond the IP header, at most: up to the TCP checksum, which the kernel may complete.
const QUOTED: usize = 20;

pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for n in ALL {
        rows.extend(last_hop(n));
        rows.extend(too_long(n));
    }
    for n in TCPS {
        rows.push(about_an_error(n));
    }
    rows
}

/// From the VIP to the client, as a router answers.
fn back(n: Net) -> Packet {
    eth(mac_of(NIC), CLIENT_MAC).ip(n.vip(), n.client()).id(0)
}

fn last_hop(n: Net) -> Vec<Row> {
    let known = || n.one().conn(n.conn().established(), 1);
    let (open, data) = (n.open().ttl(1), n.request(flag::ACK).payload(&[7; 40]).ttl(1));
    let reply = n.reply(flag::ACK).payload(&[7; 40]).ttl(1);
    let told = |packet: Packet| Expect::send(NIC, &packet).count(Counter::TimeExceededSent);
    let quoted = |packet: &Packet| {
        if packet.ip_len() as usize - packet.ip_header_length() < QUOTED {
            8
        } else {
            QUOTED
        }
    };
    let to_backend = eth(mac_of(NIC), B1_MAC)
        .ip(n.source(), n.b1())
        .id(0)
        .time_exceeded(&reply, QUOTED);
    vec![
        row(format!("{n}: a new flow on its last hop is told so"), n.one()).comes_to_tc(
            NIC,
            &open,
            told(back(n).time_exceeded(&open, quoted(&open))),
        ),
        row(format!("{n}: a known flow on its last hop is told so"), known()).comes_to_tc(
            NIC,
            &data,
            told(back(n).time_exceeded(&data, QUOTED)),
        ),
        row(format!("{n}: a backend on its last hop is told so"), known()).comes_to_tc(
            NIC,
            &reply,
            told(to_backend),
        ),
        row(
            format!("{n}: once enough were told, the last hop ends in silence"),
            known().answers_exhausted(),
        )
        .comes_to_tc(NIC, &data, Expect::drop(DropReason::TtlExpired, 1)),
    ]
}

fn too_long(n: Net) -> Vec<Row> {
    let given = || {
        n.service()
            .remote(n.b1(), BPORT, NARROW, B1_MAC)
            .conn(n.conn().established(), 1)
    };
    let long = n.request(flag::ACK).payload(&[7; 700]);
    let mut rows = Vec::new();
    let mut both = |what: &str, packet: Packet| {
        rows.push(
            row(
                format!("{n}: more than the MTU of the way out is answered by too big: {what}"),
                given(),
            )
            .comes_to_tc(
                NIC,
                &packet,
                Expect::send(NIC, &back(n).too_big(NARROW_MTU as u16, &packet, QUOTED))
                    .count(Counter::TooBigSent),
            ),
        );
    };
    both("a plain header", long.clone());
    both("odd length", long.clone().payload(&[7; 701]));
    if n.v6 {
        both("hop-by-hop options", long.clone().extension(0, 1));
        both("a routing header", long.clone().extension(43, 3));
        both(
            "three extension headers",
            long.clone().extension(0, 1).extension(43, 2).extension(60, 1),
        );
        both("many options", long.clone().extension(60, 12));
    } else {
        both("may be fragmented", long.clone().may_fragment());
        both("four bytes of options", long.clone().options(&[1, 1, 1, 0]));
        both("forty bytes of options", long.clone().options(&[1; 40]));
    }
    let whole = n.request(flag::ACK).payload(&[7; 1280]);
    rows.push(
        row(
            format!("{n}: the first fragment is answered by too big, the others are not"),
            given(),
        )
        .comes_to_tc(
            NIC,
            &whole.clone().fragment(0, 640),
            Expect::send(
                NIC,
                &back(n).too_big(NARROW_MTU as u16, &whole.clone().fragment(0, 640), QUOTED),
            )
            .count(Counter::TooBigSent)
            .count(Counter::FragmentsTracked),
        )
        .comes_to_tc(
            NIC,
            &whole.fragment(640, 1280),
            Expect::drop(DropReason::MtuExceeded, 1),
        ),
    );
    rows
}

/// Nobody is told of an error about an error.
fn about_an_error(n: Net) -> Row {
    let given = n
        .service()
        .remote(n.b1(), BPORT, NARROW, B1_MAC)
        .conn(n.conn().established(), 1);
    let seen = n.to_client(&n.reply(flag::ACK).payload(&[9; 900]));
    let error = eth(CLIENT_MAC, mac_of(NIC))
        .ip(n.stranger(), n.vip())
        .too_big(1280, &seen, 800);
    row(format!("{n}: an error that is too long goes nowhere"), given).comes_to_tc(
        NIC,
        &error,
        Expect::drop(DropReason::MtuExceeded, 1),
    )
}
