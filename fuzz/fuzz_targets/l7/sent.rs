//! What an upstream gets, judged by RFC 9110, 7.6.1, and RFC 7239.

use std::collections::BTreeSet;

use hyper::{
    HeaderMap, Uri, Version,
    header::{self, HeaderName, HeaderValue},
    http::request::Parts,
};
use weir_l7::{
    proxy::{cookie, request},
    table::host,
    worker::Client,
};

use super::routes::Route;

/// What never goes on, besides `Connection` and `Upgrade` of an upgrade.
const NEVER: [&str; 8] = [
    "keep-alive",
    "proxy-connection",
    "transfer-encoding",
    "http2-settings",
    "expect",
    "proxy-authorization",
    "connection",
    "upgrade",
];
/// What the shim says of its client.
const OURS: [&str; 6] = [
    "forwarded",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-proto",
    "x-real-ip",
];

/// The request as it is sent.
pub fn judge(asked: &Parts, client: &Client, route: &Route) -> Parts {
    let upgrade = request::upgrade(asked, &BTreeSet::new());
    if let Some(to) = &upgrade {
        assert_eq!(asked.version, Version::HTTP_11);
        let is_h2c = |word: &[u8]| word.trim_ascii().to_ascii_lowercase().starts_with(b"h2c");
        assert!(
            !to.as_bytes().split(|byte| *byte == b',').any(is_h2c),
            "{to:?} hides requests"
        );
    }
    let _of_any_text = cookie(&asked.headers, "weir");
    let mut sent = asked.clone();
    request::prepare(&mut sent, route.prefix(), upgrade.as_ref(), client);
    assert_eq!(sent.version, Version::HTTP_11);
    assert_eq!(sent.method, asked.method);
    path(asked, &sent, route.prefix());
    hosts(asked, &sent);
    let named = named(&asked.headers);
    neighbours(&asked.headers, &sent.headers, upgrade.as_ref(), &named);
    others(&asked.headers, &sent.headers, &named);
    forwarded(asked, &sent, client, &named);
    answer(asked, &named);
    sent
}

/// Path and query alone, and those of the request but for the prefix.
fn path(asked: &Parts, sent: &Parts, prefix: &str) {
    let text = sent.uri.to_string();
    assert!(text == "*" || text.starts_with('/'), "{text:?}");
    assert!(
        !text.contains(|c: char| c.is_ascii_control() || matches!(c, ' ' | '#')),
        "{text:?}"
    );
    assert_eq!(text.parse::<Uri>().ok().as_ref(), Some(&sent.uri));
    assert_eq!(sent.uri.query(), asked.uri.query());
    let (before, after) = (asked.uri.path(), sent.uri.path());
    let whole = match before.strip_prefix(prefix) {
        Some("") | None => "/",
        Some(rest) => rest,
    };
    assert_eq!(after, whole, "{before} without {prefix}");
}

/// One host, the one that was routed.
fn hosts(asked: &Parts, sent: &Parts) {
    let host = one(&sent.headers, "host")
        .to_str()
        .expect("a host is a text")
        .to_owned();
    let routed = request::host(asked).expect("it had a host");
    assert_eq!(host::normal(&host).unwrap_or_default(), routed);
}

/// The names of headers that a request says are for the next neighbour only.
fn named(headers: &HeaderMap) -> BTreeSet<String> {
    let lines = headers.get_all(header::CONNECTION).iter();
    let words = lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
    let names = words.filter_map(|word| HeaderName::from_bytes(word.trim_ascii()).ok());
    // What the request is must not be taken off by what the connection is; `close` is no header.
    let kept = ["host", "content-length", "close"];
    let names = names.map(|name| name.as_str().to_owned());
    names.filter(|name| !kept.contains(&name.as_str())).collect()
}

fn neighbours(asked: &HeaderMap, sent: &HeaderMap, upgrade: Option<&HeaderValue>, named: &BTreeSet<String>) {
    let is_of_upgrade = |name: &str| upgrade.is_some() && matches!(name, "connection" | "upgrade");
    for name in NEVER.into_iter().filter(|name| !is_of_upgrade(name)) {
        assert!(!sent.contains_key(name), "{name} goes on");
    }
    if let Some(to) = upgrade {
        assert_eq!(one(sent, "connection"), "upgrade");
        assert_eq!(one(sent, "upgrade"), to);
    }
    for name in named {
        let set_anew = OURS.contains(&name.as_str()) || name == "te" || is_of_upgrade(name);
        assert!(
            set_anew || !sent.contains_key(name),
            "{name} goes on, and was named by Connection"
        );
    }
    if sent.contains_key(header::TE) {
        assert_eq!(one(sent, "te"), "trailers");
        assert!(asked.contains_key(header::TE));
    }
}

/// Everything else goes on as it came; cookies in one line.
fn others(asked: &HeaderMap, sent: &HeaderMap, named: &BTreeSet<String>) {
    let apart = |name: &str| {
        NEVER.contains(&name)
            || OURS.contains(&name)
            || matches!(name, "te" | "host" | "cookie")
            || named.contains(name)
    };
    for name in asked
        .keys()
        .chain(sent.keys())
        .filter(|name| !apart(name.as_str()))
    {
        assert!(
            asked.get_all(name).iter().eq(sent.get_all(name)),
            "{name} is another one"
        );
    }
    if !named.contains("cookie") && asked.contains_key(header::COOKIE) {
        assert_eq!(one(sent, "cookie").as_bytes(), joined(asked, "cookie", b"; "));
    }
}

/// An unknown client is not believed, and a trusted one is continued.
fn forwarded(asked: &Parts, sent: &Parts, client: &Client, named: &BTreeSet<String>) {
    let own = client.address.ip().to_string();
    let chain = one(&sent.headers, "x-forwarded-for");
    let element = one(&sent.headers, "forwarded").to_str().unwrap_or_default();
    let scheme = if client.is_tls { "https" } else { "http" };
    if client.is_trusted {
        let before = match named.contains("x-forwarded-for") {
            true => Vec::new(),
            false => joined(&asked.headers, "x-forwarded-for", b", "),
        };
        let whole = if before.is_empty() {
            own.into_bytes()
        } else {
            [&before[..], b", ", own.as_bytes()].concat()
        };
        assert_eq!(chain.as_bytes(), whole);
        assert!(sent.headers.contains_key("x-forwarded-proto"));
        return;
    }
    assert_eq!(chain, own.as_str());
    assert_eq!(one(&sent.headers, "x-forwarded-proto"), scheme);
    for name in ["x-forwarded-port", "x-real-ip"] {
        assert!(!sent.headers.contains_key(name), "{name} is believed");
    }
    let address = if client.address.is_ipv4() {
        own
    } else {
        format!("\"[{own}]\"")
    };
    let host = match sent.headers.get("x-forwarded-host") {
        Some(host) => {
            assert_eq!(host, one(&sent.headers, "host"));
            format!(";host=\"{}\"", host.to_str().expect("a host is a text"))
        }
        None => String::new(),
    };
    assert_eq!(element, format!("for={address}{host};proto={scheme}"));
}

/// The same headers in an answer.
fn answer(asked: &Parts, named: &BTreeSet<String>) {
    let mut headers = asked.headers.clone();
    request::strip_hop_by_hop(&mut headers);
    for name in [
        "connection",
        "keep-alive",
        "proxy-connection",
        "transfer-encoding",
        "upgrade",
    ] {
        assert!(!headers.contains_key(name), "{name} goes back");
    }
    for name in named {
        assert!(
            !headers.contains_key(name),
            "{name} goes back, and was named by Connection"
        );
    }
}

fn one<'h>(headers: &'h HeaderMap, name: &str) -> &'h HeaderValue {
    let mut values = headers.get_all(name).iter();
    let value = values.next().unwrap_or_else(|| panic!("there is no {name}"));
    assert_eq!(values.next(), None, "there are two of {name}");
    value
}

/// All lines of a header as one.
fn joined(headers: &HeaderMap, name: &str, between: &[u8]) -> Vec<u8> {
    let lines: Vec<&[u8]> = headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
    lines.join(between)
}
