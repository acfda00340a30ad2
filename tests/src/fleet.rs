//! Many nodes in one process: the real publisher for each, with containers that are made up.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_util::sync::CancellationToken;
use weir::{
    config::{Config, NodeConfig},
    model::Protocol,
    node::publish::Publisher,
    source::docker::{
        Heard,
        container::{Container, NetworkMode, Routing, RunState},
    },
};

use crate::{etcd::Etcd, netns::Namespace};

/// First port that containers are published at.
const FIRST_PORT: u16 = 20_000;
/// Facts that may wait for a publisher.
const WAITING: usize = 64;

/// The nodes, and what they have said.
#[derive(Debug)]
pub struct Fleet {
    // First the word to stop, then the end of the threads.
    stop: CancellationToken,
    nodes: Vec<Member>,
    services: usize,
    /// Containers made so far.
    made: usize,
    runtime: Option<Runtime>,
}

#[derive(Debug)]
struct Member {
    facts: mpsc::Sender<Heard>,
    address: IpAddr,
    containers: BTreeMap<String, Container>,
    next_port: u16,
}

impl Fleet {
    /// So many nodes at addresses from 10.80.0.1 on, each with `each` containers that are dealt out to `services`
    /// services (`s0` and on, at port 1 and on of the only VIP). They publish from this namespace.
    pub fn start(
        namespace: &Namespace,
        etcd: &Etcd<'_>,
        nodes: usize,
        each: usize,
        services: usize,
    ) -> Result<Self> {
        let text = format!("interfaces = \"lo\"\n{}", etcd.section());
        let config = Config::parse(std::path::Path::new("fleet"), &text)?
            .etcd
            .context("a section")?;
        // Its threads are made in the namespace and stay in it.
        let runtime = namespace.run(|| {
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
        })?;
        let stop = CancellationToken::new();
        let member = |number: usize| {
            let (facts, heard) = mpsc::channel(WAITING);
            let address = IpAddr::from((0x0a50_0001 + number as u32).to_be_bytes());
            let node = NodeConfig {
                name: format!("node-{number:03}"),
                addresses: vec![address],
                ttl: Duration::from_secs(10),
                withdraw: false,
            };
            let publisher = Publisher::new(config.clone(), node, "a boot".into());
            runtime.spawn(publisher.run(heard, stop.clone()));
            Member {
                facts,
                address,
                containers: BTreeMap::new(),
                next_port: FIRST_PORT,
            }
        };
        let members = (0..nodes).map(member).collect();
        let mut fleet = Self {
            stop,
            nodes: members,
            services,
            made: 0,
            runtime: Some(runtime),
        };
        for at in 0..nodes {
            for _ in 0..each {
                let container = fleet.make(at);
                fleet.nodes[at].containers.insert(container.id.clone(), container);
            }
            let all = fleet.nodes[at].containers.values().cloned().collect();
            fleet.say(at, Heard::List(all))?;
        }
        Ok(fleet)
    }

    fn say(&self, node: usize, heard: Heard) -> Result<()> {
        self.nodes[node]
            .facts
            .blocking_send(heard)
            .context("a publisher has ended")
    }

    fn make(&mut self, node: usize) -> Container {
        let service = self.made % self.services;
        let name = format!("c{:05}", self.made);
        self.made += 1;
        let node = &mut self.nodes[node];
        let port = node.next_port;
        node.next_port += 1;
        container(&name, &format!("s{service}"), 1 + service as u16, port)
    }

    /// One change by chance: a container starts, stops, or is paused or resumed. As many start as stop.
    pub fn change(&mut self, random: &mut Random) -> Result<()> {
        let at = random.below(self.nodes.len());
        let held = self.nodes[at].containers.len();
        let which = (held > 0).then(|| random.below(held));
        let id = which.and_then(|which| self.nodes[at].containers.keys().nth(which).cloned());
        match (random.below(3), id) {
            (0, _) | (_, None) => {
                let container = self.make(at);
                self.nodes[at]
                    .containers
                    .insert(container.id.clone(), container.clone());
                self.say(at, Heard::Put(Box::new(container)))
            }
            (1, Some(id)) => {
                self.nodes[at].containers.remove(&id);
                self.say(at, Heard::Remove(id))
            }
            (_, Some(id)) => {
                let container = self.nodes[at].containers.get_mut(&id).context("it is there")?;
                container.state = match container.state {
                    RunState::Running => RunState::Paused,
                    _ => RunState::Running,
                };
                let container = Box::new(container.clone());
                self.say(at, Heard::Put(container))
            }
        }
    }

    /// The first node's word about a container that is none of the others, alone in its service.
    pub fn prober(&self) -> Prober {
        Prober(self.nodes[0].facts.clone())
    }

    /// Which backends take new flows when all of it has been heard, by service.
    pub fn expected(&self) -> BTreeMap<String, BTreeSet<SocketAddr>> {
        let mut all: BTreeMap<String, BTreeSet<SocketAddr>> = BTreeMap::new();
        for node in &self.nodes {
            for container in node.containers.values().filter(|c| c.state == RunState::Running) {
                let label = container.labels.keys().next().map_or("", String::as_str);
                let service = label.split('.').nth(2).unwrap_or_default();
                let port = container
                    .published
                    .values()
                    .flatten()
                    .next()
                    .map_or(0, SocketAddr::port);
                all.entry(service.to_owned())
                    .or_default()
                    .insert(SocketAddr::new(node.address, port));
            }
        }
        all
    }
}

/// Says where one container is.
#[derive(Clone, Debug)]
pub struct Prober(mpsc::Sender<Heard>);

impl Prober {
    /// It is published at `port` now; its service listens at `listen`.
    pub fn say(&self, service: &str, listen: u16, port: u16) -> Result<()> {
        let heard = Heard::Put(Box::new(container("probe", service, listen, port)));
        self.0.blocking_send(heard).context("a publisher has ended")
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }
}

/// A running container of a service, published at this port of its node.
fn container(name: &str, service: &str, listen: u16, port: u16) -> Container {
    let inside = (8080, Protocol::Tcp);
    Container {
        id: format!("{name:0>64}"),
        name: name.to_owned(),
        created: SystemTime::UNIX_EPOCH + Duration::from_secs(1),
        started: SystemTime::UNIX_EPOCH + Duration::from_secs(1),
        labels: BTreeMap::from([(format!("weir.service.{service}.listen"), format!("{listen}/tcp"))]),
        state: RunState::Running,
        health: None,
        stop_signal: 15,
        stopping: false,
        network_mode: NetworkMode::Network("bridge".into()),
        routing: Routing::default(),
        networks: BTreeMap::from([("bridge".into(), vec![[172, 17, 0, 2].into()])]),
        exposed: BTreeSet::from([inside]),
        published: BTreeMap::from([(inside, vec![SocketAddr::new([0, 0, 0, 0].into(), port)])]),
    }
}

/// Numbers that look like chance and are the same in every run (xorshift).
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}
