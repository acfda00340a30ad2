//! A client's connection: its bytes, and what stage it is in, so that one sweep can end all that are silent for too long.
//! Timers for each request would cost more than the requests.

use std::{
    io::{self, Read as _},
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
    sync::Arc,
    sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed},
    task::{Context, Poll},
};

use bytes::{Buf as _, Bytes};
use futures_util::task::AtomicWaker;
use lb_route::L7Timeouts;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// Between two requests.
const IDLE: u8 = 0;
/// Bytes of a header have come, and its end has not.
const HEAD: u8 = 1;
/// A request is under way: its own timeouts hold.
const BUSY: u8 = 2;

/// How long a connection says nothing until what its next request needs is let go, milliseconds.
const REST_AFTER_MS: u64 = 1_000;

/// Room for the first bytes of a connection: most requests fit in it.
pub const FIRST_BYTES: usize = 2048;

/// Bytes written at once that are parts of answers, and no mere replies to what HTTP/2 says of the connection.
const PARTS: usize = 1024;

/// What a connection is told from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Nothing.
    GoOn,
    /// To end after what is under way.
    Finish,
    /// To end at once.
    End,
}

/// The state of a connection. One worker writes it; it is atomic because it travels with connections that are upgraded.
#[derive(Debug, Default)]
pub struct Stage {
    stage: AtomicU8,
    since_ms: AtomicU64,
    /// Requests under way: more than one in HTTP/2.
    active: AtomicU32,
    /// Those of them whose client has a part of the answer to take.
    waiting: AtomicU32,
    /// When that changed last.
    turned_ms: AtomicU64,
    is_h2: AtomicBool,
    /// Something is written that the system has not taken yet, or the connection is being closed.
    is_unflushed: AtomicBool,
    /// Not all of a request has been read: what comes next is no beginning of another one.
    is_unread: AtomicBool,
    word: AtomicU8,
    waker: AtomicWaker,
}

// === impl Stage ===

impl Stage {
    /// Of a connection that is new now.
    pub fn new(now_ms: u64) -> Arc<Self> {
        let stage = Self::idle(now_ms);
        // A client that opens a connection means to send something.
        stage.stage.store(HEAD, Relaxed);
        stage
    }

    /// Of a connection that is between two requests from now on.
    pub fn idle(now_ms: u64) -> Arc<Self> {
        let stage = Self::default();
        stage.since_ms.store(now_ms, Relaxed);
        Arc::new(stage)
    }

    /// It speaks HTTP/2, where bytes that come need not be a request.
    pub fn is_h2(&self) {
        self.is_h2.store(true, Relaxed);
        self.stage.store(IDLE, Relaxed);
    }

    /// Whether it speaks HTTP/2.
    pub fn speaks_h2(&self) -> bool {
        self.is_h2.load(Relaxed)
    }

    /// Bytes have come.
    fn heard(&self, now_ms: impl FnOnce() -> u64) {
        if self.stage.load(Relaxed) == IDLE {
            if !self.is_h2.load(Relaxed) {
                self.stage.store(HEAD, Relaxed);
            }
            self.since_ms.store(now_ms(), Relaxed);
        }
    }

    /// A request begins.
    pub fn begin(&self) {
        self.active.store(self.active.load(Relaxed) + 1, Relaxed);
        self.stage.store(BUSY, Relaxed);
    }

    /// A request has been answered.
    pub fn end(&self, now_ms: u64) {
        let active = self.active.load(Relaxed).saturating_sub(1);
        self.active.store(active, Relaxed);
        if active == 0 {
            self.stage.store(IDLE, Relaxed);
            self.since_ms.store(now_ms, Relaxed);
        }
    }

    /// One request more, or less, waits for the client to take a part of its answer.
    pub fn waits_for_client(&self, waits: bool, now_ms: u64) {
        let waiting = self.waiting.load(Relaxed);
        let waiting = match waits {
            true => waiting + 1,
            false => waiting.saturating_sub(1),
        };
        self.waiting.store(waiting, Relaxed);
        self.turned_ms.store(now_ms, Relaxed);
    }

    /// So many bytes have been written: a slow client takes parts of answers that have been given long before.
    fn wrote(&self, bytes: &Poll<io::Result<usize>>, now_ms: impl FnOnce() -> u64) {
        if matches!(bytes, Poll::Ready(Ok(bytes)) if *bytes >= PARTS) && self.speaks_h2() {
            self.turned_ms.store(now_ms(), Relaxed);
        }
    }

    /// Not all of the request that ends has been read.
    pub fn leave_unread(&self) {
        self.is_unread.store(true, Relaxed);
    }

    /// Whether nothing is under way on it, in neither direction, and has not been for a while.
    pub fn may_rest(&self, now_ms: u64) -> bool {
        let is_set = |flag: &AtomicBool| flag.load(Relaxed);
        self.stage.load(Relaxed) == IDLE
            && now_ms.saturating_sub(self.since_ms.load(Relaxed)) > REST_AFTER_MS
            && !is_set(&self.is_h2)
            && !is_set(&self.is_unflushed)
            && !is_set(&self.is_unread)
    }

    /// When what it is at began, milliseconds.
    pub fn since_ms(&self) -> u64 {
        self.since_ms.load(Relaxed)
    }

    /// Has its task look at it.
    pub fn wake(&self) {
        self.waker.wake();
    }

    /// Whether it has been silent for too long.
    pub fn is_late(&self, now_ms: u64, timeouts: &L7Timeouts) -> bool {
        let (since, limit) = match self.stage.load(Relaxed) {
            IDLE => (&self.since_ms, timeouts.client),
            HEAD => (&self.since_ms, timeouts.header),
            // In HTTP/1 the system knows who takes nothing.
            _ if !self.speaks_h2() || self.waiting.load(Relaxed) < self.active.load(Relaxed) => return false,
            _ => (&self.turned_ms, timeouts.client),
        };
        u128::from(now_ms.saturating_sub(since.load(Relaxed))) > limit.as_millis()
    }

    /// What it has been told.
    pub fn word(&self) -> Word {
        match self.word.load(Relaxed) {
            0 => Word::GoOn,
            1 => Word::Finish,
            _ => Word::End,
        }
    }

    /// Tells it something. What was said first stands unless it is more now.
    pub fn say(&self, word: Word) {
        if word as u8 > self.word.load(Relaxed) {
            self.word.store(word as u8, Relaxed);
            self.waker.wake();
        }
    }

    /// What it has been told; the task is woken when there is more.
    pub fn poll_word(&self, cx: &Context<'_>) -> Word {
        self.waker.register(cx.waker());
        self.word()
    }
}

/// A coarse clock that every worker reads and the sweeps set.
#[derive(Debug)]
pub struct Clock {
    start: std::time::Instant,
    coarse_ms: AtomicU64,
}

impl Clock {
    /// Starts now.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            start: std::time::Instant::now(),
            // Not 0, which is never.
            coarse_ms: AtomicU64::new(1),
        })
    }

    /// Milliseconds since the start, some tenths of a second late.
    pub fn coarse_ms(&self) -> u64 {
        self.coarse_ms.load(Relaxed)
    }

    /// Sets what is read.
    pub fn tick(&self) {
        self.set(self.start.elapsed().as_millis() as u64 + 1);
    }

    /// Sets what is read to this.
    pub fn set(&self, ms: u64) {
        self.coarse_ms.store(ms, Relaxed);
    }
}

/// What carries the bytes.
#[derive(Debug)]
pub enum Transport {
    /// As they are.
    Plain(TcpStream),
    /// Inside TLS.
    Tls(Box<tokio_rustls::server::TlsStream<Prefixed>>),
}

/// A stream of which some bytes have been read already.
#[derive(Debug)]
pub struct Prefixed {
    /// The bytes.
    pub prefix: Bytes,
    /// The rest.
    pub stream: TcpStream,
}

/// A client's connection as hyper uses it.
#[derive(Debug)]
pub struct ClientIo {
    transport: Transport,
    prefix: Bytes,
    stage: Arc<Stage>,
    clock: Arc<Clock>,
}

/// A client's connection while it is silent.
#[derive(Debug)]
pub enum RestingIo {
    /// Known to the system alone.
    Plain(std::net::TcpStream),
    /// As it was: TLS goes on with what it has agreed on.
    Tls(Box<tokio_rustls::server::TlsStream<Prefixed>>),
}

// === impl ClientIo ===

impl ClientIo {
    /// Reads `prefix` first.
    pub fn new(transport: Transport, prefix: Bytes, stage: Arc<Stage>, clock: Arc<Clock>) -> Self {
        Self {
            transport,
            prefix,
            stage,
            clock,
        }
    }

    /// The same, with bytes that have been read already.
    pub fn before(mut self, read: Bytes) -> Self {
        if !read.is_empty() {
            self.prefix = [read, std::mem::take(&mut self.prefix)].concat().into();
        }
        self
    }

    /// Whether all that has come has been read.
    pub fn is_silent(&self) -> bool {
        self.prefix.is_empty()
    }

    /// Lets go what only a connection in use needs. It must be silent.
    ///
    /// # Errors
    /// If the runtime does not give it up.
    pub fn rest(self) -> io::Result<RestingIo> {
        Ok(match self.transport {
            Transport::Plain(stream) => RestingIo::Plain(stream.into_std()?),
            Transport::Tls(stream) => RestingIo::Tls(stream),
        })
    }
}

// === impl RestingIo ===

impl RestingIo {
    /// In use again, with what has come.
    ///
    /// # Errors
    /// If it has ended, or the runtime does not take it.
    pub fn wake(self, stage: &Arc<Stage>, clock: &Arc<Clock>) -> io::Result<ClientIo> {
        let (transport, first) = match self {
            Self::Plain(mut stream) => {
                let first = first_bytes(&mut stream)?;
                (Transport::Plain(TcpStream::from_std(stream)?), first)
            }
            Self::Tls(stream) => (Transport::Tls(stream), Bytes::new()),
        };
        Ok(ClientIo::new(
            transport,
            first,
            Arc::clone(stage),
            Arc::clone(clock),
        ))
    }
}

impl AsFd for RestingIo {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Plain(stream) => stream.as_fd(),
            Self::Tls(stream) => stream.get_ref().0.stream.as_fd(),
        }
    }
}

/// What has come, as far as there is room. The runtime would first have to be told that there is something.
fn first_bytes(stream: &mut std::net::TcpStream) -> io::Result<Bytes> {
    let mut bytes = vec![0; FIRST_BYTES];
    match stream.read(&mut bytes) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(length) => {
            bytes.truncate(length);
            Ok(bytes.into())
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Bytes::new()),
        Err(error) => Err(error),
    }
}

/// Gives of `prefix` what fits.
fn give(prefix: &mut Bytes, buf: &mut ReadBuf<'_>) {
    let n = prefix.len().min(buf.remaining());
    buf.put_slice(&prefix[..n]);
    prefix.advance(n);
    if prefix.is_empty() {
        // Frees what it is a part of.
        *prefix = Bytes::new();
    }
}

impl AsyncRead for Prefixed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.prefix.is_empty() {
            give(&mut self.prefix, buf);
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Prefixed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl AsyncRead for ClientIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.prefix.is_empty() {
            // Of a connection that rested it is the beginning of a header: it does not rest again before its end.
            this.stage.heard(|| this.clock.coarse_ms());
            give(&mut this.prefix, buf);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let polled = match &mut this.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Transport::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        };
        if buf.filled().len() > before {
            this.stage.heard(|| this.clock.coarse_ms());
        }
        polled
    }
}

impl AsyncWrite for ClientIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.stage.is_unflushed.store(true, Relaxed);
        let written = match &mut this.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Transport::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        };
        this.stage.wrote(&written, || this.clock.coarse_ms());
        written
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.stage.is_unflushed.store(true, Relaxed);
        let written = match &mut this.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Transport::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        };
        this.stage.wrote(&written, || this.clock.coarse_ms());
        written
    }

    fn is_write_vectored(&self) -> bool {
        match &self.transport {
            Transport::Plain(stream) => stream.is_write_vectored(),
            Transport::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = match &mut this.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_flush(cx),
        };
        if matches!(flushed, Poll::Ready(Ok(()))) {
            this.stage.is_unflushed.store(false, Relaxed);
        }
        flushed
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Whether all of it has been said or not: nothing more is.
        self.stage.leave_unread();
        match &mut self.get_mut().transport {
            Transport::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_judged_by_the_stage() {
        let timeouts = L7Timeouts::default();
        let stage = Stage::new(0);
        assert!(!stage.is_late(10_000, &timeouts) && stage.is_late(10_001, &timeouts));
        stage.begin();
        assert!(!stage.is_late(u64::MAX, &timeouts));
        stage.end(20_000);
        assert!(!stage.is_late(80_000, &timeouts) && stage.is_late(80_001, &timeouts));
        stage.heard(|| 30_000);
        assert!(
            stage.is_late(40_001, &timeouts),
            "a header does not take that long"
        );
        stage.heard(|| 40_000);
        assert!(stage.is_late(40_001, &timeouts), "not even byte by byte");
        let h2 = Stage::new(0);
        h2.is_h2();
        h2.heard(|| 5_000);
        assert!(!h2.is_late(60_000, &timeouts) && h2.is_late(65_001, &timeouts));
        h2.begin();
        h2.begin();
        h2.end(70_000);
        assert!(!h2.is_late(900_000, &timeouts), "one is still under way");
        h2.waits_for_client(true, 900_000);
        assert!(!h2.is_late(960_000, &timeouts) && h2.is_late(960_001, &timeouts));
        h2.wrote(&Poll::Ready(Ok(17)), || 950_000);
        assert!(h2.is_late(960_001, &timeouts), "a reply to a ping is no answer");
        h2.wrote(&Poll::Ready(Ok(16_384)), || 930_000);
        assert!(!h2.is_late(990_000, &timeouts) && h2.is_late(990_001, &timeouts));
        h2.begin();
        assert!(
            !h2.is_late(999_000, &timeouts),
            "another one waits for its upstream"
        );
        h2.end(999_000);
        h2.waits_for_client(false, 999_000);
        assert!(!h2.is_late(u64::MAX, &timeouts), "now it is the upstream's turn");
    }
}
