//! The exposition against its definition, its document and the values it is made of.

use std::collections::BTreeSet;

use lb_common::counter::Counter;

use super::*;
use crate::admin::fixture;

fn text() -> String {
    exposition(
        &fixture::status(),
        &Counters::new(&fixture::reading(5), &fixture::status(), 0),
    )
    .unwrap()
}

#[test]
fn the_exposition_parses_and_no_series_is_told_twice() {
    let mut series = BTreeSet::new();
    for line in text().lines().filter(|l| !l.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        value.parse::<f64>().unwrap();
        assert!(series.insert(name.to_owned()), "twice: {name}");
    }
    for expected in [
        r#"weir_packets_total{verdict="passed"}"#,
        r#"weir_drops_total{reason="malformed"}"#,
        r#"weir_service_drops_total{service="web",address="10.0.0.1:80/tcp",reason="acl_denied"}"#,
        r#"weir_backend_bytes_total{service="dns",service_address="[fd00::1]:53/udp",backend="dns-1",address="[fd00::5]:53",direction="out"}"#,
        r#"weir_build_info{version="0.1.0"}"#,
    ] {
        assert!(series.contains(expected), "{expected} is missing of {series:#?}");
    }
}

#[test]
fn values_are_those_of_status_and_counters() {
    let text = text();
    for line in [
        r#"weir_drops_total{reason="no_flow"} 12"#,
        r#"weir_backend_ring_share_ratio{service="web",service_address="10.0.0.1:80/tcp",backend="web-1",address="172.17.0.2:8080"} 0.6667"#,
        r#"weir_backend_state{service="web",service_address="10.0.0.1:80/tcp",backend="web-3",address="172.17.0.4:8080",state="draining"} 1"#,
        r#"weir_service_live_flows{service="web",address="10.0.0.1:80/tcp"} 132"#,
        r#"weir_route_upstreams{host="vote.example.com",path="/shop",state="draining"} 1"#,
        r#"weir_rejections{source="docker"} 1"#,
        r#"weir_source_last_heard_seconds{source="docker"} 1767225599"#,
        r#"weir_source_last_full_read_seconds{source="docker"} 1767225470"#,
        "weir_commit_duration_seconds 0.00125",
        r#"weir_backend_condition{service="web",service_address="10.0.0.1:80/tcp",backend="web-3",address="172.17.0.4:8080",by="check"} 0"#,
        r#"weir_checks_total{result="impossible"} 1"#,
        r#"weir_flow_table_established{family="ipv4"} 120"#,
        r#"weir_flow_table_half_open{family="ipv4"} 12"#,
        r#"weir_flow_table_rated{family="ipv6"} 65536"#,
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is missing of\n{text}");
    }
}

#[test]
fn an_address_with_an_old_record_is_one_series() {
    let mut status = fixture::status();
    let mut old = status.services[0].backends[0].clone();
    (old.id, old.leaving, old.flows, old.ring_share) = (12, true, 1, 0);
    old.state = BackendState::Draining;
    status.services[0].backends.push(old);
    let text = exposition(
        &status,
        &Counters::new(&fixture::reading(0), &fixture::status(), 0),
    )
    .unwrap();
    let of = |metric: &str| {
        let start =
            format!("{metric}{{service=\"web\",service_address=\"10.0.0.1:80/tcp\",backend=\"web-1\"");
        text.lines()
            .filter(|l| l.starts_with(&start))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(of("weir_backend_live_flows").len(), 1);
    assert!(of("weir_backend_live_flows")[0].ends_with(" 121"));
    assert!(of("weir_backend_flows_total")[0].ends_with(" 20"));
    assert!(of("weir_backend_state")[0].ends_with("state=\"active\"} 1"));
}

#[test]
fn verdicts_are_the_first_counters() {
    let first: Vec<&str> = Counter::ALL
        .iter()
        .take(VERDICTS.len())
        .map(|c| c.name())
        .collect();
    assert_eq!(first, VERDICTS);
    assert_eq!(
        Counter::ALL[VERDICTS.len()],
        Counter::FlowsCreated,
        "a new verdict belongs into VERDICTS"
    );
}

#[test]
fn the_document_lists_what_is_exported() {
    let document = include_str!("../../../docs/metrics.md");
    let documented: Vec<String> = document
        .lines()
        .filter(|l| l.starts_with("| `weir_"))
        .map(str::to_owned)
        .collect();
    let defined: Vec<String> = METRICS
        .iter()
        .map(|d| {
            let kind = if d.counter { "counter" } else { "gauge" };
            let labels: Vec<String> = d.labels.iter().map(|l| format!("`{l}`")).collect();
            format!("| `{}` | {kind} | {} | {} |", d.name, labels.join(", "), d.help)
        })
        .collect();
    assert_eq!(
        documented,
        defined,
        "docs/metrics.md should be:\n{}",
        defined.join("\n")
    );
    let text = text();
    for definition in METRICS {
        assert!(
            text.contains(&format!("# TYPE {} ", definition.name)),
            "{} is never exported",
            definition.name
        );
    }
}
