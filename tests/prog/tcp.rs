//! The life of a TCP flow: handshake, close, reset, port reuse, re-steering, resets on behalf of the service.

use lb_common::{
    counter::{Counter, DropReason},
    maps::{backend_state, flow_state as state, service_flags},
};
use lb_tests::{
    packet::{Packet, eth, flag},
    row::{Expect, Row, row},
    world::{CLOSING_S, Conn, NIC, mac_of},
};

use crate::{
    flows::created,
    net::{CLIENT_MAC, CPORT, Net, SPORT, TCPS},
};

pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for n in TCPS {
        rows.extend(life(n));
        rows.extend(reuse(n));
        rows.extend(resteer(n));
        rows.extend(unknown(n));
        rows.extend(gone(n));
    }
    rows
}

/// A reset on behalf of the service (RFC 9293 §3.5.2), to the client.
fn reset(n: Net, seq: u32, ack: Option<u32>) -> Packet {
    let flags = if ack.is_some() { flag::RST_ACK } else { flag::RST };
    eth(mac_of(NIC), CLIENT_MAC)
        .ip(n.vip(), n.client())
        .id(0)
        .tcp(SPORT, CPORT, flags)
        .seq(seq, ack.unwrap_or(0))
        .window(0)
}

fn up(n: Net, flags: u8) -> (Packet, Expect) {
    let packet = n.request(flags);
    let expect = Expect::send(NIC, &n.to_b1(&packet)).to_backend(1, &packet);
    (packet, expect)
}

fn down(n: Net, flags: u8) -> (Packet, Expect) {
    let packet = n.reply(flags);
    let expect = Expect::send(NIC, &n.to_client(&packet)).to_client(1, &packet);
    (packet, expect)
}

/// A row of packets of one flow, each with the state that it has to leave behind.
fn story(name: String, n: Net, from: Option<u32>, packets: &[(char, u8, u32)]) -> Row {
    let given = match from {
        Some(bits) => n.one().conn(n.conn().state(bits), 1),
        None => n.one(),
    };
    let mut row = row(name, given);
    let mut before = from;
    for (side, flags, after) in packets {
        let (packet, expect) = if *side == '>' {
            up(n, *flags)
        } else {
            down(n, *flags)
        };
        let conn = n.conn().state(*after);
        let mut expect = expect.flows(&[&conn]);
        if before.is_none() {
            expect = expect.new_flow(1, 1);
        }
        if before.unwrap_or(0) & state::ESTABLISHED == 0 && after & state::ESTABLISHED != 0 {
            expect = expect.handshake(1);
        }
        before = Some(*after);
        row = row.comes(NIC, &packet, expect);
    }
    row
}

fn life(n: Net) -> Vec<Row> {
    use flag::{ACK, FIN_ACK, PSH, RST, RST_ACK, SYN, SYN_ACK};
    let est = state::ESTABLISHED;
    let (fc, fb) = (est | state::FIN_CLIENT, est | state::FIN_BACKEND);
    let both = est | state::FIN_CLIENT | state::FIN_BACKEND;
    let (client_reset, backend_reset) = (est | state::RESET_CLIENT, est | state::RESET_BACKEND);
    let name = |what: &str| format!("{n}: {what}");
    vec![
        story(
            name("a handshake"),
            n,
            None,
            &[('>', SYN, 0), ('<', SYN_ACK, est), ('>', ACK, est)],
        ),
        story(
            name("data both ways leaves the state alone"),
            n,
            Some(est),
            &[('>', ACK | PSH, est), ('<', ACK | PSH, est), ('>', ACK, est)],
        ),
        story(
            name("the client closes first"),
            n,
            Some(est),
            &[
                ('>', FIN_ACK, fc),
                ('<', ACK, fc),
                ('<', FIN_ACK, both),
                ('>', ACK, both),
            ],
        ),
        story(
            name("the backend closes first"),
            n,
            Some(est),
            &[
                ('<', FIN_ACK, fb),
                ('>', ACK, fb),
                ('>', FIN_ACK, both),
                ('<', ACK, both),
            ],
        ),
        story(
            name("both close at once"),
            n,
            Some(est),
            &[
                ('>', FIN_ACK, fc),
                ('<', FIN_ACK, both),
                ('>', ACK, both),
                ('<', ACK, both),
            ],
        ),
        story(
            name("half closed, the backend goes on sending"),
            n,
            Some(fc),
            &[('<', ACK | PSH, fc), ('>', ACK, fc), ('<', ACK | PSH, fc)],
        ),
        story(
            name("a repeated FIN changes nothing more"),
            n,
            Some(fc),
            &[('>', FIN_ACK, fc)],
        ),
        story(
            name("the client resets"),
            n,
            Some(est),
            &[('>', RST, client_reset)],
        ),
        story(
            name("the backend resets"),
            n,
            Some(est),
            &[('<', RST_ACK, backend_reset)],
        ),
        story(
            name("a client that goes on after its reset takes it back"),
            n,
            Some(est),
            &[
                ('>', RST, client_reset),
                ('<', ACK, client_reset),
                ('>', ACK, est),
            ],
        ),
        story(
            name("a backend that goes on after its reset takes it back"),
            n,
            Some(est),
            &[
                ('<', RST_ACK, backend_reset),
                ('>', ACK, backend_reset),
                ('<', ACK, est),
            ],
        ),
        story(
            name("a SYN-ACK that comes twice is counted once"),
            n,
            None,
            &[('>', SYN, 0), ('<', SYN_ACK, est), ('<', SYN_ACK, est)],
        ),
        story(
            name("an ECN SYN opens a flow"),
            n,
            None,
            &[('>', SYN | flag::ECE | flag::CWR, 0)],
        ),
        {
            let packet = n.open().payload(b"GET / HTTP/1.1");
            let expect = created(Expect::send(NIC, &n.to_b1(&packet)), &packet, &n.conn());
            row(name("a SYN with data opens a flow"), n.one()).comes(NIC, &packet, expect)
        },
    ]
}

fn reuse(n: Net) -> Vec<Row> {
    let both = state::ESTABLISHED | state::FIN_CLIENT | state::FIN_BACKEND;
    let open = n.open();
    let fresh = || created(Expect::send(NIC, &n.to_b2(&open)), &open, &n.conn2());
    let given = || n.two().ring(&[2]);
    let early = n.open().payload(b"early data");
    let drains = {
        let mut world = given();
        world.backends[0].state = backend_state::DRAINING;
        world
    };
    // Somebody else's finished flow holds the SNAT port.
    let other = Conn {
        client: (n.stranger(), 40_000),
        ..n.conn2().state(both)
    };
    vec![
        row(
            format!("{n}: a SYN on a closed tuple begins a new flow"),
            given().conn(n.conn().state(both), 5),
        )
        .comes(NIC, &open, fresh()),
        row(format!("{n}: a SYN on a reset tuple begins a new flow"), {
            given().conn(n.conn().state(state::ESTABLISHED | state::RESET), 5)
        })
        .comes(NIC, &open, fresh()),
        row(
            format!("{n}: a SYN on a half-closed tuple is left to the backend"),
            given().conn(n.conn().state(state::ESTABLISHED | state::FIN_CLIENT), 5),
        )
        .comes(
            NIC,
            &open,
            Expect::send(NIC, &n.to_b1(&open)).to_backend(1, &open),
        ),
        row(
            format!("{n}: a SYN on a live tuple is left to the backend (RFC 5961)"),
            given().conn(n.conn().established(), 5),
        )
        .comes(
            NIC,
            &open,
            Expect::send(NIC, &n.to_b1(&open)).to_backend(1, &open),
        ),
        row(
            format!("{n}: a SYN with data that were acknowledged stays with its draining backend"),
            drains.clone().conn(n.conn().established(), 5),
        )
        .comes(
            NIC,
            &early,
            Expect::send(NIC, &n.to_b1(&early)).to_backend(1, &early),
        ),
        row(
            format!("{n}: a SYN to a draining backend's flow goes to another"),
            drains.clone().conn(n.conn().established(), 5),
        )
        .comes(NIC, &open, fresh()),
        row(
            format!("{n}: a closed flow gives up its SNAT port after a second"),
            given().snat_ports(CPORT, CPORT).conn(other.clone(), 5),
        )
        .comes(NIC, &open, fresh().count(Counter::FlowsReclaimed)),
        row(format!("{n}: a closed flow keeps its SNAT port for a second"), {
            given().snat_ports(CPORT, CPORT).conn(other.clone(), 0)
        })
        .comes(NIC, &open, Expect::drop(DropReason::SnatPortsExhausted, 1)),
        row(format!("{n}: an expired closed flow gives up its SNAT port"), {
            given().snat_ports(CPORT, CPORT).conn(other, CLOSING_S + 5)
        })
        .comes(NIC, &open, fresh().count(Counter::FlowsReclaimed)),
        row(format!("{n}: half-closed flows keep their SNAT port"), {
            let half = Conn {
                client: (n.stranger(), 40_000),
                ..n.conn2().state(state::ESTABLISHED | state::FIN_CLIENT)
            };
            given().snat_ports(CPORT, CPORT).conn(half, CLOSING_S + 5)
        })
        .comes(NIC, &open, Expect::drop(DropReason::SnatPortsExhausted, 1)),
    ]
}

fn resteer(n: Net) -> Vec<Row> {
    let open = n.open();
    let tries = |count: u32| count << state::TRIES_SHIFT;
    let given = || n.two().ring(&[2]);
    let again = || Expect::send(NIC, &n.to_b1(&open)).to_backend(1, &open);
    let moved = n.conn2().state(tries(1));
    let to_b2 = || {
        created(Expect::send(NIC, &n.to_b2(&open)), &open, &moved)
            .count(Counter::Resteered)
            .and("backend 1 resteered", 1)
    };
    let refusal = n.reply(flag::RST_ACK).seq(0, 1001);
    let nudge = n.to_client(&n.reply(flag::ACK).seq(0, 1001_u32.wrapping_sub(1 << 16)));
    let refused = n.conn().state(state::REFUSED);
    let hidden = || {
        Expect::send(NIC, &nudge)
            .to_client(1, &refusal)
            .count(Counter::RefusalsHidden)
            .and("backend 1 refused", 1)
            .flows(&[&refused])
    };
    let bare = n.reply(flag::RST).seq(0, 0);
    let reset_state = n.conn().state(state::RESET_BACKEND);
    vec![
        row(
            format!("{n}: a SYN sent again goes to another backend"),
            given().conn(n.conn(), 1),
        )
        .comes(NIC, &open, to_b2()),
        row(
            format!("{n}: a SYN copied by the network goes to the same backend"),
            given().conn(n.conn(), 0),
        )
        .comes(NIC, &open, again()),
        row(
            format!("{n}: a SYN sent again with no other backend goes to the same"),
            n.one().conn(n.conn(), 1),
        )
        .comes(NIC, &open, again()),
        row(format!("{n}: after three backends a SYN sent again stays"), {
            given().conn(n.conn().state(tries(3)), 1)
        })
        .comes(NIC, &open, again()),
        row(
            format!("{n}: a refused SYN is hidden and the next one goes elsewhere"),
            given().conn(n.conn(), 0),
        )
        .comes(NIC, &refusal, hidden())
        .comes(
            NIC,
            &n.request(flag::RST).seq(1000, 0),
            Expect::drop(DropReason::RefusalHidden, 1),
        )
        .comes(NIC, &open, to_b2()),
        row(
            format!("{n}: where the ring offers the same backend only, an alternate takes the SYN"),
            given().ring(&[1]).alternates([1, 2]).conn(refused.clone(), 0),
        )
        .comes(NIC, &open, to_b2()),
        row(
            format!(
                "{n}: where the ring offers the same backend only, the refusal is hidden for an alternate"
            ),
            given().ring(&[1]).alternates([2, 1]).conn(n.conn(), 0),
        )
        .comes(NIC, &refusal, hidden())
        .comes(NIC, &open, to_b2()),
        row(
            format!("{n}: with no other backend the refusal reaches the client"),
            n.one().conn(n.conn(), 0),
        )
        .comes(
            NIC,
            &refusal,
            Expect::send(NIC, &n.to_client(&refusal))
                .to_client(1, &refusal)
                .and("backend 1 refused", 1)
                .flows(&[&reset_state]),
        ),
        row(
            format!("{n}: after three backends the refusal reaches the client"),
            given().conn(n.conn().state(tries(3)), 0),
        )
        .comes(
            NIC,
            &refusal,
            Expect::send(NIC, &n.to_client(&refusal))
                .to_client(1, &refusal)
                .and("backend 1 refused", 1)
                .flows(&[&n.conn().state(tries(3) | state::RESET_BACKEND)]),
        ),
        row(
            format!("{n}: a refusal without ACK is only hidden"),
            given().conn(n.conn(), 0),
        )
        .comes(
            NIC,
            &bare,
            Expect::drop(DropReason::RefusalHidden, 1)
                .to_client(1, &bare)
                .count(Counter::RefusalsHidden)
                .and("backend 1 refused", 1)
                .flows(&[&refused]),
        ),
        row(format!("{n}: a SYN-ACK of the second backend ends the search"), {
            given().conn(n.conn2().state(tries(1)), 0)
        })
        .comes(
            NIC,
            &n.reply(flag::SYN_ACK).addresses(n.b2(), n.source()),
            Expect::send(NIC, &n.to_client(&n.reply(flag::SYN_ACK)))
                .to_client(2, &n.reply(flag::SYN_ACK))
                .handshake(2)
                .flows(&[&n.conn2().state(tries(1) | state::ESTABLISHED)]),
        ),
    ]
}

fn unknown(n: Net) -> Vec<Row> {
    let data = n.request(flag::ACK);
    let asks = || n.one().flags(service_flags::RESET_UNKNOWN);
    let no_flow = || Expect::drop(DropReason::NoFlow, 1);
    let answered = |packet: &Packet| Expect::send(NIC, packet).count(Counter::ResetsSent);
    let short = n.open().data_offset(4);
    let fin = n.request(flag::FIN).payload(b"12345");
    vec![
        row(format!("{n}: a segment of no flow is dropped"), n.one()).comes(NIC, &data, no_flow()),
        row(format!("{n}: a SYN-ACK of no flow is dropped"), n.one()).comes(
            NIC,
            &n.request(flag::SYN_ACK),
            no_flow(),
        ),
        row(format!("{n}: SYN with FIN opens nothing"), n.one()).comes(
            NIC,
            &n.request(flag::SYN | flag::FIN),
            no_flow(),
        ),
        row(format!("{n}: a segment of no flow is reset by option"), asks()).comes(
            NIC,
            &data,
            answered(&reset(n, 2000, None)),
        ),
        row(
            format!("{n}: a segment of no flow without ACK is reset by its end"),
            asks(),
        )
        .comes(NIC, &fin, answered(&reset(n, 0, Some(1006)))),
        row(
            format!("{n}: a reset of no flow for an address of the node is the stack's"),
            asks(),
        )
        .comes(NIC, &n.request(flag::RST_ACK), Expect::pass()),
        row(
            format!("{n}: a reset of no flow for a routed VIP is never answered"),
            asks().routed(0),
        )
        .comes(NIC, &n.request(flag::RST_ACK), no_flow()),
        row(
            format!("{n}: on the node's own address a segment of no flow passes"),
            n.one().silent_vip(),
        )
        .comes(NIC, &data, Expect::pass()),
        row(format!("{n}: a SYN with too short a header is dropped"), n.one()).comes(
            NIC,
            &short,
            Expect::drop(DropReason::Malformed, 1),
        ),
    ]
}

fn gone(n: Net) -> Vec<Row> {
    let (open, data) = (n.open(), n.request(flag::ACK));
    let answered = || {
        Expect::send(NIC, &reset(n, 2000, None))
            .count(Counter::ResetsSent)
            .flows(&[])
    };
    let dead = || {
        let mut world = n.two().ring(&[2]);
        world.backends[0].state = backend_state::DEAD;
        world.conn(n.conn().established(), 1)
    };
    let other_epoch = || n.two().ring(&[2]).conn(n.conn().established().epoch(99), 1);
    let fresh = || created(Expect::send(NIC, &n.to_b2(&open)), &open, &n.conn2());
    vec![
        row(format!("{n}: a flow of a dead backend is reset"), dead()).comes(NIC, &data, answered()),
        row(
            format!("{n}: a flow of a backend id's earlier user is reset"),
            other_epoch(),
        )
        .comes(NIC, &data, answered()),
        row(format!("{n}: a reset to a dead backend is not answered"), dead()).comes(
            NIC,
            &n.request(flag::RST),
            Expect::drop(DropReason::BackendDead, 1).flows(&[]),
        ),
        row(
            format!("{n}: a SYN on a dead backend's flow goes elsewhere"),
            dead(),
        )
        .comes(NIC, &open, fresh()),
        row(
            format!("{n}: a SYN on an earlier user's flow goes elsewhere"),
            other_epoch(),
        )
        .comes(NIC, &open, fresh()),
        row(
            format!("{n}: the last words of a dead backend reach the client"),
            dead(),
        )
        .comes(
            NIC,
            &n.reply(flag::ACK),
            Expect::send(NIC, &n.to_client(&n.reply(flag::ACK))).to_client(1, &n.reply(flag::ACK)),
        ),
    ]
}
