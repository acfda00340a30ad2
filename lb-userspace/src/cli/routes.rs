//! The routes of `weir status`.

use super::table::{Cell, Column, Table, Tone};
use crate::{
    model::{Backend, BackendState},
    route::{Route, RouteSettings},
    status::{RouteStatus, Status},
};

const UPSTREAMS: &[Column] = &[
    Column::words("UPSTREAM"),
    Column::words("ADDRESS"),
    Column::words("STATE"),
    Column::words("REASON"),
];

/// Every route with its upstreams; empty when there is none.
pub(super) fn routes(status: &Status) -> Table {
    let mut table = Table::new(UPSTREAMS, 2);
    for (index, RouteStatus { route, waiting_for }) in status.routes.iter().enumerate() {
        if index > 0 {
            table.line(Vec::new());
        }
        table.line(route_line(route, waiting_for.as_deref()));
        if !route.aliases.is_empty() {
            let aliases: Vec<&str> = route.aliases.iter().map(String::as_str).collect();
            table.line(vec![format!("  also {}", aliases.join(", ")).into()]);
        }
        for remark in &route.remarks {
            table.line(vec![Cell::new(format!("  note: {remark}"), Tone::Warn)]);
        }
        if route.upstreams.is_empty() {
            continue;
        }
        table.head();
        for upstream in &route.upstreams {
            table.row(vec![
                upstream.name.clone().into(),
                upstream.address.to_string().into(),
                state(upstream, route.slow.get(&upstream.address)),
                upstream.reason.clone().into(),
            ]);
        }
    }
    table
}

fn route_line(route: &Route, waiting_for: Option<&str>) -> Vec<Cell> {
    let active = route
        .upstreams
        .iter()
        .filter(|upstream| upstream.state == BackendState::Active)
        .count();
    let tone = if active == 0 { Tone::Bad } else { Tone::Plain };
    let mut parts = vec![
        Cell::new(format!("route {}{}", route.host, route.path), Tone::Head),
        Cell::new(
            format!("{active} of {} upstreams active", route.upstreams.len()),
            tone,
        ),
    ];
    if let Some(what) = waiting_for {
        parts.push(Cell::new(format!("waiting for {what}"), Tone::Warn));
    }
    parts.push(settings(&route.settings).into());
    parts
}

/// The settings that are not as they are when nothing is said, after how requests are spread.
fn settings(settings: &RouteSettings) -> String {
    let tls = &settings.tls;
    let said = [
        (settings.rewrite, "prefix taken off".to_owned()),
        (tls.only, "HTTPS only".into()),
        (tls.serve && !tls.only, "HTTPS".into()),
        (tls.passthrough, "TLS passed through".into()),
        (
            settings.upstream_tls.is_some_and(|tls| tls.verify),
            "HTTPS to upstreams".into(),
        ),
        (
            settings.upstream_tls.is_some_and(|tls| !tls.verify),
            "HTTPS to upstreams, not verified".into(),
        ),
        (settings.sticky_cookie.is_some(), "sticky".into()),
        (
            !settings.websocket_endpoints.is_empty(),
            format!("{} WebSocket paths", settings.websocket_endpoints.len()),
        ),
        (
            !settings.redirects.is_empty(),
            format!("{} redirects", settings.redirects.len()),
        ),
        (
            settings.cluster.is_some(),
            format!("cluster {}", settings.cluster.as_deref().unwrap_or_default()),
        ),
    ];
    let mut parts = vec![settings.balance.to_string()];
    parts.extend(said.into_iter().filter_map(|(is, text)| is.then_some(text)));
    parts.join(", ")
}

/// The state, and how much of its share an upstream has while it comes back slowly.
fn state(upstream: &Backend, tenths: Option<&u8>) -> Cell {
    match (upstream.state, tenths) {
        (BackendState::Active, Some(tenths)) => Cell::new(format!("active × 0.{tenths}"), Tone::Good),
        (BackendState::Active, None) => Cell::new("active", Tone::Good),
        (BackendState::Unready, _) => Cell::new("unready", Tone::Bad),
        (BackendState::Draining, _) => Cell::new("draining", Tone::Warn),
    }
}
