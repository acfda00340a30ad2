//! What XDP may send through which device, and frames of several buffers.

use lb_tests::{
    kernel::{Program, Ran, with_kernel},
    packet::{Packet, flag},
    row::{Datapath as _, Expect, Row, row},
    world::{JUMBO, JUMBO_PLAIN, NIC, PLAIN, mac_of},
};

use crate::{
    flows::created,
    net::{ALL, B1_MAC, BPORT, Net},
};

/// More than one page, so that the kernel puts it into several buffers; less than the MTU.
const LONG: usize = 8500;

pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for n in ALL {
        let behind = n.service().remote(n.b1(), BPORT, PLAIN, B1_MAC);
        let open = n.open();
        let out = n.to_b1(&open).eth(mac_of(PLAIN), B1_MAC);
        rows.push(
            row(
                format!("{n}: the backend's device takes no redirected frames: TC"),
                behind.clone(),
            )
            .comes_to_tc(NIC, &open, created(Expect::send(PLAIN, &out), &open, &n.conn())),
        );
        let reply = n.reply(flag::ACK);
        rows.push(
            row(
                format!("{n}: the client's device takes redirected frames"),
                behind.conn(n.conn().established(), 1),
            )
            .comes(
                PLAIN,
                &reply,
                Expect::send(NIC, &n.to_client(&reply)).to_client(1, &reply),
            ),
        );
        // Back out of the device it came by, which every driver with XDP can.
        let one_arm = n.service().remote(n.b1(), BPORT, PLAIN, B1_MAC);
        let conn = n.conn().hop(crate::net::CLIENT_MAC, PLAIN);
        rows.push(row(format!("{n}: one arm on such a device"), one_arm).comes(
            PLAIN,
            &open,
            created(Expect::send(PLAIN, &out), &open, &conn),
        ));
    }
    rows
}

/// A long packet of a known flow that comes in by one device, and as it goes to the backend by another.
fn long(n: Net, from: u16, to: u16) -> (Packet, Packet) {
    let packet = n
        .request(flag::ACK)
        .eth(crate::net::CLIENT_MAC, mac_of(from))
        .payload(&vec![0x5a; LONG]);
    let out = n.to_b1(&packet).eth(mac_of(to), B1_MAC);
    (packet, out)
}

/// What XDP makes of a long packet on `from`, whose backend is behind `to`; and how many it handed to TC.
fn run_long(n: Net, from: u16, to: u16) -> anyhow::Result<(Ran, u64)> {
    let world = n
        .service()
        .remote(n.b1(), BPORT, to, B1_MAC)
        .conn(n.conn().established(), 1);
    let (packet, _) = long(n, from, to);
    let run = |kernel: &mut lb_tests::kernel::Kernel| {
        kernel.set(&world)?;
        let handed = |kernel: &mut lb_tests::kernel::Kernel| {
            anyhow::Ok(kernel.counters()?.get("to_tc").copied().unwrap_or(0))
        };
        let before = handed(kernel)?;
        let ran = kernel.run(Program::Xdp, from, &packet.build())?;
        anyhow::Ok((ran, handed(kernel)? - before))
    };
    with_kernel(run)?
}

#[test]
fn frames_of_several_buffers_are_forwarded_by_their_headers() -> anyhow::Result<()> {
    for n in ALL {
        for (from, to, action) in [(NIC, JUMBO, 4), (JUMBO, JUMBO, 3), (JUMBO_PLAIN, JUMBO_PLAIN, 3)] {
            let (ran, handed) = run_long(n, from, to)?;
            assert_eq!((ran.action, handed), (action, 0), "{n}: {from} to {to}");
            assert!(
                ran.frame == long(n, from, to).1.build(),
                "{n}: {from} to {to}: other bytes"
            );
        }
    }
    Ok(())
}

#[test]
fn frames_of_several_buffers_are_left_to_tc_where_a_driver_takes_one_only() -> anyhow::Result<()> {
    for n in ALL {
        let (ran, handed) = run_long(n, NIC, JUMBO_PLAIN)?;
        assert_eq!((ran.action, handed), (2, 1), "{n}");
        assert!(
            ran.frame == long(n, NIC, JUMBO_PLAIN).0.build(),
            "{n}: changed on its way to TC"
        );
    }
    Ok(())
}
