//! Fragments of service traffic, and what looks like it.

use lb_common::{
    counter::{Counter, DropReason},
    maps::FragmentKey,
};
use lb_tests::{
    packet::flag,
    row::{Body, Expect, Row, row},
    world::{BRIDGE, NIC},
};

use crate::{
    flows::created,
    net::{ALL, BPORT, CPORT, Net, SPORT},
};

pub fn rows() -> Vec<Row> {
    ALL.iter().flat_map(|n| of(*n)).collect()
}

/// The key of the datagram that all rows are about.
fn key(n: Net) -> FragmentKey {
    FragmentKey {
        src: n.client().into(),
        dst: n.vip().into(),
        id: if n.v6 {
            0xbeef_u32.to_be()
        } else {
            u32::from(0xbeef_u16.to_be())
        },
        proto: n.proto.into(),
    }
}

fn of(n: Net) -> Vec<Row> {
    let header = if n.is_tcp() { 20 } else { 8 };
    let whole = n
        .request(flag::ACK)
        .payload(&(0..200u8).collect::<Vec<_>>())
        .id(0xbeef);
    let end = header + 200;
    let cut = |from, to| whole.clone().fragment(from, to);
    let out = |from, to| n.to_b1(&whole).fragment(from, to);
    let given = || n.one().conn(n.conn().established(), 1);
    let sent = |from: usize, to: usize| {
        let expect = Expect::send(NIC, &out(from, to)).to_backend(1, &cut(from, to));
        if from == 0 {
            expect.count(Counter::FragmentsTracked)
        } else {
            expect
        }
    };
    let reply = n.reply(flag::ACK).payload(&[9; 200]).id(0xbeef);
    let back = |from: usize, to: usize| {
        let packet = reply.clone().fragment(from, to);
        let expect = Expect::send(NIC, &n.to_client(&reply).fragment(from, to)).to_client(1, &packet);
        (
            packet,
            if from == 0 {
                expect.count(Counter::FragmentsTracked)
            } else {
                expect
            },
        )
    };
    let mut rows = vec![
        row(
            format!("{n}: all fragments of a datagram follow the first"),
            given(),
        )
        .comes(NIC, &cut(0, 80), sent(0, 80))
        .comes(NIC, &cut(80, 160), sent(80, 160))
        .comes(NIC, &cut(160, end), sent(160, end)),
        row(format!("{n}: later fragments in the wrong order"), given())
            .comes(NIC, &cut(0, 80), sent(0, 80))
            .comes(NIC, &cut(160, end), sent(160, end))
            .comes(NIC, &cut(80, 160), sent(80, 160)),
        row(format!("{n}: fragments of a reply"), given())
            .comes(NIC, &back(0, 80).0, back(0, 80).1)
            .comes(NIC, &back(80, end).0, back(80, end).1),
        row(
            format!("{n}: a later fragment before its first is sent round to wait for it"),
            given(),
        )
        .comes(NIC, &cut(80, 160), Expect::again())
        .comes(NIC, &cut(0, 80), sent(0, 80))
        .comes(NIC, &cut(80, 160), sent(80, 160)),
        row(
            format!("{n}: a later fragment to a VIP waits for its first no longer than others let it"),
            given().answers_exhausted(),
        )
        .comes_to_tc(
            NIC,
            &cut(80, 160),
            Expect::drop_of_nobody(DropReason::FragmentEarly),
        ),
        row(
            format!("{n}: on the node's own address it passes in the end"),
            given().silent_vip().answers_exhausted(),
        )
        .comes_to_tc(NIC, &cut(80, 160), Expect::pass()),
        row(
            format!("{n}: a later fragment of another datagram waits for its own first"),
            given(),
        )
        .comes(NIC, &cut(0, 80), sent(0, 80))
        .comes(NIC, &cut(80, 160).id(0xbeee), Expect::again()),
        row(
            format!("{n}: a first fragment is remembered for 30 seconds"),
            given().fragment(key(n), (CPORT, SPORT), 29),
        )
        .comes(NIC, &cut(80, 160), sent(80, 160)),
        row(
            format!("{n}: a first fragment is not remembered for longer"),
            given().fragment(key(n), (CPORT, SPORT), 32),
        )
        .comes(NIC, &cut(80, 160), Expect::again()),
        row(
            format!("{n}: later fragments go on passing where the first passed"),
            given(),
        )
        .only(Body::Tc)
        .comes(NIC, &cut(0, 80).ports(CPORT, 9), Expect::pass())
        .comes_to_tc(NIC, &cut(80, 160), Expect::pass()),
        row(
            format!("{n}: a first fragment too short for its ports' header passes"),
            given(),
        )
        .comes(NIC, &cut(0, if n.is_tcp() { 16 } else { 0 }), Expect::pass()),
    ];
    let open = n.open().payload(&[3; 100]).id(0xcafe);
    rows.push(
        row(format!("{n}: a first fragment opens a flow"), n.one()).comes(
            NIC,
            &open.clone().fragment(0, 64),
            created(
                Expect::send(NIC, &n.to_b1(&open).fragment(0, 64)),
                &open.clone().fragment(0, 64),
                &n.conn(),
            )
            .count(Counter::FragmentsTracked),
        ),
    );
    // Towards a container TC does it all, later fragments included.
    let local = n
        .service()
        .local(n.container(), BPORT)
        .conn(n.direct(n.container()).established(), 1);
    let to_local = |from, to| {
        let whole = whole
            .clone()
            .addresses(n.client(), n.container())
            .ports(CPORT, BPORT)
            .ttl(63);
        Expect::neighbour(BRIDGE, &whole.fragment(from, to)).to_backend(1, &cut(from, to))
    };
    rows.push(
        row(format!("{n}: fragments to a container"), local)
            .comes(NIC, &cut(0, 80), to_local(0, 80).count(Counter::FragmentsTracked))
            .comes(NIC, &cut(80, end), to_local(80, end)),
    );
    rows
}
