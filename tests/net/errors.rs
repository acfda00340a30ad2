//! What the balancer tells clients by ICMP and RST as a router would: ports that no service has, packets without a hop left.
//! And backends that see their clients' own addresses, whose replies are routed through it.

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{netns::Namespace, packet::eth};

use crate::{
    lab::{Body, Lab, VIP4, Wiring, address_of, service},
    serve,
    talk::{BULK, PATIENCE, Talk, any, bytes, talk_tcp, talk_udp},
    vip,
};

/// Sets an option of a socket to a number.
fn set(socket: &UdpSocket, level: i32, name: i32, value: i32) -> Result<()> {
    // SAFETY: the option takes an integer, which outlives the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    ensure!(set == 0, "socket option: {}", std::io::Error::last_os_error());
    Ok(())
}

/// What a client is told of a datagram that it sends with so many hops.
fn told(client: &Namespace, to: SocketAddr, hops: Option<i32>) -> Result<std::io::Error> {
    client.run(|| {
        let socket = UdpSocket::bind(SocketAddr::new(any(to), 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let (level, errors, ttl) = if to.is_ipv6() {
            (libc::IPPROTO_IPV6, libc::IPV6_RECVERR, libc::IPV6_UNICAST_HOPS)
        } else {
            (libc::IPPROTO_IP, libc::IP_RECVERR, libc::IP_TTL)
        };
        set(&socket, level, errors, 1)?;
        if let Some(hops) = hops {
            set(&socket, level, ttl, hops)?;
        }
        socket.connect(to)?;
        socket.send(b"is anybody there?")?;
        let answer = socket.recv(&mut [0; 32]);
        answer.err().context("an answer instead of an error")
    })
}

/// The client is the router that sends the VIP here, and the node sends back to it what is not its own.
fn unused_ports(body: Body, v6: bool) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, body, 1)?;
    for (name, value) in [
        ("net.ipv4.ip_forward", "1"),
        ("net.ipv6.conf.all.forwarding", "1"),
    ] {
        lab.node.sysctl(name, value)?;
        lab.client.sysctl(name, value)?;
    }
    lab.node.ip("route add default via 192.0.2.10")?;
    lab.node.ip("-6 route add default via 2001:db8:c::10")?;
    let servers = serve(&lab, v6, false)?;
    let silent = if v6 { "2001:db8:f::2" } else { "198.51.100.2" };
    let (bits, via) = if v6 {
        (128, "2001:db8:c::1")
    } else {
        (32, "192.0.2.1")
    };
    lab.client.ip(&format!("route add {silent}/{bits} via {via}"))?;
    let vips = format!(
        "[vips.lab]\naddress = \"{}\"\n[vips.silent]\naddress = \"{silent}\"\nunused-ports = \"drop\"\n",
        vip(v6, 0).ip()
    );
    let weir = lab.start(&(lab.head(&vips) + &service("lab", "80/tcp", "vip = \"lab\"", &servers)))?;
    talk_tcp(&lab.client, vip(v6, 80), 1000).with_context(|| weir.explain())?;
    let refused = lab
        .client
        .run(|| TcpStream::connect_timeout(&vip(v6, 81), PATIENCE));
    let refused = refused.err().context("a connection to nobody")?;
    ensure!(
        refused.kind() == ErrorKind::ConnectionRefused,
        "{refused}: {}",
        weir.explain()
    );
    let refused = told(&lab.client, vip(v6, 81), None).with_context(|| weir.explain())?;
    ensure!(
        refused.kind() == ErrorKind::ConnectionRefused,
        "{refused}: {}",
        weir.explain()
    );
    let counters = weir.counters()?;
    assert_eq!(counters["node"]["unused_ports_refused"], 2, "{counters}");
    assert_eq!(counters["drops"]["unused_port"], 0, "{counters}");
    // The VIP without any service: each datagram is seen once, whatever its time to live.
    lab.client.run(|| -> Result<()> {
        let to = SocketAddr::new(silent.parse()?, 81);
        let socket = UdpSocket::bind(SocketAddr::new(any(to), 0))?;
        for _ in 0..3 {
            socket.send_to(b"round and round", to)?;
        }
        Ok(())
    })?;
    // It comes by the same queue as the others.
    talk_tcp(&lab.client, vip(v6, 80), 1000).with_context(|| weir.explain())?;
    let counters = weir.counters()?;
    assert_eq!(counters["drops"]["unused_port"], 3, "{counters}");
    Ok(())
}

#[test]
fn unused_ports4() -> Result<()> {
    unused_ports(Body::Native, false)
}

#[test]
fn unused_ports6_by_tc_alone() -> Result<()> {
    unused_ports(Body::Tc, true)
}

fn last_hop(body: Body, v6: bool) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, body, 1)?;
    let servers = serve(&lab, v6, true)?;
    let weir = lab.start(&lab.config(&vip(v6, 0).ip().to_string(), "53/udp", &servers))?;
    let exceeded = told(&lab.client, vip(v6, 53), Some(1)).with_context(|| weir.explain())?;
    assert_eq!(exceeded.raw_os_error(), Some(libc::EHOSTUNREACH), "{exceeded}");
    let counters = weir.counters()?;
    assert_eq!(counters["node"]["time_exceeded_sent"], 1, "{counters}");
    Ok(())
}

#[test]
fn last_hop4_by_tc_alone() -> Result<()> {
    last_hop(Body::Tc, false)
}

#[test]
fn last_hop6() -> Result<()> {
    last_hop(Body::Native, true)
}

/// `snat = "never"`: remote backends see the client, and their route to it leads through the balancer.
fn routed_replies(body: Body, v6: bool) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, body, 2)?;
    for backend in &lab.backends {
        backend.ip("route add 192.0.2.0/24 via 203.0.113.1")?;
        backend.ip("route add 2001:db8:c::/64 via 2001:db8:b::1")?;
    }
    let (tcp, udp) = (serve(&lab, v6, false)?, serve(&lab, v6, true)?);
    let never = "snat = \"never\"";
    let weir = lab.start(
        &(lab.head(&format!("[vips.lab]\naddress = \"{}\"\n", vip(v6, 0).ip()))
            + &service("tcp", "80/tcp", never, &tcp)
            + &service("udp", "53/udp", never, &udp)),
    )?;
    let own = if v6 { "2001:db8:c::10" } else { "192.0.2.10" };
    for _ in 0..8 {
        let answer = talk_tcp(&lab.client, vip(v6, 80), 100).with_context(|| weir.explain())?;
        assert_eq!(answer.seen.to_string(), own, "the backend sees the client");
        talk_udp(&lab.client, vip(v6, 53), b"question").with_context(|| weir.explain())?;
    }
    talk_tcp(&lab.client, vip(v6, 80), BULK).with_context(|| weir.explain())?;
    Ok(())
}

#[test]
fn routed_replies4() -> Result<()> {
    routed_replies(Body::Native, false)
}

#[test]
fn routed_replies6() -> Result<()> {
    routed_replies(Body::Native, true)
}

#[test]
fn routed_replies4_by_tc_alone() -> Result<()> {
    routed_replies(Body::Tc, false)
}

#[test]
fn routed_replies6_by_tc_alone() -> Result<()> {
    routed_replies(Body::Tc, true)
}

/// A fragment whose first does not come is sent round to wait for it, then dropped, and counted; the next datagram is not
/// harmed.
fn early_fragments(body: Body) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, body, 1)?;
    let (client, node) = ([0x02, 0, 0, 0, 0, 0x0c], [0x02, 0, 0, 0, 0, 0x01]);
    lab.node.ip("link set c0 address 02:00:00:00:00:01")?;
    lab.client.ip("link set e0 address 02:00:00:00:00:0c")?;
    let backend = lab.backends[0].run(|| UdpSocket::bind(SocketAddr::new(address_of(0, false), 0)))?;
    backend.set_read_timeout(Some(PATIENCE))?;
    let weir = lab.start(&lab.config(VIP4, "53/udp", &[backend.local_addr()?]))?;
    let whole = |id: u32| {
        eth(client, node)
            .ip("192.0.2.10", VIP4)
            .udp(5000, 53)
            .payload(&bytes(id.into(), 2000))
            .id(id)
    };
    // Fragments are sent once: the way must be there before.
    let small = eth(client, node)
        .ip("192.0.2.10", VIP4)
        .udp(5001, 53)
        .payload(b"probe")
        .build();
    backend.set_read_timeout(Some(Duration::from_millis(100)))?;
    let begin = Instant::now();
    let mut probe = [0; 16];
    loop {
        lab.client.send_frame("e0", &small)?;
        if backend.recv(&mut probe).is_ok() {
            break;
        }
        anyhow::ensure!(
            begin.elapsed() < PATIENCE,
            "no datagram arrives: {}",
            weir.explain()
        );
    }
    while backend.recv(&mut probe).is_ok() {}
    backend.set_read_timeout(Some(PATIENCE))?;
    lab.client
        .send_frame("e0", &whole(9).fragment(800, 1600).build())?;
    for (from, to) in [(0, 800), (1600, 2008), (800, 1600)] {
        lab.client
            .send_frame("e0", &whole(1).fragment(from, to).build())?;
    }
    let mut buffer = vec![0; 4000];
    let length = backend.recv(&mut buffer).with_context(|| weir.explain())?;
    assert_eq!(buffer[..length], bytes(1, 2000));
    let counters = weir.counters()?;
    assert_eq!(counters["drops"]["fragment_early"], 1, "{counters}");
    assert_eq!(counters["node"]["fragments_again"], 8, "{counters}");
    Ok(())
}

#[test]
fn early_fragments_by_xdp() -> Result<()> {
    early_fragments(Body::Native)
}

#[test]
fn early_fragments_by_generic_xdp() -> Result<()> {
    early_fragments(Body::Generic)
}

#[test]
fn early_fragments_by_tc_alone() -> Result<()> {
    early_fragments(Body::Tc)
}

/// BIG TCP: segments so long that their headers cannot tell.
#[test]
fn big_tcp6_by_tc_alone() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Tc, 1)?;
    for (namespace, device) in [
        (&lab.client, "e0"),
        (&lab.node, "c0"),
        (&lab.node, "b0"),
        (&lab.backends[0], "e0"),
    ] {
        namespace.ip(&format!(
            "link set {device} gso_max_size 185000 gro_max_size 185000"
        ))?;
    }
    let servers = serve(&lab, true, false)?;
    let weir = lab.start(&lab.config(&vip(true, 0).ip().to_string(), "80/tcp", &servers))?;
    talk_tcp(&lab.client, vip(true, 80), BULK).with_context(|| weir.explain())?;
    Ok(())
}

/// The agent is away, and a backend's machine is replaced by another of the same address: the kernel learns of it, and the
/// connections of the programs go there.
fn next_hop_without_agent(body: Body, forwarding: &str, v6: bool) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, body, 1)?;
    lab.node.sysctl("net.ipv4.ip_forward", forwarding)?;
    lab.node.sysctl("net.ipv6.conf.all.forwarding", forwarding)?;
    let servers = serve(&lab, v6, false)?;
    let mut weir = lab.start(&lab.config(&vip(v6, 0).ip().to_string(), "80/tcp", &servers))?;
    let mut talk = lab.client.run(|| Talk::open(vip(v6, 80)))?;
    talk.say(1000).with_context(|| weir.explain())?;
    weir.kill();
    lab.backends[0].ip("link set e0 address 02:00:00:00:00:b9")?;
    let own = address_of(0, v6);
    lab.node.ip(&format!(
        "neigh replace {own} lladdr 02:00:00:00:00:b9 dev b0 nud reachable"
    ))?;
    // Ten seconds without a sign of life are what the programs wait for.
    let until = Instant::now() + Duration::from_secs(40);
    let new = || lab.client.run(|| Talk::open(vip(v6, 80)));
    while let Err(e) = new() {
        ensure!(
            Instant::now() < until,
            "no new connection without the agent: {e:#}"
        );
    }
    lab.client
        .run(|| talk.say(1000))
        .context("the connection of before goes on")
}

#[test]
fn next_hop_without_agent4() -> Result<()> {
    next_hop_without_agent(Body::Native, "1", false)
}

#[test]
fn next_hop_without_agent6_and_forwarding() -> Result<()> {
    next_hop_without_agent(Body::Native, "0", true)
}

#[test]
fn next_hop_without_agent4_by_tc_alone() -> Result<()> {
    next_hop_without_agent(Body::Tc, "1", false)
}
