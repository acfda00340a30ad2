//! Clients that say nothing. Of each its socket and its place are kept, in one table: its task, what the runtime and hyper
//! hold for it, and what is made of its address are let go, and made anew when it speaks. Most clients of a busy shim are silent.

use std::{cell::RefCell, io, net::SocketAddr, os::fd::AsFd as _, rc::Rc, time::Duration};

use lb_route::L7Timeouts;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use slab::Slab;
use tokio::io::{Interest, unix::AsyncFd};

use super::{Client, Worker, client::Seat, http};
use crate::client::{ClientIo, RestingIo, Stage};

/// Clients that are woken at once.
const BATCH: usize = 64;

/// The clients of a worker that say nothing.
#[derive(Debug)]
pub(super) struct Resting {
    /// Tells which of them speak.
    set: Epoll,
    clients: RefCell<Slab<Rested>>,
}

/// All that is kept of one.
#[derive(Debug)]
pub(super) struct Rested {
    io: RestingIo,
    address: SocketAddr,
    local: SocketAddr,
    is_trusted: bool,
    /// When it began to say nothing.
    since_ms: u64,
    /// Its place among the clients.
    seat: Seat,
}

impl Rested {
    /// # Errors
    /// If it has no place, or the runtime does not give its socket up.
    fn new(client: Client, io: ClientIo) -> io::Result<Self> {
        let seat = client.seat.ok_or(io::ErrorKind::NotFound)?;
        seat.rest();
        Ok(Self {
            io: io.rest()?,
            address: client.address,
            local: client.local,
            is_trusted: client.is_trusted,
            since_ms: client.stage.since_ms(),
            seat,
        })
    }

    /// # Errors
    /// If the runtime does not take its socket.
    fn wake(self, worker: &Worker) -> io::Result<(Client, ClientIo)> {
        let clock = &worker.shared.clock;
        // What has come need not be the beginning of a request: TLS has words of its own.
        let stage = Stage::idle(clock.coarse_ms());
        let is_tls = matches!(self.io, RestingIo::Tls(_));
        let io = self.io.wake(&stage, clock)?;
        self.seat.wake(&stage);
        let client = Client::new(self.address, is_tls, self.is_trusted, stage);
        Ok((client.came_to(self.local).seated(self.seat), io))
    }

    /// Its number among the clients.
    pub fn id(&self) -> u64 {
        self.seat.id
    }

    /// Whether it has been silent for too long.
    pub fn is_late(&self, now_ms: u64, timeouts: &L7Timeouts) -> bool {
        Duration::from_millis(now_ms.saturating_sub(self.since_ms)) > timeouts.client
    }
}

impl Resting {
    /// None yet.
    ///
    /// # Errors
    /// If no file descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            set: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            clients: RefCell::default(),
        })
    }

    /// Takes a client in between two requests.
    ///
    /// # Errors
    /// If the system does not watch it; its connection is closed then, as it may be at any time.
    pub fn take(&self, client: Client, io: ClientIo) -> io::Result<()> {
        let rested = Rested::new(client, io)?;
        let mut clients = self.clients.borrow_mut();
        let place = clients.vacant_entry();
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, place.key() as u64);
        self.set.add(rested.io.as_fd(), event)?;
        place.insert(rested);
        Ok(())
    }

    /// Whether any is so.
    pub fn any(&self, is_so: impl Fn(&Rested) -> bool) -> bool {
        self.clients.borrow().iter().any(|(_, rested)| is_so(rested))
    }

    /// Serves those that have spoken.
    pub fn wake(&self, worker: &Rc<Worker>) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); BATCH];
        loop {
            let ready = self.set.wait(&mut events, EpollTimeout::ZERO)?;
            for event in &events[..ready] {
                let Some(rested) = self.clients.borrow_mut().try_remove(event.data() as usize) else {
                    continue;
                };
                self.set.delete(rested.io.as_fd())?;
                // What cannot be watched any more is closed, as it may be at any time.
                if let Ok((client, io)) = rested.wake(worker) {
                    tokio::task::spawn_local(http::serve(Rc::clone(worker), Rc::new(client), io, false));
                }
            }
            if ready < events.len() {
                return Ok(());
            }
        }
    }

    /// Ends those that are so and have not spoken: what has been asked already is answered.
    pub fn end(&self, worker: &Rc<Worker>, is_so: impl Fn(&Rested) -> bool) -> io::Result<()> {
        if !self.any(&is_so) {
            return Ok(());
        }
        self.wake(worker)?;
        let mut clients = self.clients.borrow_mut();
        let chosen = clients.iter().filter(|(_, rested)| is_so(rested));
        let chosen: Vec<usize> = chosen.map(|(key, _)| key).collect();
        for key in chosen {
            clients.remove(key);
        }
        Ok(())
    }
}

/// Has those that speak served, for as long as the worker lives.
pub(super) async fn watch(worker: Rc<Worker>) -> io::Result<()> {
    let set = worker.resting.set.0.try_clone()?;
    // SAFETY: it owns the descriptor, which is open and the same for as long as it lives.
    let watched = unsafe { AsyncFd::register_with_interest(set, Interest::READABLE) }?;
    loop {
        let mut ready = watched.readable().await?;
        // Before it is looked at: what comes meanwhile is told again.
        ready.clear_ready();
        worker.resting.wake(&worker)?;
    }
}
