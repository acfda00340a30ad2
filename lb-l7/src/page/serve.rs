//! The numbers for the node itself: a listener of its own, so that they need no route and are not counted.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn,
};
use hyper_util::rt::TokioIo;
use lb_route::State;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};

use super::{Kind, Report};
use crate::{
    proxy::{Reply, answer},
    worker::{Phase, Shared},
};

/// Pause between two tries to listen.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Pause when no file descriptor is left.
const BREATH: Duration = Duration::from_millis(50);

/// Serves `/metrics`, `/healthz`, the page at `/` and `/json` where the settings say, for ever. While they name an address that
/// cannot be had, the one before is served on.
pub async fn follow(mut states: watch::Receiver<Option<State>>, shared: Arc<Shared>) {
    let mut open = None::<(SocketAddr, TcpListener)>;
    let mut told = None;
    loop {
        let settings = |state: &Option<State>| state.as_ref().and_then(|state| state.settings.metrics);
        let wanted = settings(&states.borrow_and_update());
        match wanted {
            None => open = None,
            Some(address) if is_at(&open, address) => {}
            Some(address) => match TcpListener::bind(address).await {
                Ok(listener) => {
                    tracing::info!(%address, "metrics");
                    open = Some((address, listener));
                    told = None;
                }
                Err(error) if told == Some(address) => tracing::debug!("metrics at {address}: {error}"),
                // The shim before may have it until it has drained.
                Err(error) => {
                    tracing::warn!(
                        "metrics at {address}: {error}; trying again; choose another `metrics` address of [l7] if another \
                         program has this one"
                    );
                    told = Some(address);
                }
            },
        }
        let is_missing = wanted.is_some_and(|address| !is_at(&open, address));
        tokio::select! {
            changed = states.changed() => if changed.is_err() {
                return;
            },
            () = tokio::time::sleep(AGAIN_AFTER), if is_missing => {}
            accepted = accept(open.as_ref()) => match accepted {
                Ok(stream) => drop(tokio::task::spawn_local(conversation(stream, Arc::clone(&shared)))),
                Err(_) => tokio::time::sleep(BREATH).await,
            },
        }
    }
}

fn is_at(open: &Option<(SocketAddr, TcpListener)>, address: SocketAddr) -> bool {
    open.as_ref().is_some_and(|(own, _)| *own == address)
}

async fn accept(open: Option<&(SocketAddr, TcpListener)>) -> std::io::Result<TcpStream> {
    match open {
        Some((_, listener)) => listener.accept().await.map(|(stream, _)| stream),
        None => std::future::pending().await,
    }
}

async fn conversation(stream: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(move |request| {
        let answer = one(&shared, &request);
        async { Ok::<_, Infallible>(answer) }
    });
    let mut server = http1::Builder::new();
    server.timer(hyper_util::rt::TokioTimer::new());
    let _who_asks_may_go = server.serve_connection(TokioIo::new(stream), service).await;
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
