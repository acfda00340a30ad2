//! Verdicts in, states out.

use std::{sync::Arc, time::Duration};

use proptest::prelude::*;

use super::super::*;
use crate::{
    health::{Before, By, Targets, Verdict, WHOLE},
    model::{Attachment, Check, CheckKind, Passive, Protocol, ServiceSettings, UnhealthyPolicy},
    route::{RouteAddress, RouteSettings, RouteWish},
};

const SERVICE: ServiceAddress = ServiceAddress {
    vip: IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 1)),
    port: 80,
    protocol: Protocol::Tcp,
};

fn address(i: u8) -> SocketAddr {
    ([10, 0, 0, i], 80).into()
}

fn key(i: u8) -> Key {
    Key {
        service: Some(SERVICE),
        backend: address(i),
    }
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// Everything heard, and the targets as a prober would have them.
#[derive(Default)]
struct Rig {
    heard: Heard,
    targets: Targets,
    now: u64,
    settings: ServiceSettings,
}

impl Rig {
    fn hear(&mut self, update: Update) {
        self.heard.absorb(Message {
            source: SourceId("docker".into()),
            update,
        });
        self.heard.refresh(at(self.now));
        self.heard.take_target_changes().apply(&mut self.targets);
    }

    fn backend(&self, i: u8) -> Backend {
        Backend {
            address: address(i),
            weight: 1,
            state: BackendState::Active,
            reason: "running".into(),
            drain: Duration::from_secs(30),
            name: format!("web-{i}"),
            check: Some(Arc::new(Check::of(vec![CheckKind::Http]))),
            attachment: Attachment::Address,
        }
    }

    fn put(&mut self, backend: Backend) {
        let wish = ServiceWish {
            name: "web".into(),
            address: SERVICE,
            settings: self.settings.clone(),
            backends: vec![backend.clone()],
        };
        self.hear(Update::Put(Object {
            id: backend.address.to_string(),
            name: backend.name,
            created: SystemTime::UNIX_EPOCH,
            services: vec![wish],
            routes: Vec::new(),
            rejections: Vec::new(),
        }));
    }

    fn start(&mut self, backends: u8) {
        for i in 1..=backends {
            self.put(self.backend(i));
        }
    }

    fn say(&mut self, i: u8, by: By, fit: bool, tenths: u8) {
        let verdict = Verdict {
            key: key(i),
            generation: match by {
                By::Check => self.targets.active[&key(i)].generation,
                By::Passive => 0,
            },
            by,
            fit,
            tenths,
            reason: if fit { "200 OK" } else { "500 Oops" }.into(),
            since: at(self.now),
        };
        self.hear(Update::Verdicts(vec![verdict]));
    }

    fn check(&mut self, i: u8, fit: bool) {
        self.say(i, By::Check, fit, WHOLE);
    }

    fn service(&self) -> &Service {
        &self.heard.desired().services[&SERVICE].service
    }

    /// State and reason of a backend.
    fn state(&self, i: u8) -> (BackendState, &str) {
        let backends = &self.service().backends;
        let backend = backends.iter().find(|b| b.address == address(i)).unwrap();
        (backend.state, &backend.reason)
    }
}

#[test]
fn a_new_backend_serves_once_it_has_passed() {
    let mut rig = Rig::default();
    rig.start(1);
    assert_eq!(rig.targets.active[&key(1)].before, Before::New);
    assert_eq!(rig.state(1), (BackendState::Unready, "check: no result yet"));
    rig.check(1, true);
    assert_eq!(rig.state(1), (BackendState::Active, "running; check: 200 OK"));
    rig.check(1, false);
    assert_eq!(rig.state(1), (BackendState::Unready, "check: 500 Oops"));
}

#[test]
fn everybody_must_agree() {
    let mut rig = Rig {
        settings: ServiceSettings {
            passive: Some(Passive::default()),
            ..ServiceSettings::default()
        },
        ..Rig::default()
    };
    rig.start(2);
    assert_eq!(rig.targets.passive[&SERVICE], Passive::default());
    let says = |rig: &Rig| -> Vec<(String, bool, SystemTime)> {
        let conditions = rig.heard.conditions(SERVICE, address(1)).iter();
        conditions.map(|c| (c.by.clone(), c.fit, c.since)).collect()
    };
    rig.now = 10;
    rig.check(1, true);
    rig.now = 20;
    rig.say(1, By::Passive, false, WHOLE);
    assert_eq!(rig.state(1), (BackendState::Unready, "passive: 500 Oops"));
    rig.now = 30;
    rig.heard.set_drains(Drains([("web-1".into(), None)].into()));
    rig.hear(Update::Verdicts(Vec::new()));
    assert_eq!(rig.state(1), (BackendState::Draining, "drained by operator"));
    rig.now = 40;
    let mut ill = rig.backend(1);
    (ill.state, ill.reason) = (BackendState::Unready, "health: unhealthy".into());
    rig.put(ill);
    assert_eq!(rig.state(1), (BackendState::Unready, "health: unhealthy"));
    let expected = |by: &str, fit, since| (by.to_owned(), fit, at(since));
    assert_eq!(
        says(&rig),
        [
            expected("docker", false, 40),
            expected("check", true, 10),
            expected("passive", false, 20),
        ]
    );
    // One after the other takes its word back.
    rig.now = 50;
    rig.heard.set_drains(Drains::default());
    rig.put(rig.backend(1));
    assert_eq!(rig.state(1), (BackendState::Unready, "passive: 500 Oops"));
    rig.say(1, By::Passive, true, WHOLE);
    assert_eq!(rig.state(1).0, BackendState::Active);
    assert_eq!(says(&rig)[0], expected("docker", true, 50));
    // Nobody ejects any more: no word of it is left.
    rig.say(1, By::Passive, false, WHOLE);
    rig.settings.passive = None;
    rig.start(2);
    assert_eq!(rig.state(1).0, BackendState::Active);
    assert!(rig.targets.passive.is_empty());
}

#[test]
fn what_serves_goes_on_until_a_check_says_otherwise() {
    let mut rig = Rig::default();
    rig.heard.adopt(SERVICE, address(1), true);
    rig.heard.adopt(SERVICE, address(2), false);
    rig.start(2);
    // After a restart: as the maps have it.
    assert_eq!(rig.targets.active[&key(1)].before, Before::Served);
    assert_eq!(
        rig.state(1),
        (BackendState::Active, "running; check: no result yet")
    );
    assert_eq!(rig.targets.active[&key(2)].before, Before::Waited);
    assert_eq!(rig.state(2), (BackendState::Unready, "check: no result yet"));
    rig.heard.forget_adopted();

    // A check that an operator adds later.
    let mut bare = rig.backend(3);
    bare.check = None;
    rig.put(bare);
    assert_eq!(rig.state(3), (BackendState::Active, "running"));
    rig.put(rig.backend(3));
    assert_eq!(rig.targets.active[&key(3)].before, Before::Served);
    assert_eq!(rig.state(3).0, BackendState::Active);
    // Checked otherwise: the same backend, and what is known of it stands.
    rig.check(3, false);
    let generation = rig.targets.active[&key(3)].generation;
    let mut otherwise = rig.backend(3);
    otherwise.check = Some(Arc::new(Check::of(vec![CheckKind::Tcp])));
    rig.put(otherwise);
    assert_eq!(rig.targets.active[&key(3)].generation, generation);
    assert_eq!(rig.targets.active[&key(3)].check.kinds, [CheckKind::Tcp]);
    assert_eq!(rig.state(3).0, BackendState::Unready);
    // And without a check nothing of it is left.
    let mut bare = rig.backend(3);
    bare.check = None;
    rig.put(bare);
    assert_eq!(rig.state(3), (BackendState::Active, "running"));
    assert!(!rig.targets.active.contains_key(&key(3)));
}

#[test]
fn another_user_of_an_address_is_new() {
    let mut rig = Rig::default();
    rig.start(1);
    rig.check(1, true);
    let old = rig.targets.active[&key(1)].generation;
    let mut other = rig.backend(1);
    other.name = "web-9".into();
    rig.put(other);
    assert_eq!(rig.state(1), (BackendState::Unready, "check: no result yet"));
    assert_eq!(rig.targets.active[&key(1)].before, Before::New);
    // A verdict about the old one that was under way.
    rig.hear(Update::Verdicts(vec![Verdict {
        key: key(1),
        generation: old,
        by: By::Check,
        fit: true,
        tenths: WHOLE,
        reason: String::new(),
        since: at(0),
    }]));
    assert_eq!(rig.state(1).0, BackendState::Unready);
    rig.hear(Update::Reset(Vec::new()));
    assert!(rig.targets.active.is_empty());
    assert!(rig.heard.conditions(SERVICE, address(1)).is_empty());
}

#[test]
fn a_share_comes_back_in_tenths() {
    let mut rig = Rig::default();
    rig.start(2);
    rig.check(1, true);
    rig.say(2, By::Check, true, 3);
    assert_eq!(rig.service().slow, [(address(2), 3)].into());
    rig.say(2, By::Check, true, WHOLE);
    assert!(rig.service().slow.is_empty());
}

#[test]
fn when_all_are_unfit_the_policy_decides() {
    let mut rig = Rig::default();
    rig.start(2);
    rig.check(1, false);
    rig.check(2, false);
    assert!(
        rig.service()
            .backends
            .iter()
            .all(|b| b.state == BackendState::Unready)
    );

    let mut rig = Rig {
        settings: ServiceSettings {
            when_unhealthy: UnhealthyPolicy::ServeAll,
            ..ServiceSettings::default()
        },
        ..Rig::default()
    };
    rig.start(3);
    rig.check(1, false);
    rig.check(2, false);
    assert_eq!(rig.state(1).0, BackendState::Unready, "the third has not spoken");
    rig.check(3, false);
    assert_eq!(
        rig.state(1),
        (
            BackendState::Active,
            "all are unfit, so all serve (check: 500 Oops)"
        )
    );
    // Not for those whom something else keeps away.
    rig.heard.set_drains(Drains([("web-2".into(), None)].into()));
    rig.hear(Update::Verdicts(Vec::new()));
    assert_eq!(rig.state(2).0, BackendState::Draining);
    assert_eq!(rig.state(3).0, BackendState::Active);
    // One that is fit is enough.
    rig.check(3, true);
    assert_eq!(rig.state(1).0, BackendState::Unready);
    assert_eq!(rig.state(3).0, BackendState::Active);
}

/// What may happen to one backend.
#[derive(Clone, Debug)]
enum Event {
    Check(bool),
    Eject(bool),
    Drain(bool),
    Source(BackendState),
}

fn event() -> impl Strategy<Value = Event> {
    let state = proptest::sample::select(vec![
        BackendState::Active,
        BackendState::Draining,
        BackendState::Unready,
    ]);
    prop_oneof![
        any::<bool>().prop_map(Event::Check),
        any::<bool>().prop_map(Event::Eject),
        any::<bool>().prop_map(Event::Drain),
        state.prop_map(Event::Source),
    ]
}

proptest! {
    /// In whatever order they speak: a backend takes new flows when, and only when, its source, its check, the datapath's
    /// counters and the operator all agree.
    #[test]
    fn a_backend_serves_when_all_agree(events in proptest::collection::vec((1u8..4, event()), 0..60)) {
        let mut rig = Rig {
            settings: ServiceSettings {
                passive: Some(Passive::default()),
                ..ServiceSettings::default()
            },
            ..Rig::default()
        };
        rig.start(3);
        let (mut passed, mut ejected, mut drained) = ([false; 4], [false; 4], [false; 4]);
        let mut source = [BackendState::Active; 4];
        for (i, event) in events {
            let at = usize::from(i);
            match event {
                Event::Check(fit) => {
                    rig.check(i, fit);
                    passed[at] = fit;
                }
                Event::Eject(out) => {
                    rig.say(i, By::Passive, !out, WHOLE);
                    ejected[at] = out;
                }
                Event::Drain(on) => {
                    drained[at] = on;
                    let names = (1..4).filter(|i| drained[*i]).map(|i| (format!("web-{i}"), None));
                    rig.heard.set_drains(Drains(names.collect()));
                    rig.hear(Update::Verdicts(Vec::new()));
                }
                Event::Source(state) => {
                    source[at] = state;
                    let mut backend = rig.backend(i);
                    backend.state = state;
                    rig.put(backend);
                }
            }
            for i in 1..4u8 {
                let at = usize::from(i);
                let all = source[at] == BackendState::Active && passed[at] && !ejected[at] && !drained[at];
                let (state, reason) = rig.state(i);
                prop_assert_eq!(state == BackendState::Active, all, "{} {:?}", i, reason);
                // And the conditions say the same, but for the operator, who is asked last.
                let agree = rig.heard.conditions(SERVICE, address(i)).iter().all(|c| c.fit);
                prop_assert_eq!(agree, all);
            }
        }
    }
}

/// Upstreams of routes are checked too, once for all routes that lead there; those that are there when the agent starts serve
/// until their check has failed.
#[test]
fn upstreams_are_checked_once_for_all_their_routes() {
    let mut rig = Rig::default();
    let route = |i: u8, hosts: &[&str], rig: &Rig| {
        let upstream = rig.backend(i);
        let wish = |host: &&str| RouteWish {
            address: RouteAddress {
                host: (*host).into(),
                path: "/".into(),
            },
            of: (*host).into(),
            settings: RouteSettings::default(),
            remarks: Vec::new(),
            upstream: upstream.clone(),
        };
        Update::Put(Object {
            id: upstream.address.to_string(),
            name: upstream.name.clone(),
            created: SystemTime::UNIX_EPOCH,
            services: Vec::new(),
            routes: hosts.iter().map(wish).collect(),
            rejections: Vec::new(),
        })
    };
    let upstream = |i: u8| Key {
        service: None,
        backend: address(i),
    };
    let shown = |rig: &Rig, host: &str| -> Vec<(BackendState, String)> {
        let routes = rig.heard.routes();
        let route = routes.iter().find(|route| route.host == host).unwrap();
        let shown = |upstream: &Backend| (upstream.state, upstream.reason.clone());
        route.upstreams.iter().map(shown).collect()
    };
    rig.hear(route(1, &["a", "b"], &rig));
    assert_eq!(rig.targets.active.keys().collect::<Vec<_>>(), [&upstream(1)]);
    assert_eq!(rig.targets.active[&upstream(1)].before, Before::Served);
    assert_eq!(shown(&rig, "b")[0].0, BackendState::Active);
    // From now on a new one waits for its check.
    rig.heard.settle();
    rig.hear(route(2, &["b", "c"], &rig));
    assert_eq!(rig.targets.active[&upstream(2)].before, Before::New);
    let states = |shown: Vec<(BackendState, String)>| shown.into_iter().map(|s| s.0).collect::<Vec<_>>();
    assert_eq!(
        states(shown(&rig, "b")),
        [BackendState::Active, BackendState::Unready]
    );
    let share = |i: u8, fit: bool, tenths: u8, rig: &Rig| {
        Update::Verdicts(vec![Verdict {
            key: upstream(i),
            generation: rig.targets.active[&upstream(i)].generation,
            by: By::Check,
            fit,
            tenths,
            reason: "as told".into(),
            since: at(1),
        }])
    };
    let verdict = |i: u8, fit: bool, rig: &Rig| share(i, fit, WHOLE, rig);
    // Its share comes in tenths, in every route that leads there.
    let slow = |rig: &Rig| -> Vec<BTreeMap<SocketAddr, u8>> {
        rig.heard
            .routes()
            .iter()
            .map(|route| route.slow.clone())
            .collect()
    };
    rig.hear(share(2, true, 3, &rig));
    let third: BTreeMap<SocketAddr, u8> = [(address(2), 3)].into();
    assert_eq!(slow(&rig), [BTreeMap::new(), third.clone(), third]);
    rig.hear(verdict(2, true, &rig));
    assert!(slow(&rig).iter().all(BTreeMap::is_empty));
    rig.hear(verdict(1, false, &rig));
    for host in ["a", "b"] {
        assert_eq!(
            shown(&rig, host)[0],
            (BackendState::Unready, "check: as told".into())
        );
    }
    assert_eq!(shown(&rig, "b")[1].0, BackendState::Active);
    assert_eq!(shown(&rig, "c")[0].0, BackendState::Active);
    // The route goes that told of it; the other one's check goes on, and then nobody's.
    rig.hear(Update::Remove(address(1).to_string()));
    assert_eq!(rig.targets.active.keys().collect::<Vec<_>>(), [&upstream(2)]);
    rig.hear(route(2, &["c"], &rig));
    assert_eq!(rig.targets.active.len(), 1);
    rig.hear(Update::Reset(Vec::new()));
    assert!(rig.targets.active.is_empty());
}
