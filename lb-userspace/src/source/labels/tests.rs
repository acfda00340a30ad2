use std::time::{Duration, SystemTime};

use proptest::prelude::*;

use super::*;
use crate::{
    config::{Announce, Vip},
    model::{EmptyPolicy, SnatMode},
    source::docker::{container::Routing, signal},
};

pub(crate) fn policy() -> Policy {
    let vip = |name: &str, addresses: &[&str]| Vip {
        name: name.into(),
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        announce: Announce::None,
        node_address: false,
    };
    Policy {
        vips: vec![
            vip("web", &["203.0.113.10", "2001:db8::10"]),
            vip("six", &["2001:db8::66"]),
        ],
        defaults: ServiceSettings::default(),
        drain: Duration::from_secs(30),
        remember: Duration::from_secs(600),
        checks: crate::config::CheckPolicy::default(),
    }
}

pub(crate) fn container(labels: &[(&str, &str)]) -> Container {
    Container {
        id: "3f2a9c0000000000".into(),
        name: "web-1".into(),
        created: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000),
        started: SystemTime::UNIX_EPOCH + Duration::from_secs(1_001),
        labels: labels
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect(),
        state: RunState::Running,
        health: None,
        stop_signal: signal::TERM,
        stopping: false,
        network_mode: NetworkMode::Network("bridge".into()),
        routing: Routing::default(),
        networks: BTreeMap::from([("bridge".into(), vec!["172.17.0.2".parse().unwrap()])]),
        exposed: BTreeSet::from([(8080, Protocol::Tcp)]),
        published: BTreeMap::new(),
    }
}

pub(super) fn local() -> Site {
    Site {
        source: "docker".into(),
        node: vec!["192.0.2.5".parse().unwrap()],
        ..Site::default()
    }
}

/// `vip:port/protocol -> backend` of every wish, or the first refusal.
fn outcome(container: &Container, site: &Site) -> Result<Vec<String>, String> {
    let object = object(container, site, &policy()).expect("it has labels");
    match object.rejections.first() {
        Some(rejection) => Err(rejection.to_string()),
        None => Ok(object
            .services
            .iter()
            .map(|wish| format!("{} -> {}", wish.address, wish.backends[0].address))
            .collect()),
    }
}

/// Labels of one row of a table.
type Given = &'static [(&'static str, &'static str)];

const L: &str = "weir.service.web.listen";
const VIP: (&str, &str) = ("weir.service.web.vip", "web");

#[test]
fn labels_that_serve() {
    let rows: &[(Given, &[&str])] = &[
        (&[(L, "80/tcp")], &["203.0.113.10:80/tcp -> 172.17.0.2:8080"]),
        (&[(L, "80")], &["203.0.113.10:80/tcp -> 172.17.0.2:8080"]),
        (
            &[(L, "80,443")],
            &[
                "203.0.113.10:80/tcp -> 172.17.0.2:8080",
                "203.0.113.10:443/tcp -> 172.17.0.2:8080",
            ],
        ),
        (
            &[(L, "53/udp"), ("weir.service.web.port", "5353")],
            &["203.0.113.10:53/udp -> 172.17.0.2:5353"],
        ),
        (&[(L, "0/tcp")], &["203.0.113.10:0/tcp -> 172.17.0.2:0"]),
        (
            &[(L, "*/udp"), ("weir.service.web.port", "9")],
            &["203.0.113.10:0/udp -> 172.17.0.2:9"],
        ),
        (
            &[
                (L, "80"),
                ("weir.service.web.vip", "203.0.113.10"),
                ("weir.enable", "true"),
            ],
            &["203.0.113.10:80/tcp -> 172.17.0.2:8080"],
        ),
    ];
    for (labels, want) in rows {
        let mut labels = labels.to_vec();
        if !labels.iter().any(|(key, _)| *key == VIP.0) {
            labels.push(VIP);
        }
        let got = outcome(&container(&labels), &local());
        assert_eq!(
            got,
            Ok(want.iter().map(|s| (*s).to_owned()).collect()),
            "{labels:?}"
        );
    }
}

#[test]
fn labels_that_are_refused_say_what_to_do() {
    let rows: &[(Given, &str, &str)] = &[
        (&[(L, "http")], L, "write `80/tcp`"),
        (&[(L, "80/sctp")], L, "write `80/tcp`"),
        (&[(L, "")], L, "at least one"),
        (&[("weir.service.web.port", "80")], L, "add the label"),
        (
            &[(L, "80"), ("weir.service.web.lisen", "80")],
            "*",
            "did you mean `weir.service.web.listen`?",
        ),
        (
            &[(L, "80"), ("weir.service.web.wieght", "1")],
            "*",
            "did you mean `weir.service.web.weight`?",
        ),
        (
            &[(L, "80"), ("weir.service.web.weight", "heavy")],
            ".weight",
            "0 (drain)",
        ),
        (
            &[(L, "80"), ("weir.service.web.weight", "1001")],
            ".weight",
            "1000",
        ),
        (&[(L, "80"), ("weir.service.web.drain", "30")], ".drain", "`30s`"),
        (
            &[(L, "80"), ("weir.service.web.affinity", "yes")],
            ".affinity",
            "client-ip, none",
        ),
        (
            &[(L, "80"), ("weir.service.web.snat", "alway")],
            ".snat",
            "did you mean `always`?",
        ),
        (
            &[(L, "80"), ("weir.service.web.allow", "10.0.0.1/8")],
            ".allow",
            "10.0.0.0/8",
        ),
        (
            &[(L, "80"), ("weir.service.web.deny", "everybody")],
            ".deny",
            "192.0.2.0/24",
        ),
        (
            &[(L, "80"), ("weir.service.web.network", "front")],
            ".network",
            "name one of: bridge",
        ),
        (
            &[(L, "80"), ("weir.service.web.port", "0")],
            ".port",
            "1 to 65535",
        ),
        (
            &[(L, "80"), ("weir.service.web.reset-unknown", "")],
            ".reset-unknown",
            "true, false",
        ),
        (&[(L, "53/udp")], ".port", "set weir.service.web.port"),
        (&[("weir.service.Web.listen", "80")], "weir.service.Web", "a-z"),
    ];
    for (labels, label, remedy) in rows {
        let labels: Vec<_> = labels.iter().copied().chain([VIP]).collect();
        let labels: Vec<_> = if labels[0].0.contains("Web") {
            vec![labels[0]]
        } else {
            labels
        };
        let text = outcome(&container(&labels), &local()).expect_err("refused");
        assert!(
            text.starts_with("docker: container web-1 (3f2a9c000000): label weir."),
            "{text}"
        );
        assert!(
            text.contains(label) && text.contains(remedy),
            "{labels:?}: {text}"
        );
    }
}

#[test]
fn the_vip_must_be_a_configured_one() {
    let with = |vip: &[(&'static str, &'static str)]| {
        let labels: Vec<_> = [(L, "80")].into_iter().chain(vip.iter().copied()).collect();
        outcome(&container(&labels), &local())
    };
    assert!(
        with(&[])
            .unwrap_err()
            .contains("set `weir.service.web.vip` to one of: web, six")
    );
    assert!(
        with(&[("weir.service.web.vip", "198.51.100.1")])
            .unwrap_err()
            .contains("not a configured VIP")
    );
    assert!(
        with(&[("weir.service.web.vip", "wep")])
            .unwrap_err()
            .contains("did you mean `web`?")
    );
    // The container has no IPv6 address.
    assert!(
        with(&[("weir.service.web.vip", "six")])
            .unwrap_err()
            .contains("family")
    );

    let mut one = policy();
    one.vips.truncate(1);
    assert_eq!(
        object(&container(&[(L, "80")]), &local(), &one)
            .unwrap()
            .services
            .len(),
        1
    );
}

#[test]
fn both_families_are_served_where_the_container_has_both() {
    let mut dual = container(&[(L, "80"), VIP]);
    dual.networks
        .get_mut("bridge")
        .unwrap()
        .push("fd00::2".parse().unwrap());
    assert_eq!(
        outcome(&dual, &local()).unwrap(),
        [
            "203.0.113.10:80/tcp -> 172.17.0.2:8080",
            "[2001:db8::10]:80/tcp -> [fd00::2]:8080"
        ]
    );
}

#[test]
fn the_container_port_is_never_guessed() {
    let mut several = container(&[(L, "80"), VIP]);
    several.exposed = BTreeSet::from([(81, Protocol::Tcp), (82, Protocol::Tcp), (53, Protocol::Udp)]);
    let text = outcome(&several, &local()).unwrap_err();
    assert!(text.contains("one of: 81/tcp, 82/tcp"), "{text}");
    // The port that clients use is one of them.
    several.exposed.insert((80, Protocol::Tcp));
    assert_eq!(
        outcome(&several, &local()).unwrap(),
        ["203.0.113.10:80/tcp -> 172.17.0.2:80"]
    );
    several.exposed.clear();
    assert!(outcome(&several, &local()).unwrap_err().contains("exposes none"));
}

#[test]
fn networks() {
    let address = |text: &str| vec![text.parse().unwrap()];
    let mut c = container(&[(L, "80"), VIP]);
    // Connected to another network later: the one it was created with stays.
    c.networks.insert("aaa".into(), address("10.9.0.2"));
    assert_eq!(
        outcome(&c, &local()).unwrap(),
        ["203.0.113.10:80/tcp -> 172.17.0.2:8080"]
    );
    c.labels.insert("weir.service.web.network".into(), "aaa".into());
    assert_eq!(
        outcome(&c, &local()).unwrap(),
        ["203.0.113.10:80/tcp -> 10.9.0.2:8080"]
    );
    c.labels.remove("weir.service.web.network");
    c.networks.remove("bridge");
    assert_eq!(
        outcome(&c, &local()).unwrap(),
        ["203.0.113.10:80/tcp -> 10.9.0.2:8080"]
    );
    c.networks.insert("bbb".into(), address("10.8.0.2"));
    assert!(outcome(&c, &local()).unwrap_err().contains("one of: aaa, bbb"));
    c.networks.clear();
    assert!(outcome(&c, &local()).unwrap_err().contains("no network"));

    c.network_mode = NetworkMode::Container("abcdef".into());
    assert!(outcome(&c, &local()).unwrap_err().contains("that container"));
    c.network_mode = NetworkMode::Host;
    c.exposed.clear();
    assert_eq!(
        outcome(&c, &local()).unwrap(),
        ["203.0.113.10:80/tcp -> 192.0.2.5:80"]
    );
    assert!(
        outcome(&c, &Site::default())
            .unwrap_err()
            .contains("docker.node-address")
    );
}

#[test]
fn an_engine_may_be_allowed_less() {
    let with = |allow: Allowed| Site { allow, ..local() };
    let c = container(&[(L, "80"), VIP]);
    let free = outcome(&c, &local()).unwrap();
    let list = |text: &str| Some(value::listens(text).unwrap());
    let ports = |text| {
        with(Allowed {
            ports: list(text),
            ..Allowed::default()
        })
    };
    assert_eq!(outcome(&c, &ports("80/tcp")).unwrap(), free);
    let refusal = outcome(&c, &ports("80/udp, 443/tcp")).unwrap_err();
    assert!(
        refusal.contains("may not claim port 80/tcp") && refusal.contains("allow-ports"),
        "{refusal}"
    );
    let vips = |ips: &[&str]| {
        let vips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        with(Allowed {
            vips: Some(vips),
            ..Allowed::default()
        })
    };
    assert_eq!(
        outcome(&c, &vips(&["203.0.113.10", "2001:db8::10"])).unwrap(),
        free
    );
    let refusal = outcome(&c, &vips(&["203.0.113.10"])).unwrap_err();
    assert!(refusal.contains("may not claim VIP 2001:db8::10"), "{refusal}");
    let names = |name: &str| {
        with(Allowed {
            services: Some(vec![name.into()]),
            ..Allowed::default()
        })
    };
    assert_eq!(outcome(&c, &names("*")).unwrap(), free);
    assert!(
        outcome(&c, &names("other"))
            .unwrap_err()
            .contains("may not claim a service named")
    );
}

#[test]
fn a_remote_engine_is_reached_by_published_ports() {
    let site = Site {
        remote: true,
        node: vec!["192.0.2.9".parse().unwrap()],
        ..local()
    };
    let mut c = container(&[(L, "80"), VIP]);
    assert!(
        outcome(&c, &site)
            .unwrap_err()
            .contains("8080/tcp is not published")
    );
    let binding = |text: &str| vec![text.parse().unwrap()];
    c.published
        .insert((8080, Protocol::Tcp), binding("127.0.0.1:32768"));
    assert!(
        outcome(&c, &site).unwrap_err().contains("not published"),
        "loopback is not reachable"
    );
    c.published.insert((8080, Protocol::Tcp), binding("0.0.0.0:0"));
    assert!(
        outcome(&c, &site).unwrap_err().contains("not published"),
        "port 0 is none, and must not become that of a backend"
    );
    c.published
        .insert((8080, Protocol::Tcp), binding("0.0.0.0:32768"));
    assert_eq!(
        outcome(&c, &site).unwrap(),
        ["203.0.113.10:80/tcp -> 192.0.2.9:32768"]
    );
    c.published
        .insert((8080, Protocol::Tcp), binding("192.0.2.77:32768"));
    assert_eq!(
        outcome(&c, &site).unwrap(),
        ["203.0.113.10:80/tcp -> 192.0.2.77:32768"]
    );
    c.labels.insert(L.into(), "*/tcp".into());
    assert!(outcome(&c, &site).unwrap_err().contains("every port"));
}

#[test]
fn state_follows_health_pause_and_stop() {
    let state_of = |change: &dyn Fn(&mut Container)| {
        let mut c = container(&[(L, "80"), VIP]);
        change(&mut c);
        let backend = object(&c, &local(), &policy()).unwrap().services[0].backends[0].clone();
        (backend.state, backend.reason)
    };
    let want = |state, reason: &str| (state, reason.to_owned());
    assert_eq!(state_of(&|_| ()), want(BackendState::Active, "running"));
    assert_eq!(
        state_of(&|c| c.health = Some(Health::Starting)),
        want(BackendState::Unready, "health: starting")
    );
    assert_eq!(
        state_of(&|c| c.health = Some(Health::Unhealthy)),
        want(BackendState::Unready, "health: unhealthy")
    );
    assert_eq!(
        state_of(&|c| c.health = Some(Health::Healthy)),
        want(BackendState::Active, "health: healthy")
    );
    assert_eq!(
        state_of(&|c| c.state = RunState::Paused),
        want(BackendState::Unready, "container paused")
    );
    assert_eq!(
        state_of(&|c| {
            c.stopping = true;
            c.health = Some(Health::Healthy);
        }),
        want(BackendState::Draining, "container stopping")
    );
    let mut stopped = container(&[(L, "80"), VIP]);
    stopped.state = RunState::Stopped;
    assert_eq!(object(&stopped, &local(), &policy()), None);
}

#[test]
fn settings_are_taken_over() {
    let c = container(&[
        (L, "80"),
        VIP,
        ("weir.service.web.weight", "7"),
        ("weir.service.web.drain", "1m30s"),
        ("weir.service.web.affinity", "client-ip"),
        ("weir.service.web.snat", "never"),
        ("weir.service.web.allow", "10.0.0.0/8, 2001:db8::/32"),
        ("weir.service.web.deny", "10.1.0.0/16"),
        ("weir.service.web.when-empty", "drop"),
        ("weir.service.web.reset-unknown", "true"),
    ]);
    let object = object(&c, &local(), &policy()).unwrap();
    let wish = &object.services[0];
    assert!(wish.settings.client_ip_affinity && wish.settings.reset_unknown);
    assert_eq!(wish.settings.snat, SnatMode::Never);
    assert_eq!((wish.settings.allow.len(), wish.settings.deny.len()), (2, 1));
    assert_eq!(wish.settings.when_empty, EmptyPolicy::Drop);
    assert_eq!(
        (wish.backends[0].weight, wish.backends[0].drain),
        (7, Duration::from_secs(90))
    );
}

#[test]
fn switching_off_needs_a_boolean() {
    let with = |text: &str| {
        object(
            &container(&[(L, "80"), VIP, ("weir.enable", text)]),
            &local(),
            &policy(),
        )
    };
    assert_eq!(with("false"), None);
    assert_eq!(with("False"), None);
    assert_eq!(with("true").unwrap().services.len(), 1);
    let unclear = with("no").unwrap();
    assert!(unclear.services.is_empty() && unclear.rejections.len() == 1);
    let near = object(
        &container(&[(L, "80"), VIP, ("weir.enabel", "false")]),
        &local(),
        &policy(),
    )
    .unwrap();
    assert!(
        near.rejections[0].remedy.contains("did you mean `weir.enable`?"),
        "{near:?}"
    );
    assert_eq!(
        object(&container(&[("com.example", "1")]), &local(), &policy()),
        None
    );
}

#[test]
fn two_services_of_one_container_cannot_have_one_address() {
    let c = container(&[
        ("weir.service.a.listen", "80,443"),
        ("weir.service.a.vip", "web"),
        ("weir.service.b.listen", "443"),
        ("weir.service.b.vip", "web"),
    ]);
    let object = object(&c, &local(), &policy()).unwrap();
    assert_eq!(object.services.len(), 2);
    assert!(
        object.rejections[0].fault.contains("claimed by service `a`"),
        "{object:?}"
    );
}

/// A key and a value that may or may not make sense.
fn label() -> impl Strategy<Value = (String, String)> {
    let name = prop_oneof![Just("bad".to_owned()), Just("worse".to_owned()), "[a-zA-Z.]{0,6}"];
    let setting = prop_oneof![
        proptest::sample::select(SETTINGS).prop_map(str::to_owned),
        ".{0,8}"
    ];
    let value = prop_oneof![
        "[0-9]{1,6}(/(tcp|udp|sctp))?",
        "[0-9]{1,3}(ms|s|m|h|d)?",
        Just("web".to_owned()),
        Just("true".to_owned()),
        "10\\.[0-9]{1,3}\\.0\\.0/[0-9]{1,2}",
        ".{0,12}",
    ];
    (
        prop_oneof![
            (name, setting).prop_map(|(name, setting)| format!("{SERVICE}{name}.{setting}")),
            "weir\\..{0,10}",
            ".{0,10}",
        ],
        value,
    )
}

proptest! {
    #[test]
    fn no_label_panics_and_none_reaches_another_service(noise in proptest::collection::vec(label(), 0..12)) {
        // The good service is not on a port of any of the others, and is not switched off.
        let noise: Vec<_> = noise
            .into_iter()
            .filter(|(key, text)| {
                let off = key == ENABLE || key.starts_with("weir.service.good.");
                let same_port = text.contains("65432");
                !off && !same_port
            })
            .collect();
        let good = [("weir.service.good.listen", "65432/udp"), ("weir.service.good.port", "1"), ("weir.service.good.vip", "web")];
        let alone = object(&container(&good), &local(), &policy()).unwrap();
        let mut c = container(&good);
        c.labels.extend(noise);
        let all = object(&c, &local(), &policy()).unwrap();
        let kept: Vec<_> = all.services.into_iter().filter(|wish| wish.name == "good").collect();
        prop_assert_eq!(kept, alone.services);
        for rejection in all.rejections {
            prop_assert!(!rejection.fault.is_empty() && !rejection.remedy.is_empty());
        }
    }
}

#[test]
fn timeouts_have_labels_with_the_limits_of_the_file() {
    let given = |labels: &[(&str, &str)]| {
        let mut all = vec![(L, "80/tcp"), VIP];
        all.extend_from_slice(labels);
        object(&container(&all), &local(), &policy()).unwrap()
    };
    let made = given(&[
        ("weir.service.web.timeout-established", "4h"),
        ("weir.service.web.timeout-syn", "20s"),
        ("weir.service.web.timeout-closing", "90s"),
        ("weir.service.web.timeout-udp", "10m"),
    ]);
    assert_eq!(made.rejections, []);
    let t = made.services[0].settings.timeouts;
    assert_eq!(
        [t.tcp_established, t.tcp_syn, t.tcp_closing, t.udp].map(|time| time.as_secs()),
        [4 * 3600, 20, 90, 600]
    );
    let defaults = given(&[]).services[0].settings.timeouts;
    let one = given(&[("weir.service.web.timeout-udp", "1h")]);
    assert_eq!(one.services[0].settings.timeouts.tcp_syn, defaults.tcp_syn);
    let bad = given(&[("weir.service.web.timeout-syn", "10ms")]);
    let text = bad.rejections[0].to_string();
    assert!(
        text.contains("timeout-syn") && text.contains("write at least `1s`"),
        "{text}"
    );
}
