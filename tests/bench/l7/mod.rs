//! The L7 shim beside HAProxy and nginx with the same routes by host, in turns.

mod proxy;

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::net::{
    middle,
    rig::{Ask, BACKENDS, Load, PORT, Rig, VIP},
    spread,
};
use proxy::{HOST, Proxy, TLS_PORT};

/// Turns of every proxy, if there is time.
const ROUNDS: usize = 5;
/// No round starts later than this.
const LIMIT: Duration = Duration::from_secs(240);
/// Seconds of each load.
const SECONDS: u32 = 2;
/// Connections that are open and say nothing: HAProxy wants two files for each, and some are for other things.
const IDLE: usize = 9_000;
/// How long they have said nothing when memory is read.
const QUIET: Duration = Duration::from_secs(3);
/// How long the answer to one request may take.
const ANSWER: Duration = Duration::from_secs(20);
/// Changes during one load, and the time between them.
const CHANGES: usize = 10;
const PAUSE: Duration = Duration::from_millis(400);
/// Seconds of load around them.
const CHANGE_SECONDS: u32 = 6;

/// A load.
struct Case {
    name: &'static str,
    path: &'static str,
    /// Each request has a connection of its own.
    close: bool,
    tls: bool,
}

const CASES: [Case; 5] = [
    case("keep-alive requests", "/", false, false),
    case("new connections", "/", true, false),
    case("64 KiB answers", "/64k", false, false),
    case("keep-alive requests by TLS", "/", false, true),
    case("new connections by TLS", "/", true, true),
];

const fn case(name: &'static str, path: &'static str, close: bool, tls: bool) -> Case {
    Case {
        name,
        path,
        close,
        tls,
    }
}

/// What was found, by load and proxy, a value a round.
type Found = BTreeMap<(usize, Proxy), Vec<Load>>;

pub fn run() -> Result<()> {
    let rig = Rig::new()?;
    proxy::certificates(&rig)?;
    let mut found = Found::new();
    let start = Instant::now();
    for round in (0..ROUNDS).take_while(|_| start.elapsed() < LIMIT) {
        // Each round begins with another one, so that none has always the same predecessor.
        for turn in 0..Proxy::ALL.len() {
            let proxy = Proxy::ALL[(round + turn) % Proxy::ALL.len()];
            let _running = proxy.start(&rig)?;
            for (index, case) in CASES.iter().enumerate() {
                let load = rig.wrk(ask(case, SECONDS, &url(case.tls)))?;
                found.entry((index, proxy)).or_default().push(load);
            }
        }
        eprintln!("round {} of {ROUNDS}", round + 1);
    }
    for (index, case) in CASES.iter().enumerate() {
        table(case.name, index, &found);
    }
    memory(&rig)?;
    failures(&rig)
}

/// Has a shim that counts what it does serve every load, and HTTP/2, for `cargo xtask profile`; it writes when it ends.
pub fn profile() -> Result<()> {
    let rig = Rig::new()?;
    proxy::certificates(&rig)?;
    let _running = Proxy::Weir.start(&rig)?;
    for case in &CASES {
        rig.wrk(ask(case, SECONDS, &url(case.tls)))?;
    }
    let mut h2load = rig.client.command("h2load");
    h2load.args(["-c", "8", "-m", "8", "-D", &SECONDS.to_string()]);
    h2load.args(["-H", &format!(":authority: {HOST}"), &url(true)]);
    let output = h2load.output().context("h2load")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(text.contains(" 0 failed, 0 errored"), "h2load: {text}");
    Ok(())
}

fn url(tls: bool) -> String {
    match tls {
        // wrk sends the name of the URL as SNI, and no certificate is looked at.
        true => format!("https://{VIP}:{TLS_PORT}"),
        false => format!("http://{VIP}:{PORT}"),
    }
}

fn ask<'a>(case: &Case, seconds: u32, url: &'a str) -> Ask<'a> {
    Ask {
        url,
        path: case.path,
        host: HOST,
        close: case.close,
        seconds,
    }
}

/// Median over the rounds, and the ratios to the better of the other two in the same round: median, lowest and highest.
fn table(name: &str, index: usize, found: &Found) {
    let of = |proxy: Proxy| &found[&(index, proxy)];
    println!(
        "\n{name}, median of {} rounds of {SECONDS} s; in brackets the ratio to the better of HAProxy and nginx in the same \
         round: median (lowest–highest)\n{:<10} {:>28} {:>28} {:>28} {:>28} {:>7}",
        of(Proxy::Weir).len(),
        "proxy",
        "per s",
        "p50 ms",
        "p99 ms",
        "CPU µs/req",
        "errors"
    );
    for proxy in Proxy::ALL {
        let column = |value: fn(&Load) -> f64, better: fn(f64, f64) -> f64| {
            let others = of(Proxy::Haproxy).iter().zip(of(Proxy::Nginx));
            let ratios = of(proxy)
                .iter()
                .zip(others)
                .map(|(own, (a, b))| value(own) / better(value(a), value(b)));
            let median = middle(of(proxy).iter().map(value).collect());
            let digits = if median < 100.0 { 2 } else { 0 };
            format!("{median:.digits$} [{}]", spread(ratios.collect()))
        };
        println!(
            "{:<10} {:>28} {:>28} {:>28} {:>28} {:>7}",
            proxy.name(),
            column(|l| l.rate, f64::max),
            column(|l| l.p50, f64::min),
            column(|l| l.p99, f64::min),
            column(|l| l.cpu, f64::min),
            of(proxy).iter().map(|l| l.errors).sum::<u64>()
        );
    }
}

/// Memory without clients, and with so many that have asked once and stay.
fn memory(rig: &Rig) -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // What the proxies inherit too.
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    println!(
        "\nmemory (PSS), MiB, {QUIET:?} after the last answer\n{:<10} {:>10} {:>22} {:>22}",
        "proxy",
        "no clients",
        format!("{IDLE} idle clients"),
        "KiB for each"
    );
    for proxy in Proxy::ALL {
        let running = proxy.start(rig)?;
        let before = running.memory()?;
        let clients = rig
            .client
            .run(|| (0..IDLE).map(|_| idle()).collect::<Result<Vec<_>>>())?;
        std::thread::sleep(QUIET);
        let with = running.memory()?;
        drop(clients);
        println!(
            "{:<10} {:>10.1} {:>22.1} {:>22.2}",
            proxy.name(),
            before as f64 / 1024.0,
            with as f64 / 1024.0,
            with.saturating_sub(before) as f64 / IDLE as f64
        );
    }
    Ok(())
}

/// A connection that has had one answer.
fn idle() -> Result<TcpStream> {
    let mut stream = TcpStream::connect(SocketAddr::new(VIP.parse()?, PORT))?;
    stream.set_read_timeout(Some(ANSWER))?;
    // One segment: the rest of a request in pieces waits for a delayed acknowledgement, 40 ms a client.
    stream.write_all(format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n").as_bytes())?;
    let mut answer = [0; 4096];
    let mut length = 0;
    // The servers' page ends in a dot and has no other end of a header.
    while !answer[..length].windows(5).any(|end| end == b"\r\n\r\n.") {
        let more = stream.read(&mut answer[length..])?;
        ensure!(more > 0, "closed: {}", String::from_utf8_lossy(&answer[..length]));
        length += more;
    }
    ensure!(
        answer.starts_with(b"HTTP/1.1 200"),
        "{}",
        String::from_utf8_lossy(&answer[..length])
    );
    Ok(stream)
}

/// Requests that fail while servers leave and come back.
fn failures(rig: &Rig) -> Result<()> {
    println!(
        "\nfailed requests during {CHANGES} changes of the set of servers in {CHANGE_SECONDS} s of load\n{:<10} {:>24} {:>24}",
        "proxy", "a connection a request", "keep-alive"
    );
    for proxy in Proxy::ALL {
        let mut found = Vec::new();
        for close in [true, false] {
            let mut running = proxy.start(rig)?;
            let case = case("", "/", close, false);
            let url = url(false);
            let load = std::thread::scope(|scope| {
                let load = scope.spawn(|| rig.wrk(ask(&case, CHANGE_SECONDS, &url)));
                for change in 0..CHANGES {
                    std::thread::sleep(PAUSE);
                    running.change(BACKENDS - 1 + change % 2)?;
                }
                load.join().ok().context("the load panicked")?
            })?;
            found.push(format!(
                "{} of {:.0}",
                load.errors,
                load.rate * f64::from(CHANGE_SECONDS)
            ));
        }
        println!("{:<10} {:>24} {:>24}", proxy.name(), found[0], found[1]);
    }
    Ok(())
}
