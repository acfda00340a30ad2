//! The agent's end of the stream: its own code, fed by the test instead of by Docker.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use lb_route::{L7, Route};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weir::{
    admin::shims::{Connected, Shims},
    config::Config,
    model::Backend,
    status::{RouteStatus, Status},
};

/// A running stream. Dropping it is the death of the agent.
pub struct Agent {
    status: watch::Sender<Status>,
    config: watch::Sender<Arc<Config>>,
    stop: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Where shims find the agent whose admin socket is in this folder.
pub fn socket(folder: &Path) -> PathBuf {
    Shims::path(&folder.join("weir.sock"))
}

impl Agent {
    /// Tells these routes and settings, as JSON has them, to whoever listens.
    pub fn start(folder: &Path, settings: &Value, routes: &Value) -> Self {
        let (status, status_of) = watch::channel(said(routes));
        let (config, config_of) = watch::channel(configured(settings));
        let stop = CancellationToken::new();
        let (token, admin) = (stop.clone(), folder.join("weir.sock"));
        let (bound, is_bound) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let shims = Shims::bind(&admin).unwrap();
                bound.send(()).unwrap();
                shims
                    .serve(status_of, config_of, Connected::default(), token)
                    .await
                    .unwrap();
            });
        });
        is_bound.recv().unwrap();
        Self {
            status,
            config,
            stop,
            thread: Some(thread),
        }
    }

    /// Tells other routes.
    pub fn routes(&self, routes: &Value) {
        self.status.send_replace(said(routes));
    }

    /// Tells other settings.
    pub fn settings(&self, settings: &Value) {
        self.config.send_replace(configured(settings));
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn configured(settings: &Value) -> Arc<Config> {
    let mut config = Config::parse(Path::new("weir.toml"), "interfaces = [\"lo\"]\n").unwrap();
    config.l7 = serde_json::from_value::<L7>(settings.clone()).unwrap();
    Arc::new(config)
}

fn said(routes: &Value) -> Status {
    let routes: Vec<Route> = serde_json::from_value(routes.clone()).unwrap();
    let backend = |upstream: &lb_route::Upstream| Backend {
        address: upstream.address,
        weight: upstream.weight,
        state: upstream.state,
        reason: "running".into(),
        drain: upstream.drain,
        name: upstream.name.clone(),
        check: None,
        attachment: weir::model::Attachment::Address,
    };
    let told = |route: &Route| RouteStatus {
        route: route.with_upstreams(backend),
        waiting_for: None,
    };
    Status {
        version: "test".into(),
        ready: true,
        routes: routes.iter().map(told).collect(),
        ..Status::default()
    }
}

/// A route of this host with these upstreams.
pub fn route(host: &str, upstreams: &[std::net::SocketAddr]) -> Value {
    let upstreams: Vec<Value> = upstreams
        .iter()
        .map(|address| json!({ "address": address, "name": format!("c{}", address.port()) }))
        .collect();
    json!({ "host": host, "upstreams": upstreams })
}

/// The same value with others put into it.
pub fn with(mut value: Value, more: Value) -> Value {
    let (Value::Object(map), Value::Object(more)) = (&mut value, more) else {
        panic!("no objects")
    };
    map.extend(more);
    value
}
