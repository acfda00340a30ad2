//! The life of a TCP flow: handshake, close, reset, port reuse, re-steering, resets on behalf of the service.

use lb_common::{
    counter::{Counter, DropReason},
    maps::{backend_state, flow_state as state, service_flags},
};
use lb_tests::{
    packet::{Packet, eth, flag},
    row::{Expect, Row, row},
    world::{CLOSING_S, Conn, ESTABLISHED_S, NIC, mac_of},
};

use crate::{
    flows::created,
    net::{B1_MAC, BPORT, CLIENT_MAC, CPORT, Net, SPORT, TCPS},
};

pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for n in TCPS {
        rows.extend(life(n));
        rows.extend(reuse(n));
        rows.extend(busy_port(n));
        rows.extend(late(n));
        rows.extend(share(n));
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

/// A packet of a story: who sends it, its flags, sequence and acknowledgement number, and the state that it has to leave
/// behind. The client's first number is 1000, the backend's 5000.
type Told = (char, u8, u32, u32, u32);

/// A row of packets of one flow.
fn story(name: String, n: Net, from: Option<u32>, packets: &[Told]) -> Row {
    let given = match from {
        Some(bits) => n.one().conn(n.conn().state(bits), 1),
        None => n.one(),
    };
    let mut row = row(name, given);
    let mut before = from;
    for (side, flags, seq, ack, after) in packets {
        let (packet, expect): (Packet, Expect) = if *side == '>' {
            let packet = n.request(*flags).seq(*seq, *ack);
            let expect = Expect::send(NIC, &n.to_b1(&packet)).to_backend(1, &packet);
            (packet, expect)
        } else {
            let packet = n.reply(*flags).seq(*seq, *ack);
            let expect = Expect::send(NIC, &n.to_client(&packet)).to_client(1, &packet);
            (packet, expect)
        };
        let conn = n.conn().state(*after);
        let mut expect = expect.flows(&[&conn]);
        if before.is_none() {
            expect = expect.new_flow(1, 1);
        }
        if before.unwrap_or(0) & state::ANSWERED == 0 && after & state::ANSWERED != 0 {
            expect = expect.handshake(1);
        }
        before = Some(*after);
        row = row.comes(NIC, &packet, expect);
    }
    row
}

const ANSWERED: u32 = state::ANSWERED;
const ESTABLISHED: u32 = state::ANSWERED | state::ESTABLISHED;
/// A handshake.
const OPEN: [Told; 3] = [
    ('>', flag::SYN, 1000, 0, 0),
    ('<', flag::SYN_ACK, 5000, 1001, ANSWERED),
    ('>', flag::ACK, 1001, 5001, ESTABLISHED),
];

/// A handshake, or its beginning, and what follows.
fn after(open: &[Told], more: &[Told]) -> Vec<Told> {
    [open, more].concat()
}

fn life(n: Net) -> Vec<Row> {
    use flag::{ACK, FIN, FIN_ACK, PSH, RST, RST_ACK, SYN, SYN_ACK};
    let est = ESTABLISHED;
    let (fc, fb) = (est | state::FIN_CLIENT, est | state::FIN_BACKEND);
    let (fca, fba) = (fc | state::FIN_CLIENT_ACKED, fb | state::FIN_BACKEND_ACKED);
    let (client_reset, backend_reset) = (est | state::RESET_CLIENT, est | state::RESET_BACKEND);
    let name = |what: &str| format!("{n}: {what}");
    let tale = |what: &str, packets: Vec<Told>| story(name(what), n, None, &packets);
    vec![
        tale("a handshake", OPEN.to_vec()),
        tale(
            "only the acknowledgement of the SYN-ACK establishes",
            after(
                &OPEN[..2],
                &[
                    ('>', ACK, 1001, 5002, ANSWERED),
                    ('>', RST, 1001, 0, ANSWERED),
                    ('>', SYN_ACK, 1000, 5001, ANSWERED),
                    ('>', FIN, 1001, 0, ANSWERED),
                    ('>', ACK | PSH, 1001, 5001, est),
                ],
            ),
        ),
        tale(
            "an acknowledgement before the SYN-ACK establishes nothing",
            after(&OPEN[..1], &[('>', ACK, 1001, 1, 0), ('>', ACK, 1001, 0, 0)]),
        ),
        tale(
            "data both ways leaves the state alone",
            after(
                &OPEN,
                &[
                    ('>', ACK | PSH, 1001, 5001, est),
                    ('<', ACK | PSH, 5001, 1001, est),
                    ('>', ACK, 1001, 5001, est),
                ],
            ),
        ),
        tale(
            "the client closes first",
            after(
                &OPEN,
                &[
                    ('>', FIN_ACK, 1001, 5001, fc),
                    ('<', ACK, 5001, 1002, fca),
                    ('<', FIN_ACK, 5001, 1002, fca | fb),
                    ('>', ACK, 1002, 5002, fca | fba),
                ],
            ),
        ),
        tale(
            "the backend closes first",
            after(
                &OPEN,
                &[
                    ('<', FIN_ACK, 5001, 1001, fb),
                    ('>', ACK, 1001, 5002, fba),
                    ('>', FIN_ACK, 1001, 5002, fba | fc),
                    ('<', ACK, 5002, 1002, fca | fba),
                ],
            ),
        ),
        tale(
            "both close at once",
            after(
                &OPEN,
                &[
                    ('>', FIN_ACK, 1001, 5001, fc),
                    ('<', FIN_ACK, 5001, 1001, fc | fb),
                    ('>', ACK, 1002, 5002, fc | fba),
                    ('<', ACK, 5002, 1002, fca | fba),
                ],
            ),
        ),
        tale(
            "a FIN that the other side does not acknowledge closes nothing",
            after(
                &OPEN,
                &[
                    ('>', FIN_ACK, 77, 5001, fc),
                    ('<', ACK, 5001, 1001, fc),
                    ('<', FIN_ACK, 5001, 1001, fc | fb),
                    ('>', ACK, 1001, 5002, fc | fba),
                    ('>', FIN_ACK, 1001, 5002, fc | fba),
                    ('<', ACK, 5002, 1002, fca | fba),
                ],
            ),
        ),
        story(
            name("half closed, the backend goes on sending"),
            n,
            Some(fca),
            &[
                ('<', ACK | PSH, 5001, 1002, fca),
                ('>', ACK, 1002, 5001, fca),
                ('<', ACK | PSH, 5001, 1002, fca),
            ],
        ),
        story(
            name("a repeated FIN changes nothing more"),
            n,
            Some(fca),
            &[('>', FIN_ACK, 1001, 5001, fca)],
        ),
        story(
            name("the client resets"),
            n,
            Some(est),
            &[('>', RST, 1001, 0, client_reset)],
        ),
        story(
            name("the backend resets"),
            n,
            Some(est),
            &[('<', RST_ACK, 5001, 1001, backend_reset)],
        ),
        story(
            name("a client that goes on after its reset takes it back"),
            n,
            Some(est),
            &[
                ('>', RST, 1001, 0, client_reset),
                ('<', ACK, 5001, 1001, client_reset),
                ('>', ACK, 1001, 5001, est),
            ],
        ),
        story(
            name("a backend that goes on after its reset takes it back"),
            n,
            Some(est),
            &[
                ('<', RST_ACK, 5001, 1001, backend_reset),
                ('>', ACK, 1001, 5001, backend_reset),
                ('<', ACK, 5001, 1001, est),
            ],
        ),
        tale(
            "a client that has started again is let through by its backend",
            after(
                &OPEN,
                &[
                    ('>', SYN, 9000, 0, est),
                    ('<', ACK, 5001, 1001, est),
                    ('>', RST, 1001, 0, client_reset),
                    ('>', SYN, 9000, 0, client_reset),
                    ('<', SYN_ACK, 7000, 9001, ANSWERED),
                    ('>', ACK, 9001, 7001, est),
                ],
            ),
        ),
        tale(
            "a SYN-ACK that comes twice is counted once",
            after(
                &OPEN[..2],
                &[
                    ('<', SYN_ACK, 5000, 1001, ANSWERED),
                    ('>', ACK, 1001, 5001, est),
                    ('<', SYN_ACK, 5000, 1001, est),
                ],
            ),
        ),
        tale(
            "an ECN SYN opens a flow",
            vec![('>', SYN | flag::ECE | flag::CWR, 1000, 0, 0)],
        ),
        {
            let packet = n.open().payload(b"GET / HTTP/1.1");
            let expect = created(Expect::send(NIC, &n.to_b1(&packet)), &packet, &n.conn());
            row(name("a SYN with data opens a flow"), n.one()).comes(NIC, &packet, expect)
        },
    ]
}

fn reuse(n: Net) -> Vec<Row> {
    let both = ESTABLISHED | state::FINS | state::CLOSED;
    let open = n.open();
    let fresh = || created(Expect::send(NIC, &n.to_b2(&open)), &open, &n.conn2());
    let to_same = || Expect::send(NIC, &n.to_b1(&open)).to_backend(1, &open);
    let given = || n.two().ring(&[2]);
    let drains = {
        let mut world = given();
        world.backends[0].state = backend_state::DRAINING;
        world
    };
    // Somebody else's flow holds the SNAT port.
    let other = |state: u32| Conn {
        client: (n.stranger(), 40_000),
        ..n.conn2().state(state)
    };
    let one_port = |conn: Conn, age: u32| given().snat_ports(CPORT, CPORT).conn(conn, age);
    let exhausted = || Expect::drop(DropReason::SnatPortsExhausted, 1);
    vec![
        row(
            format!("{n}: a SYN on a closed tuple begins a new flow"),
            given().conn(n.conn().state(both), 5),
        )
        .comes(NIC, &open, fresh()),
        row(
            format!("{n}: a SYN on a tuple that was reset is left to the backend"),
            given().conn(n.conn().state(ESTABLISHED | state::RESET), 5),
        )
        .comes(NIC, &open, to_same()),
        row(
            format!("{n}: a SYN on a half-closed tuple is left to the backend"),
            given().conn(n.conn().state(ESTABLISHED | state::FIN_CLIENT), 5),
        )
        .comes(NIC, &open, to_same()),
        row(
            format!("{n}: a SYN on a live tuple is left to the backend (RFC 5961)"),
            given().conn(n.conn().established(), 5),
        )
        .comes(NIC, &open, to_same()),
        row(
            format!("{n}: a SYN on a live tuple is left to the backend while that drains"),
            drains.clone().conn(n.conn().established(), 5),
        )
        .comes(NIC, &open, to_same()),
        row(
            format!("{n}: a half-open flow leaves a draining backend"),
            drains.conn(n.conn().answered(), 5),
        )
        .comes(NIC, &open, fresh()),
        row(
            format!("{n}: a closed flow keeps its SNAT port for as long as tcp-closing says"),
            one_port(other(both), 5),
        )
        .comes(NIC, &open, exhausted()),
        row(
            format!("{n}: an expired closed flow gives up its SNAT port"),
            one_port(other(both), CLOSING_S + 5),
        )
        .comes(NIC, &open, fresh().count(Counter::FlowsReclaimed)),
        row(
            format!("{n}: half-closed flows keep their SNAT port"),
            one_port(other(ESTABLISHED | state::FIN_CLIENT), CLOSING_S + 5),
        )
        .comes(NIC, &open, exhausted()),
        row(
            format!("{n}: a half-open flow gives up its SNAT port when all are taken"),
            one_port(other(0), 1),
        )
        .comes(NIC, &open, fresh().count(Counter::FlowsReclaimed)),
        row(
            format!("{n}: a flow that was reset by one side keeps its SNAT port for two minutes"),
            one_port(other(ESTABLISHED | state::RESET_CLIENT), 110),
        )
        .comes(NIC, &open, exhausted()),
        row(
            format!("{n}: a flow that was reset and is silent gives up its SNAT port"),
            one_port(other(ESTABLISHED | state::RESET_CLIENT), 125),
        )
        .comes(NIC, &open, fresh().count(Counter::FlowsReclaimed)),
    ]
}

/// A backend that still has an earlier connection on the source port.
fn busy_port(n: Net) -> Vec<Row> {
    let open = n.open();
    let challenge = n.reply(flag::ACK).seq(5000, 77);
    let busy = n.conn().state(state::PORT_BUSY);
    let next = n.conn().source(n.source(), CPORT + 1);
    vec![
        row(
            format!("{n}: where the backend has the port still, the next SYN takes another"),
            n.one().snat_ports(CPORT, CPORT + 1),
        )
        .comes(
            NIC,
            &open,
            created(Expect::send(NIC, &n.to_b1(&open)), &open, &n.conn()),
        )
        .comes(
            NIC,
            &challenge,
            Expect::send(NIC, &n.to_client(&challenge))
                .to_client(1, &challenge)
                .flows(&[&busy]),
        )
        .comes(
            NIC,
            &n.request(flag::RST).seq(77, 0),
            Expect::drop(DropReason::RefusalHidden, 1),
        )
        .comes(
            NIC,
            &open,
            created(
                Expect::send(NIC, &n.to_b1(&open).ports(CPORT + 1, BPORT)),
                &open,
                &next,
            ),
        ),
    ]
}

/// Packets that come late.
fn late(n: Net) -> Vec<Row> {
    let old = ESTABLISHED_S + 5;
    let idle = || n.one().conn(n.conn().established(), old);
    let data = n.request(flag::ACK).payload(b"late");
    let from_backend = n.reply(flag::ACK).seq(5001, 1001).payload(b"late");
    let to_backend = eth(mac_of(NIC), B1_MAC)
        .ip(n.source(), n.b1())
        .id(0)
        .tcp(CPORT, BPORT, flag::RST)
        .seq(1001, 0)
        .window(0);
    let expired = || Expect::drop(DropReason::FlowExpired, 1);
    let ends = |expect: Expect| expect.count(Counter::FlowsExpired).flows(&[]);
    vec![
        row(
            format!("{n}: a client that was silent for too long is reset"),
            idle(),
        )
        .comes(
            NIC,
            &data,
            ends(Expect::send(NIC, &reset(n, 2000, None)).count(Counter::ResetsSent)),
        ),
        row(
            format!("{n}: a backend that was silent for too long is reset, and so is what comes after"),
            idle(),
        )
        .comes(
            NIC,
            &from_backend,
            ends(Expect::send(NIC, &to_backend).count(Counter::ResetsSent)),
        )
        .comes(
            NIC,
            &from_backend,
            Expect::send(NIC, &to_backend).count(Counter::ResetsSent),
        )
        .comes(NIC, &n.reply(flag::RST).seq(5001, 0), expired())
        .comes(NIC, &n.reply(flag::FIN_ACK).seq(5001, 1001), expired()),
        row(
            format!("{n}: a SYN-ACK that meets a flow that has ended is somebody else's, and clears it"),
            idle(),
        )
        .comes(
            NIC,
            &from_backend,
            ends(Expect::send(NIC, &to_backend).count(Counter::ResetsSent)),
        )
        .comes(NIC, &n.reply(flag::SYN_ACK).seq(5000, 1001), Expect::pass())
        .comes(NIC, &from_backend, Expect::pass()),
        row(
            format!("{n}: a SYN after a flow that has ended begins a new one"),
            idle(),
        )
        .comes(
            NIC,
            &n.open(),
            created(Expect::send(NIC, &n.to_b1(&n.open())), &n.open(), &n.conn())
                .count(Counter::FlowsExpired),
        ),
        row(
            format!("{n}: while either side sends, a flow does not expire"),
            n.one().conn(n.conn().established(), ESTABLISHED_S - 5),
        )
        .comes(
            NIC,
            &data,
            Expect::send(NIC, &n.to_b1(&data)).to_backend(1, &data),
        ),
    ]
}

/// A service that holds its share of the table.
fn share(n: Net) -> Vec<Row> {
    let open = n.open();
    vec![
        row(
            format!("{n}: a service that holds its share of the table gets no new flows"),
            n.one().flow_share(10, 10),
        )
        .comes(NIC, &open, Expect::drop(DropReason::ServiceShare, 1)),
        row(
            format!("{n}: below its share a service gets new flows"),
            n.one().flow_share(10, 9),
        )
        .comes(
            NIC,
            &open,
            created(Expect::send(NIC, &n.to_b1(&open)), &open, &n.conn()),
        ),
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
                .flows(&[&n.conn2().state(tries(1) | state::ANSWERED)]),
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
