//! The page for browsers: one document, which asks for itself again.

use std::{
    fmt::Write as _,
    time::{Duration, SystemTime},
};

use lb_route::BackendState;

use super::report::{CertificateReport, Numbers, Report, UpstreamReport};

const STYLE: &str = "body{font:14px system-ui,sans-serif;margin:2em;color:#222;background:#fff}\
h1{font-size:1.3em}h2{font-size:1.05em;margin:1.6em 0 .4em}\
table{border-collapse:collapse;width:100%}th,td{padding:.25em .6em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}\
th{font-weight:600;color:#555}th:first-child,td:first-child,.l{text-align:left}\
.active{color:#0a7a2f}.draining{color:#a15c00}.unready,.shunned{color:#b3261e}\
@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}th,td{border-color:#333}th{color:#aaa}}";

const COLUMNS: &[&str] = &[
    "Upstream", "Address", "State", "Since", "Weight", "Now", "Max", "Requests", "2xx", "3xx", "4xx", "5xx",
    "Mean", "In", "Out", "Conn", "Conn err", "Errors", "Retries",
];

/// The page.
pub(super) fn page(report: &Report) -> String {
    let mut page = String::with_capacity(4096);
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta http-equiv=\"refresh\" content=\"2\">\
         <title>Weir</title><style>{STYLE}</style></head><body><h1>Weir {}</h1>\
         <p>Serving for {}. Client connections: {} of {} now, {} so far. Requests without a route: {}.</p>",
        escaped(report.version),
        ago(report.since),
        report.clients.open,
        report.clients.limit,
        report.clients.total,
        report.unrouted.iter().sum::<u64>(),
    );
    page.push_str("<p>Listening at");
    for (index, place) in report
        .places
        .iter()
        .filter(|place| place.fault.is_none())
        .enumerate()
    {
        let comma = if index > 0 { "," } else { "" };
        let protocol = if place.tls { "HTTPS" } else { "HTTP" };
        let by = if place.by_systemd { " by systemd" } else { "" };
        let _ = write!(page, "{comma} {} ({protocol}{by})", place.address);
    }
    page.push_str(".</p>");
    for fault in report.places.iter().filter_map(|place| place.fault.as_ref()) {
        let _ = write!(page, "<p class=\"unready\">{}</p>", escaped(fault));
    }
    if report.routes.is_empty() {
        page.push_str("<p>No routes.</p>");
    }
    for route in &report.routes {
        let _ = write!(
            page,
            "<h2>{} <small>{}</small></h2><table><tr>",
            escaped(&route.name),
            route.balance
        );
        for column in COLUMNS {
            let _ = write!(page, "<th>{column}</th>");
        }
        page.push_str("</tr>");
        for upstream in &route.upstreams {
            let (class, state) = match (upstream.state, upstream.shunned) {
                (BackendState::Active, true) => ("shunned", "unreachable"),
                (BackendState::Active, false) => ("active", "active"),
                (BackendState::Draining, _) => ("draining", "draining"),
                (BackendState::Unready, _) => ("unready", "unready"),
            };
            let _ = write!(
                page,
                "<tr><td>{}</td><td class=\"l\">{}</td><td class=\"l {class}\">{state}</td><td>{}</td><td>{}</td>",
                escaped(&upstream.name),
                upstream.address,
                ago(upstream.changed),
                weight(upstream),
            );
            numbers(&mut page, &upstream.numbers);
            page.push_str("</tr>");
        }
        if route.own.requests > 0 {
            page.push_str("<tr><td>(the route itself)</td><td></td><td></td><td></td><td></td>");
            numbers(&mut page, &route.own);
            page.push_str("</tr>");
        }
        page.push_str("</table>");
    }
    certificates(&mut page, &report.certificates);
    page.push_str("</body></html>\n");
    page
}

/// Those that the shim gets by itself, if any.
fn certificates(page: &mut String, certificates: &[CertificateReport]) {
    if certificates.is_empty() {
        return;
    }
    page.push_str(
        "<h2>Certificates of ACME</h2><table>\
         <tr><th>Host</th><th>Ends in</th><th>Failures</th><th class=\"l\">Fault</th></tr>",
    );
    for certificate in certificates {
        let host = match certificate.host.as_str() {
            "" => "(all)".to_owned(),
            host => escaped(host),
        };
        let left = match certificate
            .until
            .map(|until| until.duration_since(SystemTime::now()))
        {
            Some(Ok(left)) => span(left),
            Some(Err(_)) => "expired".to_owned(),
            None => "none yet".to_owned(),
        };
        let fault = certificate.fault.as_deref().map(escaped).unwrap_or_default();
        let _ = write!(
            page,
            "<tr><td>{host}</td><td>{left}</td><td>{}</td><td class=\"l unready\">{fault}</td></tr>",
            certificate.failures
        );
    }
    page.push_str("</table>");
}

fn numbers(page: &mut String, n: &Numbers) {
    let mean = n.latency_us as f64 / 1000.0 / n.latency.iter().sum::<u64>().max(1) as f64;
    let [_, ok, moved, bad, failed] = n.answers;
    for number in [n.active, n.active_max, n.requests, ok, moved, bad, failed] {
        let _ = write!(page, "<td>{number}</td>");
    }
    let _ = write!(
        page,
        "<td>{mean:.1} ms</td><td>{}</td><td>{}</td>",
        bytes(n.bytes_in),
        bytes(n.bytes_out)
    );
    for number in [n.connections, n.connect_errors, n.errors, n.retries] {
        let _ = write!(page, "<td>{number}</td>");
    }
}

/// Bytes as people read them.
fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" {
                format!("{count} B")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// The weight, and how much of it counts while an upstream comes back slowly.
fn weight(upstream: &UpstreamReport) -> String {
    match upstream.tenths {
        Some(tenths) => format!("{} × 0.{tenths}", upstream.weight),
        None => upstream.weight.to_string(),
    }
}

/// How long ago.
fn ago(when: SystemTime) -> String {
    span(when.elapsed().unwrap_or(Duration::ZERO))
}

/// A time as people read it.
fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// Names come from labels: nothing of them is markup.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::report::tests::report;

    #[test]
    fn the_page_shows_what_a_browser_may_show() {
        let page = page(&report());
        for part in [
            "content=\"2\"",
            "a/",
            "10.0.0.0:80",
            "4.0 KiB",
            "class=\"l draining\"",
            "&lt;b&gt;&quot;x",
            "1m3",
            "<td>a.test</td>",
            "none yet",
            "no &lt;answer&gt;",
            "Listening at [::]:80 (HTTP by systemd).",
            "it is &lt;taken&gt;",
        ] {
            assert!(page.contains(part), "{part} is missing in {page}");
        }
        assert!(!page.contains("<b>") && !page.contains("http://") && !page.contains("https://"));
        let cells = page.split("<tr>").nth(2).unwrap().matches("<td").count();
        assert_eq!(cells, COLUMNS.len());
    }
}
