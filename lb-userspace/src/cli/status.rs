//! `weir status`: the agent's state as text.

use std::time::SystemTime;

use super::{
    humane::{age, byte_rate, grouped, micros, short, span},
    rates::{Rate, Rates},
    routes,
    table::{Cell, Column, Look, Table, Tone},
};
use crate::{
    admin::api::Counters,
    health::Report,
    model::BackendState,
    status::{BackendStatus, ServiceStatus, SourceStatus, Status},
};

const BACKENDS: &[Column] = &[
    Column::words("BACKEND"),
    Column::words("ADDRESS"),
    Column::words("STATE"),
    Column::numbers("SINCE").expendable(1),
    Column::numbers("WEIGHT").expendable(6),
    Column::numbers("SHARE").expendable(2),
    Column::numbers("FLOWS"),
    Column::numbers("NEW/S").expendable(4),
    Column::numbers("PKT/S").expendable(5),
    Column::numbers("IN").expendable(3),
    Column::numbers("OUT").expendable(3),
    Column::words("PLACE").expendable(7),
    Column::words("REASON"),
];

const SOURCES: &[Column] = &[
    Column::words("SOURCE"),
    Column::words("STATE"),
    Column::numbers("OBJECTS"),
    Column::numbers("HEARD"),
    Column::numbers("FULL READ").expendable(1),
    Column::words("FAULT"),
];

const DEVICES: &[Column] = &[
    Column::words("DEVICE"),
    Column::words("XDP"),
    Column::words("TC"),
    Column::words("WHY").expendable(1),
];

/// Everything, as of `now`. `counters` are two readings some time apart; without them there are no rates.
pub fn render(
    status: &Status,
    counters: Option<(&Counters, &Counters)>,
    now: SystemTime,
    look: Look,
) -> String {
    let rates = counters.and_then(|(before, after)| Rates::new(before, after));
    let parts = [
        headline(status, now).render(look),
        services(status, rates, now).render(look),
        routes::routes(status).render(look),
        sources(status, now).render(look),
        devices(status).render(look),
        checks(&status.checks).render(look),
        datapath(status, counters.map(|(_, after)| after), rates).render(look),
        refused(status).render(look),
        faults(status).render(look),
    ];
    parts
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("\n")
}

fn headline(status: &Status, now: SystemTime) -> Table {
    let mut table = Table::new(&[], 0);
    let ready = match status.ready {
        true => Cell::new("ready", Tone::Good),
        false => Cell::new("not ready", Tone::Bad),
    };
    let mut parts = vec![Cell::new(format!("weir {}", status.version), Tone::Head), ready];
    if let Some(commit) = status.last_commit {
        let (ago, took) = (age(now, commit), micros(status.last_commit_us));
        parts.push(format!("last change {ago} ago, took {took}").into());
    }
    parts.push(format!("{} ring commits", grouped(status.commits)).into());
    table.line(parts);
    table
}

fn services(status: &Status, rates: Option<Rates<'_>>, now: SystemTime) -> Table {
    let mut table = Table::new(BACKENDS, 2);
    if status.services.is_empty() {
        if !status.routes.is_empty() {
            return table;
        }
        table.line(vec![
            "no services: label a container with weir.service.<name>.listen".into(),
        ]);
        return table;
    }
    for (index, service) in status.services.iter().enumerate() {
        if index > 0 {
            table.line(Vec::new());
        }
        table.line(service_line(service, rates, now));
        if service.backends.is_empty() {
            continue;
        }
        table.head();
        for backend in &service.backends {
            table.row(backend_row(backend, rates.map(|r| r.backend(backend)), now));
        }
    }
    table
}

fn service_line(service: &ServiceStatus, rates: Option<Rates<'_>>, now: SystemTime) -> Vec<Cell> {
    let active = service.backends.iter().filter(|b| takes_new_flows(b)).count();
    let tone = if active == 0 { Tone::Bad } else { Tone::Plain };
    let flows: u64 = service.backends.iter().map(|b| b.flows).sum();
    let mut parts = vec![
        Cell::new(service.name.clone(), Tone::Head),
        service.address.to_string().into(),
        Cell::new(
            format!("{active} of {} backends active", service.backends.len()),
            tone,
        ),
        format!("{} flows", grouped(flows)).into(),
    ];
    if let Some(until) = service.kept_until {
        let left = span(until.duration_since(now).unwrap_or_default());
        parts.push(Cell::new(
            format!("no container; forgotten in {left}"),
            Tone::Warn,
        ));
    }
    if let Some(rate) = rates.map(|r| r.service(service)) {
        parts.push(format!("{} new/s", short(rate.flows)).into());
        parts.push(format!("{} pkt/s", short(rate.packets)).into());
        parts.push(format!("{} in", byte_rate(rate.bytes_in)).into());
        parts.push(format!("{} out", byte_rate(rate.bytes_out)).into());
    }
    parts
}

fn takes_new_flows(backend: &BackendStatus) -> bool {
    backend.state == BackendState::Active && !backend.leaving
}

/// One backend. The outer `None` of `rate`: rates are not known; the inner: not of this backend.
fn backend_row(backend: &BackendStatus, rate: Option<Option<Rate>>, now: SystemTime) -> Vec<Cell> {
    let rate = rate.flatten();
    let number = |of: fn(&Rate) -> String| Cell::from(rate.as_ref().map_or("-".into(), of));
    vec![
        backend.name.clone().into(),
        backend.address.to_string().into(),
        state(backend, now),
        age(now, backend.since).into(),
        weight(backend).into(),
        format!("{}.{:02}%", backend.ring_share / 100, backend.ring_share % 100).into(),
        grouped(backend.flows).into(),
        number(|r| short(r.flows)),
        number(|r| short(r.packets)),
        number(|r| byte_rate(r.bytes_in)),
        number(|r| byte_rate(r.bytes_out)),
        backend.place.clone().into(),
        backend.reason.clone().into(),
    ]
}

/// The weight, and how much of it counts while a backend comes back slowly.
fn weight(backend: &BackendStatus) -> String {
    match backend.tenths {
        Some(tenths) => format!("{} × 0.{tenths}", backend.weight),
        None => backend.weight.to_string(),
    }
}

fn state(backend: &BackendStatus, now: SystemTime) -> Cell {
    let left = backend
        .drain_deadline
        .map(|end| span(end.duration_since(now).unwrap_or_default()));
    match (backend.state, backend.leaving, left) {
        (BackendState::Active, false, _) => Cell::new("active", Tone::Good),
        (BackendState::Unready, false, _) => Cell::new("unready", Tone::Bad),
        (_, false, None) => Cell::new("draining", Tone::Warn),
        (_, false, Some(left)) => Cell::new(format!("draining, {left} left"), Tone::Warn),
        (_, true, None) => Cell::new("leaving", Tone::Warn),
        (_, true, Some(left)) => Cell::new(format!("leaving, {left} left"), Tone::Warn),
    }
}

fn sources(status: &Status, now: SystemTime) -> Table {
    let mut table = Table::new(SOURCES, 0);
    if !status.sources.is_empty() {
        table.head();
    }
    for source in &status.sources {
        let ago = |time: Option<SystemTime>| time.map_or("never".into(), |t| format!("{} ago", age(now, t)));
        table.row(vec![
            source.name.clone().into(),
            source_state(source),
            grouped(source.objects as u64).into(),
            ago(source.last_heard).into(),
            ago(source.last_full_read).into(),
            match (&source.fault, &source.via) {
                (Some(fault), _) => Cell::new(fault.clone(), Tone::Bad),
                (None, Some(via)) => Cell::new(format!("via {via}"), Tone::Faint),
                (None, None) => Cell::from(String::new()),
            },
        ]);
    }
    table
}

fn source_state(source: &SourceStatus) -> Cell {
    match source.connected {
        true => Cell::new("connected", Tone::Good),
        false => Cell::new("not connected", Tone::Bad),
    }
}

fn devices(status: &Status) -> Table {
    let mut table = Table::new(DEVICES, 0);
    if !status.attachments.is_empty() {
        table.head();
    }
    for device in &status.attachments {
        table.row(vec![
            device.device.clone().into(),
            device.xdp.clone().into(),
            device.tc.clone().into(),
            Cell::new(device.why.clone(), Tone::Faint),
        ]);
    }
    table
}

/// How the health checks go; nothing without any.
fn checks(checks: &Report) -> Table {
    let mut table = Table::new(&[], 0);
    if checks.targets == 0 && checks.ejected == 0 {
        return table;
    }
    let mut parts = vec![
        Cell::new("health checks", Tone::Head),
        format!("{} backends", grouped(checks.targets as u64)).into(),
        format!("{} passed", grouped(checks.passed)).into(),
        format!("{} failed", grouped(checks.failed)).into(),
    ];
    if checks.impossible > 0 {
        let text = format!("{} impossible", grouped(checks.impossible));
        parts.push(Cell::new(text, Tone::Warn));
    }
    parts.push(format!("{} ejected", grouped(checks.ejected as u64)).into());
    table.line(parts);
    table
}

/// How full the flow tables are, and what was dropped since the maps were made.
fn datapath(status: &Status, counters: Option<&Counters>, rates: Option<Rates<'_>>) -> Table {
    let mut table = Table::new(&[], 0);
    let Some(counters) = counters else { return table };
    for flows in &counters.flow_tables {
        let (entries, capacity) = (grouped(flows.entries), grouped(flows.capacity));
        let share = 100.0 * flows.entries as f64 / flows.capacity.max(1) as f64;
        let mut line = vec![
            Cell::new(format!("flow table {}", flows.family), Tone::Head),
            format!("{entries} of {capacity} entries ({share:.1}%)").into(),
        ];
        if let Some(swept) = status.flow_tables.iter().find(|t| t.family == flows.family) {
            let (established, rated) = (grouped(swept.established), grouped(swept.rated));
            let share = 100.0 * swept.established as f64 / swept.rated.max(1) as f64;
            let tone = if share >= 80.0 { Tone::Warn } else { Tone::Plain };
            let text = format!("{established} of {rated} flows established ({share:.1}%)");
            line.push(Cell::new(text, tone));
            line.push(format!("{} half-open", grouped(swept.half_open)).into());
        }
        table.line(line);
    }
    let mut drops = vec![Cell::new("drops", Tone::Head)];
    for (reason, count) in counters.drops.iter().filter(|(_, count)| **count > 0) {
        let rate = rates.map_or(0.0, |r| r.drops(reason));
        let (text, tone) = match short(rate).as_str() {
            "0" => (format!("{reason} {}", grouped(*count)), Tone::Plain),
            rate => (format!("{reason} {} (+{rate}/s)", grouped(*count)), Tone::Warn),
        };
        drops.push(Cell::new(text, tone));
    }
    if drops.len() == 1 {
        drops.push("none".into());
    }
    table.line(drops);
    table
}

fn refused(status: &Status) -> Table {
    let mut table = Table::new(&[Column::words(""), Column::words("")], 4);
    if !status.rejections.is_empty() {
        table.line(vec![Cell::new(
            format!("REJECTED ({})", status.rejections.len()),
            Tone::Bad,
        )]);
    }
    for rejection in &status.rejections {
        table.line(vec![
            format!("  {}: {}", rejection.source, rejection.object).into(),
        ]);
        table.row(vec![
            Cell::new("fault", Tone::Faint),
            rejection.fault.clone().into(),
        ]);
        table.row(vec![
            Cell::new("remedy", Tone::Faint),
            rejection.remedy.clone().into(),
        ]);
    }
    table
}

fn faults(status: &Status) -> Table {
    let mut table = Table::new(&[], 0);
    if !status.faults.is_empty() {
        table.line(vec![Cell::new(
            format!("FAULTS ({})", status.faults.len()),
            Tone::Bad,
        )]);
    }
    for fault in &status.faults {
        table.line(vec![format!("  {fault}").into()]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::fixture;

    #[test]
    fn the_whole_status_as_text() {
        let (before, after) = (
            Counters::new(&fixture::reading(0), &fixture::status(), 0),
            Counters::new(&fixture::reading(10), &fixture::status(), 2_000_000),
        );
        let text = render(
            &fixture::status(),
            Some((&before, &after)),
            *fixture::NOW,
            Look::default(),
        );
        assert_eq!(text, include_str!("golden/status.txt"), "\n{text}");
    }

    #[test]
    fn a_terminal_of_eighty_columns_gets_no_longer_line() {
        let look = Look {
            colour: false,
            width: Some(80),
        };
        let text = render(&fixture::status(), None, *fixture::NOW, look);
        assert_eq!(text, include_str!("golden/status-80.txt"), "\n{text}");
        assert!(text.lines().all(|l| l.chars().count() <= 80));
    }

    #[test]
    fn an_empty_agent_says_what_to_do() {
        let text = render(
            &Status {
                version: "0.1.0".into(),
                ..Status::default()
            },
            None,
            *fixture::NOW,
            Look::default(),
        );
        assert_eq!(
            text,
            "weir 0.1.0  not ready  0 ring commits\n\nno services: label a container with weir.service.<name>.listen\n"
        );
    }
}
