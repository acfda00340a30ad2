//! The authority's question (HTTP-01): answered before every route and redirect, for the hosts that get certificates.

use bytes::Bytes;
use hyper::{
    Method, Response,
    header::{self, HeaderValue},
    http::request::Parts,
};

use crate::{proxy::Reply, worker::Shared};

/// Where the authority asks (RFC 8555, 8.3).
pub const PATH: &str = "/.well-known/acme-challenge/";
/// Longest token; those of Let's Encrypt have 43 characters.
const LONGEST: usize = 256;

/// The token that a path asks for, if it is one.
pub fn token(path: &str) -> Option<&str> {
    let token = path.strip_prefix(PATH)?;
    let is_base64url = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    ((1..=LONGEST).contains(&token.len()) && token.bytes().all(is_base64url)).then_some(token)
}

/// The answer to the authority; `None` if this is none of its questions about a host of ours.
///
/// Which tokens were ordered is not asked: the answer proves only that this account may have a certificate for the host,
/// which is what the operator said. So a shim can answer for the order of another one.
pub fn answer(shared: &Shared, host: &str, parts: &Parts) -> Option<Response<Reply>> {
    let token = token(parts.uri.path())?;
    if !matches!(parts.method, Method::GET | Method::HEAD) || !shared.tls.borrow().acme.hosts.contains(host) {
        return None;
    }
    let thumbprint = shared.acme.thumbprint()?;
    tracing::debug!(host, "answering the authority");
    let mut answer = Response::new(Reply::Own(Some(Bytes::from(format!("{token}.{thumbprint}")))));
    let headers = answer.headers_mut();
    let kind = HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tokens_are_answered() {
        let own = |rest: &str| format!("{PATH}{rest}");
        let long = "a".repeat(LONGEST);
        for text in ["LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0", "-_", &long] {
            assert_eq!(token(&own(text)), Some(text));
        }
        for path in [
            "/",
            "/.well-known/acme-challenge",
            "/.well-known/acme-challenges/a",
            &own(""),
            &own("a/b"),
            &own("a.b"),
            &own("../a"),
            &own("a%20b"),
            &own("a=="),
            &own("<script>"),
            &own("\u{e9}"),
            &own(&(long + "a")),
        ] {
            assert_eq!(token(path), None, "{path}");
        }
    }
}
