//! Orders what is wanted, when it is due: a task of its own, which no request waits for.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{
    future::{FutureExt as _, LocalBoxFuture},
    stream::{FuturesUnordered, StreamExt as _},
};
use instant_acme::Account;
use lb_route::Acme;
use tokio::time::Instant;
use tracing::{info, warn};

use super::{
    Folder, Validity, Wanted,
    account::{self, AccountError},
    client,
    folder::Lock,
    order::{OrderError, order},
    schedule::Pause,
};
use crate::worker::{Phase, Shared};

/// Orders under way at a time: authorities do not like crowds, and one that hangs does not stop the others.
const AT_ONCE: usize = 4;
/// How often it is looked whether something is due, whatever the clock has done meanwhile.
const LOOK_EVERY: Duration = Duration::from_secs(3600);
/// How often it is looked whether the one who orders has gone.
const LOCK_EVERY: Duration = Duration::from_secs(2);

/// What has become of an order.
struct Outcome {
    host: String,
    result: Result<Validity, OrderError>,
    later: Option<SystemTime>,
}

/// Who orders.
struct Orders {
    folder: Folder,
    shared: Arc<Shared>,
    settings: Option<Acme>,
    lock: Option<Lock>,
    account: Option<Account>,
    /// The authority does not know the account any more.
    is_forgotten: bool,
    /// What concerns every host.
    trouble: Option<Pause>,
    again: BTreeMap<String, Pause>,
    under_way: FuturesUnordered<LocalBoxFuture<'static, Outcome>>,
    busy: BTreeSet<String>,
    /// Hosts of which it was said that they get none.
    told: BTreeSet<String>,
    told_of_another: bool,
}

/// Orders and renews until the process drains: the next one goes on then. Without a folder nothing is ordered.
pub async fn follow(folder: Option<Folder>, shared: Arc<Shared>) {
    let mut phase = shared.phase.subscribe();
    let orders = async {
        match folder {
            Some(folder) => Orders::new(folder, Arc::clone(&shared)).run().await,
            None => complain(&shared).await,
        }
    };
    tokio::select! {
        () = orders => {}
        _ = phase.wait_for(|phase| matches!(phase, Phase::Draining(_))) => {}
    }
}

/// Says once that nothing can be ordered.
async fn complain(shared: &Shared) {
    let mut tls = shared.tls.subscribe();
    if tls.wait_for(|tls| tls.acme.settings.is_some()).await.is_ok() {
        warn!("no certificates are ordered: there is no folder for them; start the shim with --acme FOLDER");
    }
}

// === impl Orders ===

impl Orders {
    fn new(folder: Folder, shared: Arc<Shared>) -> Self {
        Self {
            folder,
            shared,
            settings: None,
            lock: None,
            account: None,
            is_forgotten: false,
            trouble: None,
            again: BTreeMap::new(),
            under_way: FuturesUnordered::new(),
            busy: BTreeSet::new(),
            told: BTreeSet::new(),
            told_of_another: false,
        }
    }

    async fn run(mut self) {
        let mut tls = self.shared.tls.subscribe();
        loop {
            let wanted = Arc::clone(&tls.borrow_and_update().acme);
            let wait = self.turn(&wanted).await;
            tokio::select! {
                changed = tls.changed() => if changed.is_err() { return },
                Some(outcome) = self.under_way.next() => self.done(outcome),
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Begins everything that is due; how long nothing else will be.
    async fn turn(&mut self, wanted: &Wanted) -> Duration {
        if wanted.settings != self.settings {
            self.begin_anew(wanted.settings.clone());
        }
        let Some(settings) = wanted.settings.clone() else {
            return LOOK_EVERY;
        };
        self.shared.acme.keep(&wanted.hosts);
        let now = Instant::now();
        // A host that comes and goes does not get around its pause.
        self.again
            .retain(|host, pause| wanted.hosts.contains(host) || !pause.left(now).is_zero());
        self.told.retain(|host| wanted.unprovable.contains(host));
        for host in &wanted.unprovable {
            if self.told.insert(host.clone()) {
                warn!(
                    "no certificate of {host} is ordered: HTTP-01 does not prove wildcards; put one into `certificates` of [l7]"
                );
            }
        }
        if wanted.hosts.is_empty() {
            return LOOK_EVERY;
        }
        if let Some(pause) = self.trouble.filter(|pause| !pause.left(now).is_zero()) {
            return pause.left(now);
        }
        let (account, later) = client::heard(self.account(&settings)).await;
        let account = match account {
            Ok(Some(account)) => account,
            Ok(None) => return LOCK_EVERY,
            Err(error) => {
                let later = later.and_then(|at| at.duration_since(SystemTime::now()).ok());
                let pause = Pause::failed(self.trouble, Instant::now(), settings.retry, later);
                let left = pause.left(Instant::now());
                warn!("no certificates are ordered: {error}; trying again in {left:.0?}");
                self.shared.acme.failed("", error.to_string());
                self.trouble = Some(pause);
                return left;
            }
        };
        self.begin_due(wanted, &settings, &account)
    }

    /// Forgets what the settings before have come to.
    fn begin_anew(&mut self, settings: Option<Acme>) {
        self.settings = settings;
        self.account = None;
        self.trouble = None;
        self.again.clear();
        self.under_way.clear();
        self.busy.clear();
        if self.settings.is_none() {
            self.lock = None;
            self.shared.acme.tell_thumbprint(None);
            self.shared.acme.keep(&BTreeSet::new());
        }
    }

    /// The account, if it is us who order. What it has to be answered with is told in any case.
    async fn account(&mut self, settings: &Acme) -> Result<Option<Account>, AccountError> {
        if !settings.agree_terms {
            return Err(AccountError::Terms);
        }
        self.folder.create()?;
        if self.lock.is_none() {
            self.lock = self.folder.lock()?;
            if self.lock.is_none() {
                self.shared
                    .acme
                    .tell_thumbprint(account::thumbprint(&self.folder)?);
                if !std::mem::replace(&mut self.told_of_another, true) {
                    info!("certificates are ordered by another process");
                }
                self.went_well();
                return Ok(None);
            }
            info!(folder = %self.folder.path().display(), "certificates are ordered by this process");
        }
        if let Some(account) = &self.account {
            return Ok(Some(account.clone()));
        }
        // Another node may be waiting for our answer while the authority cannot be reached from here.
        self.shared
            .acme
            .tell_thumbprint(account::thumbprint(&self.folder)?);
        let account = if self.is_forgotten {
            account::again_at_authority(&self.folder, settings).await?
        } else {
            account::open(&self.folder, settings).await?
        };
        self.is_forgotten = false;
        self.shared
            .acme
            .tell_thumbprint(Some(account.key_thumbprint().into()));
        self.went_well();
        self.account = Some(account.clone());
        Ok(Some(account))
    }

    fn went_well(&mut self) {
        self.trouble = None;
        self.shared.acme.well("");
    }

    fn begin_due(&mut self, wanted: &Wanted, settings: &Acme, account: &Account) -> Duration {
        let (now, mut next) = (Instant::now(), LOOK_EVERY);
        for host in wanted.hosts.iter() {
            if self.busy.contains(host) {
                continue;
            }
            let pause = self.again.get(host).map_or(Duration::ZERO, |p| p.left(now));
            let left = pause.max(self.left(host, settings));
            if !left.is_zero() {
                next = next.min(left);
            } else if self.busy.len() < AT_ONCE {
                self.begin(host.clone(), settings, account.clone());
            }
            // One that finds no place begins when another one is done.
        }
        next
    }

    /// How long the certificate of a host is good enough.
    fn left(&self, host: &str, settings: &Acme) -> Duration {
        let Some(issued) = self.folder.issued(host) else {
            return Duration::ZERO;
        };
        if issued.directory != settings.directory {
            return Duration::ZERO;
        }
        let due = issued.validity.renew_at(settings.renew_before);
        due.duration_since(SystemTime::now()).unwrap_or_default()
    }

    fn begin(&mut self, host: String, settings: &Acme, account: Account) {
        info!(host, directory = settings.directory, "ordering a certificate");
        self.busy.insert(host.clone());
        let (folder, directory) = (self.folder.clone(), settings.directory.clone());
        let work = async move {
            let (result, later) = client::heard(order(&account, &folder, &host, &directory)).await;
            Outcome { host, result, later }
        };
        self.under_way.push(work.boxed_local());
    }

    fn done(&mut self, outcome: Outcome) {
        let Outcome { host, result, later } = outcome;
        self.busy.remove(&host);
        let first = self.settings.as_ref().map_or(Duration::ZERO, |s| s.retry);
        let now = Instant::now();
        let pause = match result {
            Ok(validity) => {
                let until = jiff::Timestamp::try_from(validity.until).unwrap_or_default();
                info!(host, %until, "a certificate has come");
                self.shared.acme.well(&host);
                Pause::done(now, first)
            }
            Err(error) => {
                let before = self.again.get(&host).copied();
                let later = later.and_then(|at| at.duration_since(SystemTime::now()).ok());
                let pause = Pause::failed(before, now, first, later);
                let (left, remedy) = (pause.left(now), error.remedy());
                warn!("no certificate of {host}: {error}; {remedy}; trying again in {left:.0?}");
                self.shared.acme.failed(&host, error.to_string());
                if error.is_of_account() {
                    self.account = None;
                    self.is_forgotten = true;
                }
                pause
            }
        };
        self.again.insert(host, pause);
    }
}
