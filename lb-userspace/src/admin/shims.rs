//! The socket of the L7 shims: routes and settings as a stream, and nothing else.
//!
//! It is a socket of its own because a shim faces the clients: whoever takes one over learns the routes and can change
//! nothing. It is for root and, if it exists, for the group that the shims are in.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State as With,
    http::header,
    response::{IntoResponse, Response},
    routing::get,
};
use futures_util::{StreamExt, stream};
use lb_route::{ALIVE_EVERY, Message, SOCKET_NAME, State, Upstream, WATCH_PATH};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::socket::{Socket, SocketError};
use crate::{config::Config, status::Status};

/// Group whose members may listen to the routes, if it exists.
pub const GROUP: &str = "weir-l7";

/// The shims that listen now; clones tell of the same.
#[derive(Clone, Debug, Default)]
pub struct Connected(Arc<Mutex<Listeners>>);

#[derive(Debug, Default)]
struct Listeners {
    next: u64,
    /// The cluster of each.
    clusters: BTreeMap<u64, Option<String>>,
}

/// One shim among [`Connected`], for as long as this lives.
#[derive(Debug)]
struct Listener {
    connected: Connected,
    id: u64,
}

/// The bound but not yet serving socket.
#[derive(Debug)]
pub struct Shims(Socket);

/// What a stream is made of.
#[derive(Clone)]
struct Origin {
    status: watch::Receiver<Status>,
    config: watch::Receiver<Arc<Config>>,
    connected: Connected,
    stop: CancellationToken,
}

/// A stream to one shim.
struct Telling {
    origin: Origin,
    told: Option<State>,
    listener: Listener,
}

// === impl Shims ===

impl Shims {
    /// Where the socket is, beside the admin socket.
    pub fn path(admin: &Path) -> PathBuf {
        admin.with_file_name(SOCKET_NAME)
    }

    /// Binds it. Must run inside a tokio runtime.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(admin: &Path) -> Result<Self, SocketError> {
        let exists = nix::unistd::Group::from_name(GROUP).is_ok_and(|group| group.is_some());
        Socket::bind(&Self::path(admin), exists.then_some(GROUP)).map(Self)
    }

    /// Serves until `stop`.
    ///
    /// # Errors
    /// The listener failed for good.
    pub async fn serve(
        mut self,
        status: watch::Receiver<Status>,
        config: watch::Receiver<Arc<Config>>,
        connected: Connected,
        stop: CancellationToken,
    ) -> io::Result<()> {
        let Some(listener) = self.0.take() else {
            return Ok(());
        };
        let origin = Origin {
            status,
            config,
            connected,
            stop: stop.clone(),
        };
        let calls = Router::new()
            .route(WATCH_PATH, get(watch_routes))
            .with_state(origin);
        axum::serve(listener, calls)
            .with_graceful_shutdown(stop.cancelled_owned())
            .await
    }
}

async fn watch_routes(With(origin): With<Origin>) -> Response {
    let stop = origin.stop.clone();
    let telling = Telling {
        listener: origin.connected.enter(),
        origin,
        told: None,
    };
    let lines = stream::unfold(telling, |mut telling| async move {
        let line = telling.next().await?;
        Some((Ok::<_, Infallible>(Bytes::from(line)), telling))
    });
    let body = Body::from_stream(lines.take_until(stop.cancelled_owned()));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

// === impl Telling ===

impl Telling {
    /// The next line, as soon as there is something to say; `None` when the agent ends.
    async fn next(&mut self) -> Option<Vec<u8>> {
        let message = loop {
            if let Some(message) = self.news() {
                break message;
            }
            tokio::select! {
                changed = self.origin.status.changed() => changed.ok()?,
                changed = self.origin.config.changed() => changed.ok()?,
                () = tokio::time::sleep(ALIVE_EVERY) => break Message::Alive,
            }
        };
        let mut line = serde_json::to_vec(&message).ok()?;
        line.push(b'\n');
        Some(line)
    }

    /// What the shim does not know yet.
    fn news(&mut self) -> Option<Message> {
        let state = {
            let status = self.origin.status.borrow_and_update();
            if !knows_its_routes(&status) {
                return None;
            }
            let routes = status
                .routes
                .iter()
                .map(|r| r.route.with_upstreams(|u| Upstream::from(u)));
            State {
                routes: routes.collect(),
                settings: self.origin.config.borrow_and_update().l7.clone(),
            }
        };
        self.listener.serves(&state.settings.cluster);
        let message = match &self.told {
            None => Some(Message::Full(Box::new(state.clone()))),
            Some(told) => state.since(told),
        };
        self.told = Some(state);
        message
    }
}

/// Whether every source has been read: before that, a route that is not there may only not have been heard of yet, and a
/// shim that was told so would take it off.
fn knows_its_routes(status: &Status) -> bool {
    let all_read = || {
        status
            .sources
            .iter()
            .all(|source| source.last_full_read.is_some())
    };
    status.ready || (!status.sources.is_empty() && all_read())
}

// === impl Connected ===

impl Connected {
    fn enter(&self) -> Listener {
        let mut listeners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.next += 1;
        let id = listeners.next;
        listeners.clusters.insert(id, None);
        Listener {
            connected: self.clone(),
            id,
        }
    }

    /// Marks the routes that somebody serves.
    pub fn mark(&self, status: &mut Status) {
        let listeners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for route in &mut status.routes {
            let wanted = &route.route.settings.cluster;
            let serves = |cluster: &Option<String>| wanted.is_none() || cluster == wanted;
            if listeners.clusters.values().any(serves) {
                route.waiting_for = None;
            }
        }
    }
}

impl Listener {
    /// It serves the routes of this cluster, and those of none.
    fn serves(&self, cluster: &Option<String>) {
        let mut listeners = self.connected.0.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.clusters.insert(self.id, cluster.clone());
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut listeners = self.connected.0.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.clusters.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admin::{client::Client, fixture},
        config::Config,
        route::ANY_HOST,
    };

    #[tokio::test]
    async fn a_shim_is_told_everything_when_it_is_known_and_then_what_changes() {
        let dir = tempfile::tempdir().unwrap();
        let admin = dir.path().join("weir.sock");
        let mut unread = fixture::status();
        unread.ready = false;
        unread.sources[0].last_full_read = None;
        let (status_to, status) = watch::channel(unread);
        let config = Config::parse(Path::new("weir.toml"), "interfaces = [\"lo\"]\n").unwrap();
        let (_config_to, config) = watch::channel(Arc::new(config));
        let (connected, stop) = (Connected::default(), CancellationToken::new());
        let shims = Shims::bind(&admin).unwrap();
        let serving = tokio::spawn(shims.serve(status, config, connected.clone(), stop.clone()));

        let (seen, mut messages) = tokio::sync::mpsc::unbounded_channel::<Message>();
        let client = Client::new(&Shims::path(&admin));
        let following =
            tokio::spawn(async move { client.follow(WATCH_PATH, |m| seen.send(m).is_ok()).await });
        // Not read yet: nothing is told, and so nothing is taken off.
        while connected.0.lock().unwrap().clusters.is_empty() {
            tokio::task::yield_now().await;
        }
        status_to.send_replace(fixture::status());
        let Some(Message::Full(state)) = messages.recv().await else {
            panic!("the first message is not everything")
        };
        let routes = fixture::status().routes;
        assert_eq!(state.routes.len(), routes.len());
        assert_eq!(state.routes[0].upstreams.len(), routes[0].route.upstreams.len());
        status_to.send_modify(|status| status.routes[0].route.host = ANY_HOST.into());
        let Some(Message::Change { put, remove }) = messages.recv().await else {
            panic!("the second message is no change")
        };
        assert_eq!((put[0].host.as_str(), remove.len()), (ANY_HOST, 1));
        // What it serves no longer waits for it; what is another cluster's does.
        let mut status = fixture::status();
        connected.mark(&mut status);
        assert_eq!(status.routes[0].waiting_for, None);
        let mut status = fixture::status();
        status.routes[0].route.settings.cluster = Some("west".into());
        connected.mark(&mut status);
        assert!(status.routes[0].waiting_for.is_some());

        stop.cancel();
        following.await.unwrap().unwrap();
        serving.await.unwrap().unwrap();
        assert!(connected.0.lock().unwrap().clusters.is_empty());
    }

    #[tokio::test]
    async fn nothing_else_can_be_asked_there() {
        let dir = tempfile::tempdir().unwrap();
        let admin = dir.path().join("weir.sock");
        let (_status_to, status) = watch::channel(fixture::status());
        let config = Config::parse(Path::new("weir.toml"), "interfaces = [\"lo\"]\n").unwrap();
        let (_config_to, config) = watch::channel(Arc::new(config));
        let stop = CancellationToken::new();
        let shims = Shims::bind(&admin).unwrap();
        let serving = tokio::spawn(shims.serve(status, config, Connected::default(), stop.clone()));
        let client = Client::new(&Shims::path(&admin));
        for path in ["/v1/status", "/v1/flows", "/v1/counters", "/metrics"] {
            assert!(client.get::<serde_json::Value>(path).await.is_err(), "{path}");
        }
        assert!(client.post::<serde_json::Value>("/v1/resync", &()).await.is_err());
        stop.cancel();
        serving.await.unwrap().unwrap();
    }
}
