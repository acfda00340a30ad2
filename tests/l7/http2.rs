//! HTTP/2 with clients that are not ours, and gRPC as it is on the wire.

use std::process::Command;

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
    shim::Shim,
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
