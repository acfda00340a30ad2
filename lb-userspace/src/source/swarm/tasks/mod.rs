//! Services, tasks and nodes of a swarm → what they wish. Pure.
//!
//! A service is one object. Each of its running tasks is looked at as a container with the service's labels, which is
//! reached on its node by the ports that the service publishes there; what those containers wish is put together.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use bollard::models::{
    EndpointPortConfig, EndpointPortConfigProtocolEnum as PortProtocol,
    EndpointPortConfigPublishModeEnum as PublishMode, Node, NodeSpecAvailabilityEnum as Availability,
    NodeState, Service, Task, TaskState,
};

use super::manager::Snapshot;
use crate::{
    config::{
        Allowed, Policy,
        value::{self, ValueError},
    },
    model::{BackendState, Protocol, Rejection, ServiceWish},
    source::{
        Object,
        docker::{
            container::{Container, Elsewhere, Health, NetworkMode, Routing, RunState, time},
            signal,
        },
        labels::{self, Site, is_ours},
    },
};

/// The label of a node that says where its published ports are reached, if not at the address that Swarm knows.
const NODE_ADDRESS: &str = "weir.address";

/// A port inside the container.
type Port = (u16, Protocol);

/// A node, seen from here.
struct Place {
    site: Site,
    /// Why its tasks are leaving.
    leaving: Option<String>,
}

/// Nodes by their ids; one that cannot be reached is an object of its own, refused.
type Places<'s> = BTreeMap<&'s str, Result<Place, Box<Object>>>;

/// What all services wish, by their ids; with them the nodes whose tasks cannot be reached.
pub fn objects(
    snapshot: &Snapshot,
    source: &str,
    allow: &Allowed,
    policy: &Policy,
) -> BTreeMap<String, Object> {
    let mut objects = BTreeMap::new();
    let places: Places<'_> = snapshot
        .nodes
        .iter()
        .filter_map(|node| Some((node.id.as_deref()?, place(node, source, allow))))
        .collect();
    let mut tasks: BTreeMap<&str, Vec<&Task>> = BTreeMap::new();
    for task in snapshot.tasks.iter().filter(|task| runs(task)) {
        if let Some(service) = &task.service_id {
            tasks.entry(service).or_default().push(task);
        }
    }
    for service in &snapshot.services {
        let id = service.id.as_deref().unwrap_or_default();
        let running = tasks.remove(id).unwrap_or_default();
        let mut missing = Vec::new();
        let found = object(service, &running, &places, policy, &mut missing);
        let all = found.into_iter().chain(missing.into_iter().cloned());
        objects.extend(all.map(|object| (object.id.clone(), object)));
    }
    objects
}

/// Whether a task runs and shall go on: it is told to stop before its container is.
fn runs(task: &Task) -> bool {
    let state = task.status.as_ref().and_then(|status| status.state);
    state == Some(TaskState::RUNNING) && task.desired_state == Some(TaskState::RUNNING)
}

/// What a service wishes; `None` when it says nothing to Weir or none of its tasks runs. The nodes of tasks that cannot
/// be reached are put into `missing`.
fn object<'p>(
    service: &Service,
    tasks: &[&Task],
    places: &'p Places<'_>,
    policy: &Policy,
    missing: &mut Vec<&'p Object>,
) -> Option<Object> {
    let given = service.spec.as_ref()?.labels.as_ref()?;
    if !is_ours(given.keys().map(String::as_str)) {
        return None;
    }
    let mut whole: Option<Object> = None;
    for task in tasks {
        let place = match task.node_id.as_deref().and_then(|id| places.get(id)) {
            Some(Ok(place)) => place,
            Some(Err(refused)) => {
                missing.push(refused);
                continue;
            }
            // It is looked at again when its node is known.
            None => continue,
        };
        let container = container(service, task, &place.site.node);
        let Some(mut part) = labels::object(&container, &place.site, policy) else {
            continue;
        };
        if let Some(reason) = &place.leaving {
            leave(&mut part, reason);
        }
        match &mut whole {
            Some(whole) => join(whole, part),
            None => whole = Some(part),
        }
    }
    whole.map(|whole| Object {
        id: service.id.clone().unwrap_or_default(),
        name: name(service).to_owned(),
        created: time(service.created_at.as_deref()),
        ..whole
    })
}

/// Adds what another task of the service wishes.
fn join(whole: &mut Object, part: Object) {
    for wish in part.services {
        let same = |other: &&mut ServiceWish| other.address == wish.address;
        match whole.services.iter_mut().find(same) {
            Some(other) => other.backends.extend(wish.backends),
            None => whole.services.push(wish),
        }
    }
    whole.routes.extend(part.routes);
    // They have the same labels: what is wrong with them is said once.
    let news = |rejection: &Rejection| !whole.rejections.contains(rejection);
    let news: Vec<Rejection> = part.rejections.into_iter().filter(news).collect();
    whole.rejections.extend(news);
}

/// The tasks of a node that is leaving get no new flows.
fn leave(object: &mut Object, reason: &str) {
    let backends = object.services.iter_mut().flat_map(|wish| &mut wish.backends);
    let upstreams = object.routes.iter_mut().map(|route| &mut route.upstream);
    for backend in backends.chain(upstreams) {
        backend.state = BackendState::Draining;
        reason.clone_into(&mut backend.reason);
    }
}

/// A task as a container of its node.
fn container(service: &Service, task: &Task, node: &[IpAddr]) -> Container {
    let spec = service.spec.clone().unwrap_or_default();
    let status = task.status.clone().unwrap_or_default();
    let wished = spec
        .endpoint_spec
        .and_then(|endpoint| endpoint.ports)
        .unwrap_or_default();
    let told = status
        .port_status
        .and_then(|status| status.ports)
        .filter(|ports| !ports.is_empty());
    let mut published: BTreeMap<Port, Vec<SocketAddr>> = BTreeMap::new();
    // What a task says of its ports is better than what its service wishes by now.
    for config in told.as_ref().unwrap_or(&wished) {
        let outside = config.published_port.and_then(|port| u16::try_from(port).ok());
        if let (Some(inside), Some(outside), true) = (
            target(config),
            outside.filter(|port| *port > 0),
            is_on_node(config),
        ) {
            let places = published.entry(inside).or_default();
            places.extend(node.iter().map(|address| SocketAddr::new(*address, outside)));
        }
    }
    let elsewhere: BTreeMap<Port, Elsewhere> = wished
        .iter()
        .filter_map(|config| {
            let why = if is_on_node(config) {
                Elsewhere::Untold
            } else {
                Elsewhere::Mesh
            };
            Some((target(config)?, why))
        })
        .filter(|(inside, _)| !published.contains_key(inside))
        .collect();
    let own = task.spec.as_ref().and_then(|spec| spec.container_spec.as_ref());
    let checked = own
        .and_then(|own| own.health_check.as_ref()?.test.as_ref())
        .is_some_and(|test| test.first().is_some_and(|word| word != "NONE"));
    Container {
        id: task.id.clone().unwrap_or_default(),
        name: task_name(service, task),
        created: time(task.created_at.as_deref()),
        started: time(status.timestamp.as_deref()),
        labels: spec.labels.unwrap_or_default().into_iter().collect(),
        state: RunState::Running,
        // Swarm says that a task runs when it is healthy, and stops it when it is not.
        health: checked.then_some(Health::Healthy),
        stop_signal: signal::TERM,
        stopping: false,
        routing: Routing::default(),
        networks: BTreeMap::new(),
        exposed: match published.is_empty() {
            true => elsewhere.keys().copied().collect(),
            false => published.keys().copied().collect(),
        },
        network_mode: NetworkMode::Task {
            service: name(service).to_owned(),
            elsewhere,
        },
        published,
    }
}

fn is_on_node(config: &EndpointPortConfig) -> bool {
    config.publish_mode == Some(PublishMode::HOST)
}

/// The port inside the container; SCTP is nothing to a balancer of TCP and UDP.
fn target(config: &EndpointPortConfig) -> Option<Port> {
    let protocol = match config.protocol {
        Some(PortProtocol::TCP | PortProtocol::EMPTY) | None => Protocol::Tcp,
        Some(PortProtocol::UDP) => Protocol::Udp,
        Some(PortProtocol::SCTP) => return None,
    };
    Some((config.target_port?.try_into().ok()?, protocol))
}

fn name(service: &Service) -> &str {
    let name = service.spec.as_ref().and_then(|spec| spec.name.as_deref());
    name.or(service.id.as_deref()).unwrap_or_default()
}

/// `web.1`, as `docker service ps` has it; a task of a global service is named by its node.
fn task_name(service: &Service, task: &Task) -> String {
    let name = name(service);
    match (task.slot.filter(|slot| *slot > 0), &task.node_id) {
        (Some(slot), _) => format!("{name}.{slot}"),
        (None, Some(node)) => format!("{name}.{node}"),
        (None, None) => name.to_owned(),
    }
}

/// Where a node is and whether it stays, or why that is not known.
fn place(node: &Node, source: &str, allow: &Allowed) -> Result<Place, Box<Object>> {
    let host = hostname(node);
    let refuse = |fault: String| {
        Box::new(Object {
            id: node.id.clone().unwrap_or_default(),
            name: host.to_owned(),
            created: time(node.created_at.as_deref()),
            services: Vec::new(),
            routes: Vec::new(),
            rejections: vec![Rejection {
                source: source.to_owned(),
                object: format!("node {host}"),
                fault,
                remedy: format!(
                    "say where its published ports are reached: \
                 `docker node update --label-add {NODE_ADDRESS}=192.0.2.12 {host}`"
                ),
            }],
        })
    };
    let availability = node.spec.as_ref().and_then(|spec| spec.availability);
    let state = node.status.as_ref().and_then(|status| status.state);
    let leaving = match (state, availability) {
        (Some(NodeState::DOWN), _) => Some(format!("node {host} is down")),
        (_, Some(Availability::DRAIN)) => Some(format!("node {host} is being drained")),
        _ => None,
    };
    let addresses = addresses(node).map_err(|error| refuse(format!("label {NODE_ADDRESS}: {error}")))?;
    if addresses.is_empty() {
        return Err(refuse(
            "Swarm does not know at which address it is reached".into(),
        ));
    }
    Ok(Place {
        site: Site {
            source: source.to_owned(),
            remote: true,
            node: addresses,
            allow: allow.clone(),
            rp_filter: [0; 2],
        },
        leaving,
    })
}

/// Those of its label, else the one that Swarm sees it at. A manager that sees itself on loopback still tells all
/// managers where it is reached.
fn addresses(node: &Node) -> Result<Vec<IpAddr>, ValueError> {
    let labels = node.spec.as_ref().and_then(|spec| spec.labels.as_ref());
    if let Some(text) = labels.and_then(|labels| labels.get(NODE_ADDRESS)) {
        return value::items(text.split(','), value::address);
    }
    let seen = node.status.as_ref().and_then(|status| status.addr.as_deref());
    let told = node
        .manager_status
        .as_ref()
        .and_then(|status| status.addr.as_deref());
    let told = told.and_then(|text| Some(text.parse::<SocketAddr>().ok()?.ip()));
    let seen = seen.and_then(|text| text.parse::<IpAddr>().ok());
    let usable = |ip: &IpAddr| value::is_unicast(*ip) && !ip.is_loopback();
    Ok([seen, told]
        .into_iter()
        .flatten()
        .map(|ip| ip.to_canonical())
        .find(usable)
        .into_iter()
        .collect())
}

fn hostname(node: &Node) -> &str {
    let host = node.description.as_ref().and_then(|own| own.hostname.as_deref());
    host.or(node.id.as_deref()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
