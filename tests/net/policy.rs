//! What a service may be told: affinity, allow and deny, every port; and what its VIP answers by itself.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::FromRawFd as _,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{netns::Namespace, weir::Weir};

use crate::{
    FLOWS,
    lab::{Body, Lab, VIP4, VIP6, Wiring, address_of, service},
    serve,
    talk::{PATIENCE, serve_tcp, talk_tcp},
    vip,
};

/// A second VIP, all of whose ports are served.
const EVERY4: &str = "198.51.100.2";
const EVERY6: &str = "2001:db8:f::2";
/// How long a connection is waited for that must not come about.
const SILENCE: Duration = Duration::from_millis(300);

fn policies(body: Body, v6: bool) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, body, 4)?;
    let (every, via) = if v6 {
        (EVERY6, "2001:db8:c::1")
    } else {
        (EVERY4, "192.0.2.1")
    };
    lab.client.ip(&format!("route add {every} via {via}"))?;
    let servers = serve(&lab, v6, false)?;
    let own = vip(v6, 0).ip();
    let any_port: Vec<SocketAddr> = servers.iter().map(|s| SocketAddr::new(s.ip(), 0)).collect();
    let (client, others) = if v6 {
        ("2001:db8:c::10", "2001:db8:c::10/127")
    } else {
        ("192.0.2.10", "192.0.2.10/31")
    };
    let on = |more: &str| format!("vip = \"{own}\"\n{more}");
    let config = lab.head(&format!("[vips.lab]\naddress = [\"{own}\", \"{every}\"]\n"))
        + &service("sticky", "81/tcp", &on("affinity = \"client-ip\""), &servers)
        + &service(
            "denied",
            "82/tcp",
            &on(&format!("deny = [\"{client}\"]")),
            &servers,
        )
        + &service(
            "allowed",
            "83/tcp",
            &on(&format!("allow = [\"{others}\"]")),
            &servers,
        )
        + &service(
            "others",
            "84/tcp",
            &on(&format!("allow = [\"{others}\"]\ndeny = [\"{client}\"]")),
            &servers,
        )
        + &service("every", "*/tcp", &format!("vip = \"{every}\""), &any_port);
    let weir = lab.start(&config)?;
    let at = |port| SocketAddr::new(own, port);
    let talk = |to| talk_tcp(&lab.client, to, 100).with_context(|| weir.explain());

    let sticky = (0..FLOWS)
        .map(|_| talk(at(81)))
        .collect::<Result<BTreeSet<_>>>()?;
    assert_eq!(sticky.len(), 1, "one client, one backend: {sticky:?}");
    talk(at(83))?;
    for port in [82, 84] {
        let refused = lab.client.run(|| TcpStream::connect_timeout(&at(port), SILENCE));
        assert!(refused.is_err(), "port {port} took a client that is denied");
    }
    let denied = weir.counters()?["drops"]["acl_denied"].as_u64();
    ensure!(denied.is_some_and(|n| n >= 2), "{}", weir.explain());

    // Two servers on ports that the configuration never names.
    let mut port = 0;
    for (i, backend) in lab.backends.iter().enumerate() {
        port = serve_tcp(backend, 10 + i, SocketAddr::new(address_of(i, v6), port))?.port();
    }
    let every: IpAddr = every.parse()?;
    ensure!(talk(SocketAddr::new(every, servers[0].port()))?.index < 4);
    ensure!(talk(SocketAddr::new(every, port))?.index >= 10);
    echo(&lab.client, &weir, own)
}

/// An ICMP echo to a VIP is answered.
fn echo(client: &Namespace, weir: &Weir<'_>, vip: IpAddr) -> Result<()> {
    let (family, protocol, request, reply, header) = if vip.is_ipv6() {
        (libc::AF_INET6, libc::IPPROTO_ICMPV6, 128, 129, 0)
    } else {
        (libc::AF_INET, libc::IPPROTO_ICMP, 8, 0, 20)
    };
    let mut message = vec![request, 0, 0, 0, 0x12, 0x34, 0, 1];
    message.extend(b"is the VIP alive");
    if !vip.is_ipv6() {
        let words = message
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
        let sum = words.sum::<u32>();
        let check = !((sum & 0xffff) + (sum >> 16)) as u16;
        message[2..4].copy_from_slice(&check.to_be_bytes());
    }
    client.run(|| {
        // SAFETY: a system call without pointers.
        let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
        ensure!(fd >= 0, "raw socket: {}", std::io::Error::last_os_error());
        // SAFETY: the kernel just gave it to us; sending and receiving datagrams is all that is done with it.
        let socket = unsafe { UdpSocket::from_raw_fd(fd) };
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send_to(&message, SocketAddr::new(vip, 0))?;
        let mut answer = [0; 200];
        loop {
            let (length, from) = socket.recv_from(&mut answer).with_context(|| weir.explain())?;
            // Neighbour discovery and our own request pass by here too.
            if from.ip() == vip && length > header && answer[header] == reply {
                ensure!(
                    answer[header + 4..length] == message[4..],
                    "another echo came back"
                );
                return Ok(());
            }
        }
    })
}

#[test]
fn policies4() -> Result<()> {
    policies(Body::Native, false)
}

#[test]
fn policies6_by_tc_alone() -> Result<()> {
    policies(Body::Tc, true)
}

/// Both families of one VIP, and what is no service's business: another port of it is not answered.
#[test]
fn a_port_without_a_service_is_silent() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Native, 1)?;
    let mut servers = serve(&lab, false, false)?;
    servers.extend(serve(&lab, true, false)?);
    let head = lab.head(&format!("[vips.lab]\naddress = [\"{VIP4}\", \"{VIP6}\"]\n"));
    let config = head
        + &service("four", "80/tcp", &format!("vip = \"{VIP4}\""), &servers[..1])
        + &service("six", "80/tcp", &format!("vip = \"{VIP6}\""), &servers[1..]);
    let weir = lab.start(&config)?;
    for v6 in [false, true] {
        talk_tcp(&lab.client, vip(v6, 80), 1000).with_context(|| weir.explain())?;
        let other = lab
            .client
            .run(|| TcpStream::connect_timeout(&vip(v6, 81), SILENCE));
        assert!(other.is_err(), "nobody serves port 81");
    }
    Ok(())
}

/// A file of the operator's bans a client from every service at once, and lets it in again.
fn firewall(body: Body, v6: bool) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, body, 1)?;
    let servers = serve(&lab, v6, false)?;
    let own = vip(v6, 0).ip();
    let (client, others) = if v6 {
        ("2001:db8:c::/64", "2001:db8:d::/64")
    } else {
        ("192.0.2.10", "192.0.2.11")
    };
    let with = |deny: &str| {
        lab.head(&format!(
            "[vips.lab]\naddress = \"{own}\"\n[firewall]\ndeny = [{deny}]\n"
        )) + &service("one", "80/tcp", "", &servers)
            + &service("two", "81/tcp", &format!("allow = [\"{client}\"]"), &servers)
    };
    let weir = lab.start(&with(""))?;
    let denied = |weir: &Weir<'_>| Ok::<_, anyhow::Error>(weir.counters()?["drops"]["acl_denied"].as_u64());
    for (deny, serves) in [
        (String::new(), true),
        (format!("\"{client}\", \"{others}\""), false),
        (format!("\"{others}\""), true),
    ] {
        weir.configure(&with(&deny))?;
        let list: Vec<String> = deny
            .split(", ")
            .filter(|p| !p.is_empty())
            .map(str::to_owned)
            .collect();
        weir.await_dump("the list is in force", |dump| {
            let entries = dump.acl.keys().filter(|(service, _)| *service == 0).count();
            entries == list.len()
        })?;
        for port in [80, 81] {
            let to = vip(v6, port);
            if serves {
                talk_tcp(&lab.client, to, 1000).with_context(|| weir.explain())?;
            } else {
                let before = denied(&weir)?;
                let refused = lab.client.run(|| TcpStream::connect_timeout(&to, SILENCE));
                ensure!(refused.is_err(), "a denied client reaches port {port}");
                assert!(denied(&weir)? > before, "{}", weir.explain());
            }
        }
    }
    Ok(())
}

#[test]
fn the_firewall4() -> Result<()> {
    firewall(Body::Native, false)
}

#[test]
fn the_firewall6_by_tc_alone() -> Result<()> {
    firewall(Body::Tc, true)
}

/// What an operator sees of announcements and of the end.
#[test]
fn vips_are_announced_on_demand_and_routes_named_at_the_end() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Tc, 1)?;
    let servers = serve(&lab, false, false)?;
    let head = lab.head(&format!(
        "[vips.here]\naddress = \"203.0.113.80\"\nannounce = \"address\"\ninterface = \"b0\"\n\
         [vips.routed]\naddress = \"{VIP4}\"\n"
    ));
    let config = head
        + &service("here", "80/tcp", "vip = \"here\"", &servers)
        + &service("routed", "80/tcp", "vip = \"routed\"", &servers);
    let mut weir = lab.start(&config)?;
    weir.await_dump("both are served", |dump| dump.services.len() == 2)?;
    let told = |words: &[&str]| -> Result<(bool, String)> {
        let output = weir.cli(words)?;
        let both = [output.stdout, output.stderr].concat();
        Ok((
            output.status.success(),
            String::from_utf8_lossy(&both).into_owned(),
        ))
    };
    for words in [&["announce"][..], &["announce", "203.0.113.80"]] {
        assert_eq!(
            told(words)?,
            (true, "203.0.113.80 is announced on b0\n".to_owned())
        );
    }
    let (good, text) = told(&["announce", VIP4])?;
    assert!(!good && text.contains("announce = \"address\""), "{text}");
    let path = weir.config_path();
    weir.kill();
    let output = weir.cli(&["detach", "--config", &path.to_string_lossy()])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    assert!(
        text.contains(&format!("`ip route add unreachable {VIP4}/32`")),
        "{text}"
    );
    assert!(!text.contains("unreachable 203.0.113.80"), "{text}");
    Ok(())
}
