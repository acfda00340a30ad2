//! One connection to an upstream, driven by whoever uses it.
//!
//! The connection is no task of its own: the request that uses it polls it. So an answer wakes the client's task at once
//! instead of a second one that wakes the first, and a request that is given up ends its connection by being dropped.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::future::Either;
use hyper::{
    Request, Response, Uri,
    body::Incoming,
    client::conn::{TrySendError, http1, http2},
    header,
    http::uri::{Authority, Scheme},
};
use hyper_util::rt::TokioIo;
use pin_project_lite::pin_project;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::proxy::OutBody;

/// What carries the bytes.
#[derive(Debug)]
pub enum UpstreamIo {
    /// As they are.
    Plain(TcpStream),
    /// Inside TLS.
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

/// Runs hyper's own tasks on the thread of the worker.
#[derive(Clone, Copy, Debug)]
pub struct LocalExec;

/// A connection.
pub struct Link {
    kind: Kind,
    /// When it became idle, milliseconds on the shim's clock.
    pub idle_since_ms: u64,
    /// Whether it has carried a request before.
    pub is_used: bool,
    /// No other request may follow: its upstream speaks HTTP/1.0, in which bodies of unknown length and upgrades get lost.
    pub is_over: bool,
}

enum Kind {
    H1 {
        sender: http1::SendRequest<OutBody>,
        /// `None` when it has ended.
        connection: Option<Connection>,
    },
    /// Many requests share it; hyper drives it as a task.
    H2 {
        sender: http2::SendRequest<OutBody>,
        is_tls: bool,
    },
}

/// hyper's side of a connection: a future without a name.
type Connection = Pin<Box<dyn Future<Output = hyper::Result<()>>>>;

pin_project! {
    /// Waits for an answer, and drives the connection meanwhile. Written out because an `async` block keeps room for the
    /// request twice.
    struct Exchange<'l, A> {
        connection: Option<&'l mut Option<Connection>>,
        #[pin]
        answer: A,
    }
}

impl<A: Future> Future for Exchange<'_, A> {
    type Output = A::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<A::Output> {
        let this = self.project();
        if let Some(connection) = this.connection {
            drive(connection, cx);
        }
        this.answer.poll(cx)
    }
}

/// Drives a connection as far as it goes.
fn drive(connection: &mut Option<Connection>, cx: &mut Context<'_>) {
    if let Some(running) = connection
        && running.as_mut().poll(cx).is_ready()
    {
        // Its error, if there is one, is told to the request.
        *connection = None;
    }
}

/// Says in HTTP/2 that TLS carries a request: without a word hyper says `http`, which servers refuse on such a connection.
fn by_https(request: &mut Request<OutBody>) {
    let host = request.headers().get(header::HOST);
    let mut parts = request.uri().clone().into_parts();
    parts.authority = host.and_then(|host| Authority::try_from(host.as_bytes()).ok());
    if parts.authority.is_some() {
        parts.scheme = Some(Scheme::HTTPS);
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
}

/// What came of a request.
pub type Exchanged = Result<Response<Incoming>, TrySendError<Request<OutBody>>>;

impl<F: Future + 'static> hyper::rt::Executor<F> for LocalExec {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(async {
            future.await;
        });
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("is_used", &self.is_used)
            .finish_non_exhaustive()
    }
}

// === impl Link ===

impl Link {
    /// Begins HTTP/1.1, or HTTP/2 with prior knowledge, on a connection.
    pub(super) async fn new(io: UpstreamIo, h2: bool) -> Result<Self, hyper::Error> {
        let is_tls = matches!(io, UpstreamIo::Tls(_));
        let io = TokioIo::new(io);
        let kind = if h2 {
            let (sender, connection) = http2::Builder::new(LocalExec)
                .timer(hyper_util::rt::TokioTimer::new())
                .keep_alive_interval(std::time::Duration::from_secs(20))
                .adaptive_window(true)
                .handshake(io)
                .await?;
            tokio::task::spawn_local(connection);
            Kind::H2 { sender, is_tls }
        } else {
            let (sender, connection) = http1::Builder::new().handshake(io).await?;
            Kind::H1 {
                sender,
                connection: Some(Box::pin(connection.with_upgrades())),
            }
        };
        Ok(Self {
            kind,
            idle_since_ms: 0,
            is_used: false,
            is_over: false,
        })
    }

    /// Drives the connection as far as it goes.
    pub fn drive(&mut self, cx: &mut Context<'_>) {
        if let Kind::H1 { connection, .. } = &mut self.kind {
            drive(connection, cx);
        }
    }

    /// Whether it can carry a request now. Sees what its upstream has done meanwhile.
    pub fn is_idle(&mut self, cx: &mut Context<'_>) -> bool {
        self.drive(cx);
        match &self.kind {
            Kind::H1 { sender, connection } => connection.is_some() && sender.is_ready(),
            Kind::H2 { sender, .. } => sender.is_ready() && !sender.is_closed(),
        }
    }

    /// Whether many requests share it.
    pub fn is_h2(&self) -> bool {
        matches!(self.kind, Kind::H2 { .. })
    }

    /// The same connection for another request, if many share it.
    pub fn share(&self) -> Option<Self> {
        match &self.kind {
            Kind::H1 { .. } => None,
            Kind::H2 { sender, is_tls } => Some(Self {
                kind: Kind::H2 {
                    sender: sender.clone(),
                    is_tls: *is_tls,
                },
                idle_since_ms: self.idle_since_ms,
                is_used: true,
                is_over: false,
            }),
        }
    }

    /// Sends a request; ready when the header of its answer has come.
    pub fn exchange(&mut self, mut request: Request<OutBody>) -> impl Future<Output = Exchanged> {
        if let Kind::H2 { is_tls: true, .. } = &self.kind {
            by_https(&mut request);
        }
        let (connection, answer) = match &mut self.kind {
            Kind::H1 { sender, connection } => {
                (Some(connection), Either::Left(sender.try_send_request(request)))
            }
            Kind::H2 { sender, .. } => (None, Either::Right(sender.try_send_request(request))),
        };
        Exchange { connection, answer }
    }

    /// Drives the connection until it has ended: an upgraded one hands over its bytes then.
    pub async fn run_out(mut self) {
        if let Kind::H1 { connection, .. } = &mut self.kind
            && let Some(running) = connection
        {
            let _its_error_is_told_to_the_upgrade = running.as_mut().await;
        }
    }
}

impl AsyncRead for UpstreamIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for UpstreamIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
