//! Real checks of real servers over loopback.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use super::{Network, Outcome, Probe as _};
use crate::model::{Check, CheckKind, HttpMethod, TlsFiles};

/// Reads a request head and answers by its path: `/500` with that status, else 200. The body names the request.
async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte).await {
            Ok(1) => head.push(byte[0]),
            _ => return,
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let path = head.split(' ').nth(1).unwrap_or("");
    if path == "/silence" {
        return std::future::pending().await;
    }
    let status = path.trim_start_matches('/').parse().unwrap_or(200);
    let body = if head.starts_with("HEAD") { "" } else { &head };
    let _gone = stream
        .write_all(
            format!(
                "HTTP/1.1 {status} Whatever\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        )
        .await;
    let _gone = stream.shutdown().await;
}

async fn http_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream));
        }
    });
    address
}

fn http(path: &str) -> Check {
    let mut check = Check::of(vec![CheckKind::Http]);
    check.http.path = path.into();
    check
}

async fn probe(to: SocketAddr, check: Check) -> Outcome {
    Network::default().probe(to, Arc::new(check)).await
}

fn failed(outcome: Outcome) -> String {
    match outcome {
        Outcome::Failed(why) => why,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn tcp_passes_where_somebody_listens() {
    let to = http_server().await;
    let tcp = || Check::of(vec![CheckKind::Tcp]);
    assert_eq!(probe(to, tcp()).await, Outcome::Passed("tcp: connected".into()));
    // A port that was free a moment ago.
    let closed = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    assert_eq!(failed(probe(closed, tcp()).await), "tcp: connection refused");
    // The check's own port, not the backend's.
    let elsewhere = Check {
        port: Some(to.port()),
        ..tcp()
    };
    assert_eq!(
        probe(closed, elsewhere).await,
        Outcome::Passed("tcp: connected".into())
    );
}

#[tokio::test]
async fn http_is_judged_by_status_and_body() {
    let to = http_server().await;
    assert_eq!(probe(to, http("/")).await, Outcome::Passed("http: 200 OK".into()));
    assert_eq!(
        failed(probe(to, http("/500")).await),
        "http: 500 Internal Server Error"
    );
    assert_eq!(
        probe(to, http("/302")).await,
        Outcome::Passed("http: 302 Found".into())
    );
    let mut only = http("/302");
    only.http.status = vec![(200, 204), (301, 301)];
    assert_eq!(failed(probe(to, only.clone()).await), "http: 302 Found");
    only.http.path = "/301".into();
    assert_eq!(
        probe(to, only).await,
        Outcome::Passed("http: 301 Moved Permanently".into())
    );

    // The server's body is the request: the request line, the host and who asks are in it.
    for (text, found) in [
        ("GET /x?y=1 HTTP/1.1", true),
        ("host: app.example.com", true),
        ("user-agent: weir/", true),
        ("nowhere", false),
    ] {
        let mut check = http("/x?y=1");
        check.http.host = Some("app.example.com".into());
        check.http.body = Some(text.into());
        match probe(to, check).await {
            Outcome::Passed(_) => assert!(found, "{text}"),
            Outcome::Failed(why) => {
                assert!(!found, "{text}: {why}");
                assert!(
                    why.contains("200 OK, but the body does not contain `nowhere`"),
                    "{why}"
                );
            }
            Outcome::Impossible(why) => panic!("{why}"),
        }
    }
    let mut head = http("/");
    head.http.method = HttpMethod::Head;
    assert_eq!(probe(to, head).await, Outcome::Passed("http: 200 OK".into()));
}

#[tokio::test]
async fn every_kind_must_pass_and_in_time() {
    let to = http_server().await;
    let mut both = http("/500");
    both.kinds = vec![CheckKind::Tcp, CheckKind::Http];
    assert_eq!(failed(probe(to, both).await), "http: 500 Internal Server Error");

    let mut silence = http("/silence");
    silence.timing.timeout = Duration::from_millis(50);
    assert_eq!(failed(probe(to, silence).await), "http: no answer within 50ms");
    // Something that is no HTTP at all: what listens there says nothing that begins like it.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let odd = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"220 mail.example.com ESMTP\r\n").await.unwrap();
        let mut rest = Vec::new();
        let _reset = stream.read_to_end(&mut rest).await;
    });
    let why = failed(probe(odd, http("/")).await);
    assert!(why.starts_with("http: no HTTP answer"), "{why}");
}

/// An authority, and files of what it signs.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
}

impl Authority {
    fn new(folder: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        fs::write(folder.join(format!("{name}.pem")), issuer.pem()).unwrap();
        Self {
            issuer,
            folder: folder.into(),
        }
    }

    /// A certificate for these names and its key, in files of this name.
    fn sign(&self, name: &str, names: &[&str]) -> (PathBuf, PathBuf) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new(names)
            .unwrap()
            .signed_by(&key, &self.issuer)
            .unwrap();
        let paths = (
            self.folder.join(format!("{name}.pem")),
            self.folder.join(format!("{name}.key")),
        );
        fs::write(&paths.0, cert.pem()).unwrap();
        fs::write(&paths.1, key.serialize_pem()).unwrap();
        paths
    }
}

/// A server like a UCP controller: it wants the client's certificate, signed by this authority.
async fn mutual_tls_server(authority: &Authority, names: &[&str]) -> SocketAddr {
    let (cert, key) = authority.sign("server", names);
    let mut roots = RootCertStore::empty();
    roots.add(authority.issuer.der().clone()).unwrap();
    let provider = Arc::new(ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .unwrap();
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![CertificateDer::from_pem_file(cert).unwrap()],
            PrivateKeyDer::from_pem_file(key).unwrap(),
        )
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    answer(stream).await;
                }
            });
        }
    });
    address
}

/// `https` of `/_ping` with both sides verified.
fn ping(ca: PathBuf, identity: Option<(PathBuf, PathBuf)>, name: Option<&str>) -> Check {
    let mut check = http("/_ping");
    check.kinds = vec![CheckKind::Https];
    check.tls.server_name = name.map(str::to_owned);
    check.tls.files = Some(TlsFiles {
        ca: Some(ca),
        identity,
    });
    check
}

#[tokio::test]
async fn mutual_tls_proves_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, foreign) = (
        Authority::new(folder.path(), "ours"),
        Authority::new(folder.path(), "foreign"),
    );
    let identity = ours.sign("client", &["weir"]);
    let to = mutual_tls_server(&ours, &["ucp.example.com"]).await;
    let ca = folder.path().join("ours.pem");
    let name = Some("ucp.example.com");

    let good = ping(ca.clone(), Some(identity.clone()), name);
    assert_eq!(probe(to, good).await, Outcome::Passed("https: 200 OK".into()));

    // Without a certificate, or with one that the server's authority did not sign.
    let why = failed(probe(to, ping(ca.clone(), None, name)).await);
    assert!(why.contains("CertificateRequired"), "{why}");
    let stranger = foreign.sign("stranger", &["weir"]);
    failed(probe(to, ping(ca.clone(), Some(stranger), name)).await);

    // A server that is not who it should be: other name, other authority, and by its address.
    let why = failed(
        probe(
            to,
            ping(ca.clone(), Some(identity.clone()), Some("other.example.com")),
        )
        .await,
    );
    assert!(
        why.contains("TLS:") && why.contains("not valid for name"),
        "{why}"
    );
    let why = failed(
        probe(
            to,
            ping(folder.path().join("foreign.pem"), Some(identity.clone()), name),
        )
        .await,
    );
    assert!(why.contains("UnknownIssuer"), "{why}");
    failed(probe(to, ping(ca.clone(), Some(identity.clone()), None)).await);
    let by_address = mutual_tls_server(&ours, &["127.0.0.1"]).await;
    assert_eq!(
        probe(by_address, ping(ca.clone(), Some(identity.clone()), None)).await,
        Outcome::Passed("https: 200 OK".into())
    );
    // Nobody speaks TLS there.
    let plain = http_server().await;
    failed(probe(plain, ping(ca, Some(identity), name)).await);
}

#[tokio::test]
async fn faults_of_the_node_say_nothing_of_the_backend() {
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new(folder.path(), "ours");
    let to = mutual_tls_server(&ours, &["ucp.example.com"]).await;
    let ca = folder.path().join("ours.pem");
    let name = Some("ucp.example.com");
    let (cert, key) = ours.sign("client", &["weir"]);
    let other_key = ours.sign("other", &["weir"]).1;
    let network = Network::default();
    let nonsense = folder.path().join("nonsense.pem");
    fs::write(&nonsense, "nonsense").unwrap();
    for (check, says) in [
        (ping(folder.path().join("absent.pem"), None, name), "absent.pem"),
        (ping(nonsense.clone(), None, name), "no certificate in it"),
        (
            ping(ca.clone(), Some((cert.clone(), nonsense.clone())), name),
            "no private key",
        ),
        (
            ping(ca.clone(), Some((cert.clone(), other_key)), name),
            "client certificate",
        ),
        (ping(ca.clone(), None, Some("not a name")), "not a server name"),
    ] {
        match network.probe(to, Arc::new(check)).await {
            Outcome::Impossible(why) => assert!(why.contains(says), "{why}"),
            other => panic!("{says}: {other:?}"),
        }
    }

    // A renewed file counts with the next check, without a restart.
    let good = Arc::new(ping(nonsense.clone(), Some((cert, key)), name));
    assert!(matches!(
        network.probe(to, good.clone()).await,
        Outcome::Impossible(_)
    ));
    fs::copy(&ca, &nonsense).unwrap();
    assert_eq!(
        network.probe(to, good).await,
        Outcome::Passed("https: 200 OK".into())
    );
}

#[tokio::test]
async fn secrets_are_not_shown() {
    let network = Network::default();
    network.clients.client(None).ok();
    assert!(!format!("{network:?}").contains("ClientConfig"));
}
