//! HTTP/2 with clients that are not ours, and gRPC as it is on the wire.

use std::{io::Write as _, process::Command};

use http_body_util::{BodyExt as _, StreamBody};
use hyper::{
    HeaderMap, Request,
    body::{Bytes, Frame},
    header::HeaderValue,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;

use super::{
    agent::{Agent, route},
    origin::Origin,
    rig::with_raw,
    shim::Shim,
    wire::Wire,
};

#[test]
fn h2load_is_served_without_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    let origins = [Origin::start(), Origin::start()];
    let all = origins.each_ref().map(|origin| origin.address);
    let _agent = Agent::start(folder.path(), &json!({}), &json!([route("127.0.0.1", &all)]));
    let shim = Shim::start(folder.path());
    for kind in ["h2c", "http/1.1"] {
        let output = Command::new("h2load")
            .args(["-n", "2000", "-c", "10", "-m", "10", "-p", kind])
            .arg(format!("http://{}/", shim.address()))
            .output()
            .expect("h2load (package nghttp2-client)");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            text.contains("2000 succeeded, 0 failed, 0 errored, 0 timeout"),
            "{kind}: {text}"
        );
        assert!(text.contains("status codes: 2000 2xx"), "{kind}: {text}");
    }
}

#[test]
fn grpc_has_http2_and_trailers_all_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let _agent = Agent::start(folder.path(), &json!({}), &json!([route("a", &[origin.address])]));
    let shim = Shim::start(folder.path());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (text, trailers) = runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(shim.address()).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                .await
                .unwrap();
        tokio::spawn(connection);
        let mut sent = HeaderMap::new();
        sent.insert("x-mine", HeaderValue::from_static("7"));
        let parts = [
            Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from("message"))),
            Ok(Frame::trailers(sent)),
        ];
        let request = Request::post("http://a/trailers")
            .header("content-type", "application/grpc+proto")
            .header("te", "trailers")
            .body(StreamBody::new(futures_util::stream::iter(parts)))
            .unwrap();
        let answer = sender.send_request(request).await.unwrap();
        assert_eq!(answer.status(), 200);
        let body = answer.into_body().collect().await.unwrap();
        let trailers = body.trailers().cloned();
        (body.to_bytes(), trailers)
    });
    assert_eq!(text, r#"{"x-mine": "7"}"#);
    assert_eq!(trailers.unwrap()["x-sum"], "42");
    let seen = origin.requests();
    assert!(
        seen[0].contains("HTTP/2.0") && seen[0].contains("te: trailers"),
        "{seen:?}"
    );
}

#[test]
fn a_stream_that_nobody_takes_does_not_hold_a_server() {
    use std::io::Read as _;
    let rig = with_raw(json!({ "timeouts": { "client_ms": 1000 } }));
    let mut wire = Wire::connect(rig.shim.address());
    // Settings with a window of nothing, and GET http://a/.
    wire.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\0\0");
    wire.send(b"\0\0\x06\x01\x05\0\0\0\x01\x82\x86\x84\x41\x01a");
    let (mut stream, _) = rig.server.accept();
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nsome")
        .unwrap();
    // The connection goes on, and so does the system's own watch over it.
    let mut answer = [0; 1];
    let patience = std::time::Instant::now() + super::shim::PATIENCE;
    let ended = loop {
        assert!(std::time::Instant::now() < patience, "held for ever");
        stream
            .set_read_timeout(Some(std::time::Duration::from_millis(100)))
            .unwrap();
        match stream.read(&mut answer) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            ended => break ended,
        }
        let _it_may_be_over = wire.try_send(b"\0\0\x08\x06\0\0\0\0\0weir-tst");
    };
    let is_over = ended.as_ref().map_or_else(
        |error| error.kind() == std::io::ErrorKind::ConnectionReset,
        |n| *n == 0,
    );
    assert!(is_over, "{ended:?}");
}
