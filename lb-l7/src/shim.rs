//! The process: state in, workers, signals.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use lb_route::{L7, State};
use tokio::{
    runtime::{Builder, LocalOptions},
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, watch},
    time::Instant,
};
use tracing::{info, warn};

use crate::{
    acme,
    cli::Cli,
    client::Clock,
    feed::{self, Store},
    handover::{self, Giver},
    listen::{Nascent, Place, Sockets},
    log::Log,
    page,
    served::{Registry, Serving},
    stats::Shards,
    tls,
    upstream::Connector,
    worker::{Phase, Shared, Worker},
};

/// Serves until a signal ends it.
///
/// # Errors
/// No port to listen on, or a file of the command line that cannot be read.
pub fn run(cli: &Cli) -> Result<()> {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build_local(LocalOptions::default())?;
    runtime.block_on(shim(cli))
}

async fn shim(cli: &Cli) -> Result<()> {
    let workers = match cli.workers {
        Some(workers) => workers.into(),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    raise_descriptors();
    let (states, mut state) = watch::channel(None::<State>);
    let mut hangup = signal(SignalKind::hangup())?;
    match &cli.routes {
        Some(path) => {
            states.send_replace(Some(feed::read(path)?));
            let path = path.clone();
            tokio::task::spawn_local(async move {
                while hangup.recv().await.is_some() {
                    match feed::read(&path) {
                        Ok(state) => drop(states.send_replace(Some(state))),
                        Err(error) => warn!("{error}; serving on by what was read before"),
                    }
                }
            });
        }
        None => {
            let store = cli.state.as_deref().map(Store::new);
            if let Some(last) = store.as_ref().and_then(Store::load) {
                info!(routes = last.routes.len(), "beginning with what was heard last");
                states.send_replace(Some(last));
            }
            let socket = cli.agent.clone();
            tokio::task::spawn_local(async move {
                let publish = |state: &State| {
                    states.send_replace(Some(state.clone()));
                    if let Some(store) = &store
                        && let Err(error) = store.save(state)
                    {
                        warn!("the state is not kept for the next start: {error}");
                    }
                };
                feed::follow(&socket, publish).await;
            });
        }
    }
    let mut stop = Stop::new()?;
    let first = tokio::select! {
        first = state.wait_for(Option::is_some) => first.context("nobody tells of routes")?.clone().unwrap_or_default(),
        () = stop.asked() => return Ok(()),
    };
    let taken = match &cli.handover {
        Some(path) => handover::take(path).with_context(|| path.display().to_string())?,
        None => None,
    };
    let (others, old) = match taken {
        Some(taken) => {
            let (sockets, old) = taken.into_parts();
            (sockets, Some(old))
        }
        None => (Sockets::default(), None),
    };
    let sockets = Sockets::bind_with(&places(cli, &first.settings), workers, others)?;
    sockets.limit_silence(first.settings.timeouts.client)?;
    let copies = match cli.handover {
        Some(_) => sockets.copies()?,
        None => Vec::new(),
    };
    let mut registry = Registry::new(workers);
    let clock = Clock::new();
    let serving = registry.serving(&first, clock.coarse_ms());
    let mut maker = tls::Maker::new().with_acme(cli.acme_folder());
    let shared = Arc::new(Shared {
        tls: watch::Sender::new(Arc::new(maker.make(&first)?)),
        acme: acme::Board::default(),
        places: Arc::new(Semaphore::new(first.settings.max_connections as usize)),
        serving: watch::Sender::new(Arc::new(serving)),
        phase: watch::Sender::new(Phase::Serving),
        clock,
        connector: Connector::new(),
        log: Log::start()?,
        unrouted: Shards::new(workers),
        clients: Shards::new(workers),
        since: std::time::SystemTime::now(),
    });
    for (place, _) in &sockets.0 {
        info!(address = %place.address, tls = place.tls, workers, "serving");
    }
    let handed_over = Arc::new(AtomicBool::new(false));
    let threads = sockets.share(workers, &handed_over).into_iter().enumerate();
    let threads: Vec<JoinHandle<()>> = threads
        .map(|(index, sockets)| start(index, sockets, Arc::clone(&shared)))
        .collect::<Result<_>>()?;
    tell(&first);
    if let Some(address) = first.settings.metrics {
        let shared = Arc::clone(&shared);
        tokio::task::spawn_local(async move {
            if let Err(error) = page::serve(address, shared).await {
                // Requests are more important than their numbers.
                tracing::error!("metrics at {address}: {error}; choose another `metrics` address of [l7]");
            }
        });
    }
    tokio::task::spawn_local(tls::follow(maker, state.clone(), shared.tls.clone()));
    tokio::task::spawn_local(acme::follow(cli.acme_folder(), Arc::clone(&shared)));
    let updating = tokio::task::spawn_local({
        let shared = Arc::clone(&shared);
        async move {
            while state.changed().await.is_ok() {
                let now = state.borrow_and_update().clone().unwrap_or_default();
                shared.clock.tick();
                let serving = registry.serving(&now, shared.clock.coarse_ms());
                resize(&shared, &serving);
                shared.serving.send_replace(Arc::new(serving));
                tell(&now);
            }
        }
    });
    if let Some(old) = old {
        info!(pid = std::process::id(), "taking over from the shim before");
        old.serving()?;
    }
    let giver = match &cli.handover {
        None => None,
        Some(path) => Some(Arc::new(
            Giver::new(path, copies).with_context(|| path.display().to_string())?,
        )),
    };
    handover::notify(&format!("READY=1\nMAINPID={}", std::process::id()));
    let taken_over = until_the_end(&mut stop, giver.clone()).await?;
    handed_over.store(taken_over, Relaxed);
    if let (Some(giver), false) = (giver, taken_over) {
        giver.stop();
        handover::notify("STOPPING=1");
    }
    let patience = shared.serving.borrow().settings.timeouts.drain;
    info!("stopping; what is under way may go on for {patience:?}");
    shared
        .phase
        .send_replace(Phase::Draining(Instant::now() + patience));
    let ended = tokio::task::spawn_blocking(move || threads.into_iter().for_each(|t| drop(t.join())));
    tokio::select! {
        _ = ended => info!("stopped"),
        () = stop.asked() => {
            warn!("stopped at once");
            std::process::exit(1);
        }
    }
    updating.abort();
    Ok(())
}

/// Waits until the process has to end; whether because another one has taken over.
async fn until_the_end(stop: &mut Stop, giver: Option<Arc<Giver>>) -> Result<bool> {
    let Some(giver) = giver else {
        stop.asked().await;
        return Ok(false);
    };
    let (given, mut is_given) = tokio::sync::oneshot::channel();
    // Not of the runtime, which would wait for it at the end.
    std::thread::Builder::new()
        .name("handover".into())
        .spawn(move || {
            giver.wait();
            let _the_process_may_have_ended = given.send(());
        })?;
    let program = std::env::current_exe().context("the path of this program")?;
    let mut successor = None::<tokio::process::Child>;
    loop {
        let ended = async {
            match &mut successor {
                Some(child) => child.wait().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = stop.term.recv() => return Ok(false),
            _ = stop.int.recv() => return Ok(false),
            _ = &mut is_given => return Ok(true),
            status = ended => {
                warn!(?status, "the new process has ended before it served; serving on");
                successor = None;
            }
            _ = stop.anew.recv() => {
                info!("starting anew");
                let mut command = tokio::process::Command::new(&program);
                match command.args(std::env::args_os().skip(1)).spawn() {
                    Ok(child) => successor = Some(child),
                    Err(error) => warn!("cannot start {}: {error}; serving on", program.display()),
                }
            }
        }
    }
}

fn tell(state: &State) {
    let upstreams: usize = state.routes.iter().map(|route| route.upstreams.len()).sum();
    info!(routes = state.routes.len(), upstreams, "routes");
}

/// Every connection takes a descriptor: as many as this process may have.
fn raise_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
        } else {
            Ok(())
        }
    });
    if let Err(error) = raised {
        warn!("the limit of open files stays as it is: {error}");
    }
}

/// Where to listen: the command line's word goes before that of the settings.
fn places(cli: &Cli, settings: &L7) -> Vec<Place> {
    let configured = |port: Option<u16>| {
        let port = port.into_iter();
        port.flat_map(|port| settings.listen.iter().map(move |ip| SocketAddr::new(*ip, port)))
            .collect::<Vec<_>>()
    };
    let own = !cli.http.is_empty() || !cli.https.is_empty();
    let http = if own {
        cli.http.clone()
    } else {
        configured(settings.http_port)
    };
    let https = if own {
        cli.https.clone()
    } else {
        configured(settings.https_port)
    };
    let plain = http.into_iter().map(|address| Place { address, tls: false });
    let tls = https.into_iter().map(|address| Place { address, tls: true });
    plain.chain(tls).collect()
}

/// Has as many places for clients as the settings say now.
fn resize(shared: &Shared, serving: &Serving) {
    let (before, now) = (
        shared.serving.borrow().settings.max_connections as usize,
        serving.settings.max_connections as usize,
    );
    if now > before {
        shared.places.add_permits(now - before);
    } else if now < before {
        // Those in use are taken away when they come back.
        let (places, mut less) = (Arc::clone(&shared.places), before - now);
        tokio::task::spawn_local(async move {
            while less > 0
                && let Ok(place) = places.acquire().await
            {
                place.forget();
                less -= 1;
            }
        });
    }
}

/// Starts the thread of a worker.
fn start(index: usize, sockets: Vec<Nascent>, shared: Arc<Shared>) -> Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name(format!("worker-{index}"));
    let work = move || -> Result<()> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build_local(LocalOptions::default())?;
        runtime.block_on(async {
            let listeners = sockets
                .into_iter()
                .map(Nascent::adopt)
                .collect::<std::io::Result<_>>()?;
            Worker::new(index, shared).run(listeners).await;
            Ok(())
        })
    };
    let spawned = thread.spawn(move || {
        if let Err(error) = work() {
            tracing::error!("worker {index}: {error:#}");
            // Half of the connections would wait for nobody.
            std::process::exit(1);
        }
    });
    spawned.context("cannot start a thread")
}

/// The signals that end the process.
struct Stop {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
    /// To start the program anew.
    anew: tokio::signal::unix::Signal,
}

impl Stop {
    fn new() -> Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            anew: signal(SignalKind::user_defined2())?,
        })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}
