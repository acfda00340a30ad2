//! Prometheus metrics.

use std::{fmt::Write as _, time::UNIX_EPOCH};

use lb_route::BackendState;

use super::report::{CertificateReport, Numbers, Report, RouteReport, UpstreamReport};
use crate::stats::BOUNDS_US;

/// A metric of upstreams: its name, kind, help, and where it is.
type Metric = (&'static str, &'static str, &'static str, fn(&Numbers) -> u64);

/// Metrics that every upstream has. `docs/l7.md` lists them.
const METRICS: &[Metric] = &[
    (
        "weir_l7_active_requests",
        "gauge",
        "Requests under way, upgraded connections too",
        |n| n.active,
    ),
    (
        "weir_l7_upstream_connections_total",
        "counter",
        "Connections made to the upstream",
        |n| n.connections,
    ),
    (
        "weir_l7_connect_errors_total",
        "counter",
        "Connections to the upstream that could not be made",
        |n| n.connect_errors,
    ),
    (
        "weir_l7_errors_total",
        "counter",
        "Requests that failed after they were sent",
        |n| n.errors,
    ),
    (
        "weir_l7_retries_total",
        "counter",
        "Requests taken away to another upstream",
        |n| n.retries,
    ),
    (
        "weir_l7_received_bytes_total",
        "counter",
        "Bytes of bodies from clients",
        |n| n.bytes_in,
    ),
    (
        "weir_l7_sent_bytes_total",
        "counter",
        "Bytes of bodies to clients",
        |n| n.bytes_out,
    ),
];

/// The text that Prometheus reads.
pub(super) fn exposition(report: &Report) -> String {
    let mut text = String::new();
    let upstreams: Vec<(&RouteReport, Option<&UpstreamReport>, &Numbers)> = report
        .routes
        .iter()
        .flat_map(|route| {
            let each = route.upstreams.iter().map(move |u| (route, Some(u), &u.numbers));
            each.chain([(route, None, &route.own)])
        })
        .collect();
    head(
        &mut text,
        "weir_l7_requests_total",
        "counter",
        "Answers by class; without an upstream: of the route itself",
    );
    for (route, upstream, numbers) in &upstreams {
        for (class, count) in (1..).zip(numbers.answers) {
            let labels = labels(route, *upstream);
            let _ = writeln!(
                text,
                "weir_l7_requests_total{{{labels},class=\"{class}xx\"}} {count}"
            );
        }
    }
    for (name, kind, help, number) in METRICS {
        head(&mut text, name, kind, help);
        for (route, upstream, numbers) in upstreams.iter().filter(|(_, upstream, _)| upstream.is_some()) {
            let _ = writeln!(text, "{name}{{{}}} {}", labels(route, *upstream), number(numbers));
        }
    }
    head(
        &mut text,
        "weir_l7_upstream_active",
        "gauge",
        "1: the upstream takes new requests",
    );
    for (route, upstream, _) in &upstreams {
        if let Some(upstream) = upstream {
            let active = u8::from(upstream.state == BackendState::Active);
            let _ = writeln!(
                text,
                "weir_l7_upstream_active{{{}}} {active}",
                labels(route, Some(upstream))
            );
        }
    }
    let name = "weir_l7_request_duration_seconds";
    head(
        &mut text,
        name,
        "histogram",
        "From a request to the end of its answer",
    );
    for (route, upstream, numbers) in &upstreams {
        histogram(&mut text, name, &labels(route, *upstream), numbers);
    }
    head(
        &mut text,
        "weir_l7_unrouted_requests_total",
        "counter",
        "Answers by class to requests that no route took",
    );
    for (class, count) in (1..).zip(report.unrouted) {
        let _ = writeln!(
            text,
            "weir_l7_unrouted_requests_total{{class=\"{class}xx\"}} {count}"
        );
    }
    let name = "weir_l7_listening";
    head(
        &mut text,
        name,
        "gauge",
        "1: the place is served; 0: it cannot be had",
    );
    for place in &report.places {
        let protocol = if place.tls { "https" } else { "http" };
        let served = u8::from(place.fault.is_none());
        let address = place.address;
        let _ = writeln!(
            text,
            "{name}{{address=\"{address}\",protocol=\"{protocol}\"}} {served}"
        );
    }
    for (name, kind, help, value) in [
        (
            "weir_l7_client_connections",
            "gauge",
            "Open client connections",
            report.clients.open,
        ),
        (
            "weir_l7_client_connections_total",
            "counter",
            "Client connections so far",
            report.clients.total,
        ),
        (
            "weir_l7_client_connections_limit",
            "gauge",
            "Client connections at a time",
            report.clients.limit.into(),
        ),
        (
            "weir_l7_log_lines_lost_total",
            "counter",
            "Lines of the access log that could not be written",
            report.log_lines_lost,
        ),
    ] {
        head(&mut text, name, kind, help);
        let _ = writeln!(text, "{name} {value}");
    }
    certificates(&mut text, &report.certificates);
    text
}

/// Of the certificates that the shim gets by itself.
fn certificates(text: &mut String, certificates: &[CertificateReport]) {
    let name = "weir_l7_certificate_expiry_seconds";
    head(
        text,
        name,
        "gauge",
        "Unix time until which a certificate of ACME is good",
    );
    for certificate in certificates {
        let until = certificate.until.map(|until| until.duration_since(UNIX_EPOCH));
        if let Some(until) = until {
            let (host, until) = (escaped(&certificate.host), until.unwrap_or_default().as_secs());
            let _ = writeln!(text, "{name}{{host=\"{host}\"}} {until}");
        }
    }
    let name = "weir_l7_acme_errors_total";
    let help = "Orders of certificates that failed; without a host: those of all of them at once";
    head(text, name, "counter", help);
    for certificate in certificates {
        let host = escaped(&certificate.host);
        let _ = writeln!(text, "{name}{{host=\"{host}\"}} {}", certificate.failures);
    }
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn histogram(text: &mut String, name: &str, labels: &str, numbers: &Numbers) {
    let mut sum = 0;
    for (place, count) in numbers.latency.iter().enumerate() {
        sum += count;
        let bound = BOUNDS_US
            .get(place)
            .map_or("+Inf".to_owned(), |us| format!("{}", *us as f64 / 1e6));
        let _ = writeln!(text, "{name}_bucket{{{labels},le=\"{bound}\"}} {sum}");
    }
    let seconds = numbers.latency_us as f64 / 1e6;
    let _ = writeln!(
        text,
        "{name}_sum{{{labels}}} {seconds}\n{name}_count{{{labels}}} {sum}"
    );
}

fn labels(route: &RouteReport, upstream: Option<&UpstreamReport>) -> String {
    let (name, address) = match upstream {
        Some(upstream) => (escaped(&upstream.name), upstream.address.to_string()),
        None => (String::new(), String::new()),
    };
    format!(
        "route=\"{}\",upstream=\"{name}\",address=\"{address}\"",
        escaped(&route.name)
    )
}

fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::page::report::tests::report;

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let text = exposition(&report());
        for line in [
            "weir_l7_requests_total{route=\"a/\",upstream=\"c0\",address=\"10.0.0.0:80\",class=\"2xx\"} 1",
            "weir_l7_retries_total{route=\"a/\",upstream=\"c0\",address=\"10.0.0.0:80\"} 3",
            "weir_l7_upstream_active{route=\"a/\",upstream=\"<b>\\\"x\\\\\",address=\"10.0.0.1:80\"} 0",
            "weir_l7_request_duration_seconds_bucket{route=\"a/\",upstream=\"c0\",address=\"10.0.0.0:80\",le=\"0.001\"} 1",
            "weir_l7_request_duration_seconds_bucket{route=\"a/\",upstream=\"c0\",address=\"10.0.0.0:80\",le=\"5\"} 1",
            "weir_l7_request_duration_seconds_bucket{route=\"a/\",upstream=\"c0\",address=\"10.0.0.0:80\",le=\"+Inf\"} 2",
            "weir_l7_unrouted_requests_total{class=\"4xx\"} 1",
            "weir_l7_certificate_expiry_seconds{host=\"a.test\"} 1900000000",
            "weir_l7_acme_errors_total{host=\"bad.test\"} 2",
            "weir_l7_acme_errors_total{host=\"new.test\"} 0",
            "weir_l7_listening{address=\"[::]:80\",protocol=\"http\"} 1",
            "weir_l7_listening{address=\"[::]:443\",protocol=\"https\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\nis missing in\n{text}");
        }
        // No series twice, and every name explained.
        let series: Vec<&str> = text
            .lines()
            .filter(|l| !l.starts_with('#'))
            .filter_map(|l| l.rsplit_once(' '))
            .map(|l| l.0)
            .collect();
        assert_eq!(series.iter().collect::<BTreeSet<_>>().len(), series.len());
        let docs = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/l7.md")).unwrap();
        for name in text
            .lines()
            .filter_map(|l| l.strip_prefix("# TYPE "))
            .filter_map(|l| l.split(' ').next())
        {
            assert!(
                docs.contains(&format!("`{name}`")),
                "docs/l7.md does not name {name}"
            );
        }
    }
}
