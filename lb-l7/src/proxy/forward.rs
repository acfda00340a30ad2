//! To an upstream, and to another one if that is of no use.

use std::{
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Waker},
    time::Instant,
};

use hyper::{
    HeaderMap, Method, Request, Response, StatusCode, Version,
    body::{Body as _, Incoming},
    header::{self, HeaderValue},
    http::request::Parts,
    upgrade::OnUpgrade,
};

use super::{
    answer,
    body::{Download, Failed, OutBody, Reply, Sent, Silence, Upload},
    exchange::Exchange,
    request, upgrade,
};
use crate::{
    balance::{self, Asked, TRIES, Tried},
    proxy_protocol,
    served::UpstreamEntry,
    table::host,
    upstream::{Exchanged, Link},
    worker::{Client, LocalRoute, Snapshot, Worker},
};

/// A request on its way to an upstream.
#[derive(Debug)]
pub struct Forward {
    worker: Rc<Worker>,
    serving: Snapshot,
    client: Rc<Client>,
    route: LocalRoute,
    /// As it goes on, and a copy of it while it is under way; `None` when it can go nowhere any more.
    request: Option<Request<OutBody>>,
    /// Its body, if it has one.
    upload: Option<Rc<Upload>>,
    /// `None` when the answer has it.
    exchange: Option<Exchange>,
    begun: Instant,
    /// The upstream that the client's cookie names.
    cookie: Option<u64>,
    /// The client's side of another protocol, if it wants to change to one, and may.
    on_client: Option<OnUpgrade>,
    /// gRPC needs HTTP/2 all the way.
    h2: bool,
    /// It is too long already by its own word.
    is_too_large: bool,
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

impl Forward {
    /// Makes the request of a client ready for an upstream of this route.
    pub fn new(
        worker: Rc<Worker>,
        serving: Snapshot,
        client: Rc<Client>,
        route: LocalRoute,
        (mut parts, incoming): (Parts, Incoming),
        mut exchange: Exchange,
    ) -> Self {
        exchange.routed(&route);
        let most = serving.settings.max_body.unwrap_or(u64::MAX);
        let upgrade_to = request::upgrade(&parts, &route.settings.websocket_endpoints);
        let on_client = parts.extensions.remove::<OnUpgrade>();
        let on_client = on_client.filter(|_| upgrade_to.is_some());
        let sticky = route.settings.sticky_cookie.as_deref();
        let cookie = sticky.and_then(|name| cookie(&parts.headers, name));
        let h2 = parts.version == Version::HTTP_2 && is_grpc(&parts.headers);
        request::prepare(&mut parts, &route.prefix, upgrade_to.as_ref(), &client);
        let is_too_large = incoming.size_hint().lower() > most;
        let upload = (!incoming.is_end_stream()).then(|| Rc::new(Upload::new()));
        let body = match &upload {
            None => OutBody::Empty,
            Some(upload) => {
                exchange.uploads(upload);
                OutBody::Client(Box::new(Sent {
                    incoming,
                    upload: Rc::clone(upload),
                    most,
                    silence: Silence::new(serving.settings.timeouts.client),
                }))
            }
        };
        Self {
            worker,
            serving,
            client,
            route,
            request: Some(Request::from_parts(parts, body)),
            upload,
            begun: exchange.start(),
            exchange: Some(exchange),
            cookie,
            on_client,
            h2,
            is_too_large,
        }
    }

    /// Sends it on and makes the answer ready for the client.
    pub async fn run(&mut self) -> Response<Reply> {
        if self.is_too_large {
            return self.own(Fault::TooLarge);
        }
        let asked = Asked {
            client: self.client.address.ip(),
            cookie: self.cookie,
            worker: self.worker.index,
            now_ms: self.worker.shared.clock.coarse_ms(),
        };
        let (mut tried, mut fault) = (Tried::default(), Fault::None);
        while tried.count() < TRIES
            && self.request.is_some()
            && let Some(place) = balance::pick(&self.route, asked, &tried)
        {
            if self.begun.elapsed() >= self.serving.settings.timeouts.request {
                fault = Fault::Late;
                break;
            }
            tried.add(place);
            match self.attempt(place).await {
                Ok((answer, link)) => {
                    self.upstream(place).welcome();
                    return self.finish(answer, link, place);
                }
                Err(failed) => fault = failed,
            }
        }
        self.own(fault)
    }

    fn upstream(&self, place: usize) -> &UpstreamEntry {
        &self.route.targets[place].upstream
    }

    /// Where idle connections of an upstream are kept.
    fn pool(&self, place: usize) -> u64 {
        self.upstream(place).id << 1 | u64::from(self.h2)
    }

    /// One upstream: by an idle connection, and if its end crossed the request, by a new one. The request is left if it may
    /// go elsewhere.
    async fn attempt(&mut self, place: usize) -> Result<(Response<Incoming>, Link), Fault> {
        let pool = self.pool(place);
        if let Some(exchange) = &mut self.exchange {
            exchange.goes_to(place, pool);
        }
        loop {
            let mut link = match self.idle_link(pool) {
                Some(link) => link,
                // Rare, and so large that every request would have to carry the room for it.
                None => Box::pin(self.new_link(place)).await.ok_or(Fault::Connect)?,
            };
            let was_used = link.is_used;
            let answered = {
                let exchange = pin!(self.send(&mut link).ok_or(Fault::None)?);
                self.in_time(exchange).await
            };
            let upstream = &self.route.targets[place].upstream;
            let stats = upstream.stats.of(self.worker.index);
            let mut error = match answered {
                Some(Ok(answer)) => return Ok((answer, link)),
                None => {
                    stats.errors.add(1);
                    self.request = None;
                    return Err(Fault::Late);
                }
                Some(Err(error)) => error,
            };
            if let Some(failed) = self.upload.as_ref().and_then(|upload| upload.failed.get()) {
                self.request = None;
                return Err(match failed {
                    Failed::TooLarge => Fault::TooLarge,
                    Failed::Client => Fault::Client,
                });
            }
            if let Some(unsent) = error.take_message() {
                self.request = Some(unsent);
            }
            // It may have closed the connection for being idle: that says nothing of the upstream.
            if was_used && self.request.is_some() {
                self.worker.pool.forget(pool);
                continue;
            }
            let (route, name, address) = (&self.route.name, &upstream.name, upstream.address);
            tracing::debug!(route, upstream = name, %address, "no answer: {}", error.error());
            stats.errors.add(1);
            if self.request.is_some() {
                upstream.shun(self.worker.shared.clock.coarse_ms());
            }
            return Err(Fault::Broken);
        }
    }

    /// Sends the request, and keeps a copy if it may be repeated.
    fn send<'l>(&mut self, link: &'l mut Link) -> Option<impl Future<Output = Exchanged> + use<'l>> {
        let request = self.request.take()?;
        self.request = may_repeat(&request).then(|| copy(&request));
        Some(link.exchange(request))
    }

    /// An idle connection, unless every client has connections of its own.
    fn idle_link(&self, pool: u64) -> Option<Link> {
        // One that told of a client is that client's.
        if self.serving.settings.send_proxy_protocol {
            return None;
        }
        self.worker.pool.take(pool)
    }

    /// A new connection to an upstream.
    async fn new_link(&self, place: usize) -> Option<Link> {
        let settings = &self.serving.settings;
        let (client, upstream) = (&self.client, self.upstream(place));
        let introduction = settings
            .send_proxy_protocol
            .then(|| proxy_protocol::header(client.address, client.local));
        let headers = self.request.as_ref()?.headers();
        let given = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let name = given.and_then(host::normal);
        let connected = self
            .worker
            .shared
            .connector
            .connect(
                upstream.address,
                self.route.settings.upstream_tls,
                name.as_deref().unwrap_or_default(),
                self.h2,
                introduction.as_deref(),
                settings.timeouts.connect,
            )
            .await;
        let stats = upstream.stats.of(self.worker.index);
        let now_ms = self.worker.shared.clock.coarse_ms();
        match connected {
            Ok(link) => {
                stats.connections.add(1);
                if let (Some(shared), None) = (link.share(), introduction) {
                    self.worker.pool.put(self.pool(place), shared, now_ms);
                }
                Some(link)
            }
            Err(error) => {
                let (route, name, address) = (&self.route.name, &upstream.name, upstream.address);
                tracing::debug!(route, upstream = name, %address, "no connection: {error}");
                stats.connect_errors.add(1);
                upstream.shun(now_ms);
                None
            }
        }
    }

    /// Waits for the header of an answer; `None`: it took too long. An upstream's time begins when the request has been sent,
    /// that of all together with the first try.
    async fn in_time<T>(&self, mut exchange: Pin<&mut impl Future<Output = T>>) -> Option<T> {
        let timeouts = &self.serving.settings.timeouts;
        let begun = Instant::now();
        // With the last part of the body sent at that time.
        let deadline = |sent: Instant| {
            let of_upstream = sent.max(begun) + timeouts.server;
            of_upstream.min(sent.max(self.begun) + timeouts.request)
        };
        let mut until = deadline(self.begun);
        loop {
            if let Ok(answer) = tokio::time::timeout_at(until.into(), exchange.as_mut()).await {
                return Some(answer);
            }
            let now = Instant::now();
            until = deadline(match &self.upload {
                // The client's silence has a limit of its own.
                Some(upload) if upload.waits.get() => now,
                Some(upload) => upload.progress.get().into_std(),
                None => self.begun,
            });
            if until <= now {
                return None;
            }
        }
    }

    /// The upstream's answer as the client gets it.
    fn finish(&mut self, mut answer: Response<Incoming>, mut link: Link, place: usize) -> Response<Reply> {
        link.is_over |= answer.version() == Version::HTTP_10;
        let Some(mut exchange) = self.exchange.take() else {
            return self.own(Fault::None);
        };
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            return match self.on_client.take() {
                Some(on_client) => upgrade::begin(&self.worker, answer, link, exchange, on_client),
                // Nobody asked for it: what would come is no HTTP.
                None => {
                    self.exchange = Some(exchange);
                    self.own(Fault::Broken)
                }
            };
        }
        let has_body = !answer.body().is_end_stream();
        if !request::settle_length(answer.headers_mut(), has_body) {
            self.exchange = Some(exchange);
            return self.own(Fault::Broken);
        }
        exchange.answered(answer.status().as_u16());
        let (mut parts, incoming) = answer.into_parts();
        request::strip_hop_by_hop(&mut parts.headers);
        parts.version = Version::HTTP_11;
        self.add_own_headers(&mut parts.headers, place);
        let reply = if !has_body {
            // Nobody waits for what it does from now on.
            exchange.give_back(link, &mut Context::from_waker(Waker::noop()));
            Reply::Empty
        } else {
            let silence = self.serving.settings.timeouts.server;
            Reply::Upstream(Box::new(Download::new(incoming, link, silence, exchange)))
        };
        Response::from_parts(parts, reply)
    }

    /// What the route adds to an answer of this upstream.
    fn add_own_headers(&self, headers: &mut HeaderMap, place: usize) {
        let (route, is_tls) = (&self.route.settings, self.client.is_tls);
        let cookie = self.upstream(place).cookie;
        if let Some(name) = &route.sticky_cookie
            && self.cookie != Some(cookie)
        {
            let secure = if is_tls { "; Secure" } else { "" };
            let text = format!("{name}={cookie:016x}; Path=/; HttpOnly; SameSite=Lax{secure}");
            if let Ok(value) = HeaderValue::from_str(&text) {
                headers.append(header::SET_COOKIE, value);
            }
        }
        let hsts_s = self.serving.settings.hsts_s;
        if is_tls
            && route.tls.only
            && hsts_s > 0
            && let Ok(value) = HeaderValue::from_str(&format!("max-age={hsts_s}"))
        {
            headers.entry(header::STRICT_TRANSPORT_SECURITY).or_insert(value);
        }
    }

    /// The answer when no upstream gave one.
    fn own(&mut self, fault: Fault) -> Response<Reply> {
        let answer = match fault {
            Fault::None => answer::page(
                StatusCode::SERVICE_UNAVAILABLE,
                "503 no upstream of this host serves now\n",
            ),
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
        if let Some(mut exchange) = self.exchange.take() {
            if fault == Fault::None {
                exchange.leaves_upstream();
            }
            exchange.answered(answer.status().as_u16());
        }
        answer
    }
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
pub fn cookie(headers: &HeaderMap, name: &str) -> Option<u64> {
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
