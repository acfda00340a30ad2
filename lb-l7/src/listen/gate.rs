//! A listening socket at its worker, and what the process has to say about its place.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use socket2::Socket;
use tokio::sync::watch;

/// What the workers have to know of a place while they accept there.
#[derive(Debug)]
pub struct Gate {
    tls: AtomicBool,
    is_kept: bool,
    /// Of the whole process: another one has its sockets.
    handed_over: Arc<AtomicBool>,
    given_up: watch::Sender<bool>,
}

/// A socket on its way to its worker.
#[derive(Debug)]
pub struct Nascent {
    pub(super) socket: Socket,
    pub(super) gate: Arc<Gate>,
}

/// A socket for one worker.
#[derive(Debug)]
pub struct Listener {
    /// The socket.
    pub socket: tokio::net::TcpListener,
    /// Its place.
    pub gate: Arc<Gate>,
}

// === impl Gate ===

impl Gate {
    /// Of a place whose sockets systemd keeps, or that are ours alone.
    pub(super) fn new(tls: bool, is_kept: bool, handed_over: &Arc<AtomicBool>) -> Arc<Self> {
        Arc::new(Self {
            tls: AtomicBool::new(tls),
            is_kept,
            handed_over: Arc::clone(handed_over),
            given_up: watch::Sender::new(false),
        })
    }

    /// TLS is spoken with those who come from now on.
    pub fn is_tls(&self) -> bool {
        self.tls.load(Relaxed)
    }

    pub(super) fn speak(&self, tls: bool) {
        self.tls.store(tls, Relaxed);
    }

    /// Nobody else accepts here until this process has ended, and somebody will then: systemd holds the socket.
    pub fn waits_for_a_successor(&self) -> bool {
        self.is_kept && !self.handed_over.load(Relaxed)
    }

    /// What waits in the queue is another process's when this one stops accepting.
    pub fn leaves_its_queue(&self) -> bool {
        self.is_kept || (self.handed_over.load(Relaxed) && !self.is_given_up())
    }

    /// Nobody shall listen here any more.
    pub fn is_given_up(&self) -> bool {
        *self.given_up.borrow()
    }

    pub(super) fn give_up(&self) {
        self.given_up.send_replace(true);
    }

    /// Ready when nobody shall listen here any more.
    pub async fn given_up(&self) {
        // The sender is ours: it is there as long as this waits.
        let _ = self.given_up.subscribe().wait_for(|given_up| *given_up).await;
    }
}

// === impl Nascent ===

impl Nascent {
    /// Makes it one of the runtime that this runs in.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn adopt(self) -> io::Result<Listener> {
        Ok(Listener {
            socket: tokio::net::TcpListener::from_std(self.socket.into())?,
            gate: self.gate,
        })
    }
}
