//! A request on its way: which route, which upstream, what comes back.

use std::{convert::Infallible, future::Future, rc::Rc};

use hyper::{
    Method, Request, Response, StatusCode, Version,
    body::{Body as _, Incoming},
    header,
    http::request::Parts,
};

pub mod answer;
mod body;
mod exchange;
mod forward;
pub mod request;
mod upgrade;

pub use body::{OutBody, Reply};
pub use exchange::Exchange;
use forward::Forward;
pub use forward::cookie;

use crate::{
    log::Log,
    served::Action,
    table::Found,
    worker::{Client, View, Worker},
};

/// Answers one request.
///
/// # Errors
/// None: what fails is told to the client.
pub fn handle(
    worker: Rc<Worker>,
    client: Rc<Client>,
    request: Request<Incoming>,
) -> impl Future<Output = Result<Response<Reply>, Infallible>> {
    let version = request.version();
    // Before the future begins, which has room for what is waited for alone: it is moved for every request.
    let mut begun = begin(&worker, client, request);
    async move {
        let mut answer = match &mut begun {
            Begun::Forward(forward) => forward.run().await,
            Begun::Answered(answer) => std::mem::take(answer),
        };
        if version < Version::HTTP_2 {
            if worker.is_draining() && answer.status() != StatusCode::SWITCHING_PROTOCOLS {
                answer::close(answer.headers_mut());
            }
        } else {
            // HTTP/2 has no such thing.
            answer.headers_mut().remove(header::CONNECTION);
        }
        Ok(answer)
    }
}

/// What is known of a request when its header has been read.
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all are forwarded, and the room is a part of the connection"
)]
enum Begun {
    /// An upstream has to answer.
    Forward(Forward),
    /// The answer is there.
    Answered(Response<Reply>),
}

fn begin(worker: &Rc<Worker>, client: Rc<Client>, request: Request<Incoming>) -> Begun {
    let serving = worker.serving();
    let (parts, incoming) = request.into_parts();
    let line = Log::line(serving.settings.access_log, client.address, &parts);
    let mut exchange = Exchange::begin(worker, &client, line);
    let (route, mut answer) = match choose(worker, &serving, &parts, &client) {
        Choice::Forward(place) => {
            let (worker, route) = (Rc::clone(worker), Rc::clone(serving.route(place)));
            let request = (parts, incoming);
            let forward = Forward::new(worker, serving, client, route, request, exchange);
            return Begun::Forward(forward);
        }
        Choice::Answer(route, answer) => (route, answer),
    };
    if let Some(place) = route {
        exchange.routed(serving.route(place));
    }
    exchange.answered(answer.status().as_u16());
    if !incoming.is_end_stream() {
        // Its body stays unread: what follows on the connection would be it.
        client.stage.leave_unread();
        answer::close(answer.headers_mut());
    }
    Begun::Answered(answer)
}

/// What is done with a request.
enum Choice {
    /// To an upstream of the route at this place.
    Forward(usize),
    /// By ourselves, for this route if it is one's.
    Answer(Option<usize>, Response<Reply>),
}

fn choose(worker: &Worker, serving: &View, parts: &Parts, client: &Client) -> Choice {
    let own = |answer| Choice::Answer(None, answer);
    let host = match request::host(parts) {
        Ok(host) => host,
        Err(request::Refused(status, text)) => return own(answer::refusal(status, text)),
    };
    if parts.method == Method::TRACE {
        return own(answer::page(
            StatusCode::METHOD_NOT_ALLOWED,
            "405 TRACE is not answered\n",
        ));
    }
    if let Some(answer) = crate::acme::answer(&worker.shared, &host, parts) {
        return own(answer);
    }
    let whole = request::whole(&parts.uri);
    let action = match serving.table.find(&host, parts.uri.path()) {
        Found::This(action) => action,
        Found::NoPath => {
            return own(answer::page(
                StatusCode::NOT_FOUND,
                "404 nothing is served at this path\n",
            ));
        }
        Found::NoHost => {
            return own(answer::page(
                StatusCode::SERVICE_UNAVAILABLE,
                "503 nobody serves this host here\n",
            ));
        }
    };
    match action {
        Action::Redirect(to) => own(answer::redirect(StatusCode::FOUND, &answer::target(to, whole))),
        // It came back from where it was sent: whoever has the port of HTTPS, it is not the one who serves this host.
        Action::ToHttps if is_secure(parts, client) => own(answer::page(
            StatusCode::SERVICE_UNAVAILABLE,
            "503 nobody serves this host here by HTTPS\n",
        )),
        // Served around the shim, by the usual port.
        Action::ToHttps => own(to_https(None, &host, whole)),
        Action::StatusPage => own(crate::page::answer(&worker.shared, serving, parts)),
        Action::Serve(place) => {
            let tls = &serving.route(*place).settings.tls;
            if tls.passthrough && client.is_tls {
                // Its TLS was begun for another name.
                let text = "421 ask for this host by its own connection\n";
                return own(answer::page(StatusCode::MISDIRECTED_REQUEST, text));
            }
            if (tls.only || tls.passthrough) && !is_secure(parts, client) {
                return Choice::Answer(Some(*place), to_https(serving.settings.https_port, &host, whole));
            }
            Choice::Forward(*place)
        }
    }
}

/// Whether the client came by TLS, to us or to whom we trust.
fn is_secure(parts: &Parts, client: &Client) -> bool {
    let said = || parts.headers.get(request::X_FORWARDED_PROTO);
    client.is_tls || (client.is_trusted && said().is_some_and(|proto| proto == "https"))
}

/// A redirect to the same URL by HTTPS, at this port if it is not the usual one.
pub fn to_https(port: Option<u16>, host: &str, whole: &str) -> Response<Reply> {
    if host.is_empty() {
        return answer::page(StatusCode::BAD_REQUEST, "400 no Host, which HTTPS needs\n");
    }
    let to = match port {
        None | Some(443) => format!("https://{host}{whole}"),
        Some(port) => format!("https://{host}:{port}{whole}"),
    };
    answer::redirect(StatusCode::MOVED_PERMANENTLY, &to)
}
