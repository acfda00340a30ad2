//! Answers of our own: plain pages and redirects.

use std::{borrow::Cow, fmt::Write as _};

use bytes::Bytes;
use hyper::{
    HeaderMap, Response, StatusCode,
    header::{self, HeaderValue},
};

use super::body::Reply;

/// A plain page that says what is wrong.
pub fn page(status: StatusCode, text: &'static str) -> Response<Reply> {
    let mut answer = Response::new(Reply::Own(Some(Bytes::from_static(text.as_bytes()))));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

/// A page after which the connection ends: what the client sends next may not be what it looks like.
pub fn refusal(status: StatusCode, text: &'static str) -> Response<Reply> {
    let mut answer = page(status, text);
    close(answer.headers_mut());
    answer
}

/// A redirect. `to` without a path gets the path of the request.
pub fn redirect(status: StatusCode, to: &str) -> Response<Reply> {
    let Ok(location) = HeaderValue::from_str(&ascii(to)) else {
        return page(
            StatusCode::BAD_GATEWAY,
            "502 a redirect leads to what is no URL\n",
        );
    };
    let mut answer = Response::new(Reply::Empty);
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::LOCATION, location);
    answer
}

/// URLs are ASCII: what was written otherwise has percent signs instead.
fn ascii(url: &str) -> Cow<'_, str> {
    if url.is_ascii() {
        return Cow::Borrowed(url);
    }
    let mut ascii = String::with_capacity(2 * url.len());
    for byte in url.bytes() {
        if byte.is_ascii() {
            ascii.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(ascii, "%{byte:02X}");
        }
    }
    Cow::Owned(ascii)
}

/// The URL that a redirect of a host leads to: what a URL without a path leaves open is the request's.
pub fn target(to: &str, path_and_query: &str) -> String {
    let rest = to.split_once("://").map_or(to, |(_, rest)| rest);
    match rest.find('/') {
        // A path of its own.
        Some(slash) if slash + 1 < rest.len() => to.to_owned(),
        Some(_) => format!("{}{path_and_query}", to.trim_end_matches('/')),
        None => format!("{to}{path_and_query}"),
    }
}

/// Has hyper close the connection after this answer.
pub fn close(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_keep_the_path_unless_they_have_one() {
        for (to, want) in [
            ("https://new.example.com", "https://new.example.com/a?b"),
            ("https://new.example.com/", "https://new.example.com/a?b"),
            ("https://new.example.com/x", "https://new.example.com/x"),
        ] {
            assert_eq!(target(to, "/a?b"), want);
        }
    }

    #[test]
    fn redirects_are_written_in_ascii() {
        let answer = redirect(StatusCode::FOUND, "https://a.example/\u{e9}?%\u{20ac}");
        assert_eq!(
            answer.headers()[header::LOCATION],
            "https://a.example/%C3%A9?%%E2%82%AC"
        );
    }
}
