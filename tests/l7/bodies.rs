//! Bodies of every form, both ways, as streams.

use std::io::{Read as _, Write as _};

use serde_json::json;

use super::{
    origin::read_header,
    rig::{rig, with_raw},
    wire::{Answer, Wire},
};

fn post(wire: &mut Wire, headers: &str, body: &[u8]) -> Answer {
    wire.send(format!("POST /echo HTTP/1.1\r\nHost: a\r\n{headers}\r\n"));
    wire.send(body);
    wire.answer()
}

#[test]
fn bodies_pass_in_every_form() {
    let rig = rig(json!({}));
    let mut wire = Wire::connect(rig.shim.address());
    let large: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
    for size in [0, 1, 65_536, 3_000_000] {
        let body = &large[..size];
        let length = post(&mut wire, &format!("Content-Length: {size}\r\n"), body);
        assert!(
            length.status == 200 && length.body == body,
            "{size} bytes by length"
        );
        let mut chunked = Vec::new();
        for part in body.chunks(50_000) {
            write!(chunked, "{:x};ext=1\r\n", part.len()).unwrap();
            chunked.extend_from_slice(part);
            chunked.extend_from_slice(b"\r\n");
        }
        chunked.extend_from_slice(b"0\r\n\r\n");
        let answer = post(&mut wire, "Transfer-Encoding: chunked\r\n", &chunked);
        assert!(
            answer.status == 200 && answer.body == body,
            "{size} bytes in chunks"
        );
    }
    wire.send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n");
    let head = wire.answer_to("HEAD");
    assert_eq!(
        head.header("content-length"),
        Some(&*rig.origin.name().len().to_string())
    );
    assert_eq!(wire.get("a", "/none").status, 204);
    assert_eq!(wire.get("a", "/empty").body, b"");
    // Several requests at once are answered in their order.
    wire.send("GET /slow/30 HTTP/1.1\r\nHost: a\r\n\r\nGET /none HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n");
    let statuses = [wire.answer().status, wire.answer().status, wire.answer().status];
    assert_eq!(statuses, [200, 204, 200]);
}

#[test]
fn trailers_pass_both_ways() {
    let rig = rig(json!({}));
    let mut wire = Wire::connect(rig.shim.address());
    wire.send(
        "POST /trailers HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nTrailer: x-mine\r\nTransfer-Encoding: chunked\r\n\r\n\
         3\r\nabc\r\n0\r\nx-mine: 7\r\n\r\n",
    );
    let answer = wire.answer();
    assert_eq!(answer.text(), r#"{"x-mine": "7"}"#);
    assert_eq!(answer.trailers, [("x-sum".to_owned(), "42".to_owned())]);
}

#[test]
fn a_body_is_asked_for_only_when_it_is_wanted() {
    let rig = rig(json!({ "max_body": 1000 }));
    let address = rig.shim.address();
    let ask = |host: &str, length: usize| {
        let mut wire = Wire::connect(address);
        wire.send(format!(
            "POST /echo HTTP/1.1\r\nHost: {host}\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n"
        ));
        let first = wire.answer();
        if first.status != 100 {
            assert!(wire.is_closed(), "the body would be the next request");
            return first;
        }
        wire.send(vec![b'x'; length]);
        wire.answer()
    };
    assert_eq!(ask("a", 1000).body.len(), 1000);
    assert_eq!(ask("a", 1001).status, 413);
    assert_eq!(ask("nobody", 10).status, 503);
    // Its length was not told before.
    let mut wire = Wire::connect(address);
    wire.send("POST /length HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n");
    wire.send(vec![b'x'; 1001]);
    assert_eq!(wire.answer().status, 413);
    assert!(
        !rig.origin.requests().iter().any(|r| r.contains("expect")),
        "we have answered that"
    );
}

#[test]
fn parts_go_on_as_they_come() {
    let rig = with_raw(json!({}));
    let mut wire = Wire::connect(rig.shim.address());
    // Half of the request's body reaches the server before the other half is sent,
    wire.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nfirst");
    let (mut stream, header) = rig.server.accept();
    assert!(header.contains("content-length: 10"), "{header}");
    let mut half = [0; 5];
    stream.read_exact(&mut half).unwrap();
    assert_eq!(&half, b"first");
    wire.send("other");
    stream.read_exact(&mut half).unwrap();
    // and half of the answer the client before the server sends the rest.
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        .unwrap();
    assert_eq!(wire.line(), "HTTP/1.1 200 OK");
    while !wire.line().is_empty() {}
    assert_eq!((wire.line(), wire.read(5)), ("3".to_owned(), b"one\r\n".to_vec()));
    stream.write_all(b"0\r\n\r\n").unwrap();
    assert_eq!((wire.line(), wire.line()), ("0".to_owned(), String::new()));
    // The connection is used again, and answers without an end end with it.
    wire.send("GET /2 HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(read_header(&mut stream).starts_with("GET /2 HTTP/1.1\r\n"));
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end")
        .unwrap();
    drop(stream);
    assert_eq!(wire.answer().text(), "until the end");
}

#[test]
fn an_answer_that_breaks_off_is_broken_for_the_client_too() {
    let rig = with_raw(json!({}));
    let (mut wire, mut stream) = rig.ask();
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart")
        .unwrap();
    while !wire.line().is_empty() {}
    assert_eq!(wire.read(4), b"part");
    drop(stream);
    assert!(wire.is_closed(), "what is missing must not look complete");
    // What came in one piece with the end of the connection is the client's all the same.
    (wire, stream) = rig.ask();
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\nno chunk\r\n")
        .unwrap();
    drop(stream);
    assert_eq!(wire.line(), "HTTP/1.1 200 OK");
    while !wire.line().is_empty() {}
    assert_eq!(
        (wire.line(), wire.read(6)),
        ("4".to_owned(), b"part\r\n".to_vec())
    );
    assert!(wire.is_closed(), "what is missing must not look complete");
}

#[test]
fn an_answer_is_as_long_as_its_chunks_and_an_unknown_coding_is_none() {
    let rig = with_raw(json!({}));
    for (codings, want) in [
        ("Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", Ok("hello")),
        ("Content-Length: 2\r\nTransfer-Encoding: Chunked\r\n", Ok("hello")),
        // Nobody would know any more that it is packed.
        ("Transfer-Encoding: gzip, chunked\r\n", Err(502)),
        (
            "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
            Err(502),
        ),
        ("Transfer-Encoding: xchunked\r\n", Err(502)),
    ] {
        let mut wire = Wire::connect(rig.shim.address());
        wire.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n");
        let (mut stream, _) = rig.server.accept();
        let answer = format!("HTTP/1.1 200 OK\r\n{codings}\r\n5\r\nhello\r\n0\r\n\r\n");
        stream.write_all(answer.as_bytes()).unwrap();
        drop(stream);
        let answer = wire.answer();
        match want {
            Ok(text) => assert_eq!((answer.status, &*answer.text()), (200, text), "{codings}"),
            Err(status) => assert_eq!(answer.status, status, "{codings}"),
        }
    }
}

#[test]
fn a_body_of_unknown_length_does_not_go_to_http_1_0() {
    let rig = with_raw(json!({}));
    let (mut wire, mut old) = rig.ask();
    old.write_all(b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi")
        .unwrap();
    assert_eq!(wire.answer().text(), "hi");
    // By that connection it would go without its body.
    wire.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n");
    let (mut stream, header) = rig.server.accept();
    assert!(header.starts_with("POST / HTTP/1.1\r\n"), "{header}");
    let mut body = [0; 15];
    stream.read_exact(&mut body).unwrap();
    assert_eq!(&body, b"5\r\nhello\r\n0\r\n\r\n");
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone")
        .unwrap();
    assert_eq!(wire.answer().text(), "done");
}
