//! Certificates are read anew when their files change.

use std::{path::PathBuf, sync::Arc, time::Duration};

use lb_route::State;
use notify::{RecursiveMode, Watcher as _};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use super::{Maker, Tls};

/// Files are written in pairs: time for the second one.
const SETTLE: Duration = Duration::from_millis(200);
/// Some file systems tell nothing.
const LOOK_EVERY: Duration = Duration::from_secs(600);

/// Publishes what TLS is served by, as states and files change.
pub async fn follow(
    mut maker: Maker,
    mut states: watch::Receiver<Option<State>>,
    to: watch::Sender<Arc<Tls>>,
) {
    let (changed, mut changes) = mpsc::channel(1);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading them is a change to nobody.
        if event.is_ok_and(|event| !event.kind.is_access()) {
            // One that waits says enough.
            let _ = changed.try_send(());
        }
    })
    .map_err(|error| warn!("changed certificates are noticed late: {error}"))
    .ok();
    let mut watched: Vec<PathBuf> = Vec::new();
    // What the process began with was read before anybody listened.
    let mut is_first = true;
    loop {
        let state = states.borrow_and_update().clone().unwrap_or_default();
        // Files are replaced, folders stay: those are watched.
        let folders: Vec<PathBuf> = maker
            .sources(&state)
            .into_iter()
            .filter_map(|path| {
                if path.is_dir() {
                    Some(path)
                } else {
                    path.parent().map(PathBuf::from)
                }
            })
            .collect();
        if let Some(watcher) = &mut watcher
            && folders != watched
        {
            for gone in watched.iter().filter(|folder| !folders.contains(folder)) {
                let _ = watcher.unwatch(gone);
            }
            for new in folders.iter().filter(|folder| !watched.contains(folder)) {
                if let Err(error) = watcher.watch(new, RecursiveMode::NonRecursive) {
                    warn!("changes in {} are noticed late: {error}", new.display());
                }
            }
            watched = folders;
        }
        match maker.make(&state) {
            Ok(tls) => {
                // Other files in those folders change too, such as this very log.
                if tls.is_news || is_first {
                    for fault in &tls.faults {
                        warn!("{fault}");
                    }
                    info!(faults = tls.faults.len(), "certificates");
                }
                is_first = false;
                to.send_replace(Arc::new(tls));
            }
            Err(error) => warn!("TLS is served as before: {error}"),
        }
        // Only what names certificates is a reason to read them.
        let named = |state: &State| {
            let of = |route: &lb_route::Route| {
                (route.address(), route.aliases.clone(), route.settings.tls.clone())
            };
            let routes: Vec<_> = state.served().map(of).collect();
            let settings = &state.settings;
            (
                maker.sources(state),
                settings.min_tls,
                settings.acme.clone(),
                routes,
            )
        };
        let known = named(&state);
        loop {
            tokio::select! {
                told = states.changed() => {
                    if told.is_err() {
                        return;
                    }
                    let differs = states.borrow_and_update().as_ref().is_some_and(|s| named(s) != known);
                    if differs {
                        break;
                    }
                }
                Some(()) = changes.recv() => {
                    tokio::time::sleep(SETTLE).await;
                    while changes.try_recv().is_ok() {}
                    break;
                }
                () = tokio::time::sleep(LOOK_EVERY) => break,
            }
        }
    }
}
