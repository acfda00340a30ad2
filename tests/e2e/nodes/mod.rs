//! Containers of other machines, published in etcd by the real `weir node` without privileges, behind the real agent.

mod access;
mod faults;
mod scale;

use anyhow::{Context as _, Result};
use lb_tests::{
    docker::Engine,
    etcd::Etcd,
    load::{Load, Talk},
    netns::Namespace,
    node::{GROUP, Node},
    site::{LABEL, Site, VIP, backends, vip},
    weir::Weir,
};
use serde_json::Value;

use super::{await_serving, names, who_answers};

/// Where etcd listens: an address of the balancer's machine of its own, so that the way to it can be cut alone.
const STORE: &str = "203.0.113.254";
/// The port of the machine that a container is published at.
const PUBLISHED: &str = "18080:8080";
/// Seconds that the keys of a node outlive it.
const TTL: &str = "ttl = \"3s\"\n";

/// A machine with an engine of its own, one cable away from the balancer.
struct Machine {
    // Before its namespace.
    engine: Engine,
    namespace: Namespace,
    name: String,
}

impl Machine {
    /// With a container `web-<number>` of service `web`.
    fn new(site: &Site, number: u8) -> Result<Self> {
        let namespace = Namespace::new("machine")?;
        let (address, node) = (
            format!("203.0.113.{}", 4 * number + 2),
            format!("203.0.113.{}", 4 * number + 1),
        );
        namespace.veth("eth0", &site.node, &format!("m{number}"))?;
        namespace.address("eth0", &format!("{address}/30"))?;
        site.node.address(&format!("m{number}"), &format!("{node}/30"))?;
        namespace.ip(&format!("route add default via {node}"))?;
        let engine = Engine::start(&namespace, &["--live-restore", &format!("--group={GROUP}")])?;
        engine.container(&format!("web-{number}"), &["--label", LABEL, "-p", PUBLISHED])?;
        Ok(Self {
            engine,
            namespace,
            name: format!("n{number}"),
        })
    }

    /// Publishes its containers. Its address is the one that it reaches etcd from.
    fn publish(&self, etcd: &Etcd<'_>, more: &str) -> Result<Node<'_>> {
        let section = format!("name = \"{}\"\n{TTL}{more}", self.name);
        Node::start(&self.namespace, &self.engine, etcd, &section, "")
    }

    /// Cuts the way to etcd, and nothing else.
    fn cut(&self) -> Result<()> {
        self.namespace.ip(&format!("route add blackhole {STORE}/32"))
    }

    fn mend(&self) -> Result<()> {
        self.namespace.ip(&format!("route del blackhole {STORE}/32"))
    }
}

/// A site with etcd at [`STORE`].
fn site() -> Result<Site> {
    let site = Site::new()?;
    site.node.address("lo", &format!("{STORE}/32"))?;
    Ok(site)
}

fn config(etcd: &Etcd<'_>, machines: usize, nodes: &str) -> String {
    let devices: String = (1..=machines)
        .map(|machine| format!(", \"m{machine}\""))
        .collect();
    format!(
        "interfaces = [\"uplink\"{devices}]\n[vips.web]\naddress = \"{VIP}\"\n[nodes]\n{nodes}{}",
        etcd.section()
    )
}

/// What the status says of a source.
fn source<'s>(status: &'s Value, name: &str) -> Option<&'s Value> {
    let mut sources = status["sources"].as_array().into_iter().flatten();
    sources.find(|source| source["name"] == name)
}

/// Conversations over the VIP with each of these servers.
fn talks(site: &Site, servers: &[&str]) -> Result<Vec<Talk>> {
    let mut found = Vec::new();
    for server in servers {
        for _ in 0..100 {
            let mut talk = site.client.run(|| Talk::open(vip(80)))?;
            if talk.say()?.server == *server {
                found.push(talk);
                break;
            }
        }
    }
    anyhow::ensure!(found.len() == servers.len(), "not all of {servers:?} answer");
    Ok(found)
}

#[test]
fn containers_of_other_machines_serve_and_drain_with_their_node() -> Result<()> {
    let site = site()?;
    let etcd = Etcd::start(&site.node, STORE, 1)?;
    let (one, two) = (Machine::new(&site, 1)?, Machine::new(&site, 2)?);
    one.engine.container(
        "admin",
        &["--label", "weir.service.admin.listen=81/tcp", "-p", "18081:8080"],
    )?;
    one.engine.container("private", &["-p", "18082:8080"])?;
    let publishing = one.publish(&etcd, "")?;
    let mut second = two.publish(&etcd, "")?;
    assert_eq!(publishing.privileges()?.1, 0, "no capability at all");
    assert_ne!(publishing.privileges()?.0, 0, "not root");

    let config = config(&etcd, 2, "allow-services = [\"web\"]\n");
    let mut weir = Weir::start_with(&site.node, "off", &config)?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    assert_eq!(who_answers(&site)?, names(&["web-1", "web-2"]));
    // What a node may claim the balancer says; who says nothing to Weir is not published.
    let status = weir.status()?;
    let rejections = status["rejections"].to_string();
    assert!(
        rejections.contains("container admin") && rejections.contains("`node:n1` may not claim"),
        "{rejections}"
    );
    assert_eq!(source(&status, "node:n1").context("n1")?["objects"], 2);
    assert_eq!(source(&status, "nodes").context("nodes")?["connected"], true);

    // A container is stopped and another one started: heard as from an engine of the machine's own.
    let load = Load::start(&site.client, vip(80), 3, 3);
    load.await_more(200)?;
    two.engine
        .container("web-3", &["--label", LABEL, "-p", "18083:8080"])?;
    await_serving(&mut weir, &["web-1", "web-2", "web-3"])?;
    two.engine.docker(&["stop", "-t", "30", "web-3"])?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    load.await_more(200)?;
    assert_eq!(load.stop().failures, [""; 0]);

    // The publisher dies: its containers drain when its lease is over, and old connections go on.
    let mut old = talks(&site, &["web-1", "web-2"])?;
    let load = Load::start(&site.client, vip(80), 3, 0);
    load.await_more(100)?;
    second.kill();
    await_serving(&mut weir, &["web-1"])?;
    assert_eq!(who_answers(&site)?, names(&["web-1"]));
    let status = weir.status()?;
    let lost = source(&status, "node:n2").context("n2")?;
    assert!(
        lost["connected"] == false && lost["fault"].to_string().contains("its containers drain"),
        "{lost}"
    );
    assert!(
        backends(&status).any(|backend| backend["name"] == "web-2" && backend["leaving"] == true),
        "{status:#}"
    );
    for talk in &mut old {
        talk.say()?;
    }
    // Back before the drain time is over: the old connection has never noticed.
    second.run()?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    for talk in &mut old {
        talk.say()?;
    }
    load.await_more(100)?;
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{report:?}");
    Ok(())
}

#[test]
fn a_restart_within_the_lease_changes_nothing_and_a_withdrawal_acts_at_once() -> Result<()> {
    let site = site()?;
    let etcd = Etcd::start(&site.node, STORE, 1)?;
    let (one, two) = (Machine::new(&site, 1)?, Machine::new(&site, 2)?);
    let mut keeps = one.publish(&etcd, "")?;
    let mut withdraws = two.publish(&etcd, "on-stop = \"withdraw\"\n")?;
    let mut weir = Weir::start_with(&site.node, "off", &config(&etcd, 2, ""))?;
    await_serving(&mut weir, &["web-1", "web-2"])?;

    // Key, revision and lease of everything that the node has published.
    let keys = || -> Result<Vec<String>> {
        let text = etcd.ctl(&["get", "--prefix", "/weir/nodes/n1/", "-w", "fields"], "")?;
        let wanted = |line: &&str| {
            ["\"Key\"", "\"ModRevision\"", "\"Lease\""]
                .iter()
                .any(|word| line.starts_with(word))
        };
        Ok(text.lines().filter(wanted).map(str::to_owned).collect())
    };
    let (before, commits) = (keys()?, weir.status()?["commits"].clone());
    assert_eq!(before.len(), 6, "a container and the node: {before:?}");
    keeps.stop()?;
    keeps.run()?;
    keeps.kill();
    keeps.run()?;
    assert_eq!(keys()?, before, "something was written");
    // The lease was renewed meanwhile, or it would be over soon: three times as long as it lasts without.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(9);
    while std::time::Instant::now() < until {
        assert_eq!(who_answers(&site)?, names(&["web-1", "web-2"]));
    }
    assert_eq!(keys()?, before, "something was written");
    assert_eq!(weir.status()?["commits"], commits, "a ring was changed");

    // Told to withdraw, it leaves at once, although it is the first half of two.
    withdraws.stop()?;
    await_serving(&mut weir, &["web-1"])?;
    let left = etcd.ctl(&["get", "--prefix", "--keys-only", "/weir/nodes/n2/"], "")?;
    assert_eq!(left.trim(), "");
    withdraws.run()?;
    await_serving(&mut weir, &["web-1", "web-2"])
}
