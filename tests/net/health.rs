//! Health: a backend that fails its check, or that refuses connections, is left alone, and nobody else notices.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{listen::hang_up, netns::Namespace, weir::Weir};
use serde_json::Value;

use crate::{
    answered,
    lab::{Body, Lab, VIP4, Wiring, address_of, container_address, service},
    load::under_load,
    talk::{PATIENCE, Talk, listen_tcp, serve_on, serve_tcp, talk_tcp},
    vip,
};

/// Containers of the service.
const BACKENDS: usize = 6;

/// A health page in a namespace that answers with the status it is told, on any port if the address has none.
fn page(namespace: &Namespace, address: SocketAddr) -> Result<(SocketAddr, Arc<AtomicU16>)> {
    let listener = listen_tcp(namespace, address)?;
    let address = listener.local_addr()?;
    let status = Arc::new(AtomicU16::new(200));
    let told = Arc::clone(&status);
    // Ends when the process does.
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A prober that goes away loses its answer.
            let _ = answer(stream, told.load(Ordering::Relaxed));
        }
    });
    Ok((address, status))
}

fn answer(mut stream: std::net::TcpStream, status: u16) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = if line.starts_with("GET /health ") {
        status
    } else {
        404
    };
    while line.len() > 2 {
        line.clear();
        reader.read_line(&mut line)?;
    }
    Ok(write!(
        stream,
        "HTTP/1.1 {status} Told\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )?)
}

/// One backend of the only service as the status has it.
fn backend(status: &Value, index: usize) -> &Value {
    &status["services"][0]["backends"][index]
}

/// Its share of the ring, parts per 10,000.
fn share(status: &Value, index: usize) -> u64 {
    backend(status, index)["ring_share"].as_u64().unwrap_or(0)
}

/// All backends have about the same share.
fn even(status: &Value, backends: usize) -> bool {
    let fair = 10_000 / backends as u64;
    (0..backends).all(|i| share(status, i).abs_diff(fair) < fair / 10)
}

fn reason(status: &Value, index: usize) -> &str {
    backend(status, index)["reason"].as_str().unwrap_or("")
}

#[test]
fn a_failing_check_takes_a_backend_out_and_a_passing_one_brings_it_back() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Native, 0)?;
    let (mut servers, mut pages) = (Vec::new(), Vec::new());
    // Every namespace has its own ports: what is free in the first is free in all.
    let (mut service_port, mut port) = (0, 0);
    let containers = lab.containers(BACKENDS)?;
    for (i, namespace) in containers.iter().enumerate() {
        let ip = container_address(i, false);
        let server = serve_tcp(namespace, i, SocketAddr::new(ip, service_port))?;
        let (address, status) = page(namespace, SocketAddr::new(ip, port))?;
        (service_port, port) = (server.port(), address.port());
        servers.push(server);
        pages.push(status);
    }
    let head = lab.head(&format!(
        "[vips.lab]\naddress = \"{VIP4}\"\n[defaults.check]\nkind = \"http\"\nport = {port}\npath = \"/health\"\n\
         interval = \"300ms\"\nfast-interval = \"100ms\"\nslow-start = \"3s\"\nrise = 2\nfall = 2\n"
    ));
    let mut weir = lab.start(&(head + &service("lab", "80/tcp", "", &servers)))?;
    weir.await_status("serving by all", |status| even(status, BACKENDS))?;
    let to = vip(false, 80);

    let ((), met) = under_load(&lab.client, to, |_| {
        pages[1].store(500, Ordering::Relaxed);
        weir.await_status("without the failing one", |status| share(status, 1) == 0)?;
        let status = weir.status()?;
        ensure!(
            backend(&status, 1)["state"] == "unready"
                && reason(&status, 1) == "check: http: 500 Internal Server Error",
            "{status:#}"
        );
        let said = &backend(&status, 1)["conditions"];
        ensure!(
            said[0]["by"] == "file"
                && said[0]["fit"] == true
                && said[1]["by"] == "check"
                && said[1]["fit"] == false,
            "{said:#}"
        );
        ensure!(
            answered(&weir, &lab.client, to)? == [0, 2, 3, 4, 5].into(),
            "the failing one serves"
        );
        let text = String::from_utf8(weir.cli(&["status"])?.stdout)?;
        ensure!(text.contains("check: http: 500 Internal Server Error"), "{text}");

        pages[1].store(204, Ordering::Relaxed);
        weir.await_status("serving a little by it", |status| {
            let tenths = backend(status, 1)["tenths"].as_u64();
            (1..1400).contains(&share(status, 1)) && tenths.is_some_and(|tenths| tenths < 10)
        })?;
        weir.await_status("serving by all again", |status| {
            even(status, BACKENDS) && backend(status, 1)["tenths"].is_null()
        })?;
        ensure!(
            answered(&weir, &lab.client, to)? == (0..BACKENDS as u8).collect(),
            "not all serve"
        );
        Ok(())
    })?;
    met.judge_with(&weir)?;

    // An agent that starts anew believes the maps until its checks have spoken.
    pages[1].store(500, Ordering::Relaxed);
    weir.await_status("without it again", |status| share(status, 1) == 0)?;
    weir.kill();
    weir.run()?;
    let status = weir.status()?;
    ensure!(share(&status, 1) == 0 && share(&status, 0) > 1800, "{status:#}");

    // All of them fail: the policy for services without backends, which refuses, and open connections go on.
    let mut open = lab.client.run(|| Talk::open(to))?;
    for page in &pages {
        page.store(503, Ordering::Relaxed);
    }
    weir.await_status("without anybody", |status| {
        (0..BACKENDS).all(|i| share(status, i) == 0)
    })?;
    let refused = lab.client.run(|| Talk::open(to));
    ensure!(refused.is_err(), "an empty service answered");
    open.say(1000).context("an open connection was harmed")?;
    pages[2].store(200, Ordering::Relaxed);
    weir.await_status("with the only one", |status| share(status, 2) == 10_000)?;
    ensure!(talk_tcp(&lab.client, to, 100)?.index == 2, "another one answered");
    Ok(())
}

/// Four backends with passive ejection and short times, one of which `spoil` makes useless and `mend` good again.
fn ejected(
    spoil: impl FnOnce(&Lab, TcpListener) -> Result<Option<TcpListener>>,
    mend: impl FnOnce(&Lab, SocketAddr, Option<TcpListener>) -> Result<()>,
) -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Native, 4)?;
    let listener = listen_tcp(&lab.backends[0], SocketAddr::new(address_of(0, false), 0))?;
    let address = listener.local_addr()?;
    for i in 1..4 {
        serve_tcp(
            &lab.backends[i],
            i,
            SocketAddr::new(address_of(i, false), address.port()),
        )?;
    }
    let config = lab.config(VIP4, "80/tcp", &lab.servers(false, address.port()))
        + "[defaults.passive]\nenabled = true\nfailures = 3\neject = \"8s\"\n";
    let mut weir = lab.start(&config)?;
    weir.await_status("serving by all", |status| even(status, 4))?;
    let to = vip(false, 80);
    let kept = spoil(&lab, listener)?;
    let resteered = |weir: &Weir<'_>| -> Result<u64> {
        weir.counters()?["node"]["resteered"]
            .as_u64()
            .context("no such counter")
    };

    // Connections succeed all the while: those that meet the bad one are sent elsewhere.
    // The agent looks at the counters once a second, however many there are.
    let until = Instant::now() + PATIENCE;
    while share(&weir.status()?, 0) > 0 {
        talk_tcp(&lab.client, to, 100).with_context(|| weir.explain())?;
        ensure!(Instant::now() < until, "never ejected: {}", weir.explain());
    }
    let status = weir.status()?;
    ensure!(
        reason(&status, 0).starts_with("passive: ") && reason(&status, 0).ends_with("out for 8s, time 1"),
        "{status:#}"
    );
    let before = resteered(&weir)?;
    ensure!(
        answered(&weir, &lab.client, to)? == [1, 2, 3].into(),
        "the ejected one answers"
    );
    ensure!(
        resteered(&weir)? == before,
        "the ejected one was tried: {}",
        weir.explain()
    );

    // It comes back by itself, and stays as it is well.
    mend(&lab, address, kept)?;
    weir.await_status("back", |status| even(status, 4))?;
    ensure!(
        answered(&weir, &lab.client, to)? == [0, 1, 2, 3].into(),
        "it is back and does not serve"
    );
    let status = weir.status()?;
    let said = backend(&status, 0)["conditions"].to_string();
    ensure!(said.contains("back after an ejection"), "{said}");
    Ok(())
}

#[test]
fn a_backend_that_refuses_is_ejected_and_comes_back() -> Result<()> {
    ejected(
        |_, listener| {
            hang_up(&listener)?;
            Ok(None)
        },
        |lab, address, _| serve_tcp(&lab.backends[0], 0, address).map(drop),
    )
}

#[test]
fn a_backend_that_says_nothing_is_ejected_and_comes_back() -> Result<()> {
    // What it would answer to the balancer goes nowhere.
    let hole = "blackhole 203.0.113.1/32";
    ejected(
        |lab, listener| {
            lab.backends[0].ip(&format!("route add {hole}"))?;
            Ok(Some(listener))
        },
        |lab, _, listener| {
            lab.backends[0].ip(&format!("route del {hole}"))?;
            serve_on(listener.context("kept")?, 0);
            Ok(())
        },
    )
}
