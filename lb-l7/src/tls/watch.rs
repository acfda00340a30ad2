//! Certificates are read anew when their files change.

use std::{path::PathBuf, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use lb_route::State;
use tokio::sync::watch;
use tracing::{info, warn};

use super::{Maker, Tls, folders::Folders};

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
    let mut folders = Folders::new()
        .map_err(|error| warn!("changed certificates are noticed late: {error}"))
        .ok();
    // What the process began with was read before anybody listened.
    let mut is_first = true;
    loop {
        let state = states.borrow_and_update().clone().unwrap_or_default();
        if let Some(folders) = &mut folders {
            // Files are replaced, folders stay: those are watched.
            let folder = |path: PathBuf| match path.is_dir() {
                true => Some(path),
                false => path.parent().map(PathBuf::from),
            };
            folders.watch(maker.sources(&state).into_iter().filter_map(folder).collect());
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
                () = changed(&mut folders) => {
                    tokio::time::sleep(SETTLE).await;
                    // What has come meanwhile is read with it.
                    while changed(&mut folders).now_or_never().is_some() {}
                    break;
                }
                () = tokio::time::sleep(LOOK_EVERY) => break,
            }
        }
    }
}

/// Ready when something has changed in one of the folders.
async fn changed(folders: &mut Option<Folders>) {
    match folders {
        Some(folders) => drop(folders.changed().await),
        None => std::future::pending().await,
    }
}
