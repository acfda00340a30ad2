//! From a listener to requests.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use hyper::{server::conn, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use super::{Client, Phase, Worker, client::Seat};
use crate::{
    client::{ClientIo, Prefixed, Stage, Transport, Word},
    listen::{Gate, Listener},
    proxy, proxy_protocol,
    tls::{hello, passthrough},
    upstream::LocalExec,
};

/// What every connection of HTTP/2 begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Room for the first bytes of a connection: most requests fit in it.
const FIRST_BYTES: usize = 2048;
/// Longest header of a request, bytes; a longer one is answered by 431.
const LONGEST_HEADER: usize = 64 * 1024;
/// Streams of one HTTP/2 connection at a time.
const MOST_STREAMS: u32 = 128;
/// Pause when no file descriptor is left.
const BREATH: Duration = Duration::from_millis(50);
/// How long a place that is given up still takes connections whose handshake has begun.
const HANDSHAKE: Duration = Duration::from_millis(500);

/// Accepts until nobody shall come here any more, and then what is left in the queue.
pub(super) async fn accept(worker: Rc<Worker>, listener: Listener) {
    let mut closed = std::pin::pin!(closed(&worker, &listener.gate));
    loop {
        let accepted = tokio::select! {
            biased;
            accepted = listener.socket.accept() => accepted,
            () = &mut closed => break,
        };
        take(&worker, &listener, accepted).await;
    }
    if listener.gate.leaves_its_queue() {
        return;
    }
    // What the kernel has shaken hands with would get a RST.
    while let Some(accepted) = now_or_never(listener.socket.accept()) {
        take(&worker, &listener, accepted).await;
    }
}

/// Ready when the process drains, or the place is given up.
async fn closed(worker: &Worker, gate: &Gate) {
    let drained = async {
        let mut phase = worker.shared.phase.subscribe();
        let _an_end_is_one_too = phase.wait_for(|phase| *phase != Phase::Serving).await;
        if gate.waits_for_a_successor() {
            // Until the clients of before have gone, new ones would wait for nothing.
            let mut relieved = worker.relieved.subscribe();
            let _an_end_is_one_too = relieved.wait_for(|relieved| *relieved).await;
        }
    };
    let given_up = async {
        gate.given_up().await;
        // Handshakes that have begun.
        tokio::time::sleep(HANDSHAKE).await;
    };
    tokio::select! {
        () = drained => {}
        () = given_up => {}
    }
}

async fn take(worker: &Rc<Worker>, listener: &Listener, accepted: io::Result<(TcpStream, SocketAddr)>) {
    match accepted {
        Ok((stream, peer)) => {
            let places = Arc::clone(&worker.shared.places);
            // Further ones wait in the queue of the listener.
            let Ok(place) = places.acquire_owned().await else {
                return;
            };
            let stage = Stage::new(worker.shared.clock.coarse_ms());
            let seat = Seat::take(worker, place, &stage);
            let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
            let connection = connection(
                Rc::clone(worker),
                stream,
                peer,
                stage,
                seat,
                listener.gate.is_tls(),
            );
            tokio::task::spawn_local(connection);
        }
        Err(error) if is_of_one_connection(&error) => {}
        Err(error) => {
            tracing::warn!("accepting a connection failed: {error}");
            tokio::time::sleep(BREATH).await;
        }
    }
}

/// Whether only this connection failed, which its client knows.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted
    )
}

/// One connection, from its first byte to its last.
async fn connection(
    worker: Rc<Worker>,
    stream: TcpStream,
    peer: SocketAddr,
    stage: Arc<Stage>,
    seat: Seat,
    tls: bool,
) {
    let limit = worker.serving().settings.timeouts.header;
    // What fails before the first request is the client's fault, or its end: there is nobody to tell.
    if let Ok(Ok(Some((client, io, is_h2)))) =
        tokio::time::timeout(limit, begin(&worker, stream, peer, stage, seat, tls)).await
    {
        http(worker, client, io, is_h2).await;
    }
}

/// What comes before HTTP. `None`: the connection is passed on as it is.
async fn begin(
    worker: &Rc<Worker>,
    mut stream: TcpStream,
    peer: SocketAddr,
    stage: Arc<Stage>,
    seat: Seat,
    tls: bool,
) -> io::Result<Option<(Rc<Client>, ClientIo, bool)>> {
    let serving = worker.serving();
    let mut address = peer;
    if is_in(peer.ip(), &serving.settings.proxy_protocol) {
        address = proxy_protocol::read(&mut stream, peer).await?;
    }
    let is_trusted = is_in(address.ip(), &serving.settings.trusted_proxies);
    let client = Client::new(address, tls, is_trusted, Arc::clone(&stage)).seated(seat);
    let client = match serving.settings.send_proxy_protocol {
        true => client.came_to(stream.local_addr()?),
        false => client,
    };
    let clock = Arc::clone(&worker.shared.clock);
    if !tls {
        let first = first_bytes(&stream).await?;
        let is_h2 = first.starts_with(PREFACE);
        let io = ClientIo::new(Transport::Plain(stream), first, stage, clock);
        return Ok(Some((Rc::new(client), io, is_h2)));
    }
    let (first, name) = hello::read(&stream).await?;
    if let Some(route) = passthrough::route(&serving, name.as_deref()) {
        let (worker, route) = (Rc::clone(worker), Arc::clone(route));
        tokio::task::spawn_local(async move {
            passthrough::pass(&worker, &client, &route, stream, first).await;
        });
        return Ok(None);
    }
    let config = Arc::clone(&worker.shared.tls.borrow().config);
    let prefixed = Prefixed {
        prefix: first.freeze(),
        stream,
    };
    let stream = TlsAcceptor::from(config).accept(prefixed).await?;
    let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let io = ClientIo::new(Transport::Tls(Box::new(stream)), Bytes::new(), stage, clock);
    Ok(Some((Rc::new(client), io, is_h2)))
}

/// Speaks HTTP with a client.
async fn http(worker: Rc<Worker>, client: Rc<Client>, io: ClientIo, is_h2: bool) {
    let stage = Arc::clone(&client.stage);
    let io = TokioIo::new(io);
    let service = {
        let worker = Rc::clone(&worker);
        service_fn(move |request| proxy::handle(Rc::clone(&worker), Rc::clone(&client), request))
    };
    // What ends a connection is the client's business; what failed of a request has been counted.
    if is_h2 {
        stage.is_h2();
        let mut builder = conn::http2::Builder::new(LocalExec);
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(MOST_STREAMS)
            .max_header_list_size(LONGEST_HEADER as u32)
            .adaptive_window(true);
        let mut connection = std::pin::pin!(builder.serve_connection(io, service));
        let mut told = worker.is_draining();
        if told {
            connection.as_mut().graceful_shutdown();
        }
        let _ended = std::future::poll_fn(|cx| {
            match stage.poll_word(cx) {
                Word::End => return Poll::Ready(Ok(())),
                Word::Finish if !told => {
                    told = true;
                    connection.as_mut().graceful_shutdown();
                }
                Word::Finish | Word::GoOn => {}
            }
            connection.as_mut().poll(cx)
        })
        .await;
    } else {
        let mut builder = conn::http1::Builder::new();
        // The sweep sees to silence.
        builder.header_read_timeout(None).max_buf_size(LONGEST_HEADER);
        let connection = builder.serve_connection(io, service).with_upgrades();
        let mut connection = std::pin::pin!(connection);
        let mut told = false;
        let _ended = std::future::poll_fn(|cx| {
            match stage.poll_word(cx) {
                Word::End => return Poll::Ready(Ok(())),
                Word::Finish if !told => {
                    told = true;
                    connection.as_mut().graceful_shutdown();
                }
                Word::Finish | Word::GoOn => {}
            }
            connection.as_mut().poll(cx)
        })
        .await;
    }
}

/// The first bytes of a connection: enough to know what it speaks.
async fn first_bytes(stream: &TcpStream) -> io::Result<Bytes> {
    // No memory is spent on a client that says nothing.
    stream.readable().await?;
    let mut bytes = BytesMut::with_capacity(FIRST_BYTES);
    loop {
        match stream.try_read_buf(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {
                let start = &bytes[..bytes.len().min(PREFACE.len())];
                // The beginning of a preface, and not yet all of it.
                if start.len() < PREFACE.len() && PREFACE.starts_with(start) {
                    continue;
                }
                return Ok(bytes.freeze());
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.readable().await?,
            Err(error) => return Err(error),
        }
    }
}

pub(super) fn is_in(ip: IpAddr, nets: &[ipnet::IpNet]) -> bool {
    nets.iter().any(|net| net.contains(&ip))
}

/// What a future has at once.
fn now_or_never<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = std::pin::pin!(future);
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    match future.as_mut().poll(&mut cx) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}
