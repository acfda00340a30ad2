//! ICMP: echo to a VIP, and errors about flows in both directions.

use lb_common::{counter::Counter, counter::DropReason, maps::flow_state as state};
use lb_tests::{
    packet::{Packet, eth, flag},
    row::{Expect, Row, row},
    world::{BRIDGE, NIC, mac_of},
};

use crate::net::{ALL, B1_MAC, BPORT, CLIENT_MAC, CONTAINER_MAC, CPORT, Net, SPORT, TCPS, UDP4, UDP6};

pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    [UDP4, UDP6].iter().for_each(|n| rows.extend(echo(*n)));
    for n in ALL {
        rows.extend(from_backend_side(n));
        rows.extend(from_client_side(n));
        rows.extend(untouched(n));
    }
    TCPS.iter().for_each(|n| rows.extend(refusals(*n)));
    rows
}

fn echo(n: Net) -> Vec<Row> {
    let family = if n.v6 { "icmpv6" } else { "icmp" };
    let frame = || eth(CLIENT_MAC, mac_of(NIC)).ip(n.client(), n.vip());
    let ask = frame().echo_request(7, 9).payload(b"0123456789abcdef");
    // The headers are turned in place: identification and type of service are the request's.
    let answer = |ask: &Packet| {
        let turned = ask
            .clone()
            .eth(mac_of(NIC), CLIENT_MAC)
            .addresses(n.vip(), n.client())
            .ttl(64);
        turned.echo_reply(7, 9)
    };
    let expect = |ask: &Packet| Expect::send(NIC, &answer(ask)).count(Counter::EchoReplies);
    let mut rows = Vec::new();
    let mut both = |what: &str, ask: Packet| {
        rows.push(row(format!("{family}: {what}"), n.one()).comes(NIC, &ask, expect(&ask)));
    };
    both("an echo request to a VIP is answered", ask.clone());
    both(
        "an echo request of odd length is answered",
        ask.clone().payload(b"odd"),
    );
    both("an empty echo request is answered", ask.clone().payload(b""));
    both(
        "the time to live of an echo request does not matter",
        ask.clone().ttl(1),
    );
    if n.v6 {
        both(
            "an echo request behind an extension header is answered",
            ask.clone().extension(60, 1),
        );
    } else {
        both(
            "an echo request with options is answered",
            ask.clone().options(&[1, 1, 1, 0]),
        );
    }
    rows.push(
        row(
            format!("{family}: echo to the node's own address is the stack's"),
            n.one().silent_vip(),
        )
        .comes(NIC, &ask, Expect::pass()),
    );
    rows.push(
        row(format!("{family}: an echo reply to a VIP passes"), n.one()).comes(
            NIC,
            &frame().echo_reply(7, 9),
            Expect::pass(),
        ),
    );
    rows.push(
        row(format!("{family}: an echo request to a backend passes"), n.one()).comes(
            NIC,
            &eth(CLIENT_MAC, mac_of(NIC))
                .ip(n.client(), n.b1())
                .echo_request(7, 9),
            Expect::pass(),
        ),
    );
    rows
}

/// Bytes beyond the quoted IP header: the least that RFC 792 asks for, up to the checksum, more, everything.
const LENGTHS: [usize; 4] = [8, 18, 28, 1000];

/// Errors about packets towards a backend: they come from its side and are meant for the client.
fn from_backend_side(n: Net) -> Vec<Row> {
    let data = n.request(flag::ACK).payload(&[0x5a; 32]);
    // As the backend or a router before it saw it.
    let seen = n.to_b1(&data).ttl(9);
    // As the client sent it, but for the hops it had made.
    let sent = data.ttl(9);
    let given = || n.one().conn(n.conn().established(), 1);
    let mut rows = Vec::new();
    for length in LENGTHS {
        let error = eth(B1_MAC, mac_of(NIC))
            .ip(n.b1(), n.source())
            .too_big(1280, &seen, length);
        let out = eth(mac_of(NIC), CLIENT_MAC)
            .ip(n.vip(), n.client())
            .ttl(63)
            .too_big(1280, &sent, length);
        rows.push(
            row(
                format!("{n}: too big from the backend reaches the client, {length} bytes quoted"),
                given(),
            )
            .comes(
                NIC,
                &error,
                Expect::send(NIC, &out).count(Counter::IcmpTranslated),
            ),
        );
    }
    // Who on the way sent it stays hidden behind the VIP.
    let router = n.stranger();
    let error = eth(B1_MAC, mac_of(NIC))
        .ip(router, n.source())
        .time_exceeded(&seen, 8);
    let out = eth(mac_of(NIC), CLIENT_MAC)
        .ip(n.vip(), n.client())
        .ttl(63)
        .time_exceeded(&sent, 8);
    rows.push(
        row(
            format!("{n}: time exceeded by a router before the backend reaches the client"),
            given(),
        )
        .comes(
            NIC,
            &error,
            Expect::send(NIC, &out).count(Counter::IcmpTranslated),
        ),
    );
    let error = eth(B1_MAC, mac_of(NIC))
        .ip(n.b1(), n.source())
        .port_unreachable(&seen, 8);
    let out = eth(mac_of(NIC), CLIENT_MAC)
        .ip(n.vip(), n.client())
        .ttl(63)
        .port_unreachable(&sent, 8);
    rows.push(
        row(
            format!("{n}: port unreachable about a live flow reaches the client"),
            given(),
        )
        .comes(
            NIC,
            &error,
            Expect::send(NIC, &out).count(Counter::IcmpTranslated),
        ),
    );
    // A container that sees the client itself.
    let local = n
        .service()
        .local(n.container(), BPORT)
        .conn(n.direct(n.container()).established(), 1);
    let seen = sent
        .clone()
        .addresses(n.client(), n.container())
        .ports(CPORT, BPORT);
    let error = eth(CONTAINER_MAC, mac_of(BRIDGE))
        .ip(n.container(), n.client())
        .too_big(1280, &seen, 28);
    let out = eth(mac_of(NIC), CLIENT_MAC)
        .ip(n.vip(), n.client())
        .ttl(63)
        .too_big(1280, &sent, 28);
    rows.push(
        row(format!("{n}: too big from a container reaches the client"), local).comes(
            BRIDGE,
            &error,
            Expect::send(NIC, &out).count(Counter::IcmpTranslated),
        ),
    );
    rows
}

/// Errors about packets towards the client: they come from its side and are meant for the backend.
fn from_client_side(n: Net) -> Vec<Row> {
    let reply = n.reply(flag::ACK).payload(&[0xa5; 32]);
    let seen = n.to_client(&reply).ttl(11);
    let sent = reply.ttl(11);
    let given = || n.one().conn(n.conn().established(), 1);
    let mut rows = Vec::new();
    for length in LENGTHS {
        // A router on the way to the client.
        let error = eth(CLIENT_MAC, mac_of(NIC))
            .ip(n.stranger(), n.vip())
            .too_big(1280, &seen, length);
        let out = eth(mac_of(NIC), B1_MAC)
            .ip(n.source(), n.b1())
            .ttl(63)
            .too_big(1280, &sent, length);
        rows.push(
            row(
                format!("{n}: too big from the client's side reaches the backend, {length} bytes quoted"),
                given(),
            )
            .comes(
                NIC,
                &error,
                Expect::send(NIC, &out).count(Counter::IcmpTranslated),
            ),
        );
    }
    // Without source translation the router stays visible.
    let local = n
        .service()
        .local(n.container(), BPORT)
        .conn(n.direct(n.container()).established(), 1);
    let error = eth(CLIENT_MAC, mac_of(NIC))
        .ip(n.stranger(), n.vip())
        .too_big(1280, &seen, 28);
    let sent = seen
        .clone()
        .addresses(n.container(), n.client())
        .ports(BPORT, CPORT);
    let out = eth(mac_of(NIC), CLIENT_MAC)
        .ip(n.stranger(), n.container())
        .ttl(63)
        .too_big(1280, &sent, 28);
    rows.push(
        row(
            format!("{n}: too big from the client's side reaches a container"),
            local,
        )
        .comes(
            NIC,
            &error,
            Expect::neighbour(BRIDGE, &out).count(Counter::IcmpTranslated),
        ),
    );
    rows
}

fn untouched(n: Net) -> Vec<Row> {
    let foreign = n
        .to_client(&n.reply(flag::ACK).payload(&[1; 32]))
        .ports(SPORT, CPORT + 7);
    let given = || n.one().conn(n.conn().established(), 1);
    let error = |length| {
        eth(CLIENT_MAC, mac_of(NIC))
            .ip(n.stranger(), n.vip())
            .too_big(1280, &foreign, length)
    };
    let known = n.to_client(&n.reply(flag::ACK));
    vec![
        row(format!("{n}: an error about no flow of ours passes"), given()).comes(
            NIC,
            &error(28),
            Expect::pass(),
        ),
        row(
            format!("{n}: an error that quotes three bytes of layer 4 passes"),
            given(),
        )
        .comes(
            NIC,
            &eth(CLIENT_MAC, mac_of(NIC))
                .ip(n.stranger(), n.vip())
                .too_big(1280, &known, 3),
            Expect::pass(),
        ),
        row(format!("{n}: an error that quotes nothing passes"), given()).comes(
            NIC,
            &eth(CLIENT_MAC, mac_of(NIC))
                .ip(n.stranger(), n.vip())
                .too_big(1280, &known, 3)
                .payload(b""),
            Expect::pass(),
        ),
        row(format!("{n}: an error about a later fragment passes"), given()).comes(
            NIC,
            &eth(CLIENT_MAC, mac_of(NIC)).ip(n.stranger(), n.vip()).too_big(
                1280,
                &known.clone().fragment(8, 16),
                8,
            ),
            Expect::pass(),
        ),
    ]
}

/// A backend that answers a SYN by an ICMP error refuses it as by RST.
fn refusals(n: Net) -> Vec<Row> {
    let seen = n.to_b1(&n.open());
    let error = eth(B1_MAC, mac_of(NIC))
        .ip(n.b1(), n.source())
        .port_unreachable(&seen, 8);
    let sent = n.open().ttl(63);
    let out = eth(mac_of(NIC), CLIENT_MAC)
        .ip(n.vip(), n.client())
        .ttl(63)
        .port_unreachable(&sent, 8);
    vec![
        row(
            format!("{n}: unreachable in answer to a SYN is hidden while there is another backend"),
            n.two().ring(&[2]).conn(n.conn(), 0),
        )
        .comes(
            NIC,
            &error,
            Expect::drop(DropReason::RefusalHidden, 1)
                .count(Counter::RefusalsHidden)
                .and("backend 1 refused", 1)
                .flows(&[&n.conn().state(state::REFUSED)]),
        ),
        row(
            format!("{n}: unreachable in answer to a SYN reaches the client when there is no other"),
            n.one().conn(n.conn(), 0),
        )
        .comes(
            NIC,
            &error,
            Expect::send(NIC, &out)
                .count(Counter::IcmpTranslated)
                .and("backend 1 refused", 1),
        ),
    ]
}
