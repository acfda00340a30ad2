//! The numbers for the node itself: a listener of its own, so that they need no route and are not counted.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use super::{Kind, Report};
use crate::{
    proxy::{Reply, answer},
    worker::{Phase, Shared},
};

/// Pause between two tries to listen.
const AGAIN_AFTER: std::time::Duration = std::time::Duration::from_secs(1);

/// Serves `/metrics`, `/healthz`, the page at `/` and `/json` for ever.
///
/// # Errors
/// Nobody can listen at the address.
pub async fn serve(address: SocketAddr, shared: Arc<Shared>) -> std::io::Result<()> {
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            // The shim before may have it until it has drained.
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                tracing::warn!("metrics at {address}: {error}; trying again");
                tokio::time::sleep(AGAIN_AFTER).await;
            }
            Err(error) => return Err(error),
        }
    };
    tracing::info!(address = %listener.local_addr()?, "metrics");
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            continue;
        };
        let shared = Arc::clone(&shared);
        let service = service_fn(move |request| {
            let answer = one(&shared, &request);
            async { Ok::<_, Infallible>(answer) }
        });
        tokio::task::spawn_local(async move {
            let mut server = http1::Builder::new();
            server.timer(hyper_util::rt::TokioTimer::new());
            let _who_asks_may_go = server.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

fn one(shared: &Shared, request: &Request<Incoming>) -> Response<Reply> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return answer::page(StatusCode::METHOD_NOT_ALLOWED, "405 only GET\n");
    }
    let kind = match request.uri().path() {
        "/healthz" => {
            return match *shared.phase.borrow() {
                Phase::Serving => answer::page(StatusCode::OK, "ok\n"),
                Phase::Draining(_) => answer::page(StatusCode::SERVICE_UNAVAILABLE, "stopping\n"),
            };
        }
        "/metrics" => Kind::Metrics,
        "/json" => Kind::Json,
        "/" => Kind::Html,
        _ => return answer::page(StatusCode::NOT_FOUND, "404 see /metrics, /healthz, / and /json\n"),
    };
    let serving = Arc::clone(&shared.serving.borrow());
    kind.of(&Report::new(shared, &serving))
}
