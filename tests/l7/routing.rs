//! Which upstream a request goes to.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use serde_json::json;

use super::{
    agent::{Agent, route, with},
    origin::{Origin, nobody},
    shim::Shim,
    wire::{Wire, get},
};

#[test]
fn hosts_aliases_wildcards_paths_and_the_default_lead_to_their_upstreams() {
    let folder = tempfile::tempdir().unwrap();
    let origins: Vec<Origin> = (0..5).map(|_| Origin::start()).collect();
    let at = |index: usize| [origins[index].address];
    let routes = json!([
        with(
            route("vote.example", &at(0)),
            json!({ "aliases": ["poll.example"] })
        ),
        route("*.example", &at(1)),
        with(
            route("vote.example", &at(2)),
            json!({ "path": "/shop", "settings": { "rewrite": true } })
        ),
        with(route("vote.example", &at(3)), json!({ "path": "/shop/cart" })),
        with(route("plain.test", &at(0)), json!({ "path": "/only" })),
    ]);
    let agent = Agent::start(folder.path(), &json!({}), &routes);
    let shim = Shim::start(folder.path());
    let address = shim.address();
    for (host, path, origin) in [
        ("vote.example", "/", 0),
        ("VOTE.example.:8080", "/x", 0),
        ("poll.example", "/", 0),
        ("other.example", "/", 1),
        ("vote.example", "/shopping", 0),
        ("vote.example", "/shop", 2),
        ("vote.example", "/shop/a?b=c", 2),
        ("vote.example", "/shop/cart/1", 3),
        ("plain.test", "/only/this", 0),
    ] {
        let answer = get(address, host, path);
        assert_eq!(
            (answer.status, answer.text()),
            (200, origins[origin].name()),
            "{host}{path}"
        );
    }
    let seen = origins[2].requests();
    assert!(
        seen[0].starts_with("GET / HTTP") && seen[1].starts_with("GET /a?b=c HTTP"),
        "{seen:?}"
    );
    assert!(origins[3].requests()[0].starts_with("GET /shop/cart/1 "));
    let unknown = get(address, "nobody.test", "/");
    assert_eq!(unknown.status, 503);
    assert!(unknown.text().contains("nobody serves this host"));
    assert_eq!(get(address, "plain.test", "/other").status, 404);

    let states = shim.states();
    agent.routes(&json!([with(route("*", &at(4)), json!({}))]));
    shim.await_states(states + 1);
    let mut wire = Wire::connect(address);
    while wire.get("nobody.test", "/").text() != origins[4].name() {}
}

#[test]
fn requests_are_spread_as_the_route_says() {
    let folder = tempfile::tempdir().unwrap();
    let origins: Vec<Origin> = (0..3).map(|_| Origin::start()).collect();
    let all: Vec<_> = origins.iter().map(|origin| origin.address).collect();
    let mut weighted = route("weighted", &all);
    weighted["upstreams"][0]["weight"] = json!(4);
    weighted["upstreams"][2]["state"] = json!("unready");
    let settings = |settings| json!({ "settings": settings });
    let routes = json!([
        route("turns", &all),
        weighted,
        with(
            route("least", &all),
            settings(json!({ "balance": "least-connections" }))
        ),
        with(route("client", &all), settings(json!({ "balance": "client-ip" }))),
        with(route("sticky", &all), settings(json!({ "sticky_cookie": "srv" }))),
    ]);
    let _agent = Agent::start(folder.path(), &json!({}), &routes);
    let shim = Shim::start_with(folder.path(), &["--http", "127.0.0.1:0", "--workers", "1"]);
    let mut wire = Wire::connect(shim.address());
    let mut count = |host: &str, requests: usize| {
        let mut counts = BTreeMap::new();
        for _ in 0..requests {
            *counts.entry(wire.get(host, "/").text()).or_insert(0) += 1;
        }
        counts
    };
    let even: BTreeMap<String, i32> = origins.iter().map(|origin| (origin.name(), 10)).collect();
    assert_eq!(count("turns", 30), even);
    assert_eq!(count("least", 30), even);
    assert_eq!(
        count("weighted", 50),
        [(origins[0].name(), 40), (origins[1].name(), 10)].into()
    );
    assert_eq!(count("client", 20).len(), 1);

    let first = wire.get("sticky", "/");
    let cookie = first
        .header("set-cookie")
        .unwrap()
        .split(';')
        .next()
        .unwrap()
        .to_owned();
    assert!(
        cookie.starts_with("srv=") && !cookie.contains("127.0.0.1"),
        "{cookie}"
    );
    for _ in 0..5 {
        wire.send(format!(
            "GET / HTTP/1.1\r\nHost: sticky\r\nCookie: a=b; {cookie}\r\n\r\n"
        ));
        let again = wire.answer();
        assert_eq!((again.text(), again.header("set-cookie")), (first.text(), None));
    }
}

#[test]
fn upstreams_that_are_not_there_are_gone_around() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let routes = json!([
        route("some", &[nobody(), origin.address, nobody()]),
        route("none", &[nobody()]),
        route("empty", &[]),
    ]);
    let _agent = Agent::start(folder.path(), &json!({}), &routes);
    let shim = Shim::start(folder.path());
    let mut wire = Wire::connect(shim.address());
    for _ in 0..20 {
        assert_eq!(wire.get("some", "/").text(), origin.name());
        // Nothing was sent yet: a body can go elsewhere too.
        wire.send("POST /echo HTTP/1.1\r\nHost: some\r\nContent-Length: 4\r\n\r\nbody");
        assert_eq!(wire.answer().text(), "body");
    }
    assert_eq!(wire.get("none", "/").status, 502);
    assert_eq!(wire.get("empty", "/").status, 503);
}

#[test]
fn redirects_are_answered_by_the_shim() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let routes = json!([
        with(
            route("secure", &[origin.address]),
            json!({ "settings": { "tls": { "serve": true, "only": true } } })
        ),
        with(
            route("new.example", &[origin.address]),
            json!({ "settings": { "redirects": [
            { "from": "http://old.example", "to": "https://new.example" }] } })
        ),
    ]);
    let settings = json!({
        "redirect_to_https": ["ucp.example"], "https_port": 8443, "trusted_proxies": ["127.0.0.0/8"]
    });
    let _agent = Agent::start(folder.path(), &settings, &routes);
    let shim = Shim::start(folder.path());
    for (host, status, location) in [
        ("secure", 301, "https://secure:8443/a?b"),
        // Not by the shim's port: it is served around it.
        ("ucp.example:80", 301, "https://ucp.example/a?b"),
        ("old.example", 302, "https://new.example/a?b"),
    ] {
        let answer = get(shim.address(), host, "/a?b");
        assert_eq!(
            (answer.status, answer.header("location")),
            (status, Some(location))
        );
    }
    // What is asked of the host itself has no path that a URL could have.
    let mut wire = Wire::connect(shim.address());
    wire.send("OPTIONS * HTTP/1.1\r\nHost: secure\r\n\r\n");
    assert_eq!(wire.answer().header("location"), Some("https://secure:8443/"));
    // One that comes back by HTTPS is not sent around again.
    let mut wire = Wire::connect(shim.address());
    wire.send("GET / HTTP/1.1\r\nHost: ucp.example\r\nX-Forwarded-Proto: https\r\n\r\n");
    assert_eq!(wire.answer().status, 503);
    assert!(origin.requests().is_empty());
}

#[test]
fn curl_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let _agent = Agent::start(
        folder.path(),
        &json!({}),
        &json!([route("a.example", &[origin.address])]),
    );
    let shim = Shim::start(folder.path());
    let url = format!("http://a.example:{}", shim.address().port());
    let resolve = format!("a.example:{}:127.0.0.1", shim.address().port());
    let curl = |words: &[&str]| {
        let output = Command::new("curl")
            .args(["-sS", "--resolve", &resolve])
            .args(words)
            .output();
        let output = output.expect("curl");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(curl(&[&format!("{url}/")]), origin.name());
    assert_eq!(
        curl(&["--http2-prior-knowledge", &format!("{url}/")]),
        origin.name()
    );
    assert_eq!(curl(&["--http1.0", &format!("{url}/")]), origin.name());
    // 20 requests on each of some connections: the upstream sees few.
    let urls = format!("{url}/[1-20]");
    curl(&[&urls]);
    let words = curl(&[
        "-H",
        "Expect: 100-continue",
        "-d",
        "hello",
        &format!("{url}/echo"),
    ]);
    assert_eq!(words, "hello");
    let connections = origin.seen.connections.load(std::sync::atomic::Ordering::SeqCst);
    assert!(connections <= 4, "{connections} connections for 24 requests");
    let hosts: BTreeSet<bool> = origin
        .requests()
        .iter()
        .map(|r| r.contains("host: a.example"))
        .collect();
    assert_eq!(hosts, [true].into());
}

#[test]
fn an_upstream_that_comes_back_gets_its_share_in_tenths() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (Origin::start(), Origin::start());
    let both = route("a", &[old.address, new.address]);
    let with_share = |tenths: u8| {
        let mut slow = serde_json::Map::new();
        slow.insert(new.address.to_string(), json!(tenths));
        json!([with(both.clone(), json!({ "slow": slow }))])
    };
    let agent = Agent::start(folder.path(), &json!({}), &with_share(1));
    let shim = Shim::start_with(folder.path(), &["--http", "127.0.0.1:0", "--workers", "1"]);
    let mut wire = Wire::connect(shim.address());
    let mut of_new = |requests: usize| {
        let names = (0..requests).map(|_| wire.get("a", "/").text());
        names.filter(|name| *name == new.name()).count()
    };
    // Ten to one, in every round of eleven.
    assert_eq!((of_new(11), of_new(11)), (1, 1));
    // Ten to five is two to one; ten to nine.
    for (tenths, round, share) in [(5, 3, 1), (9, 19, 9)] {
        let states = shim.states();
        agent.routes(&with_share(tenths));
        shim.await_states(states + 1);
        assert_eq!(of_new(2 * round), 2 * share);
    }
    let states = shim.states();
    agent.routes(&json!([both]));
    shim.await_states(states + 1);
    assert_eq!(of_new(10), 5);
}
