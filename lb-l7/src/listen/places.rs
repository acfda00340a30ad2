//! Where the process listens, as the settings say it now. Whatever changes, a place that goes on keeps its sockets, and one that
//! cannot be had takes nothing away.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use lb_route::{L7, State};
use socket2::Socket;
use tokio::{
    sync::{mpsc, watch},
    time::MissedTickBehavior,
};
use tracing::{debug, info, warn};

use super::{Gate, ListenError, Nascent, Open, Place};

/// How often it is tried again to listen at a place that could not be had.
const AGAIN_AFTER: Duration = Duration::from_secs(15);

/// All places at which this process listens.
#[derive(Debug)]
pub struct Places {
    workers: Vec<mpsc::UnboundedSender<Nascent>>,
    handed_over: Arc<AtomicBool>,
    held: Vec<Held>,
    /// Places that could not be had when it was last tried, and why.
    missing: Vec<(Place, String)>,
    silence: Duration,
}

/// A place as people and Prometheus are told of it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PlaceReport {
    /// Address and port.
    pub address: SocketAddr,
    /// TLS is spoken there.
    pub tls: bool,
    /// systemd holds the socket.
    pub by_systemd: bool,
    /// Why nobody listens there; absent if it is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

#[derive(Debug)]
struct Held {
    open: Open,
    gate: Arc<Gate>,
}

/// Follows the settings for ever; `changed` is told of each change.
pub async fn follow(
    mut places: Places,
    mut states: watch::Receiver<Option<State>>,
    wanted: impl Fn(&L7) -> Vec<Place>,
    mut changed: impl FnMut(&Places),
) {
    let mut again = tokio::time::interval(AGAIN_AFTER);
    again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = None;
    loop {
        let is_due = tokio::select! {
            state = states.changed() => match state {
                Ok(()) => false,
                // Nobody will tell of settings any more; those of now stand.
                Err(_) => return std::future::pending().await,
            },
            _ = again.tick(), if !places.missing.is_empty() => true,
        };
        let settings = &states
            .borrow_and_update()
            .as_ref()
            .map(|state| state.settings.clone());
        let Some(settings) = settings else { continue };
        let now = (wanted(settings), settings.timeouts.client);
        // Most news is of routes.
        if is_due || last.as_ref() != Some(&now) {
            places.set(&now.0, now.1);
            changed(&places);
            last = Some(now);
        }
    }
}

// === impl Places ===

impl Places {
    /// Those that somebody else has opened: systemd, or the process before. What is sent to the workers is listened to by
    /// them; `handed_over` says that another process has it too.
    pub fn new(
        workers: Vec<mpsc::UnboundedSender<Nascent>>,
        stock: Vec<Open>,
        handed_over: &Arc<AtomicBool>,
    ) -> Self {
        let mut places = Self {
            workers,
            handed_over: Arc::clone(handed_over),
            held: Vec::new(),
            missing: Vec::new(),
            silence: Duration::ZERO,
        };
        for open in stock {
            let by = if open.is_kept {
                "systemd"
            } else {
                "the shim before"
            };
            places.hold(open, by);
        }
        places
    }

    /// Listens at these places, and at no others but those that systemd keeps. Faults are told, and returned.
    ///
    /// While a place cannot be had, those that it may stand in for stay: the others of the same protocol.
    pub fn set(&mut self, wanted: &[Place], silence: Duration) -> Vec<ListenError> {
        self.silence = silence;
        let mut faults = Vec::new();
        let mut stays = vec![false; self.held.len()];
        for place in wanted {
            if let Some(at) = self.find(*place, &stays) {
                self.held[at].speak(*place);
                stays[at] = true;
                continue;
            }
            match Open::bind(*place, self.workers.len()) {
                Ok(open) => {
                    self.hold(open, "[l7]");
                    stays.push(true);
                }
                Err(fault) => faults.push(fault),
            }
        }
        for fault in &faults {
            if self.missing.iter().any(|(place, _)| *place == fault.place) {
                debug!("{fault}");
            } else {
                warn!("{fault}; the other places are served, and it is tried again");
            }
        }
        self.missing = faults
            .iter()
            .map(|fault| (fault.place, fault.to_string()))
            .collect();
        let mut stays = stays.into_iter();
        let missing = &self.missing;
        self.held.retain(|held| {
            let Open { place, is_kept, .. } = held.open;
            let stays = stays.next().unwrap_or(true) || is_kept;
            let stands_in = missing.iter().any(|(missing, _)| missing.tls == place.tls);
            if !stays && !stands_in {
                info!(address = %place.address, tls = place.tls, "closing");
                held.gate.give_up();
            }
            stays || stands_in
        });
        for held in &self.held {
            held.limit(silence);
        }
        faults
    }

    /// Which of those that are held is this place; `taken` are spoken for.
    fn find(&self, wanted: Place, taken: &[bool]) -> Option<usize> {
        let by = |is_it: &dyn Fn(&Open) -> bool| self.held.iter().position(|held| is_it(&held.open));
        by(&|open| open.asked == wanted || open.place == wanted)
            .or_else(|| by(&|open| open.covers(wanted.address)))
            // The same address with another protocol.
            .or_else(|| {
                let same = |at: usize| {
                    let address = self.held[at].open.place.address;
                    // Taken: the settings name the address twice, and the first one has it.
                    !taken.get(at).is_some_and(|taken| *taken) && address == wanted.address
                };
                (0..self.held.len()).find(|at| same(*at))
            })
    }

    fn hold(&mut self, open: Open, by: &'static str) {
        let Place { address, tls } = open.place;
        let gate = Gate::new(tls, open.is_kept, &self.handed_over);
        let held = Held { open, gate };
        if let Err(error) = held.share(&self.workers) {
            warn!(%address, "some workers do not listen: {error}; raise LimitNOFILE= of weir-l7.service");
        }
        held.limit(self.silence);
        info!(%address, tls, by, sockets = held.open.sockets.len(), workers = self.workers.len(), "serving");
        self.held.push(held);
    }

    /// Whether nothing is listened to.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Those that are served, and those that cannot be.
    pub fn report(&self) -> Vec<PlaceReport> {
        let served = self.held.iter().map(|held| PlaceReport {
            address: held.open.place.address,
            tls: held.open.place.tls,
            by_systemd: held.open.is_kept,
            fault: None,
        });
        let missing = self.missing.iter().map(|(place, fault)| PlaceReport {
            address: place.address,
            tls: place.tls,
            by_systemd: false,
            fault: Some(fault.clone()),
        });
        served.chain(missing).collect()
    }

    /// All of them, for another process.
    pub fn stock(&self) -> Vec<Open> {
        self.held.iter().map(|held| held.open.clone()).collect()
    }
}

// === impl Held ===

impl Held {
    /// Gives each worker a socket, the same one to several where there are fewer, and several to one where there are more.
    fn share(&self, workers: &[mpsc::UnboundedSender<Nascent>]) -> std::io::Result<()> {
        let sockets: &[Socket] = &self.open.sockets;
        for index in 0..workers.len().max(sockets.len()) {
            let nascent = Nascent {
                socket: sockets[index % sockets.len()].try_clone()?,
                gate: Arc::clone(&self.gate),
            };
            // A worker that has gone takes the process with it.
            let _ = workers[index % workers.len()].send(nascent);
        }
        Ok(())
    }

    /// Speaks what is wanted, unless systemd has said what.
    fn speak(&mut self, wanted: Place) {
        let Self { open, gate } = self;
        let Place { address, tls } = open.place;
        if tls == wanted.tls {
            return;
        }
        let protocol = |tls| if tls { "HTTPS" } else { "HTTP" };
        if open.is_kept {
            let (ours, theirs) = (protocol(wanted.tls), protocol(tls));
            warn!(%address, "[l7] wants {ours} there, but systemd's socket is for {theirs}, and is served so; change \
                 `FileDescriptorName=` of the socket unit, or the port");
            return;
        }
        info!(%address, tls = wanted.tls, "serving by another protocol");
        gate.speak(wanted.tls);
        open.place.tls = wanted.tls;
        open.asked.tls = wanted.tls;
    }

    fn limit(&self, silence: Duration) {
        if silence.is_zero() {
            return;
        }
        if let Err(error) = self.open.limit_silence(silence) {
            warn!(address = %self.open.place.address, "clients that are gone are noticed late: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const SILENCE: Duration = Duration::from_secs(60);

    /// No places yet, and what two workers get.
    fn places(stock: Vec<Open>) -> (Places, [mpsc::UnboundedReceiver<Nascent>; 2]) {
        let ((one, first), (two, second)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
        let places = Places::new(vec![one, two], stock, &Arc::default());
        (places, [first, second])
    }

    fn http(address: &str) -> Place {
        Place {
            address: address.parse().unwrap(),
            tls: false,
        }
    }

    fn https(address: &str) -> Place {
        Place {
            tls: true,
            ..http(address)
        }
    }

    fn at(address: SocketAddr, tls: bool) -> Place {
        Place { address, tls }
    }

    fn asked(places: &Places) -> Vec<Place> {
        places.held.iter().map(|held| held.open.asked).collect()
    }

    #[test]
    fn a_place_that_stays_keeps_its_sockets_and_one_that_goes_is_closed() {
        let (mut places, mut workers) = places(Vec::new());
        assert!(places.set(&[http("127.0.0.1:0")], SILENCE).is_empty());
        let first = places.stock().remove(0);
        assert!(
            places
                .set(&[http("127.0.0.2:0"), http("127.0.0.1:0")], SILENCE)
                .is_empty()
        );
        assert!(Arc::ptr_eq(&first.sockets, &places.stock()[0].sockets));
        drop(first);
        assert!(places.set(&[http("127.0.0.2:0")], SILENCE).is_empty());
        assert_eq!(asked(&places), [http("127.0.0.2:0")]);
        for worker in &mut workers {
            let (gone, stays) = (worker.try_recv().unwrap(), worker.try_recv().unwrap());
            assert!(gone.gate.is_given_up() && !stays.gate.is_given_up());
            assert!(worker.try_recv().is_err());
        }
        assert!(places.set(&[], SILENCE).is_empty() && places.is_empty());
    }

    #[test]
    fn a_place_that_cannot_be_had_leaves_those_it_may_stand_in_for() {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = at(other.local_addr().unwrap(), false);
        let (mut places, _workers) = places(Vec::new());
        let before = [http("127.0.0.2:0"), https("127.0.0.2:0")];
        assert!(places.set(&before, SILENCE).is_empty());
        let wanted = [taken, https("127.0.0.3:0")];
        let faults = places.set(&wanted, SILENCE);
        assert_eq!((faults.len(), faults[0].place), (1, taken));
        assert_eq!(asked(&places), [http("127.0.0.2:0"), https("127.0.0.3:0")]);
        let report = places.report();
        assert_eq!((report.len(), report[2].address), (3, taken.address));
        let fault = report[2].fault.as_deref().unwrap();
        assert!(fault.contains("another program"), "{fault}");
        drop(other);
        assert!(places.set(&wanted, SILENCE).is_empty());
        assert_eq!(asked(&places), [https("127.0.0.3:0"), taken]);
        assert!(places.missing.is_empty());
    }

    #[test]
    fn a_port_that_changes_its_protocol_keeps_its_sockets() {
        let (mut places, mut workers) = places(Vec::new());
        let both = [http("127.0.0.1:0"), https("127.0.0.2:0")];
        assert!(places.set(&both, SILENCE).is_empty());
        let before = places.stock();
        let (one, two) = (before[0].place.address, before[1].place.address);
        assert!(places.set(&[at(two, false), at(one, true)], SILENCE).is_empty());
        let now = places.stock();
        assert_eq!((now[0].place, now[1].place), (at(one, true), at(two, false)));
        assert!(
            before
                .iter()
                .zip(&now)
                .all(|(a, b)| Arc::ptr_eq(&a.sockets, &b.sockets))
        );
        let worker = &mut workers[0];
        let gates = [worker.try_recv().unwrap().gate, worker.try_recv().unwrap().gate];
        assert_eq!([gates[0].is_tls(), gates[1].is_tls()], [true, false]);
    }

    #[test]
    fn a_socket_of_systemd_is_shared_and_stands_for_its_port_whatever_the_settings_say() {
        let listener = TcpListener::bind("0.0.0.0:0").unwrap();
        let place = at(listener.local_addr().unwrap(), false);
        let port = place.address.port();
        let kept = Open {
            asked: place,
            place,
            is_kept: true,
            sockets: Arc::new(vec![Socket::from(listener)]),
        };
        let (mut places, mut workers) = places(vec![kept]);
        let covered = at(SocketAddr::new([127, 0, 0, 1].into(), port), false);
        let other = http("127.0.0.2:0");
        assert!(places.set(&[covered, other], SILENCE).is_empty());
        assert_eq!(asked(&places), [place, other]);
        for worker in &mut workers {
            let nascent = worker.try_recv().unwrap();
            assert_eq!(
                nascent.socket.local_addr().unwrap().as_socket(),
                Some(place.address)
            );
            assert!(nascent.gate.waits_for_a_successor() && nascent.gate.leaves_its_queue());
        }
        // Its name says what is spoken there.
        let tls = at(covered.address, true);
        assert!(places.set(&[tls], SILENCE).is_empty());
        assert_eq!(asked(&places), [place]);
        assert!(!places.held[0].gate.is_tls());
        assert!(places.set(&[], SILENCE).is_empty());
        assert_eq!(asked(&places), [place]);
    }

    #[test]
    fn several_sockets_of_one_place_all_have_a_worker() {
        let mut open = Open::bind(http("127.0.0.1:0"), 5).unwrap();
        open.is_kept = true;
        let (_places, mut workers) = places(vec![open]);
        let mut count = |worker: usize| std::iter::from_fn(|| workers[worker].try_recv().ok()).count();
        assert_eq!((count(0), count(1)), (3, 2));
    }
}
