//! Bodies on their way: nothing is kept of them, each part goes on as it comes.

use std::{
    cell::Cell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep};

use super::exchange::Exchange;
use crate::upstream::Link;

/// Why a body ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The other side.
    #[error(transparent)]
    Http(#[from] hyper::Error),
    /// It is longer than `l7.max-body`.
    #[error("the body is longer than {0} bytes")]
    TooLarge(u64),
    /// Nothing came for too long.
    #[error("no part of the body came within {0:?}")]
    Silence(Duration),
}

/// What a request's body tells whoever waits for the answer.
#[derive(Debug)]
pub struct Upload {
    /// When its last part came.
    pub progress: Cell<Instant>,
    /// Its client is waited for: the upstream cannot answer yet.
    pub waits: Cell<bool>,
    /// Bytes so far.
    pub bytes: Cell<u64>,
    /// All of it has come.
    pub is_whole: Cell<bool>,
    /// It was too large, or its client silent.
    pub failed: Cell<Option<Failed>>,
}

/// How a request's body failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// Longer than allowed.
    TooLarge,
    /// Its client was silent, or went.
    Client,
}

/// The body of a request to an upstream.
#[derive(Debug)]
pub enum OutBody {
    /// None.
    Empty,
    /// The client's. Most requests have none, and need not carry the room for one.
    Client(Box<Sent>),
}

/// The body of a client's request on its way.
#[derive(Debug)]
pub struct Sent {
    /// Where it comes from.
    pub incoming: Incoming,
    /// Whoever waits for the answer.
    pub upload: Rc<Upload>,
    /// Longest that is taken, bytes.
    pub most: u64,
    /// Longest time without a part.
    pub silence: Silence,
}

/// A limit on the time in which nothing happens.
#[derive(Debug)]
pub struct Silence {
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    waits: bool,
}

/// The body of an answer to a client.
#[derive(Debug, Default)]
pub enum Reply {
    /// None.
    #[default]
    Empty,
    /// Ours.
    Own(Option<Bytes>),
    /// An upstream's.
    Upstream(Box<Download>),
}

/// The body of an upstream's answer.
#[derive(Debug)]
pub struct Download {
    incoming: Incoming,
    /// The connection that it comes by, which goes back when it has come.
    link: Option<Link>,
    silence: Silence,
    exchange: Exchange,
    /// Why it has broken off.
    fault: Option<BodyError>,
}

// === impl Upload ===

impl Upload {
    /// Of a body that begins now.
    pub fn new() -> Self {
        Self {
            progress: Cell::new(Instant::now()),
            waits: Cell::new(false),
            bytes: Cell::new(0),
            is_whole: Cell::new(false),
            failed: Cell::new(None),
        }
    }
}

// === impl Silence ===

impl Silence {
    /// So long at most.
    pub fn new(limit: Duration) -> Self {
        Self {
            limit,
            timer: None,
            waits: false,
        }
    }

    /// Something has happened.
    fn broken(&mut self) {
        self.waits = false;
    }

    /// Nothing has happened (yet); ready when that has lasted too long.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let limit = self.limit;
        // Most bodies come at once: those never have a timer.
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        if !self.waits {
            self.waits = true;
            timer.as_mut().reset(Instant::now() + limit);
        }
        timer.as_mut().poll(cx)
    }
}

// === impl OutBody ===

impl OutBody {
    /// Whether there is nothing that would have to be sent again.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }
}

impl Body for OutBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Self::Client(sent) = self.get_mut() else {
            return Poll::Ready(None);
        };
        let Sent {
            incoming,
            upload,
            most,
            silence,
        } = &mut **sent;
        let polled = Pin::new(&mut *incoming).poll_frame(cx);
        upload.waits.set(polled.is_pending());
        let Poll::Ready(frame) = polled else {
            ready!(silence.poll_over(cx));
            upload.failed.set(Some(Failed::Client));
            return Poll::Ready(Some(Err(BodyError::Silence(silence.limit))));
        };
        silence.broken();
        upload.progress.set(Instant::now());
        upload.is_whole.set(incoming.is_end_stream());
        Poll::Ready(match frame {
            None => {
                upload.is_whole.set(true);
                None
            }
            Some(Err(error)) => {
                upload.failed.set(Some(Failed::Client));
                Some(Err(error.into()))
            }
            Some(Ok(frame)) => {
                let bytes = upload.bytes.get() + frame.data_ref().map_or(0, |data| data.len() as u64);
                upload.bytes.set(bytes);
                if bytes > *most {
                    upload.failed.set(Some(Failed::TooLarge));
                    Some(Err(BodyError::TooLarge(*most)))
                } else {
                    Some(Ok(frame))
                }
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Client(sent) => sent.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Client(sent) => sent.incoming.size_hint(),
        }
    }
}

// === impl Download ===

impl Download {
    /// The body of the answer that came by `link`.
    pub fn new(incoming: Incoming, link: Link, silence: Duration, mut exchange: Exchange) -> Self {
        exchange.waits_for_client(true);
        exchange.is_whole(false);
        Self {
            incoming,
            link: Some(link),
            silence: Silence::new(silence),
            exchange,
            fault: None,
        }
    }

    /// It breaks off. The client is told when it is asked for the next time: whoever is told throws away what has not been
    /// written yet, and what came before the fault shall reach the client.
    fn fail(&mut self, fault: BodyError, cx: &Context<'_>) {
        self.link = None;
        self.exchange.fail();
        self.fault = Some(fault);
        cx.waker().wake_by_ref();
    }

    /// Gives the connection back if it can be used again.
    fn end(&mut self, cx: &mut Context<'_>) {
        self.exchange.is_whole(true);
        if let Some(link) = self.link.take() {
            self.exchange.give_back(link, cx);
        }
    }
}

impl Body for Reply {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let download = match self.get_mut() {
            Self::Empty => return Poll::Ready(None),
            Self::Own(bytes) => return Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Upstream(download) => download,
        };
        download.exchange.waits_for_client(false);
        if let Some(fault) = download.fault.take() {
            return Poll::Ready(Some(Err(fault)));
        }
        let mut polled = Pin::new(&mut download.incoming).poll_frame(cx);
        if polled.is_pending()
            && let Some(link) = &mut download.link
        {
            link.drive(cx);
            polled = Pin::new(&mut download.incoming).poll_frame(cx);
        }
        let Poll::Ready(frame) = polled else {
            ready!(download.silence.poll_over(cx));
            download.fail(BodyError::Silence(download.silence.limit), cx);
            return Poll::Pending;
        };
        download.silence.broken();
        Poll::Ready(match frame {
            None => {
                download.end(cx);
                None
            }
            Some(Err(error)) => {
                download.fail(error.into(), cx);
                return Poll::Pending;
            }
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    download.exchange.sent(data.len() as u64);
                }
                // Whoever asks us for frames does not ask for one after the last.
                if download.incoming.is_end_stream() {
                    download.end(cx);
                } else {
                    download.exchange.waits_for_client(true);
                }
                Some(Ok(frame))
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty | Self::Own(None) => true,
            Self::Own(Some(_)) => false,
            Self::Upstream(download) => download.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty | Self::Own(None) => SizeHint::with_exact(0),
            Self::Own(Some(bytes)) => SizeHint::with_exact(bytes.len() as u64),
            Self::Upstream(download) => download.incoming.size_hint(),
        }
    }
}
