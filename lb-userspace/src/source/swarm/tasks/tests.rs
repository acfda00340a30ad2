use serde_json::{Value, json};

use super::{super::ports::KnownPorts, *};
use crate::source::labels::tests::policy;

/// What the API of Docker answers, as far as it matters here.
fn snapshot(services: &[Value], tasks: &[Value], nodes: &[Value]) -> Snapshot {
    Snapshot {
        services: serde_json::from_value(json!(services)).unwrap(),
        tasks: serde_json::from_value(json!(tasks)).unwrap(),
        nodes: serde_json::from_value(json!(nodes)).unwrap(),
    }
}

fn service(id: &str, labels: Value, ports: Value) -> Value {
    json!({
        "ID": id, "CreatedAt": "2026-01-02T03:04:05.6Z",
        "Spec": {"Name": format!("{id}-name"), "Labels": labels, "EndpointSpec": {"Mode": "vip", "Ports": ports}}
    })
}

fn port(target: u16, published: u16, mode: &str) -> Value {
    json!({"Protocol": "tcp", "TargetPort": target, "PublishedPort": published, "PublishMode": mode})
}

fn task(service: &str, slot: u32, node: &str, published: u16) -> Value {
    json!({
        "ID": format!("{service}-task-{slot}"), "ServiceID": service, "Slot": slot, "NodeID": node,
        "CreatedAt": "2026-01-02T03:04:06Z", "DesiredState": "running",
        "Status": {
            "Timestamp": "2026-01-02T03:04:07Z", "State": "running",
            "PortStatus": {"Ports": [port(8080, published, "host")]}
        }
    })
}

fn node(id: &str, address: &str) -> Value {
    json!({
        "ID": id, "Spec": {"Role": "worker", "Availability": "active"}, "Description": {"Hostname": id},
        "Status": {"State": "ready", "Addr": address}
    })
}

fn web() -> Value {
    json!({"weir.service.web.listen": "80/tcp", "weir.service.web.vip": "web"})
}

fn told(snapshot: &Snapshot) -> BTreeMap<String, Object> {
    objects(snapshot, "swarm", &Allowed::default(), &policy())
}

/// `name address state reason` of each backend of the only wish.
fn backends(object: &Object) -> Vec<String> {
    let [wish] = object.services.as_slice() else {
        panic!("{object:#?}")
    };
    let line = |b: &crate::model::Backend| format!("{} {} {:?}: {}", b.name, b.address, b.state, b.reason);
    wish.backends.iter().map(line).collect()
}

/// The only refusal of all objects.
fn refusal(snapshot: &Snapshot) -> String {
    let told = told(snapshot);
    let mut all = told.values().flat_map(|object| &object.rejections);
    let first = all.next().expect("a refusal").to_string();
    assert_eq!(all.next(), None, "one refusal says it");
    first
}

#[test]
fn a_service_is_one_object_with_a_backend_for_each_running_task() {
    let host = json!([port(8080, 0, "host")]);
    let snapshot = snapshot(
        &[
            service("s1", web(), host.clone()),
            service("s2", json!({"other": "x"}), host),
        ],
        &[
            task("s1", 1, "n1", 32768),
            task("s1", 2, "n2", 32769),
            task("s2", 1, "n1", 32770),
        ],
        &[node("n1", "192.0.2.11"), node("n2", "192.0.2.12")],
    );
    let told = told(&snapshot);
    assert_eq!(told.keys().collect::<Vec<_>>(), ["s1"]);
    let object = &told["s1"];
    assert_eq!((object.id.as_str(), object.name.as_str()), ("s1", "s1-name"));
    assert_eq!(object.created, time(Some("2026-01-02T03:04:05.6Z")));
    assert_eq!(object.rejections, []);
    assert_eq!(
        backends(object),
        [
            "s1-name.1 192.0.2.11:32768 Active: running",
            "s1-name.2 192.0.2.12:32769 Active: running"
        ]
    );
}

#[test]
fn only_tasks_that_run_and_shall_go_on_serve() {
    let states = [
        ("running", "running", true),
        ("running", "shutdown", false),
        ("running", "remove", false),
        ("starting", "running", false),
        ("preparing", "running", false),
        ("failed", "running", false),
        ("complete", "shutdown", false),
    ];
    for (state, desired, serves) in states {
        let mut task = task("s1", 1, "n1", 32768);
        task["Status"]["State"] = json!(state);
        task["DesiredState"] = json!(desired);
        let snapshot = snapshot(
            &[service("s1", web(), json!([port(8080, 0, "host")]))],
            &[task],
            &[node("n1", "192.0.2.11")],
        );
        assert_eq!(told(&snapshot).contains_key("s1"), serves, "{state}, {desired}");
    }
}

#[test]
fn tasks_of_nodes_that_leave_drain() {
    for (change, want) in [
        (
            json!({"Status": {"State": "down", "Addr": "192.0.2.11"}}),
            "Draining: node n1 is down",
        ),
        (
            json!({"Spec": {"Availability": "drain"}}),
            "Draining: node n1 is being drained",
        ),
        (json!({"Spec": {"Availability": "pause"}}), "Active: running"),
        // After an election the new leader knows no node's state for a while.
        (
            json!({"Status": {"State": "unknown", "Addr": "192.0.2.11"}}),
            "Active: running",
        ),
        (
            json!({"Status": {"State": "disconnected", "Addr": "192.0.2.11"}}),
            "Active: running",
        ),
    ] {
        let mut leaving = node("n1", "192.0.2.11");
        for (key, value) in change.as_object().unwrap() {
            leaving[key] = value.clone();
        }
        let routes = json!({
            "weir.service.web.listen": "80/tcp", "weir.service.web.vip": "web",
            "com.docker.lb.hosts": "app.example.com", "com.docker.lb.port": "8080",
        });
        let snapshot = snapshot(
            &[service("s1", routes, json!([port(8080, 0, "host")]))],
            &[task("s1", 1, "n1", 32768), task("s1", 2, "n2", 32769)],
            &[leaving, node("n2", "192.0.2.12")],
        );
        let told = told(&snapshot);
        assert_eq!(
            backends(&told["s1"]),
            [
                format!("s1-name.1 192.0.2.11:32768 {want}"),
                "s1-name.2 192.0.2.12:32769 Active: running".to_owned()
            ]
        );
        let upstreams: Vec<_> = told["s1"].routes.iter().map(|route| &route.upstream).collect();
        assert_eq!(upstreams.len(), 2);
        assert!(format!("{:?}: {}", upstreams[0].state, upstreams[0].reason) == want);
        assert_eq!(upstreams[1].state, BackendState::Active);
    }
}

#[test]
fn a_port_that_no_node_publishes_is_one_refusal_with_its_remedy() {
    let without = |mut task: Value| {
        task["Status"]["PortStatus"] = json!({});
        task
    };
    let tasks = [
        without(task("s1", 1, "n1", 1)),
        without(task("s1", 2, "n2", 1)),
        without(task("s1", 3, "n2", 1)),
    ];
    let nodes = [node("n1", "192.0.2.11"), node("n2", "192.0.2.12")];
    for (labels, ports, wants) in [
        (
            web(),
            json!([port(8080, 80, "ingress")]),
            [
                "service s1-name: label weir.service.web.port",
                "port 8080/tcp is published in Swarm's ingress mesh, not on the nodes",
                "mode=host,target=8080,protocol=tcp",
            ],
        ),
        (
            web(),
            json!(null),
            [
                "service s1-name: label weir.service.web.port",
                "port 80/tcp is not published on the nodes",
                "mode=host,target=80,",
            ],
        ),
        (
            json!({"com.docker.lb.hosts": "app.example.com", "com.docker.lb.port": "9000"}),
            json!([port(8080, 80, "ingress")]),
            [
                "service s1-name: label com.docker.lb.port",
                "port 9000/tcp is not published on the nodes",
                "mode=host,target=9000",
            ],
        ),
    ] {
        let snapshot = snapshot(&[service("s1", labels, ports)], &tasks, &nodes);
        let refusal = refusal(&snapshot);
        for want in wants {
            assert!(refusal.contains(want), "{want}: {refusal}");
        }
    }
}

#[test]
fn ports_that_swarm_forgets_are_remembered_for_as_long_as_the_task_runs() {
    let mut known = KnownPorts::default();
    let seen = |known: &mut KnownPorts, tasks: &[Value], host: u16| {
        let services = [service("s1", web(), json!([port(8080, host, "host")]))];
        let mut snapshot = snapshot(&services, tasks, &[node("n1", "192.0.2.11")]);
        known.complete(&mut snapshot);
        told(&snapshot).remove("s1").unwrap()
    };
    let mut forgotten = task("s1", 1, "n1", 32768);
    assert_eq!(
        backends(&seen(&mut known, &[forgotten.clone()], 0)),
        ["s1-name.1 192.0.2.11:32768 Active: running"]
    );
    for without in [json!({}), json!(null), json!({"Ports": []})] {
        forgotten["Status"]["PortStatus"] = without;
        assert_eq!(
            backends(&seen(&mut known, &[forgotten.clone()], 0)),
            ["s1-name.1 192.0.2.11:32768 Active: running"]
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("swarm.json");
    known.keep(&file).unwrap();
    assert_eq!(KnownPorts::recall(&file).unwrap(), known);
    assert_eq!(
        KnownPorts::recall(&dir.path().join("none")).unwrap(),
        KnownPorts::default()
    );
    // It is gone, and with it what was known of it.
    assert_eq!(
        backends(&seen(&mut known, &[task("s1", 2, "n1", 32769)], 0)).len(),
        1
    );
    let refused = seen(&mut known, &[forgotten.clone()], 0).rejections[0].to_string();
    for want in ["port 8080/tcp is published on the nodes, but", "--force"] {
        assert!(refused.contains(want), "{want}: {refused}");
    }
    // A port that the service names needs nobody's word.
    assert_eq!(
        backends(&seen(&mut known, &[forgotten], 8081)),
        ["s1-name.1 192.0.2.11:8081 Active: running"]
    );
}

#[test]
fn bad_labels_harm_their_service_alone() {
    let bad = json!({"weir.service.web.listen": "80/tcp", "weir.service.web.vip": "web", "weir.service.web.weight": "x"});
    let host = json!([port(8080, 0, "host")]);
    let snapshot = snapshot(
        &[service("s1", bad, host.clone()), service("s2", web(), host)],
        &[
            task("s1", 1, "n1", 32768),
            task("s1", 2, "n1", 32769),
            task("s2", 1, "n1", 32770),
        ],
        &[node("n1", "192.0.2.11")],
    );
    assert!(refusal(&snapshot).contains("service s1-name: label weir.service.web.weight"));
    let told = told(&snapshot);
    assert_eq!(told["s1"].services, []);
    assert_eq!(
        backends(&told["s2"]),
        ["s2-name.1 192.0.2.11:32770 Active: running"]
    );
}

#[test]
fn a_node_is_reached_where_its_label_says_or_where_swarm_sees_it() {
    let at = |node: Value| {
        let snapshot = snapshot(
            &[service("s1", web(), json!([port(8080, 0, "host")]))],
            &[task("s1", 1, "n1", 32768)],
            &[node],
        );
        let told = told(&snapshot);
        match told.get("s1") {
            Some(object) => object
                .services
                .iter()
                .map(|wish| wish.backends[0].address.to_string())
                .collect::<Vec<_>>()
                .join(" "),
            None => refusal(&snapshot),
        }
    };
    assert_eq!(at(node("n1", "192.0.2.11")), "192.0.2.11:32768");
    let mut labelled = node("n1", "192.0.2.11");
    labelled["Spec"]["Labels"] = json!({"weir.address": "198.51.100.7, 2001:db8::7"});
    assert_eq!(at(labelled.clone()), "198.51.100.7:32768 [2001:db8::7]:32768");
    labelled["Spec"]["Labels"] = json!({"weir.address": "n1.example.com"});
    let refused = at(labelled);
    assert!(
        refused.contains("node n1: label weir.address") && refused.contains("docker node update"),
        "{refused}"
    );
    let mut manager = node("n1", "127.0.0.1");
    manager["ManagerStatus"] =
        json!({"Leader": true, "Reachability": "reachable", "Addr": "192.0.2.11:2377"});
    assert_eq!(at(manager), "192.0.2.11:32768");
    let refused = at(node("n1", "0.0.0.0"));
    assert!(
        refused.contains("at which address") && refused.contains("weir.address=192.0.2.12 n1"),
        "{refused}"
    );
}

#[test]
fn limits_of_the_swarm_hold_for_its_services() {
    let allow = Allowed {
        services: Some(vec!["shop-*".into()]),
        ..Allowed::default()
    };
    let snapshot = snapshot(
        &[service("s1", web(), json!([port(8080, 0, "host")]))],
        &[task("s1", 1, "n1", 32768)],
        &[node("n1", "192.0.2.11")],
    );
    let told = objects(&snapshot, "swarm:one", &allow, &policy());
    let refusal = told["s1"].rejections[0].to_string();
    assert!(
        refusal.contains("swarm:one") && refusal.contains("allow-services"),
        "{refusal}"
    );
}

#[test]
fn what_swarm_does_not_say_harms_nobody() {
    // Objects between two states: no spec, no status, no node, a node that is not listed yet.
    let unknown_node = task("s1", 2, "n9", 32769);
    let snapshot = snapshot(
        &[
            json!({}),
            json!({"ID": "s0"}),
            service("s1", web(), json!([port(8080, 0, "host")])),
        ],
        &[
            json!({}),
            json!({"ID": "t", "ServiceID": "s1"}),
            unknown_node,
            task("s1", 1, "n1", 32768),
        ],
        &[json!({}), json!({"ID": "n0"}), node("n1", "192.0.2.11")],
    );
    let told = told(&snapshot);
    assert_eq!(told.len(), 1);
    assert_eq!(
        backends(&told["s1"]),
        ["s1-name.1 192.0.2.11:32768 Active: running"]
    );
}

#[test]
fn a_disabled_service_and_a_healthcheck() {
    let mut labels = web();
    labels["weir.enable"] = json!("false");
    let host = json!([port(8080, 0, "host")]);
    let nodes = [node("n1", "192.0.2.11")];
    let off = snapshot(
        &[service("s1", labels, host.clone())],
        &[task("s1", 1, "n1", 32768)],
        &nodes,
    );
    assert!(told(&off).is_empty());
    let mut labels = web();
    labels["weir.service.web.check"] = json!("docker");
    let mut checked = task("s1", 1, "n1", 32768);
    let unchecked = snapshot(
        &[service("s1", labels.clone(), host.clone())],
        &[checked.clone()],
        &nodes,
    );
    assert!(refusal(&unchecked).contains("HEALTHCHECK"));
    checked["Spec"] = json!({"ContainerSpec": {"HealthCheck": {"Test": ["CMD", "/check"]}}});
    let checked = snapshot(&[service("s1", labels, host)], &[checked], &nodes);
    assert_eq!(
        backends(&told(&checked)["s1"]),
        ["s1-name.1 192.0.2.11:32768 Active: health: healthy"]
    );
}
