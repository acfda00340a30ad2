//! How packets are rewritten: headers of every shape, checksums, hops and sizes.

use lb_common::counter::DropReason;
use lb_tests::{
    packet::{Packet, flag},
    row::{Expect, Row, row},
    world::{MTU, NARROW, NARROW_MTU, NIC, mac_of},
};

use crate::{
    flows::created,
    net::{ALL, B1_MAC, BPORT, Net, TCPS, UDP4, UDP6},
};

pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for n in ALL {
        rows.extend(headers(n));
        rows.extend(limits(n));
    }
    rows.extend(checksums());
    rows
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
    let narrow_known = narrow.conn(n.conn().established(), 1);
    vec![
        row(format!("{n}: one hop left is enough"), known()).comes(
            NIC,
            &data.clone().ttl(2),
            Expect::send(NIC, &n.to_b1(&data).ttl(1)).to_backend(1, &data),
        ),
        row(
            format!("{n}: exactly the MTU of the way out passes"),
            narrow_known,
        )
        .comes(
            NIC,
            &fits,
            Expect::send(NARROW, &n.to_b1(&fits).eth(mac_of(NARROW), B1_MAC)).to_backend(1, &fits),
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
