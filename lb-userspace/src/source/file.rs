//! The file source: follows the configuration file, publishes it, and says what its services wish.
//!
//! A file with faults changes nothing: the last good one stays in force and every fault is reported.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Freshness, Message, Object, SourceId, Update};
use crate::{
    config::{Config, ConfigErrors, Shared},
    model::Rejection,
};

/// Name of this source.
pub const SOURCE: &str = "file";
/// Object that carries the faults of the file as a whole. No service name has a slash.
const FILE_OBJECT: &str = "file/faults";
/// Editors write, sync and rename within this time: half a file is not read.
const SETTLE: Duration = Duration::from_millis(100);
/// The file is looked at this often even if nobody says that it changed: network file systems say nothing.
const RECHECK: Duration = Duration::from_secs(10);

/// Starts the source with what was loaded at start and is on `publish`; later versions are sent there, joined with what
/// the nodes share. It looks at the file when the file changes, or when `look` is notified. Ends with `stop`, or when the
/// inbox is gone.
pub fn spawn(
    publish: watch::Sender<Arc<Config>>,
    shared: watch::Receiver<Arc<Shared>>,
    inbox: mpsc::Sender<Message>,
    look: Arc<Notify>,
    stop: CancellationToken,
) -> JoinHandle<()> {
    let path = publish.borrow().path.clone();
    tokio::spawn(async move {
        let follower = Follower {
            path,
            publish,
            shared,
            inbox,
        };
        stop.run_until_cancelled(follower.run(look)).await;
    })
}

struct Follower {
    path: PathBuf,
    publish: watch::Sender<Arc<Config>>,
    shared: watch::Receiver<Arc<Shared>>,
    inbox: mpsc::Sender<Message>,
}

/// Nobody listens any more.
struct InboxGone;

impl Follower {
    async fn run(mut self, changed: Arc<Notify>) {
        // The watch is set before the file is read again below: no change falls between.
        let mut watcher = self.watch(&changed);
        let mut last: Option<(Result<String, String>, Arc<Shared>)> = None;
        loop {
            let text = fs::read_to_string(&self.path).map_err(|error| error.to_string());
            let now = (text, self.shared.borrow_and_update().clone());
            if last.as_ref() != Some(&now) {
                if self.reload(now.0.as_deref().ok(), &now.1).await.is_err() {
                    return;
                }
                last = Some(now);
                // A link may lead elsewhere now.
                watcher = self.watch(&changed).or(watcher);
            }
            tokio::select! {
                notice = timeout(RECHECK, changed.notified()) => if notice.is_ok() {
                    sleep(SETTLE).await;
                },
                // Without anybody who shares there is nothing to wait for.
                Ok(()) = self.shared.changed() => {}
            }
        }
    }

    /// Watches the folders of the file and of what it links to: an editor renames a new file over the old one, and a
    /// mounted config is a link that is switched.
    fn watch(&self, changed: &Arc<Notify>) -> Option<RecommendedWatcher> {
        let changed = changed.clone();
        let notice = move |event: notify::Result<notify::Event>| {
            // Reading is an event, too, and we read.
            let read = event.is_ok_and(|event| {
                matches!(event.kind, EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write))
            });
            if !read {
                changed.notify_one();
            }
        };
        let watch = || {
            let mut watcher = notify::recommended_watcher(notice)?;
            for folder in folders(&self.path) {
                watcher.watch(&folder, RecursiveMode::NonRecursive)?;
            }
            Ok::<_, notify::Error>(watcher)
        };
        watch()
            .map_err(|error| {
                let every = RECHECK.as_secs();
                tracing::warn!(path = %self.path.display(), %error, "cannot be watched; read every {every} s instead");
            })
            .ok()
    }

    /// Takes over a text, or keeps the last good one and says why.
    async fn reload(&self, text: Option<&str>, shared: &Arc<Shared>) -> Result<(), InboxGone> {
        let parsed = match text {
            Some(text) => Config::parse(&self.path, text),
            // Reads again for the reason alone.
            None => Config::load(&self.path),
        };
        match parsed.and_then(|config| config.with_shared(shared)) {
            Ok(config) => {
                let objects = objects(&config);
                self.publish(config);
                self.tell(objects, None).await
            }
            Err(errors) => {
                tracing::error!(%errors, "the last good configuration stays in force");
                let good = self.publish.borrow().clone();
                if let Ok(joined) = good.with_shared(shared) {
                    self.publish(joined);
                }
                let mut objects = objects(&good);
                objects.push(faults(&errors));
                let count = errors.faults.len();
                let fault =
                    format!("{count} fault(s) in the file; the last good configuration stays in force");
                self.tell(objects, Some(fault)).await
            }
        }
    }

    /// Makes a configuration that of the agent, if it is another one.
    fn publish(&self, config: Config) {
        let old = self.publish.borrow().clone();
        if *old == config {
            return;
        }
        for section in config.needs_restart(&old) {
            tracing::warn!(section, "changed: takes effect when the agent is restarted");
        }
        tracing::info!(path = %self.path.display(), "configuration reloaded");
        self.publish.send_replace(Arc::new(config));
    }

    async fn tell(&self, objects: Vec<Object>, fault: Option<String>) -> Result<(), InboxGone> {
        let now = Some(SystemTime::now());
        let freshness = Freshness {
            connected: true,
            last_heard: now,
            last_full_read: now,
            fault,
            via: None,
        };
        for update in [Update::Reset(objects), Update::Freshness(freshness)] {
            let message = Message {
                source: SourceId(SOURCE.into()),
                update,
            };
            self.inbox.send(message).await.map_err(|_| InboxGone)?;
        }
        Ok(())
    }
}

/// The folder of the file, and that of what it links to.
fn folders(path: &Path) -> Vec<PathBuf> {
    let of = |path: &Path| match path.parent() {
        Some(folder) if folder.as_os_str().is_empty() => PathBuf::from("."),
        Some(folder) => folder.to_owned(),
        None => PathBuf::from("/"),
    };
    let mut found = vec![of(path)];
    found.extend(fs::canonicalize(path).ok().map(|target| of(&target)));
    found.dedup();
    found
}

/// The services of the file. They are older than any container: their settings win.
pub fn objects(config: &Config) -> Vec<Object> {
    config
        .services
        .iter()
        .map(|service| Object {
            id: service.name.clone(),
            name: service.name.clone(),
            created: SystemTime::UNIX_EPOCH,
            services: service.wishes.clone(),
            routes: Vec::new(),
            rejections: Vec::new(),
        })
        .collect()
}

/// Every fault of the file as an object that wishes nothing.
fn faults(errors: &ConfigErrors) -> Object {
    let path = errors.path.display();
    Object {
        id: FILE_OBJECT.into(),
        name: path.to_string(),
        created: SystemTime::UNIX_EPOCH,
        services: Vec::new(),
        routes: Vec::new(),
        rejections: errors
            .faults
            .iter()
            .map(|fault| {
                let place = fault.position.map(|(line, column)| format!(":{line}:{column}"));
                Rejection {
                    source: SOURCE.into(),
                    object: format!("{path}{}: {}", place.unwrap_or_default(), fault.key),
                    fault: fault.fault.clone(),
                    remedy: fault.remedy.clone(),
                }
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str =
        "interfaces = [\"lo\"]\n[vips.web]\naddress = \"192.0.2.1\"\n[docker]\nenabled = false\n";

    fn with_service(name: &str) -> String {
        format!("{GOOD}\n[[services]]\nname = \"{name}\"\nlisten = [\"80/tcp\"]\n")
    }

    struct Rig {
        folder: tempfile::TempDir,
        inbox: mpsc::Receiver<Message>,
        config: watch::Receiver<Arc<Config>>,
        shared: watch::Sender<Arc<Shared>>,
        look: Arc<Notify>,
        stop: CancellationToken,
        task: JoinHandle<()>,
    }

    impl Rig {
        fn new(prepare: impl FnOnce(&Path) -> PathBuf) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = prepare(folder.path());
            let (publish, config) = watch::channel(Arc::new(Config::load(&path).unwrap()));
            let (sender, inbox) = mpsc::channel(64);
            let stop = CancellationToken::new();
            let look = Arc::new(Notify::new());
            let (shared, receiver) = watch::channel(Arc::default());
            let task = spawn(publish, receiver, sender, look.clone(), stop.clone());
            Self {
                folder,
                shared,
                inbox,
                config,
                look,
                stop,
                task,
            }
        }

        /// The first list for which the condition holds, and the freshness told with it.
        async fn until(&mut self, condition: impl Fn(&[Object]) -> bool) -> (Vec<Object>, Freshness) {
            let wait = async {
                loop {
                    let Update::Reset(objects) = self.inbox.recv().await.unwrap().update else {
                        continue;
                    };
                    let Update::Freshness(freshness) = self.inbox.recv().await.unwrap().update else {
                        panic!("a list without freshness");
                    };
                    if condition(&objects) {
                        return (objects, freshness);
                    }
                }
            };
            timeout(Duration::from_secs(30), wait)
                .await
                .expect("the source says so")
        }

        async fn end(self) {
            self.stop.cancel();
            self.task.await.unwrap();
        }
    }

    fn named(name: &'static str) -> impl Fn(&[Object]) -> bool {
        move |objects| objects.len() == 1 && objects[0].id == name && objects[0].rejections.is_empty()
    }

    #[tokio::test]
    async fn a_bad_file_keeps_the_last_good_one_and_names_every_fault() {
        let mut rig = Rig::new(|folder| {
            let path = folder.join("weir.toml");
            fs::write(&path, with_service("one")).unwrap();
            path
        });
        let path = rig.folder.path().join("weir.toml");
        rig.until(named("one")).await;

        fs::write(
            &path,
            format!("{}\naffinity = 5\nwieght = 1\n", with_service("two")),
        )
        .unwrap();
        let (objects, freshness) = rig.until(|objects| objects.len() == 2).await;
        assert_eq!(objects[0].id, "one");
        assert_eq!(objects[1].rejections.len(), 2, "{:?}", objects[1].rejections);
        assert!(
            objects[1].rejections[0].object.contains("weir.toml:11:12"),
            "{:?}",
            objects[1].rejections
        );
        assert!(freshness.fault.unwrap().contains("2 fault"));
        assert_eq!(rig.config.borrow().services[0].name, "one");

        // An editor: a new file renamed over the old one.
        let new = rig.folder.path().join(".weir.toml.new");
        fs::write(&new, with_service("three")).unwrap();
        fs::rename(&new, &path).unwrap();
        let (_, freshness) = rig.until(named("three")).await;
        assert_eq!(freshness.fault, None);
        assert_eq!(rig.config.borrow().services[0].name, "three");

        // Gone is a fault, not an empty configuration.
        fs::remove_file(&path).unwrap();
        let (objects, freshness) = rig.until(|objects| objects.len() == 2).await;
        assert_eq!(objects[0].id, "three");
        assert!(freshness.fault.is_some());
        rig.end().await;
    }

    #[tokio::test]
    async fn what_nodes_share_is_joined_with_the_file_whatever_the_file_does() {
        let mut rig = Rig::new(|folder| {
            let path = folder.join("weir.toml");
            fs::write(&path, with_service("one")).unwrap();
            path
        });
        rig.until(named("one")).await;
        let share = |rig: &Rig, address: &str| {
            let text = format!("[vips.shared]\naddress = \"{address}\"\n");
            let shared = Shared::parse("/weir/config", &text, &rig.config.borrow()).unwrap();
            rig.shared.send_replace(Arc::new(shared));
        };
        let known = |rig: &Rig, address: &str| rig.config.borrow().policy.vip(address).is_some();
        share(&rig, "192.0.2.2");
        rig.until(|_| true).await;
        assert!(known(&rig, "192.0.2.2") && known(&rig, "192.0.2.1"));

        fs::write(rig.folder.path().join("weir.toml"), "wrong").unwrap();
        rig.until(|objects| objects.len() == 2).await;
        share(&rig, "192.0.2.3");
        rig.config
            .wait_for(|config| config.policy.vip("192.0.2.3").is_some())
            .await
            .unwrap();
        assert!(!known(&rig, "192.0.2.2") && known(&rig, "192.0.2.1"));
        rig.end().await;
    }

    #[tokio::test]
    async fn a_switched_link_is_followed() {
        let mut rig = Rig::new(|folder| {
            for (version, name) in [("v1", "one"), ("v2", "two")] {
                fs::create_dir(folder.join(version)).unwrap();
                fs::write(folder.join(version).join("weir.toml"), with_service(name)).unwrap();
            }
            std::os::unix::fs::symlink("v1/weir.toml", folder.join("weir.toml")).unwrap();
            folder.join("weir.toml")
        });
        rig.until(named("one")).await;
        let link = rig.folder.path().join("new");
        std::os::unix::fs::symlink("v2/weir.toml", &link).unwrap();
        fs::rename(&link, rig.folder.path().join("weir.toml")).unwrap();
        rig.until(named("two")).await;
        // And what it leads to is watched now.
        fs::write(rig.folder.path().join("v2/weir.toml"), with_service("three")).unwrap();
        rig.until(named("three")).await;
        rig.end().await;
    }

    /// SIGHUP: where changes are not told, the operator tells.
    #[tokio::test(start_paused = true)]
    async fn the_file_is_looked_at_when_asked_for() {
        let mut rig = Rig::new(|folder| {
            let path = folder.join("weir.toml");
            fs::write(&path, with_service("one")).unwrap();
            fs::create_dir(folder.join("elsewhere")).unwrap();
            fs::hard_link(&path, folder.join("elsewhere/weir.toml")).unwrap();
            path
        });
        rig.until(named("one")).await;
        // A write by another name of the file is not seen in the folder that is watched.
        let other = rig.folder.path().join("elsewhere/weir.toml");
        fs::write(other, with_service("two")).unwrap();
        let asked = tokio::time::Instant::now();
        rig.look.notify_one();
        rig.until(named("two")).await;
        assert!(asked.elapsed() < RECHECK, "{:?}", asked.elapsed());
        rig.end().await;
    }
}
