//! Clients that say nothing. Their sockets wait in a set of the worker's own: the task, the runtime's part and hyper's buffers
//! of each are let go, and made anew when it speaks. Most clients of a busy shim are silent.

use std::{cell::RefCell, io, os::fd::AsFd as _, rc::Rc};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use slab::Slab;
use tokio::io::{Interest, unix::AsyncFd};

use super::{Client, Worker, http};
use crate::client::{ClientIo, RestingIo, Word};

/// Clients that are woken at once.
const BATCH: usize = 64;

/// The clients of a worker that say nothing.
#[derive(Debug)]
pub(super) struct Resting {
    set: Epoll,
    clients: RefCell<Slab<Rested>>,
}

/// All that is kept of one.
#[derive(Debug)]
struct Rested {
    client: Rc<Client>,
    io: RestingIo,
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
    pub fn take(&self, client: Rc<Client>, io: ClientIo) -> io::Result<()> {
        client.rest();
        client.stage.rest();
        let io = io.rest()?;
        let mut clients = self.clients.borrow_mut();
        let place = clients.vacant_entry();
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, place.key() as u64);
        self.set.add(io.as_fd(), event)?;
        place.insert(Rested { client, io });
        Ok(())
    }

    /// How many there are.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.clients.borrow().len()
    }

    /// Serves those that have spoken.
    pub fn wake(&self, worker: &Rc<Worker>) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); BATCH];
        loop {
            let ready = self.set.wait(&mut events, EpollTimeout::ZERO)?;
            for event in &events[..ready] {
                let Some(Rested { client, io }) = self.clients.borrow_mut().try_remove(event.data() as usize)
                else {
                    continue;
                };
                self.set.delete(io.as_fd())?;
                client.stage.awake(worker.shared.clock.coarse_ms());
                // What cannot be watched any more is closed, as it may be at any time.
                if let Ok(io) = io.wake(&client.stage, &worker.shared.clock) {
                    tokio::task::spawn_local(http::serve(Rc::clone(worker), client, io, false));
                }
            }
            if ready < events.len() {
                return Ok(());
            }
        }
    }

    /// Ends those that have been told to.
    pub fn heed(&self, worker: &Rc<Worker>) -> io::Result<()> {
        // What has been asked already is answered before the end.
        self.wake(worker)?;
        let is_told = |rested: &Rested| rested.client.stage.word() != Word::GoOn;
        let mut clients = self.clients.borrow_mut();
        let told: Vec<usize> = clients
            .iter()
            .filter(|(_, rested)| is_told(rested))
            .map(|(key, _)| key)
            .collect();
        let ended: Vec<Rested> = told.into_iter().map(|key| clients.remove(key)).collect();
        drop(clients);
        // Their seats are given up by dropping them, which the worker sees to.
        drop(ended);
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
