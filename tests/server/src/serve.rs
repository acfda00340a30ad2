//! Listening, answering, leaving.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _, UdpSocket},
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// After SIGTERM: how long no new connection must have come before the listener is closed. Whoever balances has time
/// to notice that this server is leaving; connections in the listener's queue would be reset by its end.
const QUIET: Duration = Duration::from_millis(300);
/// The longest that all of it may take.
const LONGEST: Duration = Duration::from_secs(5);

/// The server of one port.
pub struct Server {
    port: u16,
    name: String,
    well: AtomicBool,
    /// Writing end of the pipe whose other end the accepting thread watches: dropping it ends that thread.
    listening: Mutex<Option<Listening>>,
    clients: Arc<Clients>,
}

struct Listening {
    stop: OwnedFd,
    thread: std::thread::JoinHandle<()>,
}

/// Open connections, and when the last one came.
struct Clients {
    state: Mutex<(usize, Instant)>,
    changed: Condvar,
}

impl Clients {
    /// A poisoned lock guards two plain values: they are as good as before.
    fn lock(&self) -> MutexGuard<'_, (usize, Instant)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    /// Listens on TCP and UDP, on every address of both families.
    pub fn start(port: u16) -> Result<Self> {
        let name = std::env::var("NAME")
            .or_else(|_| nix::unistd::gethostname().map(|n| n.to_string_lossy().into_owned()))
            .context("no NAME and no host name")?;
        let server = Self {
            port,
            name,
            well: AtomicBool::new(true),
            listening: Mutex::new(None),
            clients: Arc::new(Clients {
                state: Mutex::new((0, Instant::now())),
                changed: Condvar::new(),
            }),
        };
        server.open()?;
        server.serve_udp()?;
        Ok(server)
    }

    /// Listens for new connections, unless it does already.
    pub fn open(&self) -> Result<()> {
        let mut listening = self.listening.lock().unwrap_or_else(PoisonError::into_inner);
        if listening.is_some() {
            return Ok(());
        }
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, self.port)).context("TCP")?;
        listener.set_nonblocking(true)?;
        let (end, stop) = nix::unistd::pipe()?;
        let (name, clients) = (self.name.clone(), Arc::clone(&self.clients));
        let thread = std::thread::spawn(move || accept(&listener, &end, &name, &clients));
        *listening = Some(Listening { stop, thread });
        Ok(())
    }

    /// Closes the listener: new connections are refused by the kernel, old ones go on.
    pub fn close(&self) {
        let listening = self
            .listening
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(Listening { stop, thread }) = listening {
            drop(stop);
            // The listener is the thread's: it is closed when the thread has ended.
            let _ = thread.join();
        }
    }

    /// Sets what the health check says.
    pub fn set_well(&self, well: bool) {
        self.well.store(well, Ordering::Relaxed);
    }

    /// What the health check says.
    pub fn is_well(&self) -> bool {
        self.well.load(Ordering::Relaxed)
    }

    /// Goes on until no new connections come, closes the listener, and waits for the clients to finish.
    pub fn leave(&self) {
        let (from, until) = (Instant::now(), Instant::now() + LONGEST);
        let mut state = self.clients.lock();
        loop {
            let quiet_at = state.1.max(from) + QUIET;
            let now = Instant::now();
            if now >= quiet_at.min(until) {
                break;
            }
            let wait = quiet_at.min(until) - now;
            state = self.wait(state, wait);
        }
        drop(state);
        self.close();
        let mut state = self.clients.lock();
        while state.0 > 0 {
            state = self.wait(state, Duration::MAX);
        }
    }

    fn wait<'a>(
        &self,
        state: MutexGuard<'a, (usize, Instant)>,
        limit: Duration,
    ) -> MutexGuard<'a, (usize, Instant)> {
        let (state, _) = self
            .clients
            .changed
            .wait_timeout(state, limit)
            .unwrap_or_else(PoisonError::into_inner);
        state
    }

    fn serve_udp(&self) -> Result<()> {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, self.port)).context("UDP")?;
        let name = self.name.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, client)) = socket.recv_from(&mut buffer) {
                let question = String::from_utf8_lossy(&buffer[..length]);
                // An answer that cannot be sent is lost, as any datagram may be.
                let _ = socket.send_to(answer(&name, client, question.trim()).as_bytes(), client);
            }
        });
        Ok(())
    }
}

/// Accepts until the other end of the pipe is closed.
fn accept(listener: &TcpListener, end: &OwnedFd, name: &str, clients: &Arc<Clients>) {
    loop {
        let mut fds = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(end.as_fd(), PollFlags::POLLIN),
        ];
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            continue;
        }
        // Those in the queue first, whatever else is wanted: they have been answered.
        while let Ok((stream, client)) = listener.accept() {
            let (name, clients) = (name.to_owned(), Arc::clone(clients));
            {
                let mut state = clients.lock();
                *state = (state.0 + 1, Instant::now());
                clients.changed.notify_all();
            }
            std::thread::spawn(move || {
                // A client that breaks off has nobody to complain to.
                let _ = converse(stream, client, &name);
                clients.lock().0 -= 1;
                clients.changed.notify_all();
            });
        }
        if fds[1].any().unwrap_or(true) {
            return;
        }
    }
}

fn converse(mut stream: TcpStream, client: SocketAddr, name: &str) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        let text = answer(name, client, line.trim());
        if line.starts_with("GET ") {
            let mut header = String::new();
            while reader.read_line(&mut header)? > 2 {
                header.clear();
            }
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{text}",
                text.len()
            )?;
        } else {
            stream.write_all(text.as_bytes())?;
        }
        line.clear();
    }
    Ok(())
}

/// Asks a server like this one, as a client.
pub fn ask(address: &str) -> Result<String> {
    let to: SocketAddr = address
        .to_socket_addrs()
        .context("the address")?
        .next()
        .context("no address of this name")?;
    let mut stream = TcpStream::connect_timeout(&to, LONGEST).context(to)?;
    stream.set_read_timeout(Some(LONGEST))?;
    writeln!(stream, "hello")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(answer)
}

/// Clients of IPv4 come to the IPv6 socket with mapped addresses: shown as what they are.
fn answer(name: &str, client: SocketAddr, text: &str) -> String {
    let client = SocketAddr::new(client.ip().to_canonical(), client.port());
    format!("{name} {client} {text}\n")
}
