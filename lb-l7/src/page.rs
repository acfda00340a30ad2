//! The status page.

use hyper::{Response, StatusCode, http::request::Parts};

use crate::{
    proxy::{Reply, answer},
    served::Serving,
    worker::Shared,
};

/// The page, for browsers or as JSON.
pub fn answer(_shared: &Shared, _serving: &Serving, _parts: &Parts) -> Response<Reply> {
    answer::page(StatusCode::OK, "weir\n")
}
