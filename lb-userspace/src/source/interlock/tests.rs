use std::time::{Duration, SystemTime};

use proptest::prelude::*;

use super::*;
use crate::{
    config::{Announce, CheckPolicy, Vip},
    model::{BackendState, CheckKind, FlowTimeouts, HttpMethod, ServiceSettings},
    route::{ANY_HOST, Balance, UpstreamTls},
    source::{
        Object,
        docker::container::{Health, NetworkAttachment, NetworkMode, Routing, RunState},
    },
};

type Given<'a> = &'a [(&'a str, &'a str)];

fn map(labels: Given<'_>) -> BTreeMap<String, String> {
    labels
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect()
}

/// A container of the seed's voting application: port 80 published, on the network of its Compose project.
fn container(labels: Given<'_>) -> Container {
    Container {
        id: "0123456789abcdef".into(),
        name: "voting_voting-app_1".into(),
        created: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000),
        started: SystemTime::UNIX_EPOCH + Duration::from_secs(1_001),
        labels: map(labels),
        state: RunState::Running,
        health: None,
        stop_signal: 15,
        stopping: false,
        network_mode: NetworkMode::Network("voting_voteapp".into()),
        routing: Routing::default(),
        networks: [("voting_voteapp".into(), vec!["172.18.0.2".parse().unwrap()])].into(),
        exposed: [(80, Protocol::Tcp)].into(),
        published: [((80, Protocol::Tcp), vec!["0.0.0.0:32768".parse().unwrap()])].into(),
    }
}

fn policy() -> Policy {
    Policy {
        vips: vec![Vip {
            name: "web".into(),
            addresses: vec!["203.0.113.10".parse().unwrap()],
            announce: Announce::None,
            node_address: false,
        }],
        defaults: ServiceSettings {
            timeouts: FlowTimeouts::default(),
            ..ServiceSettings::default()
        },
        drain: Duration::from_secs(30),
        remember: Duration::from_secs(600),
        checks: CheckPolicy::default(),
    }
}

fn object(container: &Container, site: &Site) -> Option<Object> {
    labels::object(container, site, &policy())
}

/// The routes of these labels; there must be no fault.
fn good(labels: Given<'_>) -> Vec<RouteWish> {
    let object = object(&container(labels), &Site::default()).expect("labels of ours");
    assert_eq!(object.rejections, [], "{labels:?}");
    object.routes
}

/// The only route of these labels.
fn one_route(labels: Given<'_>) -> RouteWish {
    let mut routes = good(labels);
    assert_eq!(routes.len(), 1, "{labels:?}");
    routes.remove(0)
}

const HOST: (&str, &str) = ("interlock.hostname", "vote");
const DOMAIN: (&str, &str) = ("interlock.domain", "myenterprise.com");

#[test]
fn the_labels_of_the_voting_application() {
    let route = one_route(&[HOST, DOMAIN]);
    assert_eq!(route.address.to_string(), "vote.myenterprise.com/");
    assert_eq!(route.settings, RouteSettings::default());
    assert_eq!(route.upstream.address, "172.18.0.2:80".parse().unwrap());
    assert_eq!(route.upstream.name, "voting_voting-app_1");
    assert_eq!(route.upstream.state, BackendState::Active);
    assert_eq!(route.upstream.drain, Duration::from_secs(30));
    let check = route.upstream.check.unwrap();
    assert_eq!(
        (check.kinds.as_slice(), check.timing.interval),
        (&[CheckKind::Tcp][..], Duration::from_secs(5))
    );
    assert_eq!(route.remarks, [""; 0]);
}

#[test]
fn upstreams_start_as_slowly_as_the_defaults_say_unless_the_labels_do() {
    let mut policy = policy();
    policy.checks.check.timing.slow_start = Duration::from_secs(30);
    let slow_start = |labels: Given<'_>| {
        let object = labels::object(&container(labels), &Site::default(), &policy).expect("labels of ours");
        let check = object.routes[0].upstream.check.clone().expect("a check");
        check.timing.slow_start
    };
    assert_eq!(slow_start(&[HOST, DOMAIN]), Duration::from_secs(30));
    let own = ("interlock.backend_option.0", "check slowstart 5s");
    assert_eq!(slow_start(&[HOST, DOMAIN, own]), Duration::from_secs(5));
    assert_eq!(
        one_route(&[HOST, DOMAIN])
            .upstream
            .check
            .unwrap()
            .timing
            .slow_start,
        Duration::ZERO
    );
}

#[test]
fn host_and_domain_join_as_in_interlock() {
    for (labels, want) in [
        (&[HOST][..], "vote.local/"),
        (&[HOST, ("interlock.domain", "")], "vote/"),
        (&[("interlock.hostname", ""), DOMAIN], "myenterprise.com/"),
        (
            &[("interlock.hostname", "myenterprise.com"), DOMAIN],
            "myenterprise.com/",
        ),
        (
            &[("interlock.hostname", "A.B"), ("interlock.domain", "C")],
            "a.b.c/",
        ),
        (
            &[HOST, DOMAIN, ("interlock.context_root", "/shop/")],
            "vote.myenterprise.com/shop",
        ),
    ] {
        assert_eq!(one_route(labels).address.to_string(), want, "{labels:?}");
    }
}

#[test]
fn every_switch_means_what_it_says() {
    let settings = |name: &str, text: &str| {
        let label = format!("interlock.{name}");
        one_route(&[HOST, (&label, text)]).settings
    };
    assert!(settings("ssl_only", "true").tls.only && settings("ssl_only", "").tls.only);
    assert_eq!(settings("ssl_only", "false"), RouteSettings::default());
    assert_eq!(settings("ssl", "off"), RouteSettings::default());
    assert!(settings("ssl", "1").tls.serve && settings("ssl_only", "yes").tls.serve);
    assert!(settings("context_root_rewrite", "").rewrite);
    assert!(!settings("context_root_rewrite", "0").rewrite);
    assert_eq!(settings("ip_hash", "true").balance, Balance::ClientIp);
    assert_eq!(settings("ip_hash", "false").balance, Balance::RoundRobin);
    assert_eq!(
        settings("ssl_backend", "true").upstream_tls,
        Some(UpstreamTls { verify: false })
    );
    assert_eq!(settings("ssl_backend", "false").upstream_tls, None);
}

#[test]
fn every_other_label() {
    let route = one_route(&[
        HOST,
        ("interlock.ssl", "true"),
        ("interlock.ssl_cert", "vote.pem"),
        ("interlock.ssl_cert_key", "vote.key"),
        ("interlock.ssl_backend", "true"),
        ("interlock.ssl_backend_tls_verify", "required"),
        ("interlock.port", "8443"),
        ("interlock.network", "voting_voteapp"),
        ("interlock.health_check", "httpchk GET /ping"),
        ("interlock.health_check_interval", "2500"),
        ("interlock.balance_algorithm", "leastconn"),
        ("interlock.backend_option", "forwardfor"),
        ("interlock.backend_option.1", "check rise 1 fall 5"),
        ("interlock.websocket_endpoint", "/ws"),
        ("interlock.websocket_endpoint.1", "/live/"),
    ]);
    assert_eq!(route.remarks, [""; 0]);
    assert_eq!(route.upstream.address.port(), 8443);
    let settings = route.settings;
    assert_eq!(settings.tls.certificate.as_deref(), Some("vote.pem"));
    assert_eq!(settings.tls.key.as_deref(), Some("vote.key"));
    assert_eq!(settings.upstream_tls, Some(UpstreamTls { verify: true }));
    assert_eq!(settings.balance, Balance::LeastConnections);
    assert_eq!(
        settings.websocket_endpoints,
        ["/live".into(), "/ws".into()].into()
    );
    let check = route.upstream.check.unwrap();
    assert_eq!(
        (check.kinds.as_slice(), check.http.path.as_str()),
        (&[CheckKind::Https][..], "/ping")
    );
    assert_eq!(check.http.method, HttpMethod::Get);
    let timing = &check.timing;
    assert_eq!(
        (timing.interval.as_millis(), timing.rise, timing.fall),
        (2_500, 1, 5)
    );
}

#[test]
fn aliases_are_routes_of_their_own_with_the_same_settings() {
    let routes = good(&[
        HOST,
        DOMAIN,
        ("interlock.alias_domain", "poll.example.com"),
        ("interlock.alias_domain.1", "ballot.example.com"),
        ("interlock.alias_domain.0", "vote.myenterprise.com"),
        ("interlock.ssl_only", "true"),
    ]);
    let names: Vec<_> = routes
        .iter()
        .map(|r| (r.address.host.as_str(), r.of.as_str()))
        .collect();
    let of = "vote.myenterprise.com";
    assert_eq!(
        names,
        [(of, of), ("ballot.example.com", of), ("poll.example.com", of)]
    );
    assert!(routes.iter().all(|route| route.settings.tls.only));
}

#[test]
fn a_bad_label_refuses_the_route_and_says_what_to_write() {
    for (label, text, remedy) in [
        ("interlock.hostname", "vo te", "vote.example.com"),
        ("interlock.hostname", "http://vote", "without `http://`"),
        ("interlock.domain", "example.com:80", "without a port"),
        ("interlock.port", "http", "1 to 65535"),
        ("interlock.port", "0", "1 to 65535"),
        ("interlock.ssl", "maybe", "true, false"),
        ("interlock.ssl_only", "ture", "`true`"),
        ("interlock.ssl_cert", "../../etc/passwd", "l7.certificates"),
        ("interlock.ssl_cert_key", "/key.pem", "l7.certificates"),
        ("interlock.ssl_backend", "2", "true, false"),
        ("interlock.ssl_backend_tls_verify", "requird", "`required`"),
        ("interlock.context_root", "shop", "begins with `/`"),
        ("interlock.context_root_rewrite", "x", "true, false"),
        (
            "interlock.websocket_endpoint.3",
            "ws://vote/ws",
            "begins with `/`",
        ),
        ("interlock.health_check", "ping", "httpchk GET /ping"),
        ("interlock.health_check_interval", "5s", "without a unit"),
        ("interlock.balance_algorithm", "leastcon", "`leastconn`"),
        (
            "interlock.backend_option.0",
            "httpchk POST /",
            "httpchk GET /ping",
        ),
        ("interlock.ip_hash", "x", "true, false"),
        ("interlock.network", "other", "voting_voteapp"),
    ] {
        let mut labels = vec![HOST, DOMAIN, ("weir.service.web.listen", "80")];
        labels.retain(|(key, _)| *key != label);
        labels.push((label, text));
        let object = object(&container(&labels), &Site::default()).unwrap();
        assert_eq!(object.routes, [], "{label}={text}");
        assert_eq!(object.services.len(), 1, "{label}: its service is not harmed");
        let [rejection] = object.rejections.as_slice() else {
            panic!("{label}={text}: {:?}", object.rejections)
        };
        assert_eq!(
            rejection.object,
            format!("container voting_voting-app_1 (0123456789ab): label {label}")
        );
        assert!(rejection.remedy.contains(remedy), "{label}={text}: {rejection}");
    }
}

#[test]
fn all_faults_come_together_and_a_bad_alias_costs_itself_alone() {
    let bad = [
        HOST,
        ("interlock.port", "x"),
        ("interlock.ssl", "x"),
        ("interlock.context_root", "x"),
    ];
    let object_of = |labels: Given<'_>| object(&container(labels), &Site::default()).unwrap();
    assert_eq!(object_of(&bad).rejections.len(), 3);
    let alias = object_of(&[
        HOST,
        ("interlock.alias_domain", "a b"),
        ("interlock.alias_domain.1", "b"),
    ]);
    assert_eq!((alias.routes.len(), alias.rejections.len()), (2, 1));
    assert!(
        alias.rejections[0]
            .object
            .ends_with("label interlock.alias_domain")
    );
}

#[test]
fn without_a_host_there_is_no_route_and_it_is_said() {
    let object_of = |labels: Given<'_>| object(&container(labels), &Site::default()).unwrap();
    let found = object_of(&[DOMAIN]);
    assert_eq!(found.routes, []);
    assert!(
        found.rejections[0]
            .remedy
            .contains("add the label interlock.hostname")
    );
    let slip = object_of(&[("interlock.hostnam", "vote"), DOMAIN]);
    assert!(
        slip.rejections[0]
            .remedy
            .contains("did you mean `interlock.hostname`"),
        "{slip:?}"
    );
    // The proxies and Interlock itself are no upstreams.
    for internal in [("interlock.ext.name", "nginx"), ("interlock.app", "main")] {
        let found = object_of(&[internal]);
        assert!(found.routes.is_empty() && found.rejections.is_empty());
    }
}

#[test]
fn what_is_not_meant_is_remarked_and_serves() {
    let unknown = one_route(&[HOST, ("interlock.healthcheck", "x")]);
    assert!(
        unknown.remarks[0].contains("did you mean interlock.health_check?"),
        "{:?}",
        unknown.remarks
    );
    let mut several = container(&[HOST]);
    several.published.clear();
    several.exposed = [(9090, Protocol::Tcp), (8080, Protocol::Tcp), (53, Protocol::Udp)].into();
    let routes = object(&several, &Site::default()).unwrap().routes;
    assert_eq!(routes[0].upstream.address.port(), 8080);
    assert!(routes[0].remarks[0].contains("the lowest of 8080, 9090"));
    several.exposed.clear();
    let none = object(&several, &Site::default()).unwrap();
    assert!(
        none.routes.is_empty() && none.rejections[0].remedy.contains("interlock.port"),
        "{none:?}"
    );
}

#[test]
fn the_state_is_that_of_layer_4() {
    let mut container = container(&[HOST, ("com.docker.lb.hosts", "other")]);
    let state = |container: &Container| {
        let routes = object(container, &Site::default()).unwrap().routes;
        assert_eq!(routes.len(), 2);
        routes[0].upstream.state
    };
    container.health = Some(Health::Unhealthy);
    assert_eq!(state(&container), BackendState::Unready);
    container.health = Some(Health::Healthy);
    assert_eq!(state(&container), BackendState::Active);
    container.stopping = true;
    assert_eq!(state(&container), BackendState::Draining);
    container.labels.insert("weir.enable".into(), "false".into());
    assert_eq!(object(&container, &Site::default()), None);
    container.labels.remove("weir.enable");
    container.state = RunState::Stopped;
    assert_eq!(object(&container, &Site::default()), None);
}

#[test]
fn on_a_remote_engine_the_published_port_is_the_upstream() {
    let site = Site {
        remote: true,
        node: vec!["192.0.2.7".parse().unwrap()],
        ..Site::default()
    };
    let routes = object(&container(&[HOST]), &site).unwrap().routes;
    assert_eq!(routes[0].upstream.address, "192.0.2.7:32768".parse().unwrap());
    let unpublished = object(&container(&[HOST, ("interlock.port", "81")]), &site).unwrap();
    assert!(unpublished.rejections[0].remedy.contains("publish it"));
}

#[test]
fn the_labels_of_interlock_2() {
    let routes = good(&[
        ("com.docker.lb.hosts", "shop.example.com, www.example.com"),
        ("com.docker.lb.port", "8080"),
        ("com.docker.lb.network", "voting_voteapp"),
        ("com.docker.lb.service_cluster", "east"),
        ("com.docker.lb.backend_mode", "vip"),
        ("com.docker.lb.context_root", "/app"),
        ("com.docker.lb.context_root_rewrite", "true"),
        ("com.docker.lb.ssl_cert", "shop.cert"),
        ("com.docker.lb.ssl_key", "shop.key"),
        ("com.docker.lb.ssl_passthrough", "false"),
        ("com.docker.lb.sticky_session_cookie", "session"),
        ("com.docker.lb.ip_hash", "true"),
        ("com.docker.lb.websocket_endpoints", "/ws,/live"),
        (
            "com.docker.lb.redirects",
            "http://old.example.com,http://www.example.com",
        ),
        ("com.docker.lb.default_backend", "true"),
    ]);
    let names: Vec<_> = routes.iter().map(|r| r.address.to_string()).collect();
    assert_eq!(
        names,
        [
            "shop.example.com/app",
            &format!("{ANY_HOST}/app"),
            "www.example.com/app"
        ]
    );
    let RouteWish {
        settings,
        remarks,
        upstream,
        ..
    } = &routes[0];
    assert_eq!(upstream.address.port(), 8080);
    assert!(settings.rewrite && settings.tls.serve && !settings.tls.passthrough);
    assert_eq!(settings.cluster.as_deref(), Some("east"));
    assert_eq!(settings.sticky_cookie.as_deref(), Some("session"));
    assert_eq!(settings.balance, Balance::ClientIp);
    assert_eq!(
        (settings.websocket_endpoints.len(), settings.redirects.len()),
        (2, 1)
    );
    assert!(remarks[0].contains("backend_mode=vip"), "{remarks:?}");
}

#[test]
fn bad_labels_of_interlock_2_refuse_the_route() {
    for (label, text) in [
        ("hosts", "a b"),
        ("hosts", ","),
        ("port", "x"),
        ("backend_mode", "dnsrr"),
        ("context_root", "x"),
        ("context_root_rewrite", "x"),
        ("ssl_cert", "/x"),
        ("ssl_key", ".."),
        ("ssl_passthrough", "x"),
        ("ssl_only", "x"),
        ("ssl_backend", "x"),
        ("ssl_backend_tls_verify", "x"),
        ("sticky_session_cookie", "a b"),
        ("ip_hash", "x"),
        ("websocket_endpoints", "ws"),
        ("redirects", "a"),
        ("default_backend", "x"),
        ("network", "x"),
    ] {
        let full = format!("com.docker.lb.{label}");
        let mut labels = map(&[("com.docker.lb.hosts", "shop")]);
        labels.insert(full.clone(), text.into());
        let mut container = container(&[]);
        container.labels = labels;
        let found = object(&container, &Site::default()).unwrap();
        assert!(found.routes.is_empty(), "{label}={text}");
        assert!(found.rejections[0].object.ends_with(&full), "{found:?}");
    }
}

#[test]
fn two_families_that_claim_the_same_are_told() {
    let container = container(&[HOST, ("com.docker.lb.hosts", "vote.local,shop")]);
    let found = object(&container, &Site::default()).unwrap();
    assert_eq!(found.routes.len(), 2);
    assert!(
        found.rejections[0].fault.contains("vote.local/ is claimed"),
        "{found:?}"
    );
}

#[test]
fn the_document_tells_what_becomes_of_every_label() {
    let docs = include_str!("../../../../docs/migrate-from-interlock.md");
    for (prefix, names) in [(v1::PREFIX, v1::LABELS), (v2::PREFIX, v2::LABELS)] {
        for name in names {
            let row = format!("\n| `{prefix}{name}` | ");
            assert_eq!(
                docs.matches(&row).count(),
                1,
                "docs/migrate-from-interlock.md: {prefix}{name}"
            );
        }
    }
    for algorithm in option::ALGORITHMS {
        assert!(
            docs.contains(&format!("`{algorithm}`")),
            "docs/migrate-from-interlock.md: {algorithm}"
        );
    }
}

/// A label that means something, or nearly, and anything else.
fn label() -> impl Strategy<Value = (String, String)> {
    let known: Vec<String> = [
        (v1::PREFIX, v1::LABELS),
        (v2::PREFIX, v2::LABELS),
        ("weir.service.web.", labels::SETTINGS),
    ]
    .into_iter()
    .flat_map(|(prefix, names)| {
        names
            .iter()
            .map(move |n| format!("{prefix}{}", n.replace("[.N]", ".1")))
    })
    .chain(["weir.enable".into()])
    .collect();
    let key = prop_oneof![
        6 => prop::sample::select(known),
        1 => "(weir|interlock|com\\.docker\\.lb)\\.\\PC{0,12}",
        1 => any::<String>(),
    ];
    let value = prop_oneof![
        any::<String>(),
        "[a-z0-9./,;: *-]{0,16}",
        "(httpchk|check|inter|rise|hash|sticky cookie|hdr\\() ?\\PC{0,12}",
        Just("true".to_owned()),
        Just("80".to_owned()),
        Just("/a".to_owned()),
    ];
    (key, value)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever a container says of itself, the agent lives, and what it takes from it holds what the types promise.
    #[test]
    fn no_labels_can_harm_the_agent(labels in prop::collection::btree_map(any::<String>(), any::<String>(), 0..4),
                                    ours in prop::collection::vec(label(), 0..12),
                                    remote: bool) {
        let mut container = container(&[]);
        container.labels = labels;
        container.labels.extend(ours);
        let site = Site { remote, node: vec!["192.0.2.7".parse().unwrap()], ..Site::default() };
        if let Some(object) = object(&container, &site) {
            for wish in &object.routes {
                let RouteAddress { host, path } = &wish.address;
                prop_assert!(host == ANY_HOST || value::host(host).as_ref() == Ok(host));
                prop_assert!(value::path(path).as_ref() == Ok(path));
                prop_assert_ne!(wish.upstream.address.port(), 0);
                let timing = &wish.upstream.check.as_ref().unwrap().timing;
                prop_assert!(timing.rise > 0 && timing.fall > 0 && !timing.interval.is_zero());
            }
            for rejection in &object.rejections {
                prop_assert!(!rejection.fault.is_empty() && !rejection.remedy.is_empty());
            }
        }
    }
}

#[test]
fn an_upstream_on_an_overlay_network_is_refused() {
    let mut container = container(&[HOST, DOMAIN]);
    let overlay = NetworkAttachment {
        driver: Some("overlay".into()),
        ..NetworkAttachment::default()
    };
    container.routing.networks = [("voting_voteapp".into(), overlay)].into();
    let object = object(&container, &Site::default()).unwrap();
    assert_eq!(object.routes, []);
    let text = object.rejections[0].to_string();
    assert!(
        text.contains("overlay network") && text.contains("bridge network as well"),
        "{text}"
    );
}
