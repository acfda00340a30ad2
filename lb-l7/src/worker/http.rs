//! HTTP with one client, for as long as its connection lasts.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, ready},
};

use hyper::{server::conn, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};

use super::{Client, Worker};
use crate::{
    client::{ClientIo, Stage, Word},
    proxy,
    upstream::LocalExec,
};

/// Longest header of a request, bytes; a longer one is answered by 431.
const LONGEST_HEADER: usize = 64 * 1024;
/// Streams of one HTTP/2 connection at a time.
const MOST_STREAMS: u32 = 128;

/// What becomes of a connection that is not driven any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// Nothing: it has ended.
    Ended,
    /// It waits for its client's next word.
    Rests,
}

/// Speaks HTTP with a client.
pub(super) async fn serve(worker: Rc<Worker>, client: Rc<Client>, io: ClientIo, is_h2: bool) {
    if is_h2 {
        // Large, and most connections are of the other kind.
        Box::pin(http2(worker, client, io)).await;
    } else {
        http1(worker, client, io).await;
    }
}

async fn http1(worker: Rc<Worker>, client: Rc<Client>, mut io: ClientIo) {
    let mut builder = conn::http1::Builder::new();
    // The sweep sees to silence.
    builder.header_read_timeout(None).max_buf_size(LONGEST_HEADER);
    loop {
        let service = service_fn(|request| proxy::handle(Rc::clone(&worker), Rc::clone(&client), request));
        let connection = builder.serve_connection(TokioIo::new(io), service);
        // On the heap, to be let go while the client says nothing: its buffers are most of what a connection takes.
        let mut connection = Box::new(connection.with_upgrades());
        let finish = |connection: Pin<&mut conn::http1::UpgradeableConnection<_, _>>| {
            connection.graceful_shutdown();
        };
        let after = drive(&worker, &client.stage, Pin::new(&mut *connection), finish).await;
        if after == After::Ended {
            return;
        }
        let Some(parts) = connection.into_parts() else {
            return;
        };
        worker.rested.set(true);
        io = parts.io.into_inner().before(parts.read_buf);
        if client.stage.rest(&mut io).await != Word::GoOn {
            return;
        }
    }
}

async fn http2(worker: Rc<Worker>, client: Rc<Client>, io: ClientIo) {
    client.stage.is_h2();
    let mut builder = conn::http2::Builder::new(LocalExec);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MOST_STREAMS)
        .max_header_list_size(LONGEST_HEADER as u32)
        .adaptive_window(true);
    let service = {
        let (worker, client) = (Rc::clone(&worker), Rc::clone(&client));
        service_fn(move |request| proxy::handle(Rc::clone(&worker), Rc::clone(&client), request))
    };
    let connection = pin!(builder.serve_connection(TokioIo::new(io), service));
    drive(&worker, &client.stage, connection, |connection| {
        connection.graceful_shutdown();
    })
    .await;
}

/// Drives a connection until it has ended, or may rest. What ends it is the client's business; what failed of a request has
/// been counted.
async fn drive<C: Future>(
    worker: &Worker,
    stage: &Stage,
    mut connection: Pin<&mut C>,
    finish: impl Fn(Pin<&mut C>),
) -> After {
    // HTTP/2 has a way to say that nothing new is taken; in HTTP/1 the next answer says it.
    let mut told = stage.speaks_h2() && worker.is_draining();
    if told {
        finish(connection.as_mut());
    }
    poll_fn(|cx| {
        match stage.poll_word(cx) {
            Word::End => return Poll::Ready(After::Ended),
            Word::Finish if !told => {
                told = true;
                finish(connection.as_mut());
            }
            Word::Finish | Word::GoOn => {}
        }
        if connection.as_mut().poll(cx).is_ready() {
            return Poll::Ready(After::Ended);
        }
        match stage.may_rest(worker.shared.clock.coarse_ms()) {
            true => Poll::Ready(After::Rests),
            false => Poll::Pending,
        }
    })
    .await
}

impl Stage {
    /// Waits until its client says something, or it is told to end.
    async fn rest(&self, io: &mut ClientIo) -> Word {
        self.rests(true);
        let word = poll_fn(|cx: &mut Context<'_>| {
            let word = self.poll_word(cx);
            if word == Word::GoOn {
                ready!(io.poll_readable(cx));
            }
            Poll::Ready(word)
        })
        .await;
        self.rests(false);
        word
    }
}
