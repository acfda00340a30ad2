//! Path MTU discovery through the balancer: by its own device, and by a router between it and a backend.

use std::{
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::netns::Namespace;

use crate::{
    lab::{Body, Lab, Wiring, service},
    talk::{BULK, PATIENCE, any, serve_tcp, serve_udp, talk_tcp},
    vip,
};

/// MTU of the balancer's device towards the backends.
const DEVICE: u32 = 1400;
/// MTU behind the router.
const ROUTED: u32 = 1300;

/// A router on the backends' segment and a backend behind it, on a link with a smaller MTU.
fn routed(lab: &Lab, v6: bool) -> Result<(Namespace, Namespace, &'static str)> {
    let (router, backend) = (Namespace::new("router")?, Namespace::new("routed")?);
    let (own, near, far, from) = if v6 {
        (
            "2001:db8:b::fe/64",
            "2001:db8:e::1/64",
            "2001:db8:e::2",
            "2001:db8:b::/64",
        )
    } else {
        ("203.0.113.254/24", "10.9.0.1/24", "10.9.0.2", "203.0.113.0/24")
    };
    lab.plug_backend(&router, "router")?;
    router.address("e0", own)?;
    router.veth("e1", &backend, "e0")?;
    router.address("e1", near)?;
    router.ip(&format!("link set e1 mtu {ROUTED}"))?;
    router.sysctl("net.ipv4.ip_forward", "1")?;
    router.sysctl("net.ipv6.conf.all.forwarding", "1")?;
    backend.ip(&format!("link set e0 mtu {ROUTED}"))?;
    let (length, hop) = if v6 {
        (64, "2001:db8:e::1")
    } else {
        (24, "10.9.0.1")
    };
    backend.address("e0", &format!("{far}/{length}"))?;
    // It asks for full segments, so that the router has something to refuse.
    backend.ip(&format!("route add {from} via {hop} advmss 1440"))?;
    let via = own.split('/').next().unwrap_or_default();
    lab.node.ip(&format!("route add {far} via {via}"))?;
    Ok((router, backend, far))
}

/// Sends a datagram that may not be fragmented and waits to be told that it is too long; the MTU told.
fn told(client: &Namespace, to: SocketAddr, length: usize) -> Result<u32> {
    client.run(|| {
        let socket = UdpSocket::bind(SocketAddr::new(any(to), 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect(to)?;
        let (level, discover, mtu) = if to.is_ipv6() {
            (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_MTU)
        } else {
            (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_MTU)
        };
        let (mut value, mut size) = (libc::IP_PMTUDISC_DO, size_of::<libc::c_int>() as libc::socklen_t);
        // SAFETY: the option takes an integer, which outlives the call.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                level,
                discover,
                (&raw const value).cast(),
                size,
            )
        };
        ensure!(set == 0, "MTU_DISCOVER: {}", std::io::Error::last_os_error());
        socket.send(&vec![7; length])?;
        match socket.recv(&mut [0; 16]) {
            Err(e) if e.raw_os_error() == Some(libc::EMSGSIZE) => {}
            other => anyhow::bail!("a datagram of {length} bytes should be too long: {other:?}"),
        }
        // SAFETY: the option gives an integer of `size` bytes.
        let got = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                level,
                mtu,
                (&raw mut value).cast(),
                &raw mut size,
            )
        };
        ensure!(got == 0, "MTU: {}", std::io::Error::last_os_error());
        Ok(value as u32)
    })
}

fn discovery(body: Body, v6: bool) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, body, 1)?;
    let (_router, behind, far) = routed(&lab, v6)?;
    lab.node.ip(&format!("link set b0 mtu {DEVICE}"))?;
    // Ahead of the connected route of IPv6, or in place of that of IPv4.
    let (subnet, source, metric) = if v6 {
        ("2001:db8:b::/64", "2001:db8:b::11", 1)
    } else {
        ("203.0.113.0/24", "203.0.113.11", 0)
    };
    // The backend keeps to the segment's MTU, but asks for more.
    lab.backends[0].ip(&format!("link set e0 mtu {DEVICE}"))?;
    lab.backends[0].ip(&format!(
        "route replace {subnet} dev e0 src {source} metric {metric} advmss 1440"
    ))?;
    let near: SocketAddr = SocketAddr::new(source.parse()?, 0);
    let far: SocketAddr = SocketAddr::new(far.parse()?, 0);
    let config = lab.head(&format!("[vips.lab]\naddress = \"{}\"\n", vip(v6, 0).ip()))
        + &service("near", "81/tcp", "", &[serve_tcp(&lab.backends[0], 0, near)?])
        + &service("near-udp", "81/udp", "", &[serve_udp(&lab.backends[0], 0, near)?])
        + &service("far", "82/tcp", "", &[serve_tcp(&behind, 1, far)?])
        + &service("far-udp", "82/udp", "", &[serve_udp(&behind, 1, far)?]);
    let weir = lab.start(&config)?;
    let counted = |name: &str| -> Result<u64> {
        let counters = weir.counters()?;
        counters["node"][name]
            .as_u64()
            .with_context(|| counters.to_string())
    };

    talk_tcp(&lab.client, vip(v6, 81), BULK).with_context(|| weir.explain())?;
    ensure!(
        counted("too_big_sent")? > 0,
        "TCP was never told: {}",
        weir.explain()
    );
    // Only TCP's own route knows by now.
    forget(&lab.client, v6)?;
    let mtu = told(&lab.client, vip(v6, 81), 1430).with_context(|| weir.explain())?;
    assert_eq!(mtu, DEVICE, "the balancer's device");

    ensure!(counted("icmp_translated")? == 0, "{}", weir.explain());
    talk_tcp(&lab.client, vip(v6, 82), BULK).with_context(|| weir.explain())?;
    ensure!(
        counted("icmp_translated")? > 0,
        "the router was not heard: {}",
        weir.explain()
    );
    forget(&lab.client, v6)?;
    let mtu = told(&lab.client, vip(v6, 82), 1330).with_context(|| weir.explain())?;
    assert_eq!(mtu, ROUTED, "the router's link");
    Ok(())
}

/// Makes the client forget the path MTU that it has learnt.
fn forget(client: &Namespace, v6: bool) -> Result<()> {
    client.ip(if v6 {
        "-6 route flush cache"
    } else {
        "-4 route flush cache"
    })
}

#[test]
fn path_mtu4() -> Result<()> {
    discovery(Body::Native, false)
}

#[test]
fn path_mtu6_by_tc_alone() -> Result<()> {
    discovery(Body::Tc, true)
}
