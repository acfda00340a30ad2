//! HTTP with one client, for as long as its connection lasts.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    rc::Rc,
    task::Poll,
};

use futures_util::future::Either;
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
pub(super) fn serve(
    worker: Rc<Worker>,
    client: Rc<Client>,
    io: ClientIo,
    is_h2: bool,
) -> impl Future<Output = ()> {
    match is_h2 {
        // Large, and most connections are of the other kind.
        true => Either::Left(Box::pin(http2(worker, client, io))),
        false => Either::Right(http1(worker, client, io)),
    }
}

/// Until the connection ends, or rests. Not `async` itself: what is given would have room twice.
fn http1(worker: Rc<Worker>, client: Rc<Client>, io: ClientIo) -> impl Future<Output = ()> {
    let mut resting = Some(io);
    async move {
        loop {
            let Some(io) = resting.take() else { return };
            let service =
                service_fn(|request| proxy::handle(Rc::clone(&worker), Rc::clone(&client), request));
            // On the heap, to be let go while the client says nothing: its buffers are most of what a connection takes.
            let mut connection = Box::new(
                conn::http1::Builder::new()
                    // The sweep sees to silence.
                    .header_read_timeout(None)
                    .max_buf_size(LONGEST_HEADER)
                    .serve_connection(TokioIo::new(io), service)
                    .with_upgrades(),
            );
            let finish = |connection: Pin<&mut conn::http1::UpgradeableConnection<_, _>>| {
                connection.graceful_shutdown();
            };
            let after = drive(&worker, &client.stage, Pin::new(&mut *connection), finish).await;
            resting = match after {
                After::Ended => None,
                After::Rests => connection
                    .into_parts()
                    .map(|parts| parts.io.into_inner().before(parts.read_buf)),
            };
            // What has come behind the last request is served at once.
            if let Some(io) = resting.take_if(|io| io.is_silent()) {
                // Nothing is under way that could hold it.
                if let Some(client) = Rc::into_inner(client) {
                    worker.rest(client, io);
                }
                return;
            }
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
fn drive<C: Future<Output = hyper::Result<()>>>(
    worker: &Worker,
    stage: &Stage,
    mut connection: Pin<&mut C>,
    finish: impl Fn(Pin<&mut C>),
) -> impl Future<Output = After> {
    // HTTP/2 has a way to say that nothing new is taken; in HTTP/1 the next answer says it.
    let mut told = stage.speaks_h2() && worker.is_draining();
    if told {
        finish(connection.as_mut());
    }
    poll_fn(move |cx| {
        let word = stage.poll_word(cx);
        if word == Word::End {
            return Poll::Ready(After::Ended);
        }
        loop {
            if let Poll::Ready(ended) = connection.as_mut().poll(cx) {
                if ended.is_err_and(|error| error.is_parse()) {
                    // What is no request is answered before it comes to us.
                    worker.stats().answered(400);
                }
                return Poll::Ready(After::Ended);
            }
            if told || word == Word::GoOn {
                break;
            }
            // Not before what has come was read: hyper ends a connection of which it has read nothing.
            told = true;
            finish(connection.as_mut());
        }
        match stage.may_rest(worker.shared.clock.coarse_ms()) {
            true => Poll::Ready(After::Rests),
            false => Poll::Pending,
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use lb_route::State;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
        runtime::{Builder, LocalOptions},
        sync::{Semaphore, watch},
        task::JoinHandle,
    };

    use super::{
        super::{client::Seat, rest},
        *,
    };
    use crate::{
        client::{Clock, Transport},
        log::Log,
        served::Registry,
        stats::Shards,
        tls::Maker,
        upstream::Connector,
        worker::{Phase, Shared},
    };

    /// A worker with no routes, which answers everything by 503.
    fn worker() -> Rc<Worker> {
        let state = State::default();
        let shared = Shared {
            serving: watch::Sender::new(Arc::new(Registry::new(1).serving(&state, 0))),
            phase: watch::Sender::new(Phase::Serving),
            tls: watch::Sender::new(Arc::new(Maker::new().make(&state).unwrap())),
            acme: crate::acme::Board::default(),
            listening: watch::Sender::new(Vec::new()),
            places: Arc::new(Semaphore::new(10)),
            clock: Clock::new(),
            connector: Connector::new().unwrap(),
            log: Log::start().unwrap(),
            unrouted: Shards::new(1),
            clients: Shards::new(1),
            since: std::time::SystemTime::now(),
        };
        Worker::new(0, Arc::new(shared)).unwrap()
    }

    /// A client, the server's side of its connection, and the task that serves it.
    async fn connect(worker: &Rc<Worker>) -> (TcpStream, Arc<Stage>, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, peer) = listener.accept().await.unwrap();
        let stage = Stage::new(0);
        let clock = Arc::clone(&worker.shared.clock);
        let io = ClientIo::new(Transport::Plain(stream), Bytes::new(), Arc::clone(&stage), clock);
        let place = Arc::clone(&worker.shared.places).acquire_owned().await.unwrap();
        let seat = Seat::take(worker, place, &stage);
        let served = Client::new(peer, false, false, Arc::clone(&stage)).seated(seat);
        let task = tokio::task::spawn_local(serve(Rc::clone(worker), Rc::new(served), io, false));
        (client, stage, task)
    }

    async fn ask(client: &mut TcpStream, request: &str) {
        client.write_all(request.as_bytes()).await.unwrap();
        answer(client).await;
    }

    async fn answer(client: &mut TcpStream) {
        let mut answer = Vec::new();
        while !answer.ends_with(b"here\n") {
            let more = client.read_buf(&mut answer).await.unwrap();
            assert!(more > 0, "{}", answer.escape_ascii());
        }
        assert!(answer.starts_with(b"HTTP/1.1 503"), "{}", answer.escape_ascii());
    }

    /// Has the worker find that so much time has passed, and the connection what follows of it.
    async fn pass(worker: &Worker, ms: u64) {
        worker.shared.clock.set(worker.shared.clock.coarse_ms() + ms);
        for stage in worker.clients.borrow().values() {
            stage.wake();
        }
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }

    fn rests(worker: &Worker) -> bool {
        worker.resting.any(|_| true)
    }

    fn run(test: impl AsyncFnOnce(Rc<Worker>)) {
        let mut builder = Builder::new_current_thread();
        let runtime = builder.enable_all().build_local(LocalOptions::default()).unwrap();
        runtime.block_on(async {
            let worker = worker();
            tokio::task::spawn_local(rest::watch(Rc::clone(&worker)));
            test(worker).await;
        });
    }

    const REQUEST: &str = "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n";

    #[test]
    fn a_silent_connection_rests_and_serves_again() {
        run(async |worker| {
            let (mut client, _stage, task) = connect(&worker).await;
            for _ in 0..3 {
                ask(&mut client, REQUEST).await;
                pass(&worker, 500).await;
                assert!(!worker.rested.take(), "not yet");
                pass(&worker, 1_000).await;
                assert!(worker.rested.take() && rests(&worker), "it is let go");
                pass(&worker, 5_000).await;
                assert!(!worker.rested.take() && rests(&worker), "it rests already");
                assert!(worker.clients.borrow().is_empty(), "only what is needed is kept");
            }
            task.await.unwrap();
            drop(client);
            while rests(&worker) {
                tokio::task::yield_now().await;
            }
        });
    }

    #[test]
    fn half_a_header_is_no_silence() {
        run(async |worker| {
            let (mut client, stage, _task) = connect(&worker).await;
            ask(&mut client, REQUEST).await;
            client.write_all(&REQUEST.as_bytes()[..20]).await.unwrap();
            while stage.may_rest(u64::MAX) {
                tokio::task::yield_now().await;
            }
            pass(&worker, 2_000).await;
            assert!(!worker.rested.get());
            client.write_all(&REQUEST.as_bytes()[20..]).await.unwrap();
            answer(&mut client).await;
        });
    }

    #[test]
    fn half_a_header_behind_a_request_is_kept() {
        run(async |worker| {
            let (mut client, _stage, _task) = connect(&worker).await;
            ask(&mut client, &format!("{REQUEST}{}", &REQUEST[..20])).await;
            for _ in 0..3 {
                pass(&worker, 2_000).await;
            }
            client.write_all(&REQUEST.as_bytes()[20..]).await.unwrap();
            answer(&mut client).await;
        });
    }

    #[test]
    fn an_unread_body_is_no_request() {
        run(async |worker| {
            let (mut client, _stage, task) = connect(&worker).await;
            let body = format!("POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 500\r\n\r\n{REQUEST}");
            ask(&mut client, &body).await;
            pass(&worker, 2_000).await;
            assert!(!worker.rested.get());
            task.await.unwrap();
            let mut rest = Vec::new();
            // A reset says the same as an end.
            let _ended = client.read_to_end(&mut rest).await;
            assert_eq!(rest, b"", "what is left of the body has been taken for a request");
        });
    }

    #[test]
    fn a_resting_connection_ends_when_it_is_told_unless_it_has_asked() {
        for asks in [false, true] {
            run(async |worker| {
                let (mut client, _stage, _task) = connect(&worker).await;
                ask(&mut client, REQUEST).await;
                pass(&worker, 2_000).await;
                assert!(rests(&worker));
                if asks {
                    // Not yet noticed: nothing else has run.
                    let sent = client.try_write(REQUEST.as_bytes()).unwrap();
                    assert_eq!(sent, REQUEST.len());
                }
                worker.finish(|_| true);
                assert!(!rests(&worker));
                if asks {
                    answer(&mut client).await;
                }
                assert_eq!(client.read_to_end(&mut Vec::new()).await.unwrap(), 0);
            });
        }
    }
}
