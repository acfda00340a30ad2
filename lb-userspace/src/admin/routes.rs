//! The calls of the admin API, one function each.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    time::{Duration, SystemTime},
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Query, State, rejection::JsonRejection, rejection::QueryRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::{StreamExt, stream};
use tokio::sync::{broadcast::error::RecvError, oneshot};

use super::{
    Context,
    api::{
        AnnounceQuery, Announced, AnnouncedVip, BackendName, Counters, Done, DrainRequest, FlowFilter,
        FlowList, FlowQuery, Refusal,
    },
    event, select,
};
use crate::{
    datapath::announcements::AnnounceRequest,
    metrics,
    reconcile::{Command, CommandError},
    status::Status,
};

/// Flows listed when the query does not say how many.
pub const DEFAULT_FLOWS: usize = 100;
/// Longest that the reconciler may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Everything: for the Unix socket.
pub fn unix(context: Context) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/counters", get(counters))
        .route("/v1/flows", get(flows))
        .route("/v1/events", get(events))
        .route("/v1/drain", post(drain))
        .route("/v1/undrain", post(undrain))
        .route("/v1/resync", post(resync))
        .route("/v1/announce", post(announce))
        .with_state(context.clone())
        .merge(tcp(context))
}

/// What only reads and tells no names of clients: for TCP.
pub fn tcp(context: Context) -> Router {
    Router::new()
        .route("/metrics", get(exposition))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(context)
}

/// A refusal and its HTTP status.
struct Refused(StatusCode, Refusal);

impl Refused {
    fn new(status: StatusCode, error: impl ToString, remedy: &str) -> Self {
        Self(
            status,
            Refusal {
                error: error.to_string(),
                remedy: remedy.into(),
                candidates: Vec::new(),
            },
        )
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

async fn status(State(context): State<Context>) -> Json<Status> {
    let mut status = context.status.borrow().clone();
    context.shims.mark(&mut status);
    Json(status)
}

async fn counters(State(context): State<Context>) -> Result<Json<Counters>, Refused> {
    let status = context.status.borrow().clone();
    Ok(Json(read(&context, &status).await?))
}

async fn flows(
    State(context): State<Context>,
    query: Result<Query<FlowQuery>, QueryRejection>,
) -> Result<Json<FlowList>, Refused> {
    let Query(query) = query.map_err(|e| bad_request(&e))?;
    let status = context.status.borrow().clone();
    let filter = filter(&status, &query)?;
    let mut list = blocking(&context, move |c| c.readings.flows(&filter)).await?;
    for row in &mut list.flows {
        let service = status.services.iter().find(|s| s.id == row.service_id);
        let backend = service.and_then(|s| s.backends.iter().find(|b| b.id == row.backend_id));
        row.service = service.map(|s| s.name.clone()).unwrap_or_default();
        row.backend_name = backend.map(|b| b.name.clone()).unwrap_or_default();
    }
    Ok(Json(list))
}

async fn events(State(context): State<Context>) -> Response {
    let (status, stop) = (context.status.clone(), context.stop.clone());
    let lines = stream::unfold(context.events.subscribe(), move |mut receiver| {
        let status = status.clone();
        async move {
            let record = match receiver.recv().await {
                Ok(event) => event::record(&event, &status.borrow(), SystemTime::now()),
                Err(RecvError::Lagged(count)) => event::lost(count, SystemTime::now()),
                Err(RecvError::Closed) => return None,
            };
            let mut line = serde_json::to_vec(&record).ok()?;
            line.push(b'\n');
            Some((Ok::<_, Infallible>(Bytes::from(line)), receiver))
        }
    });
    let body = Body::from_stream(lines.take_until(stop.cancelled_owned()));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

async fn drain(
    State(context): State<Context>,
    body: Result<Json<DrainRequest>, JsonRejection>,
) -> Result<Json<Done>, Refused> {
    let Json(body) = body.map_err(|e| bad_request(&e))?;
    let backends = resolve(&context, &body)?;
    let deadline = body.deadline_ms.map(Duration::from_millis);
    for backend in selectors(&body.backend, &backends) {
        command(&context, |reply| Command::Drain {
            backend,
            deadline,
            reply,
        })
        .await?;
    }
    Ok(Json(Done { backends }))
}

async fn undrain(
    State(context): State<Context>,
    body: Result<Json<DrainRequest>, JsonRejection>,
) -> Result<Json<Done>, Refused> {
    let Json(body) = body.map_err(|e| bad_request(&e))?;
    // A drain outlives the backend it names, and must be possible to lift.
    let gone = select::matches(&context.status.borrow(), &body.backend).is_empty();
    let backends = if gone {
        Vec::new()
    } else {
        resolve(&context, &body)?
    };
    for backend in selectors(&body.backend, &backends) {
        command(&context, |reply| Command::Undrain { backend, reply }).await?;
    }
    Ok(Json(Done { backends }))
}

async fn resync(State(context): State<Context>) -> Result<Json<Done>, Refused> {
    command(&context, |reply| Command::Resync { reply }).await?;
    Ok(Json(Done::default()))
}

async fn announce(
    State(context): State<Context>,
    body: Result<Json<AnnounceQuery>, JsonRejection>,
) -> Result<Json<Announced>, Refused> {
    let Json(AnnounceQuery { vip }) = body.map_err(|e| bad_request(&e))?;
    let (reply, answer) = oneshot::channel();
    let ended = || {
        Refused::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "the agent is stopping",
            "start it again",
        )
    };
    let request = AnnounceRequest { vip, reply };
    context.announce.send(request).await.map_err(|_| ended())?;
    let announced = tokio::time::timeout(PATIENCE, answer)
        .await
        .map_err(|_| {
            Refused::new(
                StatusCode::GATEWAY_TIMEOUT,
                "the network is not read in time",
                "try again",
            )
        })?
        .map_err(|_| ended())?;
    if announced.is_empty() {
        let which = vip.map_or_else(|| "no VIP".into(), |vip| format!("{vip}"));
        let is = if vip.is_some() { "is not" } else { "is" };
        return Err(Refused::new(
            StatusCode::NOT_FOUND,
            format!("{which} {is} on an interface of this node whose link is up"),
            "only VIPs with `announce = \"address\"` are announced: see `ip address`",
        ));
    }
    let announced = announced
        .into_iter()
        .map(|(interface, vip)| AnnouncedVip { vip, interface })
        .collect();
    Ok(Json(Announced { announced }))
}

async fn exposition(State(context): State<Context>) -> Result<Response, Refused> {
    let status = context.status.borrow().clone();
    let counters = read(&context, &status).await?;
    let text = metrics::exposition(&status, &counters).map_err(|e| {
        Refused::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            e,
            "report this: a metric contradicts its definition",
        )
    })?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

/// Alive: the reconciler, which publishes the status, is running.
async fn healthz(State(context): State<Context>) -> Response {
    match context.status.has_changed() {
        Ok(_) => (StatusCode::OK, "ok\n").into_response(),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the reconciler has ended\n").into_response(),
    }
}

/// Ready: every source has been read once and the maps hold the desired state.
async fn readyz(State(context): State<Context>) -> Response {
    let status = context.status.borrow().clone();
    if status.ready && context.status.has_changed().is_ok() {
        return (StatusCode::OK, "ready\n").into_response();
    }
    (
        StatusCode::SERVICE_UNAVAILABLE,
        reasons(&status).join("\n") + "\n",
    )
        .into_response()
}

/// Why an agent is not ready, a line each; never empty.
pub(super) fn reasons(status: &Status) -> Vec<String> {
    let mut reasons: Vec<String> = status
        .sources
        .iter()
        .filter(|s| s.last_full_read.is_none())
        .map(|s| {
            let fault = s
                .fault
                .as_deref()
                .unwrap_or("waiting for its first complete list");
            format!("source {}: {fault}", s.name)
        })
        .collect();
    reasons.extend(status.faults.iter().cloned());
    if reasons.is_empty() {
        reasons.push("the maps do not hold the desired state yet".into());
    }
    reasons
}

/// The backends that were asked for.
fn resolve(context: &Context, body: &DrainRequest) -> Result<Vec<BackendName>, Refused> {
    select::resolve(&context.status.borrow(), &body.backend, body.all).map_err(|refusal| {
        let several = refusal.candidates.len() > 1 && refusal.error.contains("means");
        Refused(
            if several {
                StatusCode::CONFLICT
            } else {
                StatusCode::NOT_FOUND
            },
            refusal,
        )
    })
}

/// The reconciler's words for backends: what was typed, so that the drain of a name stays with a container that comes
/// back with another address. Only ids mean nothing to it: they become service and address.
fn selectors(typed: &str, backends: &[BackendName]) -> BTreeSet<String> {
    let by_id = |b: &BackendName| {
        let id = typed.strip_prefix('#').unwrap_or(typed).parse();
        id.is_ok_and(|id: u32| b.id == Some(id)) && b.name != typed
    };
    if !backends.iter().any(by_id) {
        return [typed.to_owned()].into();
    }
    let exact = backends.iter().map(|b| format!("{}/{}", b.service, b.address));
    exact.collect()
}

/// Has the reconciler do something and waits until it is done.
async fn command(
    context: &Context,
    make: impl FnOnce(oneshot::Sender<Result<usize, CommandError>>) -> Command,
) -> Result<(), Refused> {
    let gone = || {
        Refused::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "the reconciler has ended",
            "see the agent's log and start it again; traffic goes on by the pinned maps",
        )
    };
    let (reply, answer) = oneshot::channel();
    let exchange = async {
        context.commands.send(make(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    };
    match tokio::time::timeout(PATIENCE, exchange).await {
        Err(_) => Err(Refused::new(
            StatusCode::GATEWAY_TIMEOUT,
            format!("the reconciler did not answer within {} s", PATIENCE.as_secs()),
            "it may still do it: look at `weir status`",
        )),
        Ok(answer) => match answer? {
            Ok(_) => Ok(()),
            Err(e @ CommandError::Unknown(_)) => Err(Refused::new(StatusCode::NOT_FOUND, e, "")),
            Err(e) => Err(Refused::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                e,
                "see `weir status` for faults",
            )),
        },
    }
}

/// Reads the counters of everything in the status.
async fn read(context: &Context, status: &Status) -> Result<Counters, Refused> {
    let services: Vec<u32> = status.services.iter().map(|s| s.id).collect();
    let backends: Vec<u32> = status
        .services
        .iter()
        .flat_map(|s| s.backends.iter().map(|b| b.id))
        .collect();
    let reading = blocking(context, move |c| c.readings.counters(&services, &backends)).await?;
    Ok(Counters::new(&reading, status, taken_us(context)))
}

/// Runs system calls off the runtime's threads.
async fn blocking<T, E>(
    context: &Context,
    call: impl FnOnce(&Context) -> Result<T, E> + Send + 'static,
) -> Result<T, Refused>
where
    T: Send + 'static,
    E: ToString + Send + 'static,
{
    let context = context.clone();
    let failed = |error: String| {
        Refused::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            error,
            "the pinned maps may have been removed: see the agent's log",
        )
    };
    match tokio::task::spawn_blocking(move || call(&context)).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(failed(error.to_string())),
        Err(error) => Err(failed(error.to_string())),
    }
}

/// Names of a query as ids.
fn filter(status: &Status, query: &FlowQuery) -> Result<FlowFilter, Refused> {
    let unknown = |what: &str, name: &str| {
        Refused::new(
            StatusCode::NOT_FOUND,
            format!("no {what} is called {name:?}"),
            "see `weir status`",
        )
    };
    let services = query
        .service
        .as_ref()
        .map(|name| match select::services(status, name) {
            ids if ids.is_empty() => Err(unknown("service", name)),
            ids => Ok(ids),
        });
    let backends = query.backend.as_ref().map(|name| {
        let ids: BTreeSet<u32> = select::matches(status, name)
            .iter()
            .filter_map(|b| b.id)
            .collect();
        if ids.is_empty() {
            Err(unknown("backend", name))
        } else {
            Ok(ids)
        }
    });
    Ok(FlowFilter {
        services: services.transpose()?,
        client: query.client,
        backends: backends.transpose()?,
        limit: query.limit.unwrap_or(DEFAULT_FLOWS),
    })
}

fn bad_request(error: &impl ToString) -> Refused {
    Refused::new(
        StatusCode::BAD_REQUEST,
        error.to_string(),
        "compare the call with docs/admin-api.md",
    )
}

fn taken_us(context: &Context) -> u64 {
    u64::try_from(context.started.elapsed().as_micros()).unwrap_or(u64::MAX)
}
