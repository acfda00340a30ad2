//! Connections that are open when their client is banned.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::weir::Weir;

use crate::{
    lab::{Body, Lab, Wiring, address_of, service},
    talk::{PATIENCE, Talk, listen_tcp, serve_tcp, serve_udp},
    vip,
};

/// A banned client's connections end within it.
const AT_ONCE: Duration = Duration::from_secs(1);
/// How long an answer is waited for that must not come.
const SILENCE: Duration = Duration::from_millis(200);

/// Who bans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// The list for all services.
    Firewall,
    /// The services' own deny lists.
    Deny,
    /// The services' own allow lists, which have the client no more.
    Allow,
}

/// A question and its answer, over a socket with one port.
fn asks(socket: &UdpSocket) -> bool {
    let mut answer = [0; 16];
    socket.send(b"question").is_ok()
        && socket
            .recv(&mut answer)
            .is_ok_and(|length| &answer[1..length] == b"question")
}

/// A UDP client with a port of its own, and an answered conversation.
fn udp_client(source: IpAddr, to: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(SocketAddr::new(source, 0))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    ensure!(asks(&socket) && asks(&socket), "no answer");
    socket.set_read_timeout(Some(SILENCE))?;
    Ok(socket)
}

/// Talks until the connection is reset; how long after `began` that was.
fn reset_after(began: Instant, mut exchange: impl FnMut() -> std::io::Result<()>) -> Result<Duration> {
    loop {
        match exchange() {
            Ok(()) => ensure!(began.elapsed() < PATIENCE, "the connection goes on"),
            Err(e) => {
                ensure!(
                    matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
                    "not reset, but {e}"
                );
                return Ok(began.elapsed());
            }
        }
        std::thread::yield_now();
    }
}

fn drops(weir: &Weir<'_>, reason: &str) -> Result<u64> {
    weir.counters()?["drops"][reason]
        .as_u64()
        .context("no such counter")
}

fn banned(body: Body, v6: bool, by: By) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, body, 1)?;
    let (client, friend, network) = if v6 {
        ("2001:db8:c::10", "2001:db8:c::99", "64")
    } else {
        ("192.0.2.10", "192.0.2.99", "24")
    };
    lab.client.address("e0", &format!("{friend}/{network}"))?;
    // Of its two addresses the first is the one that connects.
    let (to, via) = if v6 {
        ("2001:db8:f::1/128", "2001:db8:c::1")
    } else {
        ("198.51.100.1/32", "192.0.2.1")
    };
    lab.client
        .ip(&format!("route replace {to} via {via} src {client}"))?;
    let at = |port| SocketAddr::new(address_of(0, v6), port);
    let web = serve_tcp(&lab.backends[0], 0, at(0))?;
    let pushing = listen_tcp(&lab.backends[0], at(0))?;
    let dns = serve_udp(&lab.backends[0], 0, at(0))?;
    let config = |ban: bool| {
        let all = if v6 { "::/0" } else { "0.0.0.0/0" };
        let (firewall, more) = match by {
            By::Firewall if ban => (format!("\"{client}\""), String::new()),
            By::Deny if ban => (String::new(), format!("deny = [\"{client}\"]")),
            By::Allow if ban => (String::new(), format!("allow = [\"{friend}\"]")),
            By::Allow => (String::new(), format!("allow = [\"{all}\"]")),
            _ => (String::new(), String::new()),
        };
        lab.head(&format!(
            "[vips.lab]\naddress = \"{}\"\n[limits]\nflows4 = 4096\nflows6 = 4096\n\
             [firewall]\ndeny = [{firewall}]\n",
            vip(v6, 0).ip()
        )) + &service("web", "80/tcp", &more, &[web])
            + &service("push", "81/tcp", &more, &[pushing.local_addr().expect("bound")])
            + &service("dns", "53/udp", &more, &[dns])
    };
    let weir = lab.start(&config(false))?;
    lab.client.run(|| {
        let mut talk = Talk::open(vip(v6, 80))?;
        talk.say(100)?;
        let mut pushed = TcpStream::connect_timeout(&vip(v6, 81), PATIENCE)?;
        pushed.set_read_timeout(Some(PATIENCE))?;
        let (mut pusher, _) = pushing.accept()?;
        pusher.set_read_timeout(Some(Duration::from_millis(10)))?;
        pusher.write_all(b"!")?;
        pushed.read_exact(&mut [0])?;
        let question = udp_client(client.parse()?, vip(v6, 53))?;
        let other = udp_client(friend.parse()?, vip(v6, 53))?;
        let opened = drops(&weir, "acl_denied")?;

        weir.configure(&config(true))?;
        let began = Instant::now();
        let client_saw = reset_after(began, || {
            talk.say(10).map_err(|e| {
                let kind = e.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
                std::io::Error::new(kind.unwrap_or(ErrorKind::Other), e)
            })
        })
        .with_context(|| weir.explain())?;
        // The backend speaks first on this one: its packet is answered, too.
        let backend_saw = reset_after(began, || {
            pusher.write_all(b"!")?;
            match pusher.read(&mut [0]) {
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(()),
                Err(e) => Err(e),
                Ok(_) => Ok(()),
            }
        })
        .with_context(|| weir.explain())?;
        println!("reset after {client_saw:?} (client), {backend_saw:?} (backend)");
        ensure!(
            client_saw < AT_ONCE && backend_saw < AT_ONCE,
            "{}",
            weir.explain()
        );
        ensure!(!asks(&question), "a banned client is answered");
        ensure!(drops(&weir, "acl_denied")? > opened, "{}", weir.explain());
        // Who is not banned has lost nothing.
        ensure!(asks(&other), "another client is hurt: {}", weir.explain());

        weir.configure(&config(false))?;
        let until = Instant::now() + PATIENCE;
        while !asks(&question) {
            ensure!(Instant::now() < until, "banned for ever: {}", weir.explain());
        }
        Talk::open(vip(v6, 80))?.say(100)
    })
}

#[test]
fn a_ban_ends_open_connections4() -> Result<()> {
    banned(Body::Native, false, By::Firewall)
}

#[test]
fn a_ban_ends_open_connections6_by_tc_alone() -> Result<()> {
    banned(Body::Tc, true, By::Firewall)
}

#[test]
fn a_service_s_deny_list_ends_open_connections4_by_tc_alone() -> Result<()> {
    banned(Body::Tc, false, By::Deny)
}

#[test]
fn a_service_s_allow_list_ends_open_connections6() -> Result<()> {
    banned(Body::Native, true, By::Allow)
}
