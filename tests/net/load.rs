//! Clients that never stop: new connections one after the other, and long-lived ones that go on talking.

use std::{
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{load::RETRANSMITTED, netns::Namespace};

use crate::talk::Talk;

/// Connections that live as long as the load.
pub const LONG_LIVED: usize = 40;
/// Threads that open one connection after the other.
const OPENERS: usize = 2;

/// What the clients met.
#[derive(Debug, Default)]
pub struct Met {
    /// New connections that were opened, used and closed.
    pub connections: usize,
    /// Rounds of all long-lived connections.
    pub rounds: usize,
    /// Longest time from SYN to greeting.
    pub slowest: Duration,
    /// Everything that failed.
    pub failures: Vec<String>,
}

/// Runs `work` while clients load the service; what they met. The load goes on for one more round after `work`.
pub fn under_load<T>(
    client: &Namespace,
    to: SocketAddr,
    work: impl FnOnce(&dyn Fn() -> usize) -> Result<T>,
) -> Result<(T, Met)> {
    let (met, stop) = (Mutex::new(Met::default()), AtomicBool::new(false));
    let (met, stop) = (&met, &stop);
    let note = |change: &dyn Fn(&mut Met)| change(&mut met.lock().expect("no client panics"));
    let begun = Instant::now();
    let failed = |what: &str, error: anyhow::Error| {
        let text = format!("{:?} {what}: {error:#}", begun.elapsed());
        note(&|met| met.failures.push(text.clone()));
    };
    let connections = || met.lock().expect("no client panics").connections;
    let result = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        let mut talks = client.run(|| {
            (0..LONG_LIVED)
                .map(|_| Talk::open(to))
                .collect::<Result<Vec<_>>>()
        })?;
        threads.push(scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                talks.retain_mut(|talk| {
                    let said = talk.say(64);
                    if let Err(error) = said {
                        failed(
                            "long-lived",
                            error.context(format!("backend {}", talk.answer.index)),
                        );
                        return false;
                    }
                    true
                });
                note(&|met| met.rounds += 1);
                // Their life is the point, not their rate; the openers need the CPU.
                std::thread::park_timeout(Duration::from_millis(20));
            }
        }));
        for _ in 0..OPENERS {
            threads.push(scope.spawn(move || {
                client.run(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let began = Instant::now();
                        let talk = Talk::open(to);
                        let took = began.elapsed();
                        match talk.and_then(|mut talk| talk.say(200)) {
                            Ok(()) => note(&|met| {
                                met.connections += 1;
                                met.slowest = met.slowest.max(took);
                            }),
                            Err(error) => failed("new", error.context(format!("after {took:?}"))),
                        }
                    }
                });
            }));
        }
        let result = work(&connections);
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().expect("no client panics");
        }
        result
    })?;
    let met = std::mem::take(&mut *met.lock().expect("no client panics"));
    Ok((result, met))
}

// === impl Met ===

impl Met {
    /// Fails unless nobody noticed anything.
    pub fn judge(&self) -> Result<()> {
        ensure!(
            self.failures.is_empty(),
            "{} failures: {:#?}",
            self.failures.len(),
            &self.failures[..self.failures.len().min(10)]
        );
        ensure!(
            self.slowest < RETRANSMITTED,
            "a connection took {:?}",
            self.slowest
        );
        ensure!(
            self.connections > 100 && self.rounds > 5,
            "hardly any load: {} connections, {} rounds",
            self.connections,
            self.rounds
        );
        println!(
            "{} connections, the slowest {:?}; {} rounds of {LONG_LIVED} long-lived",
            self.connections, self.slowest, self.rounds
        );
        Ok(())
    }

    /// [`Met::judge`] with what the agent knows.
    pub fn judge_with(&self, weir: &lb_tests::weir::Weir<'_>) -> Result<()> {
        self.judge().with_context(|| weir.explain())
    }
}
