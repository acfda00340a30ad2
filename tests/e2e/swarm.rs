//! A real swarm: three managers on machines of their own, a service with host-mode ports, and traffic through all that
//! its operator does and all that breaks.

use std::{collections::BTreeSet, path::Path};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{
    docker::{Engine, IMAGE, PORT},
    load::Load,
    netns::Namespace,
    pki::Authority,
    site::{LABEL, Site, VIP, backends, serving, vip},
    weir::Weir,
};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{
    await_serving,
    engines::{self, DOCKER_PORT},
    names, who_answers,
};

/// A machine on the wire that joins them all.
struct Machine {
    // Before its namespace.
    engine: Engine,
    _namespace: Namespace,
    address: String,
}

impl Machine {
    fn new(wire: &Namespace, number: u8, authority: &Authority, files: &Path) -> Result<Self> {
        let namespace = Namespace::new("manager")?;
        let address = format!("203.0.113.{}", 10 + number);
        plug(&namespace, "eth0", wire, &format!("m{number}"), &address)?;
        let options = engines::tls(&address, authority, files)?;
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let engine = Engine::start(&namespace, &options)?;
        Ok(Self {
            engine,
            _namespace: namespace,
            address,
        })
    }

    fn endpoint(&self) -> String {
        format!("tcp://{}:{DOCKER_PORT}", self.address)
    }

    /// Its id in the swarm.
    fn id(&self) -> Result<String> {
        self.engine.docker(&["info", "-f", "{{.Swarm.NodeID}}"])
    }
}

/// Joins a device of a namespace to the bridge of the wire.
fn plug(namespace: &Namespace, device: &str, wire: &Namespace, port: &str, address: &str) -> Result<()> {
    namespace.veth(device, wire, port)?;
    namespace.address(device, &format!("{address}/24"))?;
    wire.ip(&format!("link set {port} master wire"))
}

/// Three managers of one swarm.
struct Swarm {
    machines: Vec<Machine>,
    _wire: Namespace,
}

impl Swarm {
    fn new(site: &Site, files: &Path) -> Result<Self> {
        let wire = Namespace::new("wire")?;
        wire.bridge("wire")?;
        plug(&site.node, "wire0", &wire, "node", "203.0.113.1")?;
        let authority = engines::authority(files)?;
        let machines: Vec<Machine> = (1..=3)
            .map(|number| Machine::new(&wire, number, &authority, files))
            .collect::<Result<_>>()?;
        let [first, others @ ..] = machines.as_slice() else {
            unreachable!("three machines")
        };
        let docker = |machine: &Machine, words: &[&str]| machine.engine.docker(words);
        docker(first, &["swarm", "init", "--advertise-addr", &first.address])?;
        let token = docker(first, &["swarm", "join-token", "-q", "manager"])?;
        for other in others {
            let at = format!("{}:2377", first.address);
            let own = ["--advertise-addr", &other.address];
            let join = ["swarm", "join", "--token", &token, own[0], own[1], &at];
            docker(other, &join)?;
        }
        Ok(Self {
            machines,
            _wire: wire,
        })
    }

    /// The section of the configuration.
    fn section(&self, files: &Path, more: &str) -> String {
        let endpoints: Vec<String> = self.machines.iter().map(Machine::endpoint).collect();
        let files = files.display();
        format!(
            "[swarm]\nendpoints = {endpoints:?}\ntls-ca = \"{files}/ca.pem\"\n\
             tls-cert = \"{files}/client.pem\"\ntls-key = \"{files}/client.key\"\n{more}\n"
        )
    }

    /// `docker service create` of the test server, named as its task is in the agent's status.
    fn service(&self, name: &str, options: &[&str]) -> Result<()> {
        let words = [
            "service",
            "create",
            "--quiet",
            "--no-resolve-image",
            "--name",
            name,
        ];
        let named = ["--env", "NAME={{.Service.Name}}.{{.Task.Slot}}"];
        let all = [&words[..], &named, options, &[IMAGE]].concat();
        self.machines[0].engine.docker(&all).map(drop)
    }

    /// The machine that the agent hears.
    fn in_use(&mut self, status: &Value) -> Result<usize> {
        let via = source(status).context("the swarm")?["via"].as_str();
        let via = via.context("a manager in use")?.to_owned();
        let machine = self.machines.iter().position(|machine| machine.endpoint() == via);
        machine.context(via)
    }
}

/// What the status says of the swarm.
fn source(status: &Value) -> Option<&Value> {
    let mut sources = status["sources"].as_array().into_iter().flatten();
    sources.find(|source| source["name"] == "swarm")
}

fn connected(status: &Value) -> bool {
    source(status).is_some_and(|source| source["connected"] == true)
}

/// Addresses of the nodes that take new flows.
fn nodes(status: &Value) -> BTreeSet<String> {
    backends(status)
        .filter(|backend| backend["ring_share"].as_u64() > Some(0))
        .filter_map(|backend| backend["address"].as_str()?.rsplit_once(':'))
        .map(|(ip, _)| ip.to_owned())
        .collect()
}

/// The configuration of the node but for the swarm.
fn config() -> String {
    format!("interfaces = [\"uplink\", \"wire0\"]\n[vips.web]\naddress = \"{VIP}\"\n")
}

#[test]
fn what_the_operator_of_a_swarm_does_costs_nobody_a_connection() -> Result<()> {
    let files = tempfile::tempdir()?;
    let site = Site::new()?;
    let swarm = Swarm::new(&site, files.path())?;
    let manager = &swarm.machines[0].engine;
    let publish = format!("mode=host,target={PORT}");
    swarm.service(
        "web",
        &["--replicas", "3", "--label", LABEL, "--publish", &publish],
    )?;
    let config = config() + &swarm.section(files.path(), "");
    let mut weir = Weir::start_with(&site.node, "off", &config)?;
    let three = ["web.1", "web.2", "web.3"];
    await_serving(&mut weir, &three)?;
    assert_eq!(who_answers(&site)?, names(&three));

    let load = Load::start(&site.client, vip(80), 4, 0);
    load.await_more(100)?;
    let quiet = |step: &str| {
        let failures = load.report().failures;
        ensure!(failures.is_empty(), "{step}: {failures:?}\n{}", weir.explain());
        load.await_more(100)
    };
    let update = ["service", "update", "--quiet", "--no-resolve-image"];
    let places = |status: &Value| -> BTreeSet<String> {
        let serving = backends(status).filter(|backend| backend["ring_share"].as_u64() > Some(0));
        serving.map(|backend| backend["address"].to_string()).collect()
    };
    let before = places(&weir.status()?);
    manager.docker(&[&update[..], &["--env-add", "VERSION=2", "web"]].concat())?;
    quiet("update")?;
    manager.docker(&["service", "rollback", "--quiet", "web"])?;
    quiet("rollback")?;
    manager.docker(&["service", "scale", "web=6"])?;
    quiet("scale up")?;
    manager.docker(&["service", "scale", "web=3"])?;
    quiet("scale down")?;
    await_serving(&mut weir, &three)?;
    let after = places(&weir.status()?);
    ensure!(
        before.is_disjoint(&after),
        "{before:?} {after:?}: nothing was updated"
    );

    // A node is drained and comes back; its tasks do not come back by themselves, so the service is updated once more.
    let third = &swarm.machines[2];
    ensure!(
        nodes(&weir.status()?).contains(&third.address),
        "the third has a task"
    );
    manager.docker(&["node", "update", "--availability", "drain", &third.id()?])?;
    let two: BTreeSet<String> = swarm.machines[..2].iter().map(|m| m.address.clone()).collect();
    weir.await_status("served by two nodes", |status| {
        nodes(status) == two && serving(status) == names(&three)
    })?;
    load.await_more(100)?;
    manager.docker(&["node", "update", "--availability", "active", &third.id()?])?;
    manager.docker(&[&update[..], &["--force", "web"]].concat())?;
    weir.await_status("served by the third again", |status| {
        nodes(status).contains(&third.address) && serving(status) == names(&three)
    })?;
    load.await_more(100)?;

    // Bad services harm themselves alone.
    swarm.service(
        "typo",
        &[
            "--label",
            LABEL,
            "--label",
            "weir.service.web.weight=heavy",
            "--publish",
            &publish,
        ],
    )?;
    swarm.service(
        "mesh",
        &[
            "--label",
            "weir.service.mesh.listen=81/tcp",
            "--detach",
            "--publish",
            "8081:8080",
        ],
    )?;
    weir.await_status("refusing both", |status| {
        let all = status["rejections"].to_string();
        let words = [
            "service typo: label weir.service.web.weight",
            "service mesh",
            "mode=host,target=8080",
        ];
        words.iter().all(|word| all.contains(word))
    })?;
    let rejections = weir.status()?["rejections"].clone();
    assert_eq!(rejections.as_array().map(Vec::len), Some(2), "{rejections:#}");
    assert_eq!(serving(&weir.status()?), names(&three));
    manager.docker(&["service", "rm", "typo", "mesh"])?;
    weir.await_status("without refusals", |status| {
        status["rejections"].as_array().is_some_and(Vec::is_empty)
    })?;
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{}", weir.explain());
    // The end of the service is the end of its backends.
    manager.docker(&["service", "rm", "web"])?;
    weir.await_status("without backends", |status| serving(status).is_empty())
}

#[test]
fn managers_that_stall_die_or_lose_their_leader_cost_nobody_a_connection() -> Result<()> {
    let files = tempfile::tempdir()?;
    let site = Site::new()?;
    let mut swarm = Swarm::new(&site, files.path())?;
    let publish = format!("mode=host,target={PORT}");
    swarm.service(
        "web",
        &["--replicas", "3", "--label", LABEL, "--publish", &publish],
    )?;
    let config = config() + &swarm.section(files.path(), "liveness = \"2s\"");
    let mut weir = Weir::start_with(&site.node, "off", &config)?;
    let three = names(&["web.1", "web.2", "web.3"]);
    await_serving(&mut weir, &["web.1", "web.2", "web.3"])?;
    let load = Load::start(&site.client, vip(80), 4, 0);
    load.await_more(100)?;

    // The one that is heard stops in the middle of everything: its sockets stay open, its answers do not come.
    let stalled = swarm.in_use(&weir.status()?)?;
    let endpoint = swarm.machines[stalled].endpoint();
    swarm.machines[stalled].engine.signal(Signal::SIGSTOP)?;
    weir.await_status("heard by another", |status| {
        let via = source(status).and_then(|source| source["via"].as_str());
        connected(status) && via.is_some_and(|via| via != endpoint)
    })?;
    load.await_more(100)?;
    swarm.machines[stalled].engine.signal(Signal::SIGCONT)?;
    // Swarm has missed the node meanwhile, or it has not: in the end there are three tasks.
    await_serving(&mut weir, &["web.1", "web.2", "web.3"])?;
    load.await_more(100)?;
    // If another leader was elected, Swarm has forgotten the tasks' ports. An agent that starts now knows them.
    weir.kill();
    weir.run()?;
    await_serving(&mut weir, &["web.1", "web.2", "web.3"])?;
    load.await_more(100)?;

    // The one that is heard now dies. Its tasks live on and serve until Swarm has missed the node and made others.
    let dead = swarm.in_use(&weir.status()?)?;
    swarm.machines[dead].engine.stop(Signal::SIGKILL)?;
    let gone = swarm.machines[dead].address.clone();
    weir.await_status("served without the dead node", |status| {
        connected(status) && !nodes(status).contains(&gone) && serving(status) == three
    })?;
    load.await_more(100)?;

    // One of the two that are left dies, too: no quorum, no leader, no answers. Everything stays as it is.
    let keepers = Load::start(&site.client, vip(80), 0, 4);
    keepers.await_more(100)?;
    let second = swarm.in_use(&weir.status()?)?;
    let before = nodes(&weir.status()?);
    swarm.machines[second].engine.stop(Signal::SIGKILL)?;
    weir.await_status("without a swarm", |status| {
        let faults = source(status).and_then(|source| source["fault"].as_str());
        // All three of them have been asked.
        !connected(status) && faults.is_some_and(|faults| faults.matches("tcp://").count() >= 3)
    })?;
    // An agent that starts now takes over what serves.
    weir.kill();
    weir.run()?;
    load.await_more(300)?;
    keepers.await_more(300)?;
    assert_eq!(nodes(&weir.status()?), before);
    assert_eq!(keepers.stop().failures, [""; 0]);
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{}", weir.explain());
    Ok(())
}
