//! What is not ours passes untouched, whatever it looks like.

use lb_tests::{
    packet::{Packet, eth, flag},
    row::{Body, Expect, Row, row},
    world::{BRIDGE, NIC, World, mac_of},
};

use crate::net::{ALL, B1_MAC, BPORT, CLIENT_MAC, CPORT, Net, SPORT, TCP4, TCPS, UDP4, UDP6};

pub fn rows() -> Vec<Row> {
    let mut rows = others();
    for n in ALL {
        rows.extend(addressed(n));
        rows.extend(truncated(n));
        rows.extend(lies(n));
    }
    rows
}

/// Both families have a service, so that nothing passes for want of one.
fn given() -> World {
    let mut world = TCP4.one();
    for n in [UDP4, TCPS[1], UDP6] {
        world = world
            .service(n.vip(), SPORT, n.proto)
            .remote(n.b1(), BPORT, NIC, B1_MAC);
    }
    world
}

fn passes(name: impl Into<String>, packet: &Packet) -> Row {
    let mut all = row(name, given())
        .comes(NIC, packet, Expect::pass())
        .leaves(NIC, packet, Expect::pass());
    all = all.comes(BRIDGE, packet, Expect::pass());
    all
}

fn others() -> Vec<Row> {
    let frame = || eth(CLIENT_MAC, mac_of(NIC));
    let (v4, v6) = (TCP4, TCPS[1]);
    let between = |n: Net| frame().ip(n.client(), n.vip());
    let solicitation = frame()
        .ip(v6.client(), v6.vip())
        .ttl(255)
        .icmp(135, 0, 0)
        .payload(&[0x20; 24]);
    let mut rows = vec![
        passes(
            "an ARP request for a VIP",
            &frame().arp([192, 0, 2, 10], [198, 51, 100, 1]),
        ),
        passes("neighbour solicitation for a VIP", &solicitation),
        passes(
            "neighbour advertisement",
            &frame()
                .ip(v6.client(), v6.vip())
                .icmp(136, 0, 0)
                .payload(&[0x20; 24]),
        ),
        passes(
            "router advertisement",
            &frame().ip(v6.client(), v6.vip()).icmp(134, 0, 0).payload(&[0; 8]),
        ),
        passes("LLDP", &frame().raw(0x88cc, &[2, 7, 4, 1, 2, 3, 4, 5, 6])),
        passes(
            "an 802.3 length instead of a type",
            &frame().raw(46, &[0x42, 0x42, 3, 0, 0]),
        ),
        passes(
            "MPLS around a packet to a VIP",
            &frame().raw(0x8847, &between(v4).tcp(1, SPORT, flag::SYN).ip_bytes()),
        ),
        passes(
            "IPv6 in an IPv4 frame",
            &frame().raw(0x0800, &v6.open().ip_bytes()),
        ),
        passes(
            "IPv4 in an IPv6 frame",
            &frame().raw(0x86dd, &v4.open().ip_bytes()),
        ),
        passes(
            "seven extension headers",
            &(0..7).fold(v6.open(), |p, _| p.extension(60, 1)),
        ),
        passes(
            "ICMP timestamp to a VIP",
            &between(v4).icmp(13, 0, 0).payload(&[0; 12]),
        ),
        passes(
            "ICMP redirect to a VIP",
            &between(v4).icmp(5, 1, 0).payload(&[0; 28]),
        ),
        passes("ICMPv6 in IPv4 to a VIP", &between(v4).icmp(128, 0, 0)),
        passes(
            "an echo request cut into fragments",
            &between(v4).echo_request(1, 1).payload(&[0; 64]).fragment(0, 32),
        ),
    ];
    for (name, number) in [
        ("IGMP", 2),
        ("IPIP", 4),
        ("GRE", 47),
        ("ESP", 50),
        ("AH", 51),
        ("OSPF", 89),
        ("SCTP", 132),
    ] {
        for n in [v4, v6] {
            let packet = between(n).protocol(number).payload(&[0x42; 32]);
            let family = if n.v6 { "IPv6" } else { "IPv4" };
            rows.push(passes(format!("{name} over {family} to a VIP"), &packet));
        }
    }
    rows
}

fn addressed(n: Net) -> Vec<Row> {
    let stranger = n.stranger();
    let later = n.request(flag::ACK).payload(&[0; 64]).fragment(32, 64);
    let theirs = n
        .packet((n.client(), CPORT), (stranger, SPORT), flag::ACK)
        .payload(&[0; 64]);
    vec![
        passes(
            format!("{n}: between strangers"),
            &n.packet((n.client(), CPORT), (stranger, SPORT), flag::SYN),
        ),
        passes(
            format!("{n}: straight to a backend"),
            &n.packet((n.client(), CPORT), (n.b1(), BPORT), flag::SYN),
        ),
        passes(
            format!("{n}: another port of a VIP"),
            &n.packet((n.client(), CPORT), (n.vip(), 81), flag::SYN),
        ),
        passes(
            format!("{n}: from a VIP"),
            &n.packet((n.vip(), SPORT), (n.client(), CPORT), flag::SYN_ACK),
        ),
        passes(
            format!("{n}: from a backend to a SNAT source without a flow"),
            &n.reply(flag::ACK),
        ),
        row(format!("{n}: a later fragment of ICMP to a VIP passes"), given()).comes(
            NIC,
            &later.protocol(if n.v6 { 58 } else { 1 }),
            Expect::pass(),
        ),
        passes(
            format!("{n}: a fragment between strangers"),
            &theirs.fragment(0, 32),
        ),
    ]
}

/// A frame to a service that is cut anywhere before the end of its transport header is not understood, so it passes.
fn truncated(n: Net) -> Vec<Row> {
    let open = n.open();
    let header = if n.is_tcp() { 20 } else { 8 };
    let (ip, whole) = (
        14 + open.ip_header_length(),
        14 + open.ip_header_length() + header,
    );
    let cut = |body: Body, name: &str, from: usize| {
        let row = row(
            format!("{n}: cut at every length before the end of its headers, {name}"),
            given(),
        );
        (from..whole).fold(row.only(body), |row, length| {
            row.comes(NIC, &open.clone().cut(length), Expect::pass())
        })
    };
    // BPF_PROG_TEST_RUN wants an Ethernet header, and for TC a whole IP header.
    vec![cut(Body::XdpThenTc, "XDP", 14), cut(Body::Tc, "TC", ip)]
}

fn lies(n: Net) -> Vec<Row> {
    if n.v6 {
        return vec![passes(format!("{n}: version 4 in an IPv6 header"), &{
            let mut bytes = n.open().ip_bytes();
            bytes[0] = 0x40;
            eth(CLIENT_MAC, mac_of(NIC)).raw(0x86dd, &bytes)
        })];
    }
    let mut rows: Vec<Row> = (0..5)
        .map(|words| {
            passes(
                format!("{n}: a header of {words} words"),
                &n.open().header_words(words),
            )
        })
        .collect();
    rows.push(passes(
        format!("{n}: a header longer than the packet"),
        &n.open().header_words(15).total_length(40),
    ));
    rows.push(passes(
        format!("{n}: a total length shorter than the header"),
        &n.open().total_length(19),
    ));
    rows.push(passes(format!("{n}: version 6 in an IPv4 header"), &{
        let mut bytes = n.open().ip_bytes();
        bytes[0] = 0x65;
        eth(CLIENT_MAC, mac_of(NIC)).raw(0x0800, &bytes)
    }));
    rows
}
