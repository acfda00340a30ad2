//! Servers behind the shim: one that does as the path says, and one that the test drives byte by byte.

use std::{
    convert::Infallible,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use http_body_util::{BodyExt as _, Full, StreamBody, combinators::BoxBody};
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::{Bytes, Frame, Incoming},
    header::HeaderValue,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lb_tests::listen::hang_up;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// A server of HTTP/1.1 and HTTP/2 with prior knowledge. Its name is its port.
pub struct Origin {
    pub address: SocketAddr,
    pub seen: Arc<Seen>,
    listener: TcpListener,
    _runtime: tokio::runtime::Runtime,
}

/// What a server has seen.
#[derive(Default)]
pub struct Seen {
    pub connections: AtomicUsize,
    /// Request lines and headers, in the order in which they came.
    pub requests: Mutex<Vec<String>>,
}

type Body = BoxBody<Bytes, hyper::Error>;

impl Origin {
    pub fn start() -> Self {
        Self::begin(None)
    }

    /// By TLS, with the certificate in `FILE.pem` and the key in `FILE.key`; HTTP/2 for whoever offers it.
    pub fn secure(folder: &std::path::Path, file: &str) -> Self {
        use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
        let chain = CertificateDer::from_pem_file(folder.join(format!("{file}.pem"))).unwrap();
        let key = PrivateKeyDer::from_pem_file(folder.join(format!("{file}.key"))).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![chain], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Self::begin(Some(Arc::new(config).into()))
    }

    fn begin(tls: Option<tokio_rustls::TlsAcceptor>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let ours = listener.try_clone().unwrap();
        let seen = Arc::new(Seen::default());
        let to = Arc::clone(&seen);
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                to.connections.fetch_add(1, SeqCst);
                let seen = Arc::clone(&to);
                let tls = tls.clone();
                tokio::spawn(async move {
                    let Some(tls) = tls else {
                        let mut first = [0; 3];
                        let _ = stream.peek(&mut first).await;
                        return speak(address, seen, stream, first == *b"PRI").await;
                    };
                    if let Ok(stream) = tls.accept(stream).await {
                        let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                        speak(address, seen, stream, h2).await;
                    }
                });
            }
        });
        Self {
            address,
            seen,
            listener: ours,
            _runtime: runtime,
        }
    }

    pub fn name(&self) -> String {
        self.address.port().to_string()
    }

    pub fn requests(&self) -> Vec<String> {
        self.seen.requests.lock().unwrap().clone()
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        let _ended_already = hang_up(&self.listener);
    }
}

async fn speak<S>(me: SocketAddr, seen: Arc<Seen>, stream: S, h2: bool)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| serve(me, Arc::clone(&seen), request));
    let io = TokioIo::new(stream);
    if h2 {
        let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let _ = server.serve_connection(io, service).await;
    } else {
        let server = hyper::server::conn::http1::Builder::new();
        let _ = server.serve_connection(io, service).with_upgrades().await;
    }
}

fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).map_err(|never| match never {}).boxed()
}

async fn serve(
    me: SocketAddr,
    seen: Arc<Seen>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let mut shown = format!("{} {} {:?}\n", request.method(), request.uri(), request.version());
    for (name, value) in request.headers() {
        shown.push_str(&format!(
            "{name}: {}\n",
            String::from_utf8_lossy(value.as_bytes())
        ));
    }
    seen.requests.lock().unwrap().push(shown.clone());
    let path = request.uri().path().to_owned();
    let mut answer = Response::new(match path.as_str() {
        // Everything that it was sent, as it comes.
        "/echo" => return Ok(Response::new(request.into_body().boxed())),
        "/length" => {
            let bytes = request
                .into_body()
                .collect()
                .await
                .map_or(0, |body| body.to_bytes().len());
            full(bytes.to_string())
        }
        "/headers" => full(shown),
        "/empty" | "/none" => full(""),
        "/trailers" => {
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sum", HeaderValue::from_static("42"));
            let sent = request.into_body().collect().await.ok();
            let got = sent
                .as_ref()
                .and_then(|body| body.trailers())
                .map(|t| format!("{t:?}"));
            let parts = [
                Ok(Frame::data(Bytes::from(got.unwrap_or_default()))),
                Ok(Frame::trailers(trailers)),
            ];
            StreamBody::new(futures_util::stream::iter(parts)).boxed()
        }
        "/upgrade" => {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut io = TokioIo::new(upgrade.await.unwrap());
                let mut buf = [0; 1024];
                while let Ok(n) = io.read(&mut buf).await
                    && n > 0
                {
                    let _ = io.write_all(&buf[..n]).await;
                }
            });
            full("")
        }
        slow if slow.starts_with("/slow/") => {
            let ms = slow["/slow/".len()..].parse().unwrap();
            tokio::time::sleep(Duration::from_millis(ms)).await;
            full(me.port().to_string())
        }
        _ => full(me.port().to_string()),
    });
    match path.as_str() {
        "/none" => *answer.status_mut() = StatusCode::NO_CONTENT,
        "/upgrade" => {
            *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            answer
                .headers_mut()
                .insert("connection", HeaderValue::from_static("upgrade"));
            answer
                .headers_mut()
                .insert("upgrade", HeaderValue::from_static("websocket"));
        }
        "/trailers" => drop(
            answer
                .headers_mut()
                .insert("trailer", HeaderValue::from_static("x-sum")),
        ),
        _ => {}
    }
    Ok(answer)
}

/// A server that the test drives.
pub struct Raw {
    listener: TcpListener,
    pub address: SocketAddr,
}

impl Raw {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        Self { listener, address }
    }

    /// The next connection, with the header of its first request read.
    pub fn accept(&self) -> (std::net::TcpStream, String) {
        let mut stream = self.accept_bare();
        let header = read_header(&mut stream);
        (stream, header)
    }

    /// The next connection, with nothing read of it.
    pub fn accept_bare(&self) -> std::net::TcpStream {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd as _;
        let mut waiting = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        let patience = PollTimeout::try_from(super::shim::PATIENCE).unwrap();
        assert_eq!(poll(&mut waiting, patience), Ok(1), "nobody connects");
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(super::shim::PATIENCE)).unwrap();
        stream
    }
}

/// A header, with the empty line behind it; less if the connection ends.
pub fn read_header(stream: &mut std::net::TcpStream) -> String {
    use std::io::Read as _;
    let mut header = Vec::new();
    let mut byte = [0];
    while !header.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
        header.push(byte[0]);
    }
    String::from_utf8(header).unwrap()
}

/// An address at which nobody listens, and nobody will unless told to: its port is none that the kernel gives to those
/// who ask for any (`ip_local_port_range` begins at 32768), as other tests do all the time.
pub fn nobody() -> SocketAddr {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    loop {
        // Two runs at a time begin at different ports.
        let turn = std::process::id() as usize * 64 + NEXT.fetch_add(1, SeqCst);
        let address = SocketAddr::from(([127, 0, 0, 1], 12_000 + (turn % 20_000) as u16));
        if let Ok(listener) = TcpListener::bind(address) {
            hang_up(&listener).unwrap();
            return address;
        }
    }
}
