//! The status page: the same numbers for browsers, as JSON, and for Prometheus.

use bytes::Bytes;
use hyper::{
    Response, StatusCode,
    header::{self, HeaderValue},
    http::request::Parts,
};

mod html;
mod metrics;
mod report;
mod serve;

pub use report::Report;
pub use serve::follow;

use crate::{
    proxy::{Reply, answer},
    served::Serving,
    worker::Shared,
};

/// The page at the host and path of the settings: as JSON below it at `/json`, or if only JSON is accepted.
pub fn answer(shared: &Shared, serving: &Serving, parts: &Parts) -> Response<Reply> {
    let path = parts.uri.path().trim_end_matches('/');
    let accepts = parts.headers.get(header::ACCEPT);
    let json = path.ends_with("/json") || accepts.is_some_and(|kinds| kinds == "application/json");
    let report = Report::new(shared, serving);
    let kind = if json { Kind::Json } else { Kind::Html };
    kind.of(&report)
}

/// The forms of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Html,
    Json,
    Metrics,
}

impl Kind {
    fn of(self, report: &Report) -> Response<Reply> {
        let (kind, text) = match self {
            Self::Html => ("text/html; charset=utf-8", html::page(report)),
            Self::Metrics => (
                "text/plain; version=0.0.4; charset=utf-8",
                metrics::exposition(report),
            ),
            Self::Json => match serde_json::to_string(report) {
                Ok(text) => ("application/json", text),
                Err(_) => return answer::page(StatusCode::INTERNAL_SERVER_ERROR, "500 no JSON\n"),
            },
        };
        let mut answer = Response::new(Reply::Own(Some(Bytes::from(text))));
        let headers = answer.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        // Nothing of it comes from elsewhere, and nothing of it runs.
        let policy = "default-src 'none'; style-src 'unsafe-inline'";
        headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
        answer
    }
}
