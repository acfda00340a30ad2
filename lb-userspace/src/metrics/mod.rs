//! Prometheus metrics, made anew at each scrape from the datapath's counters and the published [`Status`].
//!
//! `METRICS` defines every name once; `docs/metrics.md` lists them and a test compares the two.

use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus::{
    Encoder, TextEncoder,
    proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType},
};

#[cfg(test)]
mod tests;

use crate::{
    admin::api::Counters,
    model::BackendState,
    status::{BackendStatus, ServiceStatus, Status},
};

/// The content type of [`exposition`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// One metric as it is defined.
#[derive(Debug)]
struct Definition {
    name: &'static str,
    counter: bool,
    labels: &'static [&'static str],
    help: &'static str,
}

const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Definition {
    Definition {
        name,
        counter: true,
        labels,
        help,
    }
}

const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Definition {
    Definition {
        name,
        counter: false,
        labels,
        help,
    }
}

const SERVICE: &[&str] = &["service", "address"];
const BACKEND: &[&str] = &["service", "service_address", "backend", "address"];
const BACKEND_DIRECTION: &[&str] = &["service", "service_address", "backend", "address", "direction"];
const BACKEND_STATE: &[&str] = &["service", "service_address", "backend", "address", "state"];

/// Verdicts: the first counters of `lb_common::counter::Counter`, one of which every packet moves.
const VERDICTS: &[&str] = &[
    "passed",
    "to_tc",
    "transmitted",
    "redirected",
    "to_neighbour",
    "to_node",
    "dropped",
];

/// Every metric.
const METRICS: &[Definition] = &[
    counter(
        "weir_packets_total",
        &["verdict"],
        "Packets seen by the programs, by what became of them.",
    ),
    counter(
        "weir_datapath_events_total",
        &["event"],
        "Other things that the datapath counts.",
    ),
    counter("weir_drops_total", &["reason"], "Dropped packets by reason."),
    counter("weir_service_flows_total", SERVICE, "Flows created."),
    counter(
        "weir_service_drops_total",
        &["service", "address", "reason"],
        "Dropped packets of the service by reason; a reason appears once it has occurred.",
    ),
    gauge(
        "weir_service_backends",
        &["service", "address", "state"],
        "Backends by state.",
    ),
    gauge(
        "weir_service_live_flows",
        SERVICE,
        "Live flows at the last sweep.",
    ),
    gauge(
        "weir_service_generation",
        SERVICE,
        "Generation of the ring; each committed ring raises it.",
    ),
    counter(
        "weir_backend_packets_total",
        BACKEND_DIRECTION,
        "Packets; direction in: from clients, out: to clients.",
    ),
    counter(
        "weir_backend_bytes_total",
        BACKEND_DIRECTION,
        "IP bytes; direction in: from clients, out: to clients.",
    ),
    counter("weir_backend_flows_total", BACKEND, "Flows created."),
    counter(
        "weir_backend_established_total",
        BACKEND,
        "Flows whose handshake the backend finished.",
    ),
    counter(
        "weir_backend_refused_total",
        BACKEND,
        "SYNs that the backend answered by RST or an ICMP error.",
    ),
    counter(
        "weir_backend_resteered_total",
        BACKEND,
        "SYNs taken away from the backend and sent to another.",
    ),
    gauge(
        "weir_backend_live_flows",
        BACKEND,
        "Live flows at the last sweep.",
    ),
    gauge(
        "weir_backend_state",
        BACKEND_STATE,
        "1 for the state the backend is in, 0 for the others.",
    ),
    gauge(
        "weir_backend_condition",
        &["service", "service_address", "backend", "address", "by"],
        "1 while this judge holds the backend fit, 0 while it does not; backends with a check, an ejection or a drain.",
    ),
    gauge("weir_backend_weight", BACKEND, "Weight."),
    gauge(
        "weir_backend_ring_share_ratio",
        BACKEND,
        "Share of the ring, 0 to 1.",
    ),
    gauge("weir_check_targets", &[], "Backends with an active health check."),
    gauge("weir_checks_running", &[], "Health checks under way."),
    counter(
        "weir_checks_total",
        &["result"],
        "Health checks by result; impossible: this node could not make them.",
    ),
    gauge(
        "weir_ejected_backends",
        &[],
        "Backends ejected at the moment by what the datapath counts.",
    ),
    gauge(
        "weir_route_upstreams",
        &["host", "path", "state"],
        "Upstreams of the route by state; an alias is not counted again.",
    ),
    gauge(
        "weir_source_connected",
        &["source"],
        "1 while the source is connected.",
    ),
    gauge(
        "weir_source_last_heard_seconds",
        &["source"],
        "When the source last gave a sign of life, seconds since 1970; absent before the first.",
    ),
    gauge(
        "weir_source_last_full_read_seconds",
        &["source"],
        "When the source's last complete list was read, seconds since 1970; absent before the first.",
    ),
    gauge(
        "weir_source_objects",
        &["source"],
        "Objects that the source told of.",
    ),
    gauge(
        "weir_rejections",
        &["source"],
        "Objects that are refused at the moment; `weir status` names them.",
    ),
    gauge(
        "weir_faults",
        &[],
        "Faults of the agent itself; `weir status` names them.",
    ),
    gauge(
        "weir_ready",
        &[],
        "1 once every source has been read, the maps hold the desired state and every interface has its programs.",
    ),
    counter(
        "weir_commits_total",
        &[],
        "Rings committed since the agent started.",
    ),
    gauge(
        "weir_commit_duration_seconds",
        &[],
        "Length of the last pass, from the first waiting update to the last commit.",
    ),
    gauge(
        "weir_last_commit_timestamp_seconds",
        &[],
        "When the maps last changed, seconds since 1970.",
    ),
    gauge(
        "weir_flow_table_entries",
        &["family"],
        "Entries in use at the last sweep; a connection takes two.",
    ),
    gauge("weir_flow_table_capacity", &["family"], "Entries that fit."),
    gauge(
        "weir_flow_table_established",
        &["family"],
        "Flows at the last sweep that cannot be evicted.",
    ),
    gauge(
        "weir_flow_table_half_open",
        &["family"],
        "Flows at the last sweep whose handshake is not finished; they give way when their place is needed.",
    ),
    gauge(
        "weir_flow_table_rated",
        &["family"],
        "Flows that the table is made for: limits.flows4, limits.flows6.",
    ),
    gauge(
        "weir_device_attached",
        &["device", "xdp", "tc"],
        "1 for each device that has programs, with how.",
    ),
    gauge(
        "weir_build_info",
        &["version"],
        "1, with the version of the agent.",
    ),
];

/// Why metrics could not be written.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// A sample contradicts its definition.
    #[error("metric {name} is given {given} labels, or is not defined")]
    Undefined {
        /// The metric.
        name: &'static str,
        /// Labels it was given.
        given: usize,
    },
    /// The library refused the families.
    #[error("metrics: {0}")]
    Encode(#[from] prometheus::Error),
}

/// The Prometheus text of everything known.
///
/// # Errors
/// A metric contradicts its definition: a fault of this program.
pub fn exposition(status: &Status, counters: &Counters) -> Result<String, MetricsError> {
    let families = families(status, counters)?;
    let mut text = Vec::new();
    // The encoder refuses a family without samples.
    let full: Vec<MetricFamily> = families
        .into_iter()
        .filter(|f| !f.get_metric().is_empty())
        .collect();
    TextEncoder::new().encode(&full, &mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Samples on their way into families.
#[derive(Default)]
struct Samples {
    by_name: BTreeMap<&'static str, Vec<Metric>>,
    fault: Option<MetricsError>,
}

impl Samples {
    /// Adds one sample; label values are in the order of the definition.
    fn add(&mut self, name: &'static str, labels: &[&str], value: f64) {
        let Some(definition) = METRICS
            .iter()
            .find(|d| d.name == name && d.labels.len() == labels.len())
        else {
            self.fault.get_or_insert(MetricsError::Undefined {
                name,
                given: labels.len(),
            });
            return;
        };
        let pairs = definition.labels.iter().zip(labels).map(|(name, value)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).into());
            pair.set_value((*value).into());
            pair
        });
        let mut metric = Metric::from_label(pairs.collect());
        if definition.counter {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        self.by_name.entry(name).or_default().push(metric);
    }
}

fn families(status: &Status, counters: &Counters) -> Result<Vec<MetricFamily>, MetricsError> {
    let mut samples = Samples::default();
    node(&mut samples, counters);
    for route in status.routes.iter().map(|status| &status.route) {
        for state in STATES {
            let upstreams = route.upstreams.iter();
            let count = upstreams.filter(|u| state_name(u.state) == state).count();
            samples.add(
                "weir_route_upstreams",
                &[&route.host, &route.path, state],
                count as f64,
            );
        }
    }
    for service in &status.services {
        self::service(&mut samples, service, counters);
    }
    agent(&mut samples, status);
    if let Some(fault) = samples.fault {
        return Err(fault);
    }
    let mut by_name = samples.by_name;
    Ok(METRICS
        .iter()
        .map(|definition| {
            let mut family = MetricFamily::default();
            family.set_name(definition.name.into());
            family.set_help(definition.help.into());
            family.set_field_type(if definition.counter {
                MetricType::COUNTER
            } else {
                MetricType::GAUGE
            });
            family.set_metric(by_name.remove(definition.name).unwrap_or_default());
            family
        })
        .collect())
}

fn node(samples: &mut Samples, counters: &Counters) {
    for (name, value) in &counters.node {
        if VERDICTS.contains(&name.as_str()) {
            samples.add("weir_packets_total", &[name], *value as f64);
        } else {
            samples.add("weir_datapath_events_total", &[name], *value as f64);
        }
    }
    for (reason, value) in &counters.drops {
        samples.add("weir_drops_total", &[reason], *value as f64);
    }
    for table in &counters.flow_tables {
        samples.add("weir_flow_table_entries", &[&table.family], table.entries as f64);
        samples.add(
            "weir_flow_table_capacity",
            &[&table.family],
            table.capacity as f64,
        );
    }
}

fn service(samples: &mut Samples, service: &ServiceStatus, counters: &Counters) {
    let address = service.address.to_string();
    let labels = [service.name.as_str(), address.as_str()];
    for state in STATES {
        let count = service
            .backends
            .iter()
            .filter(|b| state_name(b.state) == state)
            .count();
        samples.add(
            "weir_service_backends",
            &[labels[0], labels[1], state],
            count as f64,
        );
    }
    let live: u64 = service.backends.iter().map(|b| b.flows).sum();
    samples.add("weir_service_live_flows", &labels, live as f64);
    samples.add("weir_service_generation", &labels, f64::from(service.generation));
    if let Some(counted) = counters.services.get(&service.id) {
        samples.add("weir_service_flows_total", &labels, counted.flows as f64);
        for (reason, value) in &counted.drops {
            samples.add(
                "weir_service_drops_total",
                &[labels[0], labels[1], reason],
                *value as f64,
            );
        }
    }
    // One address can have two records while an old one drains: Prometheus wants one series.
    let mut by_address: BTreeMap<(String, &str), Vec<&BackendStatus>> = BTreeMap::new();
    for backend in &service.backends {
        by_address
            .entry((backend.address.to_string(), &backend.name))
            .or_default()
            .push(backend);
    }
    for ((address, name), records) in by_address {
        backend(
            samples,
            [labels[0], labels[1], name, &address],
            &records,
            counters,
        );
    }
}

/// One backend; `records` are its current record and those that drain, never empty.
fn backend(samples: &mut Samples, labels: [&str; 4], records: &[&BackendStatus], counters: &Counters) {
    let [service, service_address, name, address] = labels;
    let sum = |of: fn(&BackendStatus) -> u64| records.iter().map(|r| of(r)).sum::<u64>() as f64;
    let current = records.iter().find(|r| !r.leaving).or(records.first());
    for state in STATES {
        let is = current.is_some_and(|b| state_name(b.state) == state);
        let labels = [service, service_address, name, address, state];
        samples.add("weir_backend_state", &labels, f64::from(u8::from(is)));
    }
    for condition in current.iter().flat_map(|b| &b.conditions) {
        let labels = [service, service_address, name, address, &condition.by];
        samples.add(
            "weir_backend_condition",
            &labels,
            f64::from(u8::from(condition.fit)),
        );
    }
    samples.add("weir_backend_live_flows", &labels, sum(|b| b.flows));
    samples.add(
        "weir_backend_weight",
        &labels,
        current.map_or(0.0, |b| f64::from(b.weight)),
    );
    samples.add(
        "weir_backend_ring_share_ratio",
        &labels,
        sum(|b| b.ring_share.into()) / 10_000.0,
    );
    let counted: Vec<_> = records
        .iter()
        .filter_map(|r| counters.backends.get(&r.id))
        .collect();
    if counted.is_empty() {
        return;
    }
    let mut add = |name: &'static str, value: u64| samples.add(name, &labels, value as f64);
    add("weir_backend_flows_total", counted.iter().map(|c| c.flows).sum());
    add(
        "weir_backend_established_total",
        counted.iter().map(|c| c.established).sum(),
    );
    add(
        "weir_backend_refused_total",
        counted.iter().map(|c| c.refused).sum(),
    );
    add(
        "weir_backend_resteered_total",
        counted.iter().map(|c| c.resteered).sum(),
    );
    let mut add = |metric: &'static str, direction: &str, value: u64| {
        samples.add(
            metric,
            &[service, service_address, name, address, direction],
            value as f64,
        );
    };
    add(
        "weir_backend_packets_total",
        "in",
        counted.iter().map(|c| c.packets_in).sum(),
    );
    add(
        "weir_backend_packets_total",
        "out",
        counted.iter().map(|c| c.packets_out).sum(),
    );
    add(
        "weir_backend_bytes_total",
        "in",
        counted.iter().map(|c| c.bytes_in).sum(),
    );
    add(
        "weir_backend_bytes_total",
        "out",
        counted.iter().map(|c| c.bytes_out).sum(),
    );
}

fn agent(samples: &mut Samples, status: &Status) {
    let checks = &status.checks;
    samples.add("weir_check_targets", &[], checks.targets as f64);
    samples.add("weir_checks_running", &[], checks.running as f64);
    for (result, count) in [
        ("passed", checks.passed),
        ("failed", checks.failed),
        ("impossible", checks.impossible),
    ] {
        samples.add("weir_checks_total", &[result], count as f64);
    }
    samples.add("weir_ejected_backends", &[], checks.ejected as f64);
    for source in &status.sources {
        let labels = [source.name.as_str()];
        samples.add(
            "weir_source_connected",
            &labels,
            f64::from(u8::from(source.connected)),
        );
        samples.add("weir_source_objects", &labels, source.objects as f64);
        if let Some(heard) = source.last_heard {
            samples.add("weir_source_last_heard_seconds", &labels, unix(heard));
        }
        if let Some(read) = source.last_full_read {
            samples.add("weir_source_last_full_read_seconds", &labels, unix(read));
        }
        let refused = status
            .rejections
            .iter()
            .filter(|r| r.source == source.name)
            .count();
        samples.add("weir_rejections", &labels, refused as f64);
    }
    samples.add("weir_faults", &[], status.faults.len() as f64);
    samples.add("weir_ready", &[], f64::from(u8::from(status.ready)));
    samples.add("weir_commits_total", &[], status.commits as f64);
    samples.add(
        "weir_commit_duration_seconds",
        &[],
        status.last_commit_us as f64 / 1e6,
    );
    if let Some(at) = status.last_commit {
        samples.add("weir_last_commit_timestamp_seconds", &[], unix(at));
    }
    for device in &status.attachments {
        samples.add(
            "weir_device_attached",
            &[&device.device, &device.xdp, &device.tc],
            1.0,
        );
    }
    for table in &status.flow_tables {
        for (name, value) in [
            ("weir_flow_table_established", table.established),
            ("weir_flow_table_half_open", table.half_open),
            ("weir_flow_table_rated", table.rated),
        ] {
            samples.add(name, &[&table.family], value as f64);
        }
    }
    samples.add("weir_build_info", &[&status.version], 1.0);
}

/// Every backend state, as a label.
const STATES: [&str; 3] = ["active", "draining", "unready"];

fn state_name(state: BackendState) -> &'static str {
    match state {
        BackendState::Active => STATES[0],
        BackendState::Draining => STATES[1],
        BackendState::Unready => STATES[2],
    }
}

fn unix(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}
