//! To an upstream, and to another one if that is of no use.

use std::{rc::Rc, sync::Arc};

use hyper::{
    HeaderMap, Method, Request, Response, StatusCode, Version,
    body::{Body as _, Incoming},
    header::{self, HeaderValue},
    http::request::Parts,
    upgrade::OnUpgrade,
};
use tokio::time::Instant;

use super::{
    answer,
    body::{Download, Failed, OutBody, Reply, Silence, Upload},
    exchange::Exchange,
    request, upgrade,
};
use crate::{
    balance::{self, Asked, TRIES, Tried},
    proxy_protocol,
    served::{Served, Serving, UpstreamEntry},
    upstream::Link,
    worker::{Client, Worker},
};

/// What a request is forwarded by.
#[derive(Clone, Copy, Debug)]
pub struct Job<'j> {
    pub worker: &'j Rc<Worker>,
    pub serving: &'j Serving,
    pub client: &'j Rc<Client>,
    /// As the table names it.
    pub host: &'j str,
    pub route: &'j Arc<Served>,
}

/// Why an upstream gave no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// There is none (left).
    None,
    /// No connection.
    Connect,
    /// The connection ended before the answer.
    Broken,
    /// No answer in time.
    Late,
    /// The request's body was too long.
    TooLarge,
    /// The request's body did not come.
    Client,
}

/// A try that came to nothing; the request if it may be tried elsewhere.
struct Failure {
    fault: Fault,
    request: Option<Request<OutBody>>,
}

/// Sends a request on and makes the answer ready for the client.
pub async fn forward(
    job: Job<'_>,
    mut parts: Parts,
    incoming: Incoming,
    mut exchange: Exchange,
) -> Response<Reply> {
    let Job {
        worker,
        serving,
        client,
        route,
        ..
    } = job;
    exchange.routed(route);
    let most = serving.settings.max_body.unwrap_or(u64::MAX);
    if incoming.size_hint().lower() > most {
        return own(exchange, Fault::TooLarge);
    }
    let upgrade_to = request::upgrade(&parts, &route.settings.websocket_endpoints);
    let on_client = parts.extensions.remove::<OnUpgrade>();
    let asked = Asked {
        client: client.address.ip(),
        cookie: route
            .settings
            .sticky_cookie
            .as_deref()
            .and_then(|name| cookie(&parts.headers, name)),
        worker: worker.index,
        now_ms: worker.shared.clock.coarse_ms(),
    };
    // gRPC needs HTTP/2 all the way.
    let h2 = parts.version == Version::HTTP_2 && is_grpc(&parts.headers);
    request::prepare(&mut parts, job.host, &route.prefix, upgrade_to.as_ref(), client);
    let upload = (!incoming.is_end_stream()).then(|| Rc::new(Upload::new()));
    let body = match &upload {
        None => OutBody::Empty,
        Some(upload) => {
            exchange.uploads(upload);
            OutBody::Client {
                incoming,
                upload: Rc::clone(upload),
                most,
                silence: Silence::new(serving.settings.timeouts.client),
            }
        }
    };
    let mut request = Request::from_parts(parts, body);
    let (mut tried, mut fault) = (Tried::default(), Fault::None);
    while tried.count() < TRIES
        && let Some(place) = balance::pick(route, asked, &tried)
    {
        tried.add(place);
        let upstream = &route.targets[place].upstream;
        let pool = upstream.id << 1 | u64::from(h2);
        exchange.goes_to(upstream, pool);
        match attempt(job, upstream, pool, h2, request, upload.as_deref()).await {
            Ok((answer, link)) => {
                upstream.welcome();
                let upgrade = upgrade_to.is_some().then_some(on_client).flatten();
                let new_cookie = (asked.cookie != Some(upstream.cookie)).then_some(upstream.cookie);
                return finish(job, answer, link, exchange, upgrade, new_cookie).await;
            }
            Err(failure) => {
                fault = failure.fault;
                match failure.request {
                    Some(again) => request = again,
                    None => break,
                }
            }
        }
    }
    own(exchange, fault)
}

/// One upstream: by an idle connection, and if its end crossed the request, by a new one.
async fn attempt(
    job: Job<'_>,
    upstream: &UpstreamEntry,
    pool: u64,
    h2: bool,
    mut request: Request<OutBody>,
    upload: Option<&Upload>,
) -> Result<(Response<Incoming>, Link), Failure> {
    let Job { worker, route, .. } = job;
    let stats = upstream.stats.of(worker.index);
    loop {
        let Some(mut link) = link(job, upstream, pool, h2).await else {
            stats.connect_errors.add(1);
            upstream.shun(worker.shared.clock.coarse_ms());
            return Err(Failure {
                fault: Fault::Connect,
                request: Some(request),
            });
        };
        let copy = may_repeat(&request).then(|| copy(&request));
        let was_used = link.is_used;
        let answered = in_time(job, upload, link.exchange(request)).await;
        let mut error = match answered {
            Some(Ok(answer)) => return Ok((answer, link)),
            None => {
                stats.errors.add(1);
                return Err(Failure {
                    fault: Fault::Late,
                    request: None,
                });
            }
            Some(Err(error)) => error,
        };
        let again = error.take_message().or(copy);
        if let Some(failed) = upload.and_then(|upload| upload.failed.get()) {
            let fault = match failed {
                Failed::TooLarge => Fault::TooLarge,
                Failed::Client => Fault::Client,
            };
            return Err(Failure { fault, request: None });
        }
        match again {
            // It may have closed the connection for being idle: that says nothing of the upstream.
            Some(again) if was_used => {
                worker.pool.forget(pool);
                request = again;
            }
            again => {
                tracing::debug!(route = route.name, upstream = upstream.name, address = %upstream.address, "no answer: {}", error.error());
                stats.errors.add(1);
                if again.is_some() {
                    upstream.shun(worker.shared.clock.coarse_ms());
                }
                return Err(Failure {
                    fault: Fault::Broken,
                    request: again,
                });
            }
        }
    }
}

/// A connection to an upstream: an idle one, or a new one.
async fn link(job: Job<'_>, upstream: &UpstreamEntry, pool: u64, h2: bool) -> Option<Link> {
    let Job {
        worker,
        serving,
        client,
        route,
        ..
    } = job;
    let settings = &serving.settings;
    let introduction = match settings.send_proxy_protocol {
        true => Some(proxy_protocol::header(client.address, client.local)),
        false => None,
    };
    // One that told of a client is that client's.
    if introduction.is_none()
        && let Some(link) = worker.pool.take(pool)
    {
        return Some(link);
    }
    let (tls, patience) = (route.settings.upstream_tls, settings.timeouts.connect);
    let connector = &worker.shared.connector;
    let connected = connector
        .connect(
            upstream.address,
            tls,
            job.host,
            h2,
            introduction.as_deref(),
            patience,
        )
        .await;
    match connected {
        Ok(link) => {
            upstream.stats.of(worker.index).connections.add(1);
            if let (Some(shared), None) = (link.share(), introduction) {
                worker.pool.put(pool, shared, worker.shared.clock.coarse_ms());
            }
            Some(link)
        }
        Err(error) => {
            let (route, upstream, address) = (&route.name, &upstream.name, upstream.address);
            tracing::debug!(route, upstream, %address, "no connection: {error}");
            None
        }
    }
}

/// Waits for the header of an answer; `None`: it took too long. The time begins when the request has been sent.
async fn in_time<T>(job: Job<'_>, upload: Option<&Upload>, exchange: impl Future<Output = T>) -> Option<T> {
    let timeouts = &job.serving.settings.timeouts;
    let limit = timeouts.server.min(timeouts.request);
    let begun = Instant::now();
    let mut exchange = std::pin::pin!(exchange);
    let mut deadline = begun + limit;
    loop {
        if let Ok(answer) = tokio::time::timeout_at(deadline, exchange.as_mut()).await {
            return Some(answer);
        }
        let now = Instant::now();
        let sent = upload.map_or(begun, |upload| match upload.waits.get() {
            // The client's silence has a limit of its own.
            true => now,
            false => upload.progress.get().max(begun),
        });
        if sent + limit <= now {
            return None;
        }
        deadline = sent + limit;
    }
}

/// The upstream's answer as the client gets it.
async fn finish(
    job: Job<'_>,
    answer: Response<Incoming>,
    link: Link,
    mut exchange: Exchange,
    on_client: Option<OnUpgrade>,
    new_cookie: Option<u64>,
) -> Response<Reply> {
    let Job {
        serving,
        client,
        route,
        ..
    } = job;
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
        return match on_client {
            Some(on_client) => upgrade::begin(job.worker, answer, link, exchange, on_client),
            // Nobody asked for it: what would come is no HTTP.
            None => own(exchange, Fault::Broken),
        };
    }
    exchange.answered(answer.status().as_u16());
    let (mut parts, incoming) = answer.into_parts();
    request::strip_hop_by_hop(&mut parts.headers);
    parts.version = Version::HTTP_11;
    if let (Some(name), Some(cookie)) = (&route.settings.sticky_cookie, new_cookie) {
        let secure = if client.is_tls { "; Secure" } else { "" };
        let text = format!("{name}={cookie:016x}; Path=/; HttpOnly; SameSite=Lax{secure}");
        if let Ok(value) = HeaderValue::from_str(&text) {
            parts.headers.append(header::SET_COOKIE, value);
        }
    }
    if client.is_tls && route.settings.tls.only && serving.settings.hsts_s > 0 {
        let text = format!("max-age={}", serving.settings.hsts_s);
        if let Ok(value) = HeaderValue::from_str(&text) {
            parts
                .headers
                .entry(header::STRICT_TRANSPORT_SECURITY)
                .or_insert(value);
        }
    }
    let reply = if incoming.is_end_stream() {
        let mut link = Some(link);
        std::future::poll_fn(|cx| {
            if let Some(link) = link.take() {
                exchange.give_back(link, cx);
            }
            std::task::Poll::Ready(())
        })
        .await;
        Reply::Empty
    } else {
        let silence = serving.settings.timeouts.server;
        Reply::Upstream(Box::new(Download::new(incoming, link, silence, exchange)))
    };
    Response::from_parts(parts, reply)
}

/// The answer when no upstream gave one.
fn own(mut exchange: Exchange, fault: Fault) -> Response<Reply> {
    let answer = match fault {
        Fault::None => {
            exchange.leaves_upstream();
            answer::page(
                StatusCode::SERVICE_UNAVAILABLE,
                "503 no upstream of this host serves now\n",
            )
        }
        Fault::Connect => answer::page(StatusCode::BAD_GATEWAY, "502 no upstream could be reached\n"),
        Fault::Broken => answer::page(
            StatusCode::BAD_GATEWAY,
            "502 the upstream gave no proper answer\n",
        ),
        Fault::Late => answer::page(
            StatusCode::GATEWAY_TIMEOUT,
            "504 the upstream gave no answer in time\n",
        ),
        Fault::TooLarge => answer::refusal(StatusCode::PAYLOAD_TOO_LARGE, "413 the body is too long\n"),
        Fault::Client => answer::refusal(StatusCode::REQUEST_TIMEOUT, "408 the body did not come\n"),
    };
    exchange.answered(answer.status().as_u16());
    answer
}

/// Whether a request may be sent a second time: it changes nothing, or the same, and there is nothing of it that is gone.
fn may_repeat(request: &Request<OutBody>) -> bool {
    request.body().is_empty()
        && matches!(
            *request.method(),
            Method::GET | Method::HEAD | Method::OPTIONS | Method::PUT | Method::DELETE
        )
}

/// A request without a body once more.
fn copy(request: &Request<OutBody>) -> Request<OutBody> {
    let mut copy = Request::new(OutBody::Empty);
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.headers_mut() = request.headers().clone();
    copy
}

fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    kind.is_some_and(|kind| kind.starts_with(b"application/grpc"))
}

/// The upstream that a cookie names.
fn cookie(headers: &HeaderMap, name: &str) -> Option<u64> {
    let lines = headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let mut pairs = lines
        .flat_map(|line| line.split(';'))
        .filter_map(|pair| pair.trim().split_once('='));
    let value = pairs.find_map(|(key, value)| (key == name).then_some(value))?;
    u64::from_str_radix(value.trim_matches('"'), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_are_found_among_others() {
        let mut headers = HeaderMap::new();
        headers.append(
            header::COOKIE,
            HeaderValue::from_static("a=1; xroute=2;route=\"00ff\""),
        );
        headers.append(header::COOKIE, HeaderValue::from_static("route2=7"));
        assert_eq!(cookie(&headers, "route"), Some(255));
        assert_eq!(cookie(&headers, "route2"), Some(7));
        assert_eq!(cookie(&headers, "b"), None);
    }
}
