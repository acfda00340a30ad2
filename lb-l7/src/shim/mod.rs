//! The process: state in, workers, signals.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use lb_route::{L7, State};
use sd_notify::NotifyState;
use tokio::{
    runtime::{Builder, LocalOptions},
    sync::{Semaphore, mpsc, watch},
    time::Instant,
};
use tracing::{info, warn};

use crate::{
    acme,
    cli::Cli,
    client::Clock,
    feed,
    handover::{self, Giver},
    listen::{self, Place, Places},
    log::Log,
    page,
    served::{Registry, Serving},
    stats::Shards,
    tls,
    upstream::Connector,
    worker::{Phase, Shared},
};

mod end;
mod threads;

use end::{Stop, notify, until_the_end};

/// Serves until a signal ends it.
///
/// # Errors
/// No port to listen on, or a file of the command line that cannot be read.
pub fn run(cli: &Cli) -> Result<()> {
    // Before anything is opened.
    let activated = listen::activated().context("the sockets of systemd")?;
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build_local(LocalOptions::default())?;
    runtime.block_on(shim(cli, activated))
}

async fn shim(cli: &Cli, activated: listen::Activated) -> Result<()> {
    let workers = match cli.workers {
        Some(workers) => workers.into(),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    raise_descriptors();
    let mut state = feed::begin(cli)?;
    let mut stop = Stop::new()?;
    let first = tokio::select! {
        first = state.wait_for(Option::is_some) => first.context("nobody tells of routes")?.clone().unwrap_or_default(),
        () = stop.asked() => return Ok(()),
    };
    let taken = match &cli.handover {
        Some(path) => handover::take(path).with_context(|| path.display().to_string())?,
        None => None,
    };
    let (mut stock, old) = taken.map_or_else(Default::default, |taken| {
        let (places, old) = taken.into_parts();
        (places, Some(old))
    });
    stock.extend(activated.places(&first.settings));
    let handed_over = Arc::new(AtomicBool::new(false));
    let (senders, sockets): (Vec<_>, Vec<_>) = (0..workers).map(|_| mpsc::unbounded_channel()).unzip();
    let mut places = Places::new(senders, stock, &handed_over);
    let faults = places.set(&wanted(cli, &first.settings), first.settings.timeouts.client);
    if let (Some(fault), true) = (faults.into_iter().next(), places.is_empty()) {
        return Err(fault.into());
    }
    let mut registry = Registry::new(workers);
    let clock = Clock::new();
    let serving = registry.serving(&first, clock.coarse_ms());
    let mut maker = tls::Maker::new().with_acme(cli.acme_folder());
    let shared = Arc::new(Shared {
        tls: watch::Sender::new(Arc::new(maker.make(&first)?)),
        acme: acme::Board::default(),
        listening: watch::Sender::new(places.report()),
        places: Arc::new(Semaphore::new(first.settings.max_connections as usize)),
        serving: watch::Sender::new(Arc::new(serving)),
        phase: watch::Sender::new(Phase::Serving),
        clock,
        connector: Connector::new()?,
        log: Log::start()?,
        unrouted: Shards::new(workers),
        clients: Shards::new(workers),
        since: std::time::SystemTime::now(),
    });
    let threads = sockets.into_iter().enumerate();
    let threads: Vec<JoinHandle<()>> = threads
        .map(|(index, sockets)| threads::start(index, sockets, Arc::clone(&shared)))
        .collect::<Result<_>>()?;
    tell(&first);
    tokio::task::spawn_local(page::follow(state.clone(), Arc::clone(&shared)));
    tokio::task::spawn_local(tls::follow(maker, state.clone(), shared.tls.clone()));
    tokio::task::spawn_local(acme::follow(cli.acme_folder(), Arc::clone(&shared)));
    let states = state.clone();
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
            Giver::new(path, places.stock()).with_context(|| path.display().to_string())?,
        )),
    };
    let moving = tokio::task::spawn_local({
        let (cli, giver, shared) = (cli.clone(), giver.clone(), Arc::clone(&shared));
        let wanted = move |settings: &L7| wanted(&cli, settings);
        listen::follow(places, states, wanted, move |places| {
            shared.listening.send_replace(places.report());
            if let Some(giver) = &giver {
                giver.has(places.stock());
            }
        })
    });
    notify(&[NotifyState::Ready, NotifyState::MainPid(std::process::id())]);
    let taken_over = until_the_end(&mut stop, giver.clone()).await?;
    handed_over.store(taken_over, Relaxed);
    // With what is held of the sockets besides the workers, which would keep their places in the kernel.
    moving.abort();
    let _it_has_been_told_to_end = moving.await;
    if let (Some(giver), false) = (giver, taken_over) {
        giver.stop();
    }
    if !taken_over {
        notify(&[NotifyState::Stopping]);
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

/// Where to listen: the command line's word goes before that of the settings.
fn wanted(cli: &Cli, settings: &L7) -> Vec<Place> {
    if cli.http.is_empty() && cli.https.is_empty() {
        return listen::configured(settings);
    }
    let at = |tls| {
        move |address: &_| Place {
            address: *address,
            tls,
        }
    };
    let http = cli.http.iter().map(at(false));
    http.chain(cli.https.iter().map(at(true))).collect()
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
