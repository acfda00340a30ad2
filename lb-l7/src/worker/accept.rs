//! From a listener to requests.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{io::AsyncReadExt as _, net::TcpStream};
use tokio_rustls::server::StartHandshake;

use super::{Client, Phase, Worker, client::Seat, http};
use crate::{
    client::{ClientIo, FIRST_BYTES, Prefixed, Stage, Transport},
    listen::{Gate, Listener},
    proxy_protocol,
    tls::{hello, passthrough},
};

/// What every connection of HTTP/2 begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Pause when no file descriptor is left.
const BREATH: Duration = Duration::from_millis(50);
/// Milliseconds between two words about balancers.
const WARN_EVERY_MS: u64 = 10_000;
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
///
/// Not `async` itself: what is given would have room in the task for as long as the connection lasts.
fn connection(
    worker: Rc<Worker>,
    stream: TcpStream,
    peer: SocketAddr,
    stage: Arc<Stage>,
    seat: Seat,
    tls: bool,
) -> impl Future<Output = ()> {
    let limit = worker.serving().settings.timeouts.header;
    // On the heap: large, and over soon.
    let begun = Box::pin(begin(Rc::clone(&worker), stream, peer, stage, seat, tls));
    async move {
        // What fails before the first request is the client's fault, or its end: there is nobody to tell.
        if let Ok(Ok(Some((client, io, is_h2)))) = tokio::time::timeout(limit, begun).await {
            http::serve(worker, client, io, is_h2).await;
        }
    }
}

/// What comes before HTTP. `None`: the connection is passed on as it is.
async fn begin(
    worker: Rc<Worker>,
    mut stream: TcpStream,
    peer: SocketAddr,
    stage: Arc<Stage>,
    seat: Seat,
    tls: bool,
) -> io::Result<Option<(Rc<Client>, ClientIo, bool)>> {
    let serving = worker.serving();
    let mut address = peer;
    if is_in(peer.ip(), &serving.settings.proxy_protocol) {
        let told = proxy_protocol::read(&mut stream, peer).await;
        address = told.inspect_err(|error| warn_of_balancer(&worker, peer, error))?;
    }
    let is_trusted = is_in(address.ip(), &serving.settings.trusted_proxies);
    let client = Client::new(address, tls, is_trusted, Arc::clone(&stage)).seated(seat);
    let client = match serving.settings.send_proxy_protocol {
        true => client.came_to(stream.local_addr()?),
        false => client,
    };
    if !tls {
        let clock = Arc::clone(&worker.shared.clock);
        let first = first_bytes(&mut stream).await?;
        let is_h2 = first.starts_with(PREFACE);
        let io = ClientIo::new(Transport::Plain(stream), first, stage, clock);
        return Ok(Some((Rc::new(client), io, is_h2)));
    }
    // Not all connections need the room for it.
    Box::pin(begin_tls(&worker, stream, client, stage)).await
}

/// Says that one of our own balancers does not say who its client is: whoever set it up sees nothing but closed connections.
fn warn_of_balancer(worker: &Worker, peer: SocketAddr, error: &io::Error) {
    static NEXT_MS: AtomicU64 = AtomicU64::new(0);
    let now = worker.shared.clock.coarse_ms();
    // Checks of theirs connect and go.
    if error.kind() == io::ErrorKind::InvalidData && now >= NEXT_MS.load(Relaxed) {
        NEXT_MS.store(now + WARN_EVERY_MS, Relaxed);
        tracing::warn!(%peer, "{error}; l7.proxy-protocol wants one from this address");
    }
}

/// As [`begin`], where a client begins TLS.
async fn begin_tls(
    worker: &Rc<Worker>,
    mut stream: TcpStream,
    client: Client,
    stage: Arc<Stage>,
) -> io::Result<Option<(Rc<Client>, ClientIo, bool)>> {
    let serving = worker.serving();
    let clock = Arc::clone(&worker.shared.clock);
    let mut hello = hello::read(&mut stream).await?;
    if let Some(route) = passthrough::route(&serving, hello.name().as_deref()) {
        let (worker, route) = (Rc::clone(worker), Arc::clone(route));
        tokio::task::spawn_local(async move {
            passthrough::pass(&worker, &client, &route, stream, hello.bytes).await;
        });
        return Ok(None);
    }
    let config = worker.shared.tls.borrow().config(&hello.accepted.client_hello());
    let prefixed = Prefixed {
        prefix: hello.bytes.split_off(hello.fed).freeze(),
        stream,
    };
    let begun = StartHandshake::from_parts(hello.accepted, prefixed);
    let stream = begun.into_stream(config).await?;
    let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let io = ClientIo::new(Transport::Tls(Box::new(stream)), Bytes::new(), stage, clock);
    Ok(Some((Rc::new(client), io, is_h2)))
}

/// The first bytes of a connection: enough to know what it speaks.
async fn first_bytes(stream: &mut TcpStream) -> io::Result<Bytes> {
    // No memory is spent on a client that says nothing.
    stream.readable().await?;
    let mut bytes = BytesMut::with_capacity(FIRST_BYTES);
    loop {
        // Not `try_read`, which does not see that there was no more: the next to read would ask the kernel in vain.
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let start = &bytes[..bytes.len().min(PREFACE.len())];
        // The beginning of a preface, and not yet all of it, says nothing yet.
        if start.len() == PREFACE.len() || !PREFACE.starts_with(start) {
            return Ok(bytes.freeze());
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
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}
