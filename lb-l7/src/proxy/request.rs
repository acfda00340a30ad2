//! A request's header: what is refused, and what is changed before it goes on.

use std::borrow::Cow;

use hyper::{
    HeaderMap, Method, StatusCode, Uri, Version,
    header::{self, HeaderName, HeaderValue},
    http::{request::Parts, uri::PathAndQuery},
};

use crate::{table::host, worker::Client};

pub const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
pub const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
pub const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
/// What applications believe too, and we have nothing to say about.
const OTHERS_WORDS: [HeaderName; 6] = [
    X_FORWARDED_PORT,
    X_REAL_IP,
    HeaderName::from_static("x-forwarded-prefix"),
    HeaderName::from_static("x-forwarded-scheme"),
    HeaderName::from_static("x-forwarded-server"),
    HeaderName::from_static("x-forwarded-ssl"),
];
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Why a request is refused: what the client is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(pub StatusCode, pub &'static str);

const fn bad(text: &'static str) -> Refused {
    Refused(StatusCode::BAD_REQUEST, text)
}

/// The host that a request is for, as the table names it; empty for HTTP/1.0 without one.
///
/// # Errors
/// There is none, there are several, they contradict each other, or it cannot be one.
pub fn host(parts: &Parts) -> Result<Cow<'_, str>, Refused> {
    if parts.method == Method::CONNECT {
        return Err(Refused(
            StatusCode::METHOD_NOT_ALLOWED,
            "405 this is no proxy for CONNECT\n",
        ));
    }
    let mut given = parts.headers.get_all(header::HOST).iter();
    let header = given.next();
    if given.next().is_some() {
        return Err(bad("400 more than one Host\n"));
    }
    let header = match header {
        Some(value) => Some(
            value
                .to_str()
                .map_err(|_| bad("400 a Host that cannot be one\n"))?,
        ),
        None => None,
    };
    let named = |text: &'_ str| host::normal(text).map(Cow::into_owned);
    let text = match parts.uri.authority() {
        // RFC 9112, 3.2: needed beside the absolute form too.
        Some(_) if header.is_none() && parts.version == Version::HTTP_11 => return Err(bad("400 no Host\n")),
        Some(authority) => {
            if authority.as_str().contains('@') {
                return Err(bad("400 a host with a user\n"));
            }
            // Two words for one thing must not differ; in the absolute form of HTTP/1.1 the URL counts.
            if parts.version == Version::HTTP_2
                && header.is_some_and(|header| named(header) != named(authority.as_str()))
            {
                return Err(bad("400 Host and :authority differ\n"));
            }
            authority.as_str()
        }
        None => match header {
            Some(text) => text,
            None if parts.version < Version::HTTP_11 => return Ok(Cow::Borrowed("")),
            None => return Err(bad("400 no Host\n")),
        },
    };
    host::normal(text).ok_or(bad("400 a Host that cannot be one\n"))
}

/// Path and query, as they stand behind a host in a URL: the server itself (`*`) has no other one than its root there.
pub fn whole(uri: &Uri) -> &str {
    match uri.path_and_query().map(PathAndQuery::as_str) {
        None | Some("*") => "/",
        Some(whole) => whole,
    }
}

/// The protocol that a client wants to change to, if it may.
pub fn upgrade(
    parts: &Parts,
    websocket_endpoints: &std::collections::BTreeSet<String>,
) -> Option<HeaderValue> {
    if parts.version != Version::HTTP_11 || !has_token(&parts.headers, &header::CONNECTION, "upgrade") {
        return None;
    }
    let to = parts.headers.get(header::UPGRADE)?;
    // HTTP/2 is spoken with prior knowledge only: by an upgrade it would hide requests from us.
    let h2c = |word: &[u8]| word.eq_ignore_ascii_case(b"h2c");
    if to.as_bytes().windows(3).any(h2c) {
        return None;
    }
    let path = parts.uri.path();
    let may = websocket_endpoints.is_empty()
        || websocket_endpoints
            .iter()
            .any(|endpoint| crate::table::covers(endpoint.trim_end_matches('/'), path) || endpoint == path);
    may.then(|| to.clone())
}

/// Whether a comma-separated header has a token.
fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|text| text.split(','))
        .any(|word| word.trim().eq_ignore_ascii_case(token))
}

/// What is between two neighbours only (RFC 9110, 7.6.1), besides `Connection` itself.
const HOP_BY_HOP: [HeaderName; 4] = [
    KEEP_ALIVE,
    PROXY_CONNECTION,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];
/// What else goes no further in a request.
const FOR_US: [HeaderName; 4] = [
    HTTP2_SETTINGS,
    header::EXPECT,
    header::PROXY_AUTHORIZATION,
    header::TE,
];

/// Takes these off. One look at the few that are there is less than a search for each of these.
fn remove_all(headers: &mut HeaderMap, names: &[HeaderName]) {
    if headers.keys().any(|name| names.contains(name)) {
        for name in names {
            headers.remove(name);
        }
    }
}

/// What `Connection` may name in vain: what the request is must not be taken off by what the connection is, and `close` is no
/// header.
const STAYS: [&str; 3] = ["host", "content-length", "close"];

/// Takes off the headers that a line of `Connection` names.
fn take_off(headers: &mut HeaderMap, line: &HeaderValue) {
    // A word that is no text is no name, and spares no other one.
    let words = line.as_bytes().split(|byte| *byte == b',');
    for word in words.filter_map(|word| str::from_utf8(word.trim_ascii()).ok()) {
        if !STAYS.iter().any(|name| word.eq_ignore_ascii_case(name)) {
            headers.remove(word);
        }
    }
}

/// Takes off what is between two neighbours only.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if let header::Entry::Occupied(named) = headers.entry(header::CONNECTION) {
        // Nearly always one line, and then nothing is collected.
        let mut lines = named.remove_entry_mult().1;
        let (first, others) = (lines.next(), lines.collect::<Vec<_>>());
        for line in first.iter().chain(&others) {
            take_off(headers, line);
        }
    }
    remove_all(headers, &HOP_BY_HOP);
}

/// Whether the header of an answer with a body says of its length one thing only, which is what it is read by. Chunks count
/// before a length (RFC 9112, 6.3): the length goes no further, or a client would take the answer to end there.
pub fn settle_length(headers: &mut HeaderMap, has_body: bool) -> bool {
    let codings = headers.get_all(header::TRANSFER_ENCODING);
    let mut codings = codings.iter();
    let Some(coding) = codings.next() else {
        one_length(headers);
        return true;
    };
    // What else it is packed in nobody would know any more.
    let is_chunked = coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked");
    let is_plain = is_chunked && codings.next().is_none();
    headers.remove(header::CONTENT_LENGTH);
    is_plain || !has_body
}

/// A length that is said several times, which is allowed, once (RFC 9110, 8.6).
fn one_length(headers: &mut HeaderMap) {
    let lines = headers.get_all(header::CONTENT_LENGTH);
    let mut lines = lines.iter();
    let Some(first) = lines.next() else { return };
    if lines.next().is_none() && first.as_bytes().iter().all(u8::is_ascii_digit) {
        return;
    }
    // All are the same: whoever read it has looked.
    let digits = first.as_bytes().split(|byte| *byte == b',').next();
    if let Ok(once) = HeaderValue::from_bytes(digits.unwrap_or_default().trim_ascii()) {
        headers.insert(header::CONTENT_LENGTH, once);
    }
}

/// Makes the header of a client that of a request to an upstream.
///
/// `prefix` is what is taken off its path, `upgrade` the protocol it changes to.
pub fn prepare(parts: &mut Parts, prefix: &str, upgrade: Option<&HeaderValue>, client: &Client) {
    let headers = &mut parts.headers;
    let trailers = has_token(headers, &header::TE, "trailers");
    strip_hop_by_hop(headers);
    remove_all(headers, &FOR_US);
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    join_cookies(headers);
    one_length(headers);
    if let Some(to) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, to.clone());
    }
    forwarded(headers, parts.uri.authority().map(|a| a.as_str()), client);
    if let Some(authority) = parts.uri.authority()
        && let Ok(value) = HeaderValue::from_str(authority.as_str())
    {
        headers.insert(header::HOST, value);
    } else if !headers.contains_key(header::HOST) {
        // HTTP/1.0 knows none.
        headers.insert(header::HOST, HeaderValue::from_static(""));
    }
    if parts.uri.scheme().is_some() || parts.uri.authority().is_some() || !prefix.is_empty() {
        parts.uri = origin_form(&parts.uri, prefix);
    }
    parts.version = Version::HTTP_11;
}

/// Tells the upstream who its client is. What an unknown client says of itself is no news.
fn forwarded(headers: &mut HeaderMap, authority: Option<&str>, client: &Client) {
    let host = match authority {
        Some(authority) => HeaderValue::from_str(authority).ok(),
        None => headers.get(header::HOST).cloned(),
    };
    let element = client.forwarded(host.as_ref());
    if client.is_trusted {
        append(headers, X_FORWARDED_FOR, &client.address_value);
        if let Some(element) = &element {
            append(headers, header::FORWARDED, element);
        }
        let scheme = client.scheme_value();
        headers.entry(X_FORWARDED_PROTO).or_insert(scheme);
        if let Some(host) = host {
            headers.entry(X_FORWARDED_HOST).or_insert(host);
        }
        return;
    }
    remove_all(headers, &OTHERS_WORDS);
    headers.insert(X_FORWARDED_FOR, client.address_value.clone());
    headers.insert(X_FORWARDED_PROTO, client.scheme_value());
    match host {
        Some(host) => headers.insert(X_FORWARDED_HOST, host),
        None => headers.remove(&X_FORWARDED_HOST),
    };
    match element {
        Some(element) => headers.insert(header::FORWARDED, element),
        None => headers.remove(header::FORWARDED),
    };
}

/// HTTP/2 sends cookies one by one; HTTP/1.1 has one line for all (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(header::COOKIE).iter().nth(1).is_none() {
        return;
    }
    let lines: Vec<&[u8]> = headers
        .get_all(header::COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if let Ok(joined) = HeaderValue::from_bytes(&lines.join(&b"; "[..])) {
        headers.insert(header::COOKIE, joined);
    }
}

/// Continues a list.
fn append(headers: &mut HeaderMap, name: HeaderName, value: &HeaderValue) {
    let lines: Vec<&[u8]> = headers.get_all(&name).iter().map(HeaderValue::as_bytes).collect();
    let mut list = lines.join(&b", "[..]);
    if list.is_empty() {
        headers.insert(name, value.clone());
        return;
    }
    list.extend_from_slice(b", ");
    list.extend_from_slice(value.as_bytes());
    if let Ok(list) = HeaderValue::from_bytes(&list) {
        headers.insert(name, list);
    }
}

/// Path and query alone, without the prefix.
fn origin_form(uri: &Uri, prefix: &str) -> Uri {
    let whole = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    let rest = whole.strip_prefix(prefix).unwrap_or(whole);
    let built = if rest.starts_with('/') || rest == "*" {
        PathAndQuery::try_from(rest)
    } else {
        PathAndQuery::try_from(format!("/{rest}"))
    };
    built.map_or_else(|_| uri.clone(), Uri::from)
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;

    fn parts(build: hyper::http::request::Builder) -> Parts {
        build.body(()).unwrap().into_parts().0
    }

    fn client(is_trusted: bool) -> Client {
        Client::new(
            "192.0.2.7:4000".parse().unwrap(),
            false,
            is_trusted,
            crate::client::Stage::new(0),
        )
    }

    fn text<'p>(parts: &'p Parts, name: &str) -> Vec<&'p str> {
        parts
            .headers
            .get_all(name)
            .iter()
            .map(|v| v.to_str().unwrap())
            .collect()
    }

    #[test]
    fn a_request_has_one_host() {
        let get = |uri: &str| Request::builder().uri(uri);
        for (build, want) in [
            (get("/").header("host", "A.example:80"), Ok("a.example")),
            (
                get("http://b.example/x").header("host", "a.example"),
                Ok("b.example"),
            ),
            (get("http://b.example/x"), Err(400)),
            (get("/").version(Version::HTTP_10), Ok("")),
            (
                get("http://a.example/")
                    .version(Version::HTTP_2)
                    .header("host", "A.example"),
                Ok("a.example"),
            ),
            (get("/"), Err(400)),
            (get("/").header("host", "a").header("host", "a"), Err(400)),
            (get("/").header("host", "a b"), Err(400)),
            (get("/").header("host", "a@b"), Err(400)),
            (get("/").header("host", ""), Err(400)),
            (get("http://u@b.example/"), Err(400)),
            (
                get("http://a.example/")
                    .version(Version::HTTP_2)
                    .header("host", "b.example"),
                Err(400),
            ),
            (get("a:80").method("CONNECT"), Err(405)),
        ] {
            let parts = parts(build);
            let got = host(&parts);
            assert_eq!(got.as_deref().map_err(|r| r.0.as_u16()), want, "{parts:?}");
        }
    }

    #[test]
    fn what_is_between_neighbours_stays_between_them() {
        let mut parts = parts(
            Request::builder()
                .uri("/")
                .header("host", "a")
                .header("connection", "close, X-Secret, host, te")
                .header("keep-alive", "timeout=5")
                .header("proxy-connection", "x")
                .header("transfer-encoding", "chunked")
                .header("upgrade", "websocket")
                .header("te", "gzip, trailers")
                .header("expect", "100-continue")
                .header("x-secret", "1")
                .header("cookie", "c"),
        );
        prepare(&mut parts, "", None, &client(false));
        let names: std::collections::BTreeSet<&str> = parts.headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(
            names.into_iter().collect::<Vec<_>>(),
            [
                "cookie",
                "forwarded",
                "host",
                "te",
                "x-forwarded-for",
                "x-forwarded-host",
                "x-forwarded-proto"
            ]
        );
        assert_eq!(text(&parts, "te"), ["trailers"]);
    }

    #[test]
    fn every_line_of_connection_counts() {
        let line = |bytes: &[u8]| HeaderValue::from_bytes(bytes).unwrap();
        let mut headers = HeaderMap::new();
        for value in [&b"keep-alive"[..], b"\xff, X-One", b"x-two,host"] {
            headers.append(header::CONNECTION, line(value));
        }
        for name in ["x-one", "x-two", "host", "x-three"] {
            headers.insert(name, line(b"1"));
        }
        strip_hop_by_hop(&mut headers);
        let names: std::collections::BTreeSet<&str> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["host", "x-three"].into());
    }

    #[test]
    fn a_length_is_said_once() {
        for (lines, want) in [
            (&[][..], None),
            (&["5"], Some("5")),
            (&["5", "5"], Some("5")),
            (&["5, 5"], Some("5")),
        ] {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(header::CONTENT_LENGTH, HeaderValue::from_static(line));
            }
            assert!(settle_length(&mut headers, true));
            let left: Vec<&HeaderValue> = headers.get_all(header::CONTENT_LENGTH).iter().collect();
            assert_eq!(left, want.into_iter().collect::<Vec<_>>(), "{lines:?}");
        }
    }

    #[test]
    fn the_client_is_told_and_an_unknown_one_is_not_believed() {
        let build = || {
            Request::builder()
                .uri("/")
                .header("host", "a.example:8080")
                .header("x-forwarded-for", "10.9.9.9")
                .header("x-forwarded-proto", "https")
                .header("x-real-ip", "10.9.9.9")
                .header("x-forwarded-prefix", "/theirs")
                .header("forwarded", "for=10.9.9.9")
        };
        let mut known = parts(build());
        let mut unknown = parts(build());
        prepare(&mut unknown, "", None, &client(false));
        assert_eq!(text(&unknown, "x-forwarded-for"), ["192.0.2.7"]);
        assert_eq!(text(&unknown, "x-forwarded-proto"), ["http"]);
        assert_eq!(text(&unknown, "x-forwarded-host"), ["a.example:8080"]);
        assert_eq!(
            text(&unknown, "forwarded"),
            ["for=192.0.2.7;host=\"a.example:8080\";proto=http"]
        );
        assert!(text(&unknown, "x-real-ip").is_empty() && text(&unknown, "x-forwarded-prefix").is_empty());
        prepare(&mut known, "", None, &client(true));
        assert_eq!(text(&known, "x-forwarded-for"), ["10.9.9.9, 192.0.2.7"]);
        assert_eq!(text(&known, "x-forwarded-proto"), ["https"]);
        assert_eq!(
            text(&known, "forwarded"),
            ["for=10.9.9.9, for=192.0.2.7;host=\"a.example:8080\";proto=http"]
        );
    }

    #[test]
    fn cookies_are_one_line() {
        let build = Request::builder().uri("/").header("host", "a");
        let mut parts = parts(build.header("cookie", "a=1").header("cookie", "b=2; c=3"));
        prepare(&mut parts, "", None, &client(false));
        assert_eq!(text(&parts, "cookie"), ["a=1; b=2; c=3"]);
    }

    #[test]
    fn urls_become_paths_without_their_prefix() {
        for (uri, prefix, want) in [
            ("/shop/a?b=1", "/shop", "/a?b=1"),
            ("/shop", "/shop", "/"),
            ("/shop?x", "/shop", "/?x"),
            ("http://a.example/x?y", "", "/x?y"),
            ("http://a.example", "", "/"),
        ] {
            let mut parts = parts(Request::builder().uri(uri).header("host", "a.example"));
            prepare(&mut parts, prefix, None, &client(false));
            assert_eq!(parts.uri.to_string(), want, "{uri}");
        }
        let mut parts = parts(
            Request::builder()
                .uri("http://b.example:81/")
                .header("host", "a.example"),
        );
        prepare(&mut parts, "", None, &client(false));
        assert_eq!(text(&parts, "host"), ["b.example:81"]);
    }

    #[test]
    fn websockets_are_upgrades_where_they_may_be() {
        let ask = |path: &str, to: &str| {
            parts(
                Request::builder()
                    .uri(path)
                    .header("connection", "keep-alive, Upgrade")
                    .header("upgrade", to),
            )
        };
        let any = Default::default();
        let some = ["/ws".to_owned(), "/chat/".to_owned()].into();
        assert!(upgrade(&ask("/x", "websocket"), &any).is_some());
        assert!(upgrade(&ask("/x", "websocket"), &some).is_none());
        assert!(upgrade(&ask("/ws/1", "websocket"), &some).is_some());
        assert!(upgrade(&ask("/chat", "websocket"), &some).is_some());
        for hidden in [
            "h2c",
            "H2C",
            "websocket, h2c",
            "websocket,\th2C;q=1",
            "h2c/1, websocket",
        ] {
            assert!(upgrade(&ask("/x", hidden), &any).is_none(), "{hidden}");
        }
        assert!(
            upgrade(
                &parts(Request::builder().uri("/").header("upgrade", "websocket")),
                &any
            )
            .is_none()
        );
    }
}
