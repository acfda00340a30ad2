//! Clients of the test server: single conversations, and many of them side by side whose every failure is counted.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::netns::Namespace;

/// Longest wait for a connection or an answer: more than three retransmitted SYNs.
const PATIENCE: Duration = Duration::from_secs(15);
/// Pause of a client between two conversations: the pace of the load.
const PACE: Duration = Duration::from_millis(4);
/// A handshake that took longer lost a packet: a SYN is retransmitted after a second.
pub const RETRANSMITTED: Duration = Duration::from_millis(900);

/// Who answered, and as whom he saw the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub server: String,
    pub client: SocketAddr,
}

/// A connection to the test server.
#[derive(Debug)]
pub struct Talk {
    reader: BufReader<TcpStream>,
    count: u64,
}

impl Talk {
    /// Connects from the calling thread's namespace.
    pub fn open(to: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&to, PATIENCE).context("connect")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            reader: BufReader::new(stream),
            count: 0,
        })
    }

    /// Our own address and port.
    pub fn local(&self) -> Result<SocketAddr> {
        Ok(self.reader.get_ref().local_addr()?)
    }

    /// Says a line nobody said before and takes the answer to it.
    pub fn say(&mut self) -> Result<Answer> {
        self.count += 1;
        let line = format!("question-{}", self.count);
        writeln!(self.reader.get_mut(), "{line}").context("send")?;
        let mut answer = String::new();
        let length = self.reader.read_line(&mut answer).context("receive")?;
        ensure!(length > 0, "receive: closed by the other side");
        let mut words = answer.split_whitespace();
        let (server, client) = (words.next(), words.next());
        ensure!(words.next() == Some(&line), "another's answer: {answer}");
        Ok(Answer {
            server: server.context("no name")?.to_owned(),
            client: client.context("no client")?.parse()?,
        })
    }
}

impl Namespace {
    /// One conversation from here.
    pub fn talk(&self, to: SocketAddr) -> Result<Answer> {
        self.run(|| {
            let mut talk = Talk::open(to)?;
            let answer = talk.say()?;
            ensure!(
                answer.client.port() == talk.local()?.port() || answer.client.ip() != talk.local()?.ip(),
                "the port changed though the address did not"
            );
            Ok(answer)
        })
    }

    /// One request for a host from here, on a connection of its own. An answer other than 200 is the error.
    pub fn fetch(&self, to: SocketAddr, host: &str) -> Result<Answer> {
        self.run(|| fetch(to, host))
    }
}

/// What a load has seen so far.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Conversations that went well, by server.
    pub served: BTreeMap<String, u64>,
    /// What went wrong, in words.
    pub failures: Vec<String>,
    /// Handshakes that needed a second SYN.
    pub slow: u64,
    /// Client addresses that the servers saw.
    pub seen_as: BTreeMap<IpAddr, u64>,
}

impl Report {
    /// Conversations that went well.
    pub fn total(&self) -> u64 {
        self.served.values().sum()
    }

    /// Conversations by server since an earlier report of the same load.
    pub fn since(&self, earlier: &Self) -> BTreeMap<String, u64> {
        let before = |server| earlier.served.get(server).copied().unwrap_or(0);
        self.served
            .iter()
            .map(|(server, count)| (server.clone(), count - before(server)))
            .collect()
    }
}

/// Clients at work until it is dropped or stopped.
#[derive(Debug, Default)]
pub struct Load {
    stop: Arc<AtomicBool>,
    report: Arc<Mutex<Report>>,
    workers: Vec<std::thread::JoinHandle<()>>,
}

impl Load {
    /// `workers` clients that connect, talk and close, one connection after the other, and `keepers` that stay on one
    /// connection for as long as its server lets them.
    pub fn start(from: &Namespace, to: SocketAddr, workers: usize, keepers: usize) -> Self {
        let mut load = Self::default();
        for index in 0..workers + keepers {
            load.client(from, move |stop, report| {
                if index < workers {
                    once(to, report)
                } else {
                    keep(to, stop, report)
                }
            });
        }
        load
    }

    /// `workers` clients that ask each of these hosts in turn by HTTP, one connection after the other.
    pub fn start_http(from: &Namespace, to: SocketAddr, hosts: &[&str], workers: usize) -> Self {
        let mut load = Self::default();
        for _ in 0..workers {
            let hosts: Vec<String> = hosts.iter().map(|&host| host.to_owned()).collect();
            load.client(from, move |_, report| {
                for host in &hosts {
                    record(report, fetch(to, host)?);
                }
                Ok(())
            });
        }
        load
    }

    /// One more client, which does this again and again.
    fn client(
        &mut self,
        from: &Namespace,
        work: impl Fn(&AtomicBool, &Mutex<Report>) -> Result<()> + Send + 'static,
    ) {
        let (stop, report) = (Arc::clone(&self.stop), Arc::clone(&self.report));
        let work = move || {
            while !stop.load(Ordering::Relaxed) {
                if let Err(fault) = work(&stop, &report) {
                    lock(&report).failures.push(format!("{fault:#}"));
                }
                std::thread::sleep(PACE);
            }
        };
        // Threads made in the namespace stay in it.
        self.workers.push(from.run(|| std::thread::spawn(work)));
    }

    /// What has been seen so far.
    pub fn report(&self) -> Report {
        lock(&self.report).clone()
    }

    /// Waits until so many more conversations have gone well or something has failed.
    pub fn await_more(&self, count: u64) -> Result<()> {
        let (from, until) = (self.report(), Instant::now() + 4 * PATIENCE);
        loop {
            let now = self.report();
            if now.total() >= from.total() + count || now.failures.len() > from.failures.len() {
                return Ok(());
            }
            ensure!(Instant::now() < until, "the load stands still: {now:?}");
            std::thread::sleep(PACE);
        }
    }

    /// Ends the clients and returns all that they saw.
    pub fn stop(mut self) -> Report {
        self.end();
        self.report()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            // A worker that panicked has said so itself.
            let _ = worker.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

fn lock(report: &Mutex<Report>) -> std::sync::MutexGuard<'_, Report> {
    report.lock().expect("no holder panics")
}

fn record(report: &Mutex<Report>, answer: Answer) {
    let mut report = lock(report);
    *report.served.entry(answer.server).or_default() += 1;
    *report.seen_as.entry(answer.client.ip()).or_default() += 1;
}

fn once(to: SocketAddr, report: &Mutex<Report>) -> Result<()> {
    let start = Instant::now();
    let mut talk = Talk::open(to)?;
    if start.elapsed() > RETRANSMITTED {
        lock(report).slow += 1;
    }
    record(report, talk.say()?);
    Ok(())
}

fn fetch(to: SocketAddr, host: &str) -> Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE).context("connect")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )
    .context("send")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("receive")?;
    ensure!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let (_, text) = answer.split_once("\r\n\r\n").context("no body")?;
    let mut words = text.split_whitespace();
    Ok(Answer {
        server: words.next().context("no name")?.to_owned(),
        client: words.next().context("no client")?.parse()?,
    })
}

/// One connection for as long as the load lasts: it must stay with its server and never break.
fn keep(to: SocketAddr, stop: &AtomicBool, report: &Mutex<Report>) -> Result<()> {
    let mut talk = Talk::open(to)?;
    let first = talk.say()?;
    while !stop.load(Ordering::Relaxed) {
        let answer = talk.say()?;
        ensure!(answer == first, "a connection moved from {first:?} to {answer:?}");
        record(report, answer);
        std::thread::sleep(5 * PACE);
    }
    Ok(())
}
