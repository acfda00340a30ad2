//! Keeps a node's keys in etcd: one lease, renewed while this runs; what differs is written at once.
//!
//! A lease that was lost (etcd did not hear of us for its whole time, or was wiped) is replaced by a new one, under which
//! everything is written again. A publisher that starts finds the lease of the one before, if it is of the same boot, and goes
//! on with it: within the lease's time a restart writes nothing at all.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    net::{UdpSocket, lookup_host},
    sync::{Notify, mpsc},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    facts::{ABOUT, About, NODES},
    ledger::Ledger,
};
use crate::{
    config::{EtcdConfig, NodeConfig},
    etcd::{EtcdError, Lease, Rounds, Session, Snapshot},
    source::docker::Heard,
};

/// Renewals in the time of a lease: two may fail.
const RENEWALS: u32 = 3;
/// Our keys are read again so often, and mended if somebody else has changed them.
const READ_EVERY: Duration = Duration::from_secs(60);
/// How long the last words may take when we are told to stop.
const FAREWELL: Duration = Duration::from_secs(5);

/// Publishes one node.
#[derive(Debug)]
pub struct Publisher {
    etcd: EtcdConfig,
    node: NodeConfig,
    /// Boot of this machine.
    boot: String,
    shared: Arc<Shared>,
    /// The lease in use.
    lease: Option<i64>,
    /// What was said last of why it does not go on.
    complaint: Option<String>,
}

/// What the engine's side fills and etcd's side writes.
#[derive(Debug)]
struct Shared {
    ledger: Mutex<Ledger>,
    /// Why the engine is not heard.
    engine: Mutex<Option<String>>,
    changed: Notify,
}

/// Why publishing over one connection has ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    #[error(
        "another machine publishes as `{name}` (boot {boot}, addresses {addresses:?}): give one of them another `node.name`; \
         after a boot this ends with the lease of the boot before"
    )]
    Namesake {
        name: String,
        boot: String,
        addresses: Vec<IpAddr>,
    },
    #[error("the address that other nodes reach this one by is not known: {0}; set `node.addresses`")]
    Address(String),
    /// All keys are gone with it.
    #[error("the lease is gone: everything is published again")]
    LeaseGone,
    /// We were told to.
    #[error("stopped")]
    Stopped,
}

// === impl Publisher ===

impl Publisher {
    /// Of this node. `boot` names the boot of the machine.
    pub fn new(etcd: EtcdConfig, node: NodeConfig, boot: String) -> Self {
        let root = format!("{}/{NODES}{}/", etcd.prefix, node.name);
        Self {
            etcd,
            node,
            boot,
            shared: Arc::new(Shared {
                ledger: Mutex::new(Ledger::new(root)),
                engine: Mutex::default(),
                changed: Notify::new(),
            }),
            lease: None,
            complaint: None,
        }
    }

    /// Publishes what is heard of the engine until `stop`, or until nobody says anything any more. Then the keys are left to
    /// their lease, or withdrawn, as the configuration says.
    pub async fn run(mut self, mut facts: mpsc::Receiver<Heard>, stop: CancellationToken) {
        let shared = Arc::clone(&self.shared);
        let listen = async move {
            // The engine is heard on whatever etcd does: nothing of it may be missed meanwhile.
            while let Some(heard) = facts.recv().await {
                shared.hear(heard);
            }
        };
        let ended = CancellationToken::new();
        let listening = tokio::spawn({
            let ended = ended.clone();
            async move {
                ended.run_until_cancelled(listen).await;
            }
        });
        self.publish(&stop).await;
        ended.cancel();
        // It ends at once.
        let _ended = listening.await;
    }

    async fn publish(&mut self, stop: &CancellationToken) {
        let mut rounds = Rounds::new(&self.etcd);
        while let Some(endpoint) = rounds.endpoint() {
            let started = Instant::now();
            // A question to etcd may take its time; to stop must not. Within a session the end is a proper one.
            let Err(end) = self.session(&endpoint, stop).await;
            let wait = match end {
                End::Stopped => return,
                End::LeaseGone => {
                    self.complain(&End::LeaseGone.to_string());
                    self.lease = None;
                    Duration::ZERO
                }
                End::Etcd(fault) => {
                    let (told, wait) = rounds.ended(fault, started.elapsed());
                    self.complain(&told);
                    wait
                }
                other => {
                    self.complain(&other.to_string());
                    // Nothing that the next second would change.
                    Duration::from_secs(1).mul_f64(0.5 + fastrand::f64())
                }
            };
            if stop.run_until_cancelled(sleep(wait)).await.is_none() {
                return;
            }
        }
    }

    /// Once for each reason, not once for each try.
    fn complain(&mut self, reason: &str) {
        if self.complaint.as_deref() != Some(reason) {
            tracing::warn!(
                node = self.node.name,
                "{reason}; balancers keep this node for the time of its lease"
            );
            self.complaint = Some(reason.to_owned());
        }
    }

    /// One connection: takes the lease over or asks for one, and writes what differs, as long as it goes well.
    async fn session(
        &mut self,
        endpoint: &str,
        stop: &CancellationToken,
    ) -> Result<std::convert::Infallible, End> {
        let begun = stop.run_until_cancelled(self.begin(endpoint)).await;
        let (mut session, mut lease) = begun.ok_or(End::Stopped)??;
        if self.complaint.take().is_some() {
            tracing::info!(node = self.node.name, "etcd has it all again");
        }
        let pace = self.node.ttl / RENEWALS;
        let mut renew = Instant::now() + pace;
        // Soon: of two machines of one name that began at the same moment, the one that wrote last is found there.
        let mut read = Instant::now() + pace;
        loop {
            if Instant::now() >= renew {
                if !lease.renew().await? {
                    return Err(End::LeaseGone);
                }
                renew = Instant::now() + pace;
            }
            if stop.is_cancelled() {
                self.farewell(&mut session, &lease).await;
                return Err(End::Stopped);
            }
            self.describe();
            if self.step(&mut session, &lease).await? {
                continue;
            }
            tokio::select! {
                () = self.shared.changed.notified() => {}
                () = sleep_until(renew) => {}
                () = sleep_until(read) => {
                    let snapshot = self.read(&mut session).await?;
                    self.shared.ledger().read(snapshot.keys);
                    read = Instant::now() + READ_EVERY;
                }
                () = stop.cancelled() => {}
            }
        }
    }

    /// Connects, reads what is there, and sees to a lease.
    async fn begin(&mut self, endpoint: &str) -> Result<(Session, Lease), End> {
        if self.node.addresses.is_empty() {
            self.node.addresses = vec![local_address(endpoint).await?];
            tracing::info!(address = %self.node.addresses[0], "etcd is reached from this address: so is this node");
        }
        let mut session = Session::open(&self.etcd, endpoint).await?;
        let snapshot = self.read(&mut session).await?;
        // Ours, or that of the publisher before us.
        let about = format!("{}{ABOUT}", self.shared.ledger().root());
        let before = snapshot.keys.iter().find(|key| key.name == about);
        let candidate = self.lease.or_else(|| {
            let key = before.filter(|key| key.lease != 0)?;
            let known: About = serde_json::from_str(&key.text).ok()?;
            (known.ttl_s == self.node.ttl.as_secs()).then_some(key.lease)
        });
        let found = match candidate {
            Some(id) => session.lease(id).await?,
            None => None,
        };
        let lease = match found {
            Some(lease) => lease,
            None => session.grant(self.node.ttl).await?,
        };
        tracing::info!(
            endpoint,
            node = self.node.name,
            lease = lease.id(),
            "etcd is connected"
        );
        self.lease = Some(lease.id());
        self.shared.ledger().read(snapshot.keys);
        Ok((session, lease))
    }

    /// What the store has of this node, unless it is somebody else's.
    async fn read(&self, session: &mut Session) -> Result<Snapshot, End> {
        let root = self.shared.ledger().root().to_owned();
        let snapshot = session.snapshot(&root).await?;
        let about = format!("{root}{ABOUT}");
        let key = snapshot
            .keys
            .iter()
            .find(|key| key.name == about && key.lease != 0);
        let other = key.and_then(|key| serde_json::from_str::<About>(&key.text).ok());
        match other {
            Some(other) if other.boot != self.boot => Err(End::Namesake {
                name: self.node.name.clone(),
                boot: other.boot,
                addresses: other.addresses,
            }),
            _ => Ok(snapshot),
        }
    }

    fn describe(&self) {
        let fault = lock(&self.shared.engine).clone();
        self.shared.ledger().describe(&About {
            addresses: self.node.addresses.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            boot: self.boot.clone(),
            ttl_s: self.node.ttl.as_secs(),
            fault,
        });
    }

    /// Writes some of what differs; whether anything did.
    async fn step(&self, session: &mut Session, lease: &Lease) -> Result<bool, End> {
        let Some(step) = self.shared.ledger().next(lease.id()) else {
            return Ok(false);
        };
        if !session.write(lease, &step).await? {
            return Err(End::LeaseGone);
        }
        self.shared.ledger().done(step, lease.id());
        Ok(true)
    }

    /// Writes what is left to be written, and withdraws all of it if we shall.
    async fn farewell(&self, session: &mut Session, lease: &Lease) {
        let words = async {
            if self.node.withdraw {
                // Containers first, by themselves: balancers take that as said, not as the loss of a node.
                self.shared.ledger().withdraw();
            }
            while self.step(session, lease).await? {}
            if self.node.withdraw {
                session.revoke(lease).await?;
            }
            Ok::<_, End>(())
        };
        let fault = match tokio::time::timeout(FAREWELL, words).await {
            Ok(Ok(())) => return,
            Ok(Err(fault)) => fault.to_string(),
            Err(_) => format!("etcd does not answer within {FAREWELL:?}"),
        };
        tracing::warn!(
            "{fault}; what is published ends with its lease, within {:?}",
            self.node.ttl
        );
    }
}

// === impl Shared ===

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.ledger)
    }

    fn hear(&self, heard: Heard) {
        if let Heard::Freshness(freshness) = &heard {
            let fault = (!freshness.connected).then(|| freshness.fault.clone()).flatten();
            let mut known = lock(&self.engine);
            if *known == fault {
                return;
            }
            *known = fault;
        } else {
            self.ledger().hear(heard);
        }
        self.changed.notify_one();
    }
}

/// A holder that panicked left whole values: each change is one call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The address that packets to this endpoint leave from. None is sent.
async fn local_address(endpoint: &str) -> Result<IpAddr, End> {
    let fault = |error: std::io::Error| End::Address(format!("the way to {endpoint}: {error}"));
    let address = endpoint
        .split_once("://")
        .map_or(endpoint, |(_, address)| address);
    let to: SocketAddr = lookup_host(address)
        .await
        .map_err(fault)?
        .next()
        .ok_or_else(|| End::Address(format!("{endpoint} has no address")))?;
    let any: SocketAddr = match to {
        SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        SocketAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    let socket = UdpSocket::bind(any).await.map_err(fault)?;
    socket.connect(to).await.map_err(fault)?;
    let own = socket.local_addr().map_err(fault)?.ip();
    if own.is_loopback() {
        return Err(End::Address(format!("{endpoint} is on this machine")));
    }
    Ok(own)
}
