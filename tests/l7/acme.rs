//! Certificates by ACME, from a real authority (Pebble) that comes to the shim through a namespace of its own.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lb_tests::{
    netns::Namespace,
    pebble::{BLOCKED, Pebble},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{
    agent::{Agent, route, with},
    origin::Origin,
    shim::{PATIENCE, Shim},
    updates::Orphan,
    wire::{Answer, get},
};

/// Where the authority asks, with a token that nobody has ordered.
const QUESTION: &str = "/.well-known/acme-challenge/a-token_of-nobody";
/// Where the shim's metrics are.
const METRICS: &str = "127.0.0.1:9642";
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A namespace with a server of routes.
struct Place {
    namespace: Namespace,
    origin: Origin,
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let namespace = Namespace::new("acme").unwrap();
        let origin = namespace.run(Origin::start);
        let folder = tempfile::tempdir().unwrap();
        Self {
            namespace,
            origin,
            folder,
        }
    }

    fn route(&self, host: &str) -> Value {
        route(host, &[self.origin.address])
    }

    fn agent(&self, pebble: &Pebble<'_>, acme: Value, routes: &Value) -> Agent {
        Agent::start(self.folder.path(), &settings(pebble, acme), routes)
    }

    /// An authority whose certificates are good for 90 days, and an agent with one host, `a.example`.
    fn authority(&self) -> (Pebble<'_>, Agent) {
        let pebble = Pebble::started(&self.namespace, 90 * DAY).unwrap();
        let agent = self.agent(&pebble, json!({}), &json!([self.route("a.example")]));
        (pebble, agent)
    }

    /// A shim at this address, where the authority finds it.
    fn shim(&self, address: &str) -> Shim {
        self.shim_with(address, &[])
    }

    fn shim_with(&self, address: &str, words: &[&str]) -> Shim {
        let (http, https) = (format!("{address}:80"), format!("{address}:443"));
        let words = [&["--http", &http, "--https", &https], words].concat();
        Shim::start_in(&self.namespace, self.folder.path(), &words)
    }

    fn acme(&self) -> PathBuf {
        self.folder.path().join("acme")
    }

    fn get(&self, address: &str, host: &str, path: &str) -> Answer {
        let address: SocketAddr = address.parse().unwrap();
        self.namespace.run(|| get(address, host, path))
    }

    /// What curl gets from a host by HTTPS at this address, trusting the authority alone.
    fn https(&self, address: &str, host: &str, root: &Path) -> Result<String, String> {
        let mut command = self.namespace.command("curl");
        command
            .args(["-sS", "--max-time", "10", "--cacert"])
            .arg(root)
            .args(["--connect-to", &format!("::{address}:443")])
            .arg(format!("https://{host}/"));
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(text(&output.stderr))
        }
    }

    /// Waits until a host is served by HTTPS.
    fn await_https(&self, address: &str, host: &str, root: &Path) {
        eventually("a certificate is served", || {
            (self.https(address, host, root)? == self.origin.name())
                .then_some(())
                .ok_or_else(|| "another server".into())
        });
    }

    fn metric(&self, name: &str) -> Option<u64> {
        let text = self.get(METRICS, "localhost", "/metrics").text();
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
        value.map(|value| value.parse().unwrap())
    }
}

/// Settings for this authority.
fn settings(pebble: &Pebble<'_>, acme: Value) -> Value {
    let usual = json!({
        "directory": pebble.directory(), "ca": pebble.ca(), "agree_terms": true, "hosts": ["*.example"],
        "contact": ["ops@example.com"], "retry_ms": 1000,
    });
    json!({ "acme": with(usual, acme), "metrics": METRICS })
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        match look() {
            Ok(found) => return found,
            Err(why) => assert!(Instant::now() < until, "{what}: not yet: {why}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until a shim has said this of a host so many times.
fn await_said(shim: &Shim, message: &str, host: &str, times: usize) {
    shim.await_log(&format!("{message} ({host})"), |lines| {
        let of = |line: &&Value| line["message"] == message && line["host"] == host;
        (lines.iter().filter(of).count() >= times).then_some(())
    });
}

const ORDERED: &str = "ordering a certificate";
const CAME: &str = "a certificate has come";

/// Waits for a warning with all of these parts.
fn await_warning(shim: &Shim, parts: &[&str]) {
    shim.await_log(&format!("{parts:?}"), |lines| {
        let has = |line: &Value| {
            let said = line["message"].as_str();
            said.is_some_and(|said| parts.iter().all(|part| said.contains(part)))
        };
        lines.iter().any(has).then_some(())
    });
}

fn orders_of(shim: &Shim, host: &str) -> usize {
    shim.await_log("anything", |lines| {
        let of = |line: &&Value| line["message"] == ORDERED && line["host"] == host;
        Some(lines.iter().filter(of).count())
    })
}

#[test]
fn a_host_without_a_certificate_gets_one_through_its_own_shim() {
    let place = Place::new();
    let pebble = Pebble::started(&place.namespace, 90 * DAY).unwrap();
    let secure = with(
        place.route("a.example"),
        json!({ "aliases": ["alias.example"], "settings": { "tls": { "only": true } } }),
    );
    let routes = json!([secure, place.route("foreign.test"), place.route("*.wild.example")]);
    let _agent = place.agent(&pebble, json!({}), &routes);
    let shim = place.shim("127.0.0.1");
    for host in ["a.example", "alias.example"] {
        await_said(&shim, CAME, host, 1);
    }
    let root = pebble.root().unwrap();
    for host in ["a.example", "alias.example"] {
        place.await_https("127.0.0.1", host, &root);
    }
    await_warning(&shim, &["*.wild.example", "HTTP-01 does not prove wildcards"]);

    // The question is answered where everything else is a redirect, and for our hosts alone.
    let asked = |host: &str, path: &str| place.get("127.0.0.1:80", host, path);
    let account: Value =
        serde_json::from_slice(&fs::read(place.acme().join("account.json")).unwrap()).unwrap();
    let thumbprint = account["thumbprint"].as_str().unwrap();
    assert_eq!(asked("a.example", "/x").status, 301);
    let answer = asked("A.Example", QUESTION);
    assert_eq!(
        (answer.status, answer.text()),
        (200, format!("a-token_of-nobody.{thumbprint}"))
    );
    assert_eq!(
        answer.header("content-type"),
        Some("application/octet-stream"),
        "no browser shows it"
    );
    assert_eq!(asked("a.example", &format!("{QUESTION}/x")).status, 301);
    assert_eq!(asked("foreign.test", QUESTION).text(), place.origin.name());
    assert_eq!(asked("x.wild.example", QUESTION).text(), place.origin.name());
    assert_eq!(asked("unknown.example", QUESTION).status, 503);
    assert!(place.https("127.0.0.1", "foreign.test", &root).is_err());

    let until = place
        .metric("weir_l7_certificate_expiry_seconds{host=\"a.example\"}")
        .unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let days = until
        .saturating_sub(now.unwrap().as_secs())
        .div_ceil(DAY.as_secs());
    assert_eq!(days, 90);
    assert_eq!(
        place.metric("weir_l7_certificate_expiry_seconds{host=\"foreign.test\"}"),
        None
    );
    let page = place.get(METRICS, "localhost", "/").text();
    assert!(page.contains("<td>alias.example</td><td>89d23h</td>"), "{page}");

    // Nobody else reads keys, and no log has them.
    for file in ["account.json", "a.example.pem", "alias.example.pem"] {
        let mode = fs::metadata(place.acme().join(file))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    let secret = account["account"]["key_pkcs8"].as_str().unwrap();
    shim.await_log("nothing secret", |lines| {
        let text = Value::from(lines.to_vec()).to_string();
        assert!(!text.contains(secret) && !text.contains("PRIVATE KEY"));
        Some(())
    });
}

#[test]
fn shims_share_a_folder_and_a_restart_orders_nothing() {
    let place = Place::new();
    let (pebble, agent) = place.authority();
    let first = place.shim("127.0.0.1");
    await_said(&first, CAME, "a.example", 1);
    let root = pebble.root().unwrap();
    let account = || fs::read(place.acme().join("account.json")).unwrap();
    let one_for_all = account();

    let second = place.shim("127.0.0.2");
    await_warning(&second, &["ordered by another process"]);
    place.await_https("127.0.0.2", "a.example", &root);
    // The authority comes to a shim that has not ordered: it answers for the other one.
    eventually("an answer", || {
        let answer = place.get("127.0.0.2:80", "a.example", QUESTION);
        (answer.text().starts_with("a-token_of-nobody."))
            .then_some(())
            .ok_or_else(|| answer.text())
    });
    pebble.place("b.example", "127.0.0.2").unwrap();
    agent.routes(&json!([place.route("a.example"), place.route("b.example")]));
    await_said(&first, CAME, "b.example", 1);
    place.await_https("127.0.0.2", "b.example", &root);
    assert_eq!(
        (orders_of(&second, "a.example"), orders_of(&second, "b.example")),
        (0, 0)
    );

    // Who orders goes: the other one does, and has nothing to do but what is new.
    first.signal(Signal::SIGTERM);
    await_warning(&second, &["ordered by this process"]);
    drop(first);
    pebble.place("c.example", "127.0.0.2").unwrap();
    let all = ["a.example", "b.example", "c.example"].map(|host| place.route(host));
    agent.routes(&json!(all));
    await_said(&second, CAME, "c.example", 1);
    drop(second);

    let third = place.shim("127.0.0.1");
    await_warning(&third, &["ordered by this process"]);
    let four = ["a.example", "b.example", "c.example", "d.example"].map(|host| place.route(host));
    agent.routes(&json!(four));
    await_said(&third, CAME, "d.example", 1);
    for host in ["a.example", "b.example", "c.example", "d.example"] {
        place.await_https("127.0.0.1", host, &root);
    }
    for host in ["a.example", "b.example", "c.example"] {
        assert_eq!(orders_of(&third, host), 0, "{host} was there");
    }
    assert_eq!(account(), one_for_all);
}

#[test]
fn certificates_are_renewed_before_they_end() {
    let place = Place::new();
    let pebble = Pebble::started(&place.namespace, Duration::from_secs(3600)).unwrap();
    // Two seconds after they have come.
    let renewal = json!({ "renew_before_ms": 3_598_000 });
    let _agent = place.agent(&pebble, renewal, &json!([place.route("a.example")]));
    let shim = place.shim("127.0.0.1");
    await_said(&shim, CAME, "a.example", 1);
    let root = pebble.root().unwrap();
    place.await_https("127.0.0.1", "a.example", &root);
    let file = place.acme().join("a.example.pem");
    let before = fs::read(&file).unwrap();
    await_said(&shim, CAME, "a.example", 2);
    eventually("another certificate", || {
        let now = fs::read(&file).map_err(|error| error.to_string())?;
        (now != before).then_some(()).ok_or_else(|| "the same".into())
    });
    assert_eq!(
        place.https("127.0.0.1", "a.example", &root),
        Ok(place.origin.name())
    );
}

#[test]
fn a_host_that_cannot_be_proven_stops_no_other_and_is_tried_again() {
    let place = Place::new();
    let pebble = Pebble::started(&place.namespace, 90 * DAY).unwrap();
    // Nobody is there.
    pebble.place("bad.example", "127.0.0.9").unwrap();
    let routes = json!([
        place.route("bad.example"),
        place.route(BLOCKED),
        place.route("good.example")
    ]);
    let _agent = place.agent(&pebble, json!({}), &routes);
    let shim = place.shim("127.0.0.1");
    await_said(&shim, CAME, "good.example", 1);
    let root = pebble.root().unwrap();
    place.await_https("127.0.0.1", "good.example", &root);
    await_warning(
        &shim,
        &["no certificate of bad.example", "port 80", "trying again in"],
    );
    await_warning(
        &shim,
        &["no certificate of blocked.example", "`hosts` of [l7.acme]"],
    );
    assert!(place.metric("weir_l7_acme_errors_total{host=\"bad.example\"}") >= Some(1));
    let of_good = place.metric("weir_l7_acme_errors_total{host=\"good.example\"}");
    assert!(of_good.is_some());
    assert!(place.https("127.0.0.1", "bad.example", &root).is_err());
    pebble.place_back("bad.example").unwrap();
    await_said(&shim, CAME, "bad.example", 1);
    place.await_https("127.0.0.1", "bad.example", &root);
}

#[test]
fn an_authority_that_is_away_or_forgets_is_asked_again() {
    let place = Place::new();
    let mut pebble = Pebble::new(&place.namespace, 90 * DAY).unwrap();
    let agent = place.agent(&pebble, json!({}), &json!([place.route("a.example")]));
    let shim = place.shim("127.0.0.1");
    await_warning(
        &shim,
        &[
            "no certificates are ordered",
            "no account at https",
            "trying again",
        ],
    );
    assert_eq!(
        place.get("127.0.0.1:80", "a.example", "/").text(),
        place.origin.name()
    );
    assert!(place.metric("weir_l7_acme_errors_total{host=\"\"}") >= Some(1));
    pebble.start().unwrap();
    await_said(&shim, CAME, "a.example", 1);
    let account = || -> Value {
        serde_json::from_slice(&fs::read(place.acme().join("account.json")).unwrap()).unwrap()
    };
    let before = account();

    // It comes back without the account; the key, by which other shims answer, stays.
    pebble.start().unwrap();
    agent.routes(&json!([place.route("a.example"), place.route("b.example")]));
    await_said(&shim, CAME, "b.example", 1);
    place.await_https("127.0.0.1", "b.example", &pebble.root().unwrap());
    assert_eq!(account()["thumbprint"], before["thumbprint"]);
    assert_ne!(account()["account"]["id"], before["account"]["id"]);
}

#[test]
fn a_node_answers_for_the_order_of_another_one_by_a_copy_of_its_account() {
    let place = Place::new();
    let (pebble, agent) = place.authority();
    let first = place.shim("127.0.0.1");
    await_said(&first, CAME, "a.example", 1);
    let root = pebble.root().unwrap();

    let other = place.folder.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::copy(place.acme().join("account.json"), other.join("account.json")).unwrap();
    pebble.place("b.example", "127.0.0.2").unwrap();
    let second = place.shim_with("127.0.0.2", &["--acme", other.to_str().unwrap()]);
    second.addresses(2);
    eventually("an answer", || {
        let answer = place.get("127.0.0.2:80", "a.example", QUESTION);
        (answer.text().starts_with("a-token_of-nobody."))
            .then_some(())
            .ok_or_else(|| answer.text())
    });
    agent.routes(&json!([place.route("a.example"), place.route("b.example")]));
    for (shim, address) in [(&first, "127.0.0.1"), (&second, "127.0.0.2")] {
        await_said(shim, CAME, "b.example", 1);
        place.await_https(address, "b.example", &root);
    }
    await_said(&second, "answering the authority", "b.example", 1);
    let asked = first.await_log("anything", |lines| {
        let of = |line: &&Value| line["message"] == "answering the authority" && line["host"] == "b.example";
        Some(lines.iter().filter(of).count())
    });
    assert_eq!(asked, 0, "the authority has come to the other one");
    let account = |folder: &Path| fs::read(folder.join("account.json")).unwrap();
    assert_eq!(account(&other), account(&place.acme()));
}

#[test]
fn an_upgrade_hands_the_orders_over() {
    let place = Place::new();
    let (pebble, agent) = place.authority();
    let socket = place.folder.path().join("handover.sock");
    let words = ["--handover", socket.to_str().unwrap()];
    let mut old = place.shim_with("127.0.0.1", &words);
    await_said(&old, CAME, "a.example", 1);
    let root = pebble.root().unwrap();
    place.await_https("127.0.0.1", "a.example", &root);
    let orders = orders_of(&old, "a.example");
    old.signal(Signal::SIGUSR2);
    let _new = Orphan(old.await_log("that another one takes over", |lines| {
        let pid = lines.iter().find_map(|line| line["pid"].as_i64());
        pid.map(|pid| pid as i32)
    }));
    assert!(old.wait().success());
    agent.routes(&json!([place.route("a.example"), place.route("b.example")]));
    await_said(&old, CAME, "b.example", 1);
    place.await_https("127.0.0.1", "b.example", &root);
    assert_eq!(orders_of(&old, "a.example"), orders, "by the one before");
}

#[test]
fn another_directory_gets_an_account_of_its_own_and_orders_anew() {
    let place = Place::new();
    let (pebble, agent) = place.authority();
    let shim = place.shim("127.0.0.1");
    await_said(&shim, CAME, "a.example", 1);
    let root = pebble.root().unwrap();
    place.await_https("127.0.0.1", "a.example", &root);
    let account = || -> Value {
        serde_json::from_slice(&fs::read(place.acme().join("account.json")).unwrap()).unwrap()
    };
    let (before, orders) = (account(), orders_of(&shim, "a.example"));

    // Other mail addresses are told, and change nothing else.
    agent.settings(&settings(&pebble, json!({ "contact": ["new@example.com"] })));
    eventually("the new contact", || {
        let now = account();
        (now["contact"] == json!(["mailto:new@example.com"]))
            .then_some(())
            .ok_or_else(|| now["contact"].to_string())
    });
    assert_eq!(account()["account"], before["account"]);
    assert_eq!(orders_of(&shim, "a.example"), orders);

    agent.settings(&settings(
        &pebble,
        json!({ "directory": pebble.other_directory() }),
    ));
    await_said(&shim, CAME, "a.example", 2);
    place.await_https("127.0.0.1", "a.example", &root);
    assert_ne!(account()["thumbprint"], before["thumbprint"]);
    let kept = fs::read_dir(place.acme()).unwrap().any(|entry| {
        let name = entry.unwrap().file_name();
        name.to_string_lossy().starts_with("account-until-")
    });
    assert!(kept, "the account before is lost");

    // Who does not agree gets nothing more; what is there is served.
    agent.settings(&settings(&pebble, json!({ "agree_terms": false })));
    await_warning(&shim, &["terms are not agreed to", "`agree-terms = true`"]);
    place.await_https("127.0.0.1", "a.example", &root);

    // Without the section nothing is ordered, answered or served.
    agent.settings(&json!({}));
    eventually("the end", || {
        let asked = place.get("127.0.0.1:80", "a.example", QUESTION);
        (asked.text() == place.origin.name())
            .then_some(())
            .ok_or_else(|| asked.text())
    });
    assert!(place.https("127.0.0.1", "a.example", &root).is_err());
}
