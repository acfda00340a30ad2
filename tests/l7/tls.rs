//! TLS at both ends, by curl and by a handshake of our own.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Command,
    sync::Arc,
    time::Instant,
};

use lb_tests::pki::Authority;
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use serde_json::{Value, json};

use super::{
    agent::{Agent, route, with},
    origin::Origin,
    rig::with_raw,
    shim::Shim,
    wire::Wire,
};

/// Writes a certificate for these names, signed by itself, and its key.
fn certify(folder: &Path, file: &str, names: &[&str]) {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
    fs::write(folder.join(format!("{file}.key")), key.serialize_pem()).unwrap();
    // In one step, as a client of ACME does it.
    fs::write(folder.join(format!("{file}.next")), certificate.pem()).unwrap();
    fs::rename(
        folder.join(format!("{file}.next")),
        folder.join(format!("{file}.pem")),
    )
    .unwrap();
}

/// A shim with an HTTP and an HTTPS port, and its certificates.
struct Rig {
    folder: tempfile::TempDir,
    http: SocketAddr,
    https: SocketAddr,
    shim: Shim,
    _agent: Agent,
}

fn rig(settings: Value, routes: &Value, certificates: impl FnOnce(&Path)) -> Rig {
    let folder = tempfile::tempdir().unwrap();
    let certs = folder.path().join("certs");
    fs::create_dir(&certs).unwrap();
    certificates(&certs);
    let settings = with(settings, json!({ "certificates": certs }));
    let agent = Agent::start(folder.path(), &settings, routes);
    let shim = Shim::start_with(
        folder.path(),
        &["--http", "127.0.0.1:0", "--https", "127.0.0.1:0"],
    );
    let places = shim.addresses(2);
    let at = |tls| places.iter().find(|place| place.1 == tls).unwrap().0;
    Rig {
        http: at(false),
        https: at(true),
        folder,
        shim,
        _agent: agent,
    }
}

impl Rig {
    fn certs(&self) -> std::path::PathBuf {
        self.folder.path().join("certs")
    }

    /// curl for a host at the HTTPS port, trusting only this file of the folder: what it prints, or how it failed.
    fn curl(&self, host: &str, trusted: &str, words: &[&str]) -> Result<String, String> {
        let output = Command::new("curl")
            .args([
                "-sS",
                "-i",
                "--max-time",
                "10",
                "--connect-to",
                &format!("::127.0.0.1:{}", self.https.port()),
            ])
            .arg("--cacert")
            .arg(self.certs().join(trusted))
            .args(words)
            .arg(format!("https://{host}/"))
            .output()
            .expect("curl");
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }
}

#[test]
fn every_name_has_its_certificate_and_new_ones_are_taken_at_once() {
    let origin = Origin::start();
    let routes = json!([
        route("a.example", &[origin.address]),
        with(
            route("b.example", &[origin.address]),
            json!({ "settings": { "tls": {
            "serve": true, "only": true, "certificate": "other.pem", "key": "other.key" } } })
        ),
    ]);
    let rig = rig(json!({}), &routes, |certs| {
        certify(certs, "a", &["a.example"]);
        certify(certs, "other", &["b.example"]);
    });
    let a = rig.curl("a.example", "a.pem", &[]).unwrap();
    assert!(a.starts_with("HTTP/2 200") && a.contains(&origin.name()), "{a}");
    assert!(!a.contains("strict-transport-security"));
    let b = rig.curl("b.example", "other.pem", &["--http1.1"]).unwrap();
    assert!(
        b.starts_with("HTTP/1.1 200") && b.contains("strict-transport-security: max-age="),
        "{b}"
    );
    assert!(
        rig.curl("a.example", "other.pem", &[]).is_err(),
        "not its certificate"
    );
    assert!(
        rig.curl("c.example", "a.pem", &[]).is_err(),
        "no certificate is for that name"
    );
    let seen = origin.requests();
    assert!(
        seen.iter().all(|r| r.contains("x-forwarded-proto: https")),
        "{seen:?}"
    );
    // Plain HTTP is a redirect where only HTTPS may be.
    assert_eq!(Wire::connect(rig.http).get("b.example", "/").status, 301);
    assert_eq!(Wire::connect(rig.http).get("a.example", "/").status, 200);

    certify(&rig.certs(), "a", &["a.example"]);
    let until = Instant::now() + super::shim::PATIENCE;
    while rig.curl("a.example", "a.pem", &[]).is_err() {
        assert!(Instant::now() < until, "the new certificate is not served");
    }
    // A file that is cut off leaves the certificate as it was.
    let good = fs::read(rig.certs().join("a.pem")).unwrap();
    fs::copy(rig.certs().join("a.pem"), rig.certs().join("trusted")).unwrap();
    fs::write(rig.certs().join("a.pem"), &good[..good.len() / 2]).unwrap();
    rig.shim.await_log("the fault", |lines| {
        let said = |l: &Value| l["message"].as_str().is_some_and(|m| m.contains("used on"));
        lines.iter().any(said).then_some(())
    });
    rig.curl("a.example", "trusted", &[]).unwrap();
}

#[test]
fn old_versions_of_tls_are_not_spoken() {
    let origin = Origin::start();
    let routes = json!([route("a.example", &[origin.address])]);
    let old = rig(json!({}), &routes, |certs| certify(certs, "a", &["a.example"]));
    old.curl("a.example", "a.pem", &["--tls-max", "1.2"]).unwrap();
    let refused = old.curl(
        "a.example",
        "a.pem",
        &["--tlsv1.0", "--tls-max", "1.1", "--ciphers", "DEFAULT@SECLEVEL=0"],
    );
    assert!(refused.is_err(), "{refused:?}");
    let new = rig(json!({ "min_tls": "1.3" }), &routes, |certs| {
        certify(certs, "a", &["a.example"])
    });
    new.curl("a.example", "a.pem", &[]).unwrap();
    assert!(new.curl("a.example", "a.pem", &["--tls-max", "1.2"]).is_err());
}

/// A server that speaks TLS and answers every connection's first request with its name.
fn secure_server(folder: &Path, file: &str, name: &'static str) -> SocketAddr {
    let chain = CertificateDer::from_pem_file(folder.join(format!("{file}.pem"))).unwrap();
    let key = PrivateKeyDer::from_pem_file(folder.join(format!("{file}.key"))).unwrap();
    let provider = Arc::new(ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![chain], key)
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            stream.set_read_timeout(Some(super::shim::PATIENCE)).unwrap();
            let mut tls = StreamOwned::new(ServerConnection::new(Arc::clone(&config)).unwrap(), stream);
            let mut request = [0; 4096];
            if tls.read(&mut request).is_ok_and(|n| n > 0) {
                let _ = write!(
                    tls,
                    "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{name}",
                    name.len()
                );
                tls.conn.send_close_notify();
                let _ = tls.flush();
            }
        }
    });
    address
}

#[test]
fn passed_on_tls_ends_at_its_server() {
    let origin = Origin::start();
    let certs = tempfile::tempdir().unwrap();
    certify(certs.path(), "own", &["own.example"]);
    let server = secure_server(certs.path(), "own", "the server itself");
    let routes = json!([
        route("a.example", &[origin.address]),
        with(
            route("own.example", &[server]),
            json!({ "settings": { "tls": { "passthrough": true } } })
        ),
    ]);
    let rig = rig(json!({}), &routes, |shim| certify(shim, "a", &["a.example"]));
    fs::copy(certs.path().join("own.pem"), rig.certs().join("trusted")).unwrap();
    let text = rig.curl("own.example", "trusted", &["--http1.1"]).unwrap();
    assert!(text.ends_with("the server itself"), "{text}");
    rig.curl("a.example", "a.pem", &[]).unwrap();
    // Another host inside the TLS of the first is none of its business.
    let words = ["-H", "Host: own.example", "--http1.1"];
    assert!(
        rig.curl("a.example", "a.pem", &words)
            .unwrap()
            .starts_with("HTTP/1.1 421")
    );
    assert_eq!(Wire::connect(rig.http).get("own.example", "/").status, 301);
}

#[test]
fn servers_are_verified_unless_the_route_says_otherwise() {
    let certs = tempfile::tempdir().unwrap();
    certify(certs.path(), "own", &["own.example"]);
    let server = secure_server(certs.path(), "own", "secure");
    let tls = |verify: bool| json!({ "settings": { "upstream_tls": { "verify": verify } } });
    let routes = json!([
        with(route("own.example", &[server]), tls(true)),
        with(route("loose.example", &[server]), tls(false)),
    ]);
    let rig = rig(json!({}), &routes, |_| {});
    assert_eq!(Wire::connect(rig.http).get("loose.example", "/").text(), "secure");
    assert_eq!(
        Wire::connect(rig.http).get("own.example", "/").status,
        502,
        "nobody has signed it"
    );
}

/// An answer of HTTP/2 to a request of gRPC, which goes on by HTTP/2: its text.
fn grpc(address: SocketAddr, host: &str) -> String {
    use http_body_util::{BodyExt as _, Full};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let begun = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
        let (mut sender, connection) = begun.unwrap();
        tokio::spawn(connection);
        let request = hyper::Request::post(format!("http://{host}/headers"))
            .header("content-type", "application/grpc")
            .body(Full::new(hyper::body::Bytes::from("message")))
            .unwrap();
        let body = sender.send_request(request).await.unwrap().into_body();
        String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap()
    })
}

#[test]
fn servers_of_tls_are_spoken_to_as_those_without() {
    let certs = tempfile::tempdir().unwrap();
    certify(certs.path(), "own", &["own.example"]);
    let origin = Origin::secure(certs.path(), "own");
    let tls = json!({ "settings": { "upstream_tls": { "verify": false } } });
    let routes = json!([with(route("own.example", &[origin.address]), tls)]);
    let rig = rig(json!({}), &routes, |_| {});
    let mut wire = Wire::connect(rig.http);
    let seen = wire.get("own.example", "/headers").text();
    assert!(seen.starts_with("GET /headers HTTP/1.1\n"), "{seen}");
    // By HTTP/2, which the server would rather have, none would come through.
    assert_eq!(super::upgrades::open(&mut wire, "own.example", "/upgrade"), 101);
    assert!(super::upgrades::says_back(&mut wire, "hello"));
    let seen = grpc(rig.http, "own.example");
    assert!(
        seen.starts_with("POST https://own.example/headers HTTP/2.0\n"),
        "{seen}"
    );
}

#[test]
fn proxy_headers_tell_the_client_where_they_must() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let settings = json!({ "proxy_protocol": ["127.0.0.0/8"] });
    let _agent = Agent::start(folder.path(), &settings, &json!([route("a", &[origin.address])]));
    let shim = Shim::start(folder.path());
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".to_vec();
    header.extend([192, 0, 2, 77, 10, 0, 0, 1, 0x30, 0x39, 0, 80]);
    // In two parts, the request right behind.
    let mut wire = Wire::connect(shim.address());
    wire.send(&header[..9]);
    wire.send([&header[9..], b"GET /headers HTTP/1.1\r\nHost: a\r\n\r\n"].concat());
    let text = wire.answer().text();
    assert!(text.contains("x-forwarded-for: 192.0.2.77\n"), "{text}");
    let mut without = Wire::connect(shim.address());
    without.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(without.is_closed());
    // Whoever set that balancer up would see nothing else of it.
    shim.await_log("what is missing", |lines| {
        let says = |line: &&Value| line.to_string().contains("no header of the PROXY protocol");
        lines.iter().find(says).map(|_| ())
    });
}

#[test]
fn upstreams_are_told_the_client_where_they_read_it() {
    let rig = with_raw(json!({ "send_proxy_protocol": true }));
    let mut wire = Wire::connect(rig.shim.address());
    for path in ["/1", "/2"] {
        wire.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n"));
        // A connection for each request, and the header first.
        let mut stream = rig.server.accept_bare();
        let mut header = [0; 28];
        stream.read_exact(&mut header).unwrap();
        assert_eq!(&header[..14], b"\r\n\r\n\0\r\nQUIT\n\x21\x11");
        let us = wire.raw().local_addr().unwrap();
        assert_eq!(
            (&header[16..20], &header[24..26]),
            (&[127, 0, 0, 1][..], &us.port().to_be_bytes()[..])
        );
        let request = super::origin::read_header(&mut stream);
        assert!(
            request.starts_with(&format!("GET {path} HTTP/1.1\r\n")),
            "{request}"
        );
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            .unwrap();
        assert_eq!(wire.answer().status, 200);
    }
}

#[test]
fn a_silent_client_rests_and_is_served_again() {
    let origin = Origin::start();
    let routes = json!([route("a.example", &[origin.address])]);
    let rig = rig(json!({}), &routes, |certs| {
        let authority = Authority::new(&certs.with_file_name("ca.pem")).unwrap();
        let (cert, key) = (certs.join("a.pem"), certs.join("a.key"));
        authority
            .certify("a.example", "a.example", 2099, &cert, &key)
            .unwrap();
    });
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(rig.folder.path().join("ca.pem")).unwrap();
    roots.add(ca).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("a.example").unwrap();
    let client = ClientConnection::new(Arc::new(config), name).unwrap();
    let stream = TcpStream::connect(rig.https).unwrap();
    stream.set_read_timeout(Some(super::shim::PATIENCE)).unwrap();
    let mut tls = StreamOwned::new(client, stream);
    for times in 1..=3 {
        tls.write_all(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
            .unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(origin.name().as_bytes()) {
            let mut byte = [0];
            tls.read_exact(&mut byte).unwrap();
            answer.extend(byte);
        }
        assert!(answer.starts_with(b"HTTP/1.1 200"));
        rig.shim.await_rest(times);
    }
}

#[test]
fn truncated_handshakes_end_without_harm() {
    let origin = Origin::start();
    let routes = json!([route("a.example", &[origin.address])]);
    let rig = rig(json!({ "timeouts": { "header_ms": 500 } }), &routes, |certs| {
        certify(certs, "a", &["a.example"])
    });
    for bytes in [
        &b"\x16\x03\x01"[..],
        b"\x16\x03\x01\xff\xff\x01",
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
    ] {
        let mut stream = TcpStream::connect(rig.https).unwrap();
        stream.write_all(bytes).unwrap();
        stream.set_read_timeout(Some(super::shim::PATIENCE)).unwrap();
        let mut rest = Vec::new();
        let _alert_or_reset = stream.read_to_end(&mut rest);
        assert!(!rest.starts_with(b"HTTP"));
    }
    rig.curl("a.example", "a.pem", &[]).unwrap();
}
