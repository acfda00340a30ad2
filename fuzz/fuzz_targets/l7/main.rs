//! Any request against any routes: what the L7 shim sends on is what was routed, and an upstream can believe what it says of the
//! client.
//!
//! The text: a request line, lines of headers, an empty line; then a line about the client (`192.0.2.7`, and `tls`, `trusted` behind it)
//! and a line for each route (`host/path`, and `rewrite` behind it). For HTTP/2 the pseudo-header `:authority` is one of the headers.

#![no_main]

mod request;
mod routes;
mod sent;

use lb_route::AccessLog;
use libfuzzer_sys::{Corpus, fuzz_target};
use request::Text;
use routes::Routes;
use weir_l7::{
    acme::challenge,
    log::Log,
    proxy::{self, answer},
    table::host,
};

fuzz_target!(|bytes: &[u8]| -> Corpus {
    let Some(text) = Text::read(bytes) else {
        return Corpus::Reject;
    };
    let Text {
        parts,
        client,
        routes,
    } = &text;
    logged(&text);
    let Ok(host) = proxy::request::host(parts) else {
        return Corpus::Keep;
    };
    if !host.is_empty() {
        assert_eq!(host::normal(&host).as_deref(), Some(&*host));
        let of_address = host.starts_with('[');
        assert!(
            of_address || host.split('.').all(|label| !label.is_empty()),
            "{host:?}"
        );
    }
    if let Some(token) = challenge::token(parts.uri.path()) {
        // It goes back to whoever asks.
        assert!(!token.contains(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_'));
    }
    redirected(parts, &host);
    let routes = Routes::new(routes);
    let Some(route) = routes.find(&host, parts.uri.path()) else {
        return Corpus::Keep;
    };
    let sent = sent::judge(parts, client, route);
    if route.prefix().is_empty() {
        let again = routes.find(&host, sent.uri.path());
        assert_eq!(
            again.map(|found| found.place),
            Some(route.place),
            "{} became {}",
            parts.uri,
            sent.uri
        );
    }
    Corpus::Keep
});

/// A line of the log is one line, with the fields that it has.
fn logged(Text { parts, client, .. }: &Text) {
    for format in [AccessLog::Combined, AccessLog::Json] {
        let line = Log::line(format, client.address, parts)
            .expect("lines are wanted")
            .to_text();
        assert!(!line.contains(|c: char| c.is_ascii_control()), "{line:?}");
        if format == AccessLog::Combined {
            assert!(!line.contains(char::is_control), "{line:?}");
            let unescaped = line.replace("\\\\", "").replace("\\\"", "");
            assert_eq!(unescaped.matches('"').count(), 6, "{line}");
        } else {
            let read: serde_json::Value = serde_json::from_str(&line).expect("it is JSON");
            assert_eq!(read["method"], parts.method.as_str());
        }
    }
}

/// Redirects lead to the host that they say, and to the path that was asked for.
fn redirected(parts: &hyper::http::request::Parts, host: &str) {
    let whole = proxy::request::whole(&parts.uri);
    let path = parts.uri.path_and_query().map_or("/", |whole| whole.path());
    let elsewhere = |answer: hyper::Response<proxy::Reply>, authority: &str| {
        let location = answer.headers().get("location").expect("it leads somewhere");
        let location: hyper::Uri = location
            .to_str()
            .expect("it is a text")
            .parse()
            .expect("it is a URL");
        assert_eq!(
            location.authority().map(|a| a.as_str()),
            Some(authority),
            "{location}"
        );
        assert_eq!(location.scheme_str(), Some("https"));
        if path != "*" && whole.is_ascii() {
            assert_eq!(location.path(), path);
            assert_eq!(location.query(), parts.uri.query());
        }
    };
    let to = answer::target("https://new.example", whole);
    elsewhere(answer::redirect(hyper::StatusCode::FOUND, &to), "new.example");
    if host.is_empty() {
        assert_eq!(
            proxy::to_https(None, host, whole).status(),
            hyper::StatusCode::BAD_REQUEST
        );
    } else {
        elsewhere(proxy::to_https(None, host, whole), host);
        elsewhere(proxy::to_https(Some(8443), host, whole), &format!("{host}:8443"));
    }
}
