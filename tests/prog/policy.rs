//! Who may, and who serves: UDP moves, affinity, allow and deny, weights, empty services, hairpin.

use lb_common::{
    addr::Hop,
    counter::{Counter, DropReason},
    flow::FlowKey,
    limits::RING_ROW,
    maps::{ACL_ALLOW, ACL_DENY, backend_state, service_flags},
};
use lb_tests::{
    packet::{ToIp as _, eth, flag},
    row::{Expect, Row, row},
    world::{BRIDGE, Conn, NIC, NODE, World, mac_of},
};

use crate::{
    flows::created,
    net::{ALL, BPORT, CLIENT_MAC, CONTAINER_MAC, CPORT, Net, SPORT, TCPS, UDPS},
};

pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for n in ALL {
        rows.extend(acl(n));
        rows.extend(affinity(n));
        rows.extend(empty(n));
        rows.push(weights(n));
        rows.extend(hairpin(n));
    }
    UDPS.iter().for_each(|n| rows.extend(udp(*n)));
    TCPS.iter().for_each(|n| rows.extend(refuse(*n)));
    rows
}

fn udp(n: Net) -> Vec<Row> {
    let data = n.request(0);
    let reply = n.reply(0);
    let mut dead = n.two().ring(&[2]);
    dead.backends[0].state = backend_state::DEAD;
    let stale = n.two().ring(&[2]).conn(n.conn().established().epoch(99), 1);
    let moved = || created(Expect::send(NIC, &n.to_b2(&data)), &data, &n.conn2()).count(Counter::FlowsMoved);
    vec![
        row(
            format!("{n}: a flow of a dead backend moves"),
            dead.conn(n.conn().established(), 1),
        )
        .comes(NIC, &data, moved()),
        row(format!("{n}: a flow of a backend id's earlier user moves"), stale).comes(NIC, &data, moved()),
        row(
            format!("{n}: the first answer establishes"),
            n.one().conn(n.conn(), 1),
        )
        .comes(
            NIC,
            &reply,
            Expect::send(NIC, &n.to_client(&reply))
                .to_client(1, &reply)
                .handshake(1)
                .flows(&[&n.conn().established()]),
        ),
        row(format!("{n}: a datagram sent again stays with its backend"), {
            n.two().ring(&[2]).conn(n.conn(), 1)
        })
        .comes(
            NIC,
            &data,
            Expect::send(NIC, &n.to_b1(&data)).to_backend(1, &data),
        ),
        row(format!("{n}: an empty datagram"), n.one()).comes(
            NIC,
            &data.clone().payload(b""),
            created(
                Expect::send(NIC, &n.to_b1(&data).payload(b"")),
                &data.clone().payload(b""),
                &n.conn(),
            ),
        ),
    ]
}

fn acl(n: Net) -> Vec<Row> {
    let open = n.open();
    let (wide, narrow, host, elsewhere) = if n.v6 {
        (
            "2001:db8::/32",
            "2001:db8:c::/48",
            "2001:db8:c::10/128",
            "fd00::/8",
        )
    } else {
        ("192.0.0.0/8", "192.0.2.0/24", "192.0.2.10/32", "10.0.0.0/8")
    };
    let default_deny = service_flags::ACL_DEFAULT_DENY;
    let admitted = |name: &str, given: World| {
        row(format!("{n}: {name}"), given).comes(
            NIC,
            &open,
            created(Expect::send(NIC, &n.to_b1(&open)), &open, &n.conn()),
        )
    };
    let refused = |name: &str, given: World| {
        row(format!("{n}: {name}"), given).comes(NIC, &open, Expect::drop(DropReason::AclDenied, 1))
    };
    vec![
        admitted(
            "a client on the allow list",
            n.one().flags(default_deny).acl(wide, ACL_ALLOW),
        ),
        refused(
            "a client not on the allow list",
            n.one().flags(default_deny).acl(elsewhere, ACL_ALLOW),
        ),
        refused("a client on the deny list", n.one().acl(narrow, ACL_DENY)),
        admitted("a client not on the deny list", n.one().acl(elsewhere, ACL_DENY)),
        refused("the longer prefix denies", {
            n.one()
                .flags(default_deny)
                .acl(wide, ACL_ALLOW)
                .acl(narrow, ACL_DENY)
        }),
        admitted("the longest prefix allows", {
            n.one()
                .acl(wide, ACL_DENY)
                .acl(narrow, ACL_DENY)
                .acl(host, ACL_ALLOW)
        }),
        refused("a client denied for all services", n.one().firewall(narrow)),
        admitted(
            "a client not denied for all services",
            n.one().firewall(elsewhere),
        ),
        refused("no service's own list allows whom the firewall denies", {
            n.one().flags(default_deny).acl(host, ACL_ALLOW).firewall(wide)
        }),
        refused("whom the firewall passes, the service's own list judges", {
            n.one().firewall(elsewhere).acl(narrow, ACL_DENY)
        }),
        {
            // The same list for another service has no say.
            let given = n.one().service(n.vip(), 81, n.proto).acl(wide, ACL_DENY);
            admitted("another service's list", given)
        },
        {
            let data = n.request(flag::ACK);
            let given = n.one().acl(wide, ACL_DENY).conn(n.conn().established(), 1);
            row(format!("{n}: a known flow is not asked again"), given).comes(
                NIC,
                &data,
                Expect::send(NIC, &n.to_b1(&data)).to_backend(1, &data),
            )
        },
    ]
}

fn affinity(n: Net) -> Vec<Row> {
    let open = n.open();
    let given = || n.two().flags(service_flags::AFFINITY).ring(&[1]);
    let second = open.clone().ports(CPORT + 1, SPORT);
    let to_b1 = || created(Expect::send(NIC, &n.to_b1(&open)), &open, &n.conn());
    let to_b2 =
        || created(Expect::send(NIC, &n.to_b2(&open)), &open, &n.conn2()).count(Counter::AffinityHits);
    let mut drains = given().affinity(n.client(), 2, 101);
    drains.backends[1].state = backend_state::DRAINING;
    vec![
        row(
            format!("{n}: affinity goes before the ring"),
            given().affinity(n.client(), 2, 101),
        )
        .comes(NIC, &open, to_b2()),
        row(
            format!("{n}: affinity to an id's earlier user is forgotten"),
            given().affinity(n.client(), 2, 5),
        )
        .comes(NIC, &open, to_b1()),
        row(format!("{n}: affinity to a draining backend is broken"), drains).comes(NIC, &open, to_b1()),
        row(
            format!("{n}: another client's affinity has no say"),
            given().affinity(n.stranger(), 2, 101),
        )
        .comes(NIC, &open, to_b1()),
        row(
            format!("{n}: the second flow of a client follows the first"),
            given(),
        )
        .comes(NIC, &open, to_b1())
        .comes(
            NIC,
            &second,
            Expect::send(NIC, &n.to_b1(&second).ports(CPORT + 1, BPORT))
                .new_flow(1, 1)
                .to_backend(1, &second)
                .count(Counter::AffinityHits)
                .flows(&[&n.conn(), &n.conn().client_port(CPORT + 1)]),
        ),
    ]
}

fn empty(n: Net) -> Vec<Row> {
    let open = n.open();
    let no_backend = || Expect::drop(DropReason::NoBackend, 1);
    let drainer = n.one().backend_state(backend_state::DRAINING).ring(&[1]);
    vec![
        row(format!("{n}: a service without a ring drops"), n.one().no_ring()).comes(
            NIC,
            &open,
            no_backend(),
        ),
        row(format!("{n}: an empty ring drops"), n.service()).comes(NIC, &open, no_backend()),
        row(format!("{n}: a ring of dead backends drops"), {
            n.one().backend_state(backend_state::DEAD).ring(&[1])
        })
        .comes(NIC, &open, no_backend()),
        row(
            format!("{n}: drainers in the ring serve while there is nobody else"),
            drainer,
        )
        .comes(
            NIC,
            &open,
            created(Expect::send(NIC, &n.to_b1(&open)), &open, &n.conn()),
        ),
        row(
            format!("{n}: a known flow needs no ring"),
            n.one().no_ring().conn(n.conn().established(), 1),
        )
        .comes(
            NIC,
            &n.request(flag::ACK),
            Expect::send(NIC, &n.to_b1(&n.request(flag::ACK))).to_backend(1, &n.request(flag::ACK)),
        ),
    ]
}

fn refuse(n: Net) -> Vec<Row> {
    let reset = eth(mac_of(NIC), CLIENT_MAC)
        .ip(n.vip(), n.client())
        .id(0)
        .tcp(SPORT, CPORT, flag::RST_ACK)
        .seq(0, 1001)
        .window(0);
    let given = n.service().flags(service_flags::REFUSE_WHEN_EMPTY);
    vec![
        row(
            format!("{n}: a service without backends refuses by RST"),
            given.clone(),
        )
        .comes(
            NIC,
            &n.open(),
            Expect::send(NIC, &reset).count(Counter::ResetsSent),
        ),
        row(
            format!("{n}: a SYN met at lo is refused up the stack"),
            given.clone(),
        )
        .comes_to_tc(
            NODE,
            &n.open().eth([0; 6], [0; 6]),
            Expect::node(&reset.clone().eth([0; 6], [0; 6])).count(Counter::ResetsSent),
        ),
        row(format!("{n}: the refusal keeps the VLAN tag"), given).comes(
            NIC,
            &n.open().vlan(5),
            Expect::send(NIC, &reset.vlan(5)).count(Counter::ResetsSent),
        ),
    ]
}

/// The ring decides by the hash of the flow: each of 40 clients goes where its entry of the ring says.
fn weights(n: Net) -> Row {
    // Weights 3 and 1.
    let ring = [1, 1, 2, 1];
    let mut given = row(format!("{n}: the ring's shares decide"), n.two().ring(&ring));
    let mut conns: Vec<Conn> = Vec::new();
    for port in CPORT..CPORT + 24 {
        let open = n.open().ports(port, SPORT);
        let entry = ring_entry(n, port);
        let first = ring[entry % ring.len()] == 1;
        let (conn, out) = if first {
            (n.conn(), n.to_b1(&open))
        } else {
            (n.conn2(), n.to_b2(&open))
        };
        let conn = conn.client_port(port);
        conns.push(conn.clone());
        let expect = Expect::send(NIC, &out.ports(port, BPORT))
            .new_flow(1, conn.id)
            .to_backend(conn.id, &open)
            .flows(&conns.iter().collect::<Vec<_>>());
        given = given.comes(NIC, &open, expect);
    }
    given
}

fn ring_entry(n: Net, port: u16) -> usize {
    use lb_common::addr::{Addr4, Addr16, Be16};
    let (sport, dport, proto) = (Be16::new(port), Be16::new(SPORT), u32::from(n.proto));
    let (src, dst) = (Addr16::from(n.client()), Addr16::from(n.vip()));
    let hash = match (src.to_v4(), dst.to_v4()) {
        (Some(src), Some(dst)) => FlowKey::<Addr4> {
            src,
            dst,
            sport,
            dport,
            proto,
        }
        .hash(),
        _ => FlowKey::<Addr16> {
            src,
            dst,
            sport,
            dport,
            proto,
        }
        .hash(),
    };
    hash as usize % RING_ROW
}

/// Client and backend are containers of one bridge, or one container: without SNAT the reply would go past us.
fn hairpin(n: Net) -> Vec<Row> {
    let given = n.service().local(n.container(), BPORT);
    let hop = Hop::new(CONTAINER_MAC, BRIDGE);
    ["another container", "the backend itself"]
        .into_iter()
        .map(|who| {
            let client = if who == "the backend itself" {
                n.container()
            } else if n.v6 {
                "fd00:17::3".ip()
            } else {
                "172.17.0.3".ip()
            };
            let open = n
                .packet((client, CPORT), (n.vip(), SPORT), flag::SYN)
                .eth(CONTAINER_MAC, mac_of(BRIDGE));
            let out = open
                .clone()
                .addresses(n.source(), n.container())
                .ports(CPORT, BPORT)
                .ttl(63);
            let conn = Conn {
                client: (client, CPORT),
                backend: (n.container(), BPORT),
                hop,
                ..n.conn()
            };
            let reply = n
                .packet((n.container(), BPORT), (n.source(), CPORT), flag::SYN_ACK)
                .eth(CONTAINER_MAC, mac_of(BRIDGE));
            let back = reply
                .clone()
                .addresses(n.vip(), client)
                .ports(SPORT, CPORT)
                .ttl(63);
            row(format!("{n}: hairpin: {who} is the client"), given.clone())
                .comes(
                    BRIDGE,
                    &open,
                    created(Expect::neighbour(BRIDGE, &out), &open, &conn),
                )
                .comes(
                    BRIDGE,
                    &reply,
                    Expect::send(BRIDGE, &back.eth(mac_of(BRIDGE), CONTAINER_MAC))
                        .to_client(1, &reply)
                        .handshake(1)
                        .flows(&[&conn.clone().established()]),
                )
        })
        .collect()
}
