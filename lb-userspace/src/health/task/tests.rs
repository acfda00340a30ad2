//! The task on paused time, with probes that take as long as they are told.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use tokio::task::JoinHandle;

use super::*;
use crate::{
    health::Before,
    model::{Check, CheckKind, Protocol, ServiceAddress},
};

/// A network whose backends are told what to answer.
#[derive(Clone, Default)]
struct Lab(Arc<State>);

#[derive(Default)]
struct State {
    /// Backends with this bit in their last octet never answer.
    silent: AtomicUsize,
    ill: AtomicBool,
    /// This node cannot make its checks.
    broken: AtomicBool,
    running: AtomicUsize,
    most: AtomicUsize,
    starts: Mutex<Vec<(Instant, SocketAddr)>>,
}

impl Probe for Lab {
    async fn probe(&self, backend: SocketAddr, check: Arc<Check>) -> Outcome {
        let state = &self.0;
        state.starts.lock().unwrap().push((Instant::now(), backend));
        let running = state.running.fetch_add(1, Ordering::Relaxed) + 1;
        state.most.fetch_max(running, Ordering::Relaxed);
        let last = match backend.ip() {
            IpAddr::V4(v4) => usize::from(v4.octets()[3]),
            IpAddr::V6(_) => 0,
        };
        let silent = last & state.silent.load(Ordering::Relaxed) != 0;
        let took = if silent {
            check.timing.timeout
        } else {
            Duration::from_millis(20)
        };
        tokio::time::sleep(took).await;
        state.running.fetch_sub(1, Ordering::Relaxed);
        if state.broken.load(Ordering::Relaxed) {
            return Outcome::Impossible("no CA".into());
        }
        match silent || state.ill.load(Ordering::Relaxed) {
            true => Outcome::Failed("bad".into()),
            false => Outcome::Passed("good".into()),
        }
    }
}

struct Rig {
    lab: Lab,
    targets: watch::Sender<Targets>,
    inbox: mpsc::Receiver<Message>,
    report: watch::Receiver<Report>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Rig {
    fn new(targets: Targets) -> Self {
        let lab = Lab::default();
        let (targets_to, targets) = watch::channel(targets);
        let (inbox_to, inbox) = mpsc::channel(16_384);
        let (report_to, report) = watch::channel(Report::default());
        let stop = CancellationToken::new();
        let task = tokio::spawn(run(lab.clone(), targets, inbox_to, report_to, stop.clone()));
        Self {
            lab,
            targets: targets_to,
            inbox,
            report,
            stop,
            task,
        }
    }

    /// The next verdict, and how long it took.
    async fn verdict(&mut self) -> (Verdict, Duration) {
        let began = Instant::now();
        let Update::Verdicts(mut all) = self.inbox.recv().await.unwrap().update else {
            panic!("nothing but verdicts come from here");
        };
        assert_eq!(all.len(), 1, "{all:?}");
        (all.remove(0), began.elapsed())
    }

    async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

fn key(i: u32) -> Key {
    Key {
        service: Some(ServiceAddress {
            vip: IpAddr::from([192, 0, 2, 1]),
            port: 80,
            protocol: Protocol::Tcp,
        }),
        backend: (IpAddr::from((0x0a00_0000 + i).to_be_bytes()), 80).into(),
    }
}

fn target(before: Before, change: impl FnOnce(&mut Check)) -> Target {
    let mut check = Check::of(vec![CheckKind::Tcp]);
    change(&mut check);
    Target {
        generation: 1,
        check: Arc::new(check),
        before,
    }
}

fn targets(count: u32, target: &Target) -> Targets {
    Targets {
        active: (0..count).map(|i| (key(i), target.clone())).collect(),
        ..Targets::default()
    }
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_backends_make_no_bursts() {
    let mut rig = Rig::new(targets(10_000, &target(Before::Served, |_| {})));
    tokio::time::sleep(Duration::from_secs(30)).await;
    let began = Instant::now() - Duration::from_secs(30);
    let starts = std::mem::take(&mut *rig.lab.0.starts.lock().unwrap());
    // Every 5 s, a tenth more or less: 2,000 a second from the first second on.
    let mut seconds = [0usize; 30];
    let mut by_backend: HashMap<SocketAddr, usize> = HashMap::new();
    for (at, backend) in starts {
        seconds[(at - began).as_secs().min(29) as usize] += 1;
        *by_backend.entry(backend).or_default() += 1;
    }
    assert!(seconds.iter().all(|n| (1_700..2_400).contains(n)), "{seconds:?}");
    assert_eq!(by_backend.len(), 10_000);
    assert!(by_backend.values().all(|n| (5..=7).contains(n)));
    // 2,000 a second of 20 ms each are 40 at once.
    let most = rig.lab.0.most.load(Ordering::Relaxed);
    assert!(most < 100, "{most} at once");
    assert_eq!(rig.report.borrow().targets, 10_000);
    rig.inbox.close();
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn silent_backends_take_no_more_than_their_room() {
    let mut rig = Rig::new(targets(10_000, &target(Before::Served, |_| {})));
    // A half of them: 10,000 checks in flight if nothing bounded them.
    rig.lab.0.silent.store(1, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(rig.lab.0.most.load(Ordering::Relaxed), AT_ONCE);
    // The others are checked all the same, and nobody is forgotten.
    let began = Instant::now() - Duration::from_secs(60);
    let starts = std::mem::take(&mut *rig.lab.0.starts.lock().unwrap());
    let late: BTreeSet<SocketAddr> = starts
        .iter()
        .filter(|(at, _)| *at > began)
        .map(|(_, backend)| *backend)
        .collect();
    assert_eq!(late.len(), 10_000);
    let mut unfit = BTreeSet::new();
    while let Ok(message) = rig.inbox.try_recv() {
        let Update::Verdicts(all) = message.update else {
            panic!()
        };
        unfit.extend(all.into_iter().filter(|v| !v.fit).map(|v| v.key));
    }
    assert_eq!(unfit.len(), 5_000);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn falls_rises_and_starts_slowly() {
    let slow = target(Before::Served, |check| {
        check.timing.slow_start = Duration::from_secs(20)
    });
    let mut rig = Rig::new(targets(1, &slow));
    // It served: it is confirmed at once, with its whole share.
    let (verdict, took) = rig.verdict().await;
    assert!(
        verdict.fit && verdict.tenths == WHOLE && took < Duration::from_secs(1),
        "{verdict:?} {took:?}"
    );

    // Three failures: one after the interval, two more at the fast one.
    rig.lab.0.ill.store(true, Ordering::Relaxed);
    let (verdict, took) = rig.verdict().await;
    assert_eq!((verdict.fit, verdict.reason.as_str()), (false, "bad"));
    assert!((6.0..8.0).contains(&took.as_secs_f64()), "{took:?}");

    // Two successes, then ten tenths in twenty seconds.
    rig.lab.0.ill.store(false, Ordering::Relaxed);
    let (verdict, took) = rig.verdict().await;
    assert_eq!((verdict.fit, verdict.tenths), (true, 1));
    assert!((5.0..7.0).contains(&took.as_secs_f64()), "{took:?}");
    for tenths in 2..=WHOLE {
        let (step, took) = rig.verdict().await;
        assert_eq!((step.fit, step.tenths, step.since), (true, tenths, verdict.since));
        assert!((1.9..2.1).contains(&took.as_secs_f64()), "{tenths}: {took:?}");
    }
    // And no more.
    assert!(
        tokio::time::timeout(Duration::from_secs(60), rig.verdict())
            .await
            .is_err()
    );
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_slow_start_that_is_cut_short_takes_no_more_steps() {
    let slow = target(Before::New, |check| {
        check.timing.slow_start = Duration::from_secs(100);
        check.timing.fall = 1;
    });
    let mut rig = Rig::new(targets(1, &slow));
    assert_eq!(rig.verdict().await.0.tenths, 1);
    rig.lab.0.ill.store(true, Ordering::Relaxed);
    let (verdict, _) = rig.verdict().await;
    assert!(!verdict.fit, "{verdict:?}");
    assert!(
        tokio::time::timeout(Duration::from_secs(300), rig.verdict())
            .await
            .is_err()
    );
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_new_backend_starts_before_it_fails() {
    let mut rig = Rig::new(targets(0, &target(Before::New, |_| {})));
    rig.lab.0.ill.store(true, Ordering::Relaxed);
    rig.targets.send_replace(targets(1, &target(Before::New, |_| {})));
    let (verdict, _) = rig.verdict().await;
    assert_eq!((verdict.fit, verdict.reason.as_str()), (false, "starting (bad)"));
    let (verdict, took) = rig.verdict().await;
    assert_eq!((verdict.fit, verdict.reason.as_str()), (false, "bad"));
    assert!(
        (9.0..12.0).contains(&took.as_secs_f64()),
        "the time of grace: {took:?}"
    );
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_this_node_cannot_check_stays_as_it_is() {
    let mut rig = Rig::new(targets(1, &target(Before::Served, |_| {})));
    rig.lab.0.broken.store(true, Ordering::Relaxed);
    assert!(
        tokio::time::timeout(Duration::from_secs(60), rig.verdict())
            .await
            .is_err()
    );
    let report = rig.report.borrow().clone();
    assert_eq!(report.faults, ["health checks: no CA"]);
    assert!(report.impossible > 5 && report.failed == 0, "{report:?}");
    // The cause is mended: the fault goes, and a verdict comes.
    rig.lab.0.broken.store(false, Ordering::Relaxed);
    assert!(rig.verdict().await.0.fit);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert!(rig.report.borrow().faults.is_empty());
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn verdicts_are_about_who_is_there_now() {
    let first = target(Before::Served, |check| {
        check.timing.timeout = Duration::from_secs(4)
    });
    let mut rig = Rig::new(targets(2, &first));
    rig.lab.0.silent.store(1, Ordering::Relaxed);
    assert_eq!(rig.verdict().await.0.key, key(0));
    // While its successor's check is under way, the answer about the first one is void; an unwished one is not checked.
    let mut next = targets(2, &target(Before::Served, |check| check.timing.fall = 1));
    next.active.remove(&key(0));
    next.active.get_mut(&key(1)).unwrap().generation = 2;
    rig.targets.send_replace(next);
    let (verdict, _) = rig.verdict().await;
    assert_eq!((verdict.key, verdict.generation, verdict.fit), (key(1), 2, false));
    rig.lab.0.starts.lock().unwrap().clear();
    tokio::time::sleep(Duration::from_secs(60)).await;
    let starts = rig.lab.0.starts.lock().unwrap().clone();
    assert!(starts.len() > 5 && starts.iter().all(|(_, backend)| *backend == key(1).backend));
    rig.end().await;
}
