//! The log of requests: lines are made by the workers and written by a thread of its own, so that a slow reader never holds a
//! request up. What it cannot take is counted.

use std::{
    fmt::Write as _,
    io::Write as _,
    net::SocketAddr,
    sync::{
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::{Duration, SystemTime},
};

use hyper::{
    HeaderMap, Method, Version,
    header::{self, HeaderName},
    http::request::Parts,
};
use jiff::{Timestamp, tz::TimeZone};
use lb_route::AccessLog;
use serde::Serialize;

/// Lines that may wait to be written.
const WAITING: usize = 8192;

/// Where lines go.
#[derive(Debug)]
pub struct Log {
    lines: SyncSender<String>,
    lost: AtomicU64,
}

/// One request.
#[derive(Debug)]
pub struct Line {
    format: AccessLog,
    when: SystemTime,
    client: SocketAddr,
    method: Method,
    url: String,
    version: Version,
    host: String,
    referer: String,
    agent: String,
    /// Status; 0: none was sent.
    pub status: u16,
    /// Bytes of the request's body.
    pub bytes_in: u64,
    /// Bytes of the answer's body.
    pub bytes_out: u64,
    /// From the header to the end of the answer.
    pub took: Duration,
    /// The answer broke off.
    pub broken: bool,
    /// Name of the route.
    pub route: Option<String>,
    /// Name and address of the upstream.
    pub upstream: Option<(String, SocketAddr)>,
}

/// A line as JSON has it.
#[derive(Serialize)]
struct Record<'l> {
    time: String,
    client: SocketAddr,
    method: &'l str,
    host: &'l str,
    url: &'l str,
    protocol: &'l str,
    status: u16,
    bytes_in: u64,
    bytes_out: u64,
    ms: f64,
    broken: bool,
    route: Option<&'l str>,
    upstream: Option<&'l str>,
    upstream_address: Option<SocketAddr>,
    referer: &'l str,
    user_agent: &'l str,
}

// === impl Log ===

impl Log {
    /// Writes to standard output.
    pub fn start() -> std::io::Result<Self> {
        let (lines, queue) = sync_channel(WAITING);
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write_all(&queue))?;
        Ok(Self {
            lines,
            lost: AtomicU64::new(0),
        })
    }

    /// What has to be remembered of a request from its header, if it is logged at all.
    pub fn line(format: AccessLog, client: SocketAddr, parts: &Parts) -> Option<Box<Line>> {
        if format == AccessLog::Off {
            return None;
        }
        let host = parts.uri.authority().map(|a| a.as_str().to_owned());
        let url = parts.uri.path_and_query().map_or("", |p| p.as_str());
        Some(Box::new(Line {
            format,
            when: SystemTime::now(),
            client,
            method: parts.method.clone(),
            url: url.to_owned(),
            version: parts.version,
            host: host.unwrap_or_else(|| text(&parts.headers, &header::HOST)),
            referer: text(&parts.headers, &header::REFERER),
            agent: text(&parts.headers, &header::USER_AGENT),
            status: 0,
            bytes_in: 0,
            bytes_out: 0,
            took: Duration::ZERO,
            broken: false,
            route: None,
            upstream: None,
        }))
    }

    /// Writes a line, or counts it as lost.
    pub fn write(&self, line: &Line) {
        if self.lines.try_send(line.to_text()).is_err() {
            self.lost.fetch_add(1, Relaxed);
        }
    }

    /// Lines that could not be written.
    pub fn lost(&self) -> u64 {
        self.lost.load(Relaxed)
    }
}

/// Writes lines until nobody makes any; those that are waiting go out together.
fn write_all(queue: &Receiver<String>) {
    let mut out = std::io::stdout();
    while let Ok(mut text) = queue.recv() {
        text.push('\n');
        for line in queue.try_iter().take(256) {
            text.push_str(&line);
            text.push('\n');
        }
        // A log that nobody takes is no reason to stop serving.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}

fn text(headers: &HeaderMap, name: &HeaderName) -> String {
    let value = headers
        .get(name)
        .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    value.unwrap_or_default()
}

// === impl Line ===

impl Line {
    /// As it is written, without its end.
    pub fn to_text(&self) -> String {
        if self.format == AccessLog::Json {
            return self.to_json();
        }
        let time = Timestamp::try_from(self.when).map_or_else(
            |_| "-".to_owned(),
            |t| {
                t.to_zoned(TimeZone::UTC)
                    .strftime("%d/%b/%Y:%H:%M:%S %z")
                    .to_string()
            },
        );
        let dash = |text: &str| {
            if text.is_empty() {
                "-".to_owned()
            } else {
                escaped(text)
            }
        };
        let mut line = format!(
            "{} - - [{time}] \"{} {} {:?}\" {} {} \"{}\" \"{}\" {} {} {:.3}",
            self.client.ip(),
            self.method,
            escaped(&self.url),
            self.version,
            self.status,
            self.bytes_out,
            dash(&self.referer),
            dash(&self.agent),
            dash(self.route.as_deref().unwrap_or_default()),
            dash(self.upstream.as_ref().map_or("", |(name, _)| name)),
            self.took.as_secs_f64(),
        );
        if self.broken {
            let _ = write!(line, " broken");
        }
        line
    }

    fn to_json(&self) -> String {
        let record = Record {
            time: Timestamp::try_from(self.when).map_or_else(|_| String::new(), |t| t.to_string()),
            client: self.client,
            method: self.method.as_str(),
            host: &self.host,
            url: &self.url,
            protocol: match self.version {
                Version::HTTP_10 => "HTTP/1.0",
                Version::HTTP_2 => "HTTP/2",
                _ => "HTTP/1.1",
            },
            status: self.status,
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            ms: self.took.as_micros() as f64 / 1000.0,
            broken: self.broken,
            route: self.route.as_deref(),
            upstream: self.upstream.as_ref().map(|(name, _)| name.as_str()),
            upstream_address: self.upstream.as_ref().map(|(_, address)| *address),
            referer: &self.referer,
            user_agent: &self.agent,
        };
        serde_json::to_string(&record).unwrap_or_default()
    }
}

/// Nothing that a client sends may end the field that it is in.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;

    fn line(format: AccessLog) -> Box<Line> {
        let request = Request::builder()
            .uri("/a?b=c")
            .header("host", "h")
            .header("user-agent", "x\" 200 \"y\tz")
            .body(());
        let parts = request.unwrap().into_parts().0;
        let mut line = Log::line(format, "192.0.2.7:4000".parse().unwrap(), &parts).unwrap();
        line.when = SystemTime::UNIX_EPOCH;
        line.status = 200;
        line.bytes_out = 5;
        line.took = Duration::from_micros(1500);
        line.route = Some("h/".into());
        line.upstream = Some(("c1".into(), "10.0.0.1:80".parse().unwrap()));
        line
    }

    #[test]
    fn lines_cannot_be_forged_by_clients() {
        assert_eq!(
            line(AccessLog::Combined).to_text(),
            r#"192.0.2.7 - - [01/Jan/1970:00:00:00 +0000] "GET /a?b=c HTTP/1.1" 200 5 "-" "x\" 200 \"y\x09z" h/ c1 0.002"#
        );
        let json: serde_json::Value = serde_json::from_str(&line(AccessLog::Json).to_text()).unwrap();
        assert_eq!(json["user_agent"], "x\" 200 \"y\tz");
        assert_eq!(
            (json["ms"].as_f64(), json["upstream"].as_str()),
            (Some(1.5), Some("c1"))
        );
    }

    #[test]
    fn nothing_is_remembered_when_nothing_is_written() {
        let parts = Request::new(()).into_parts().0;
        assert!(Log::line(AccessLog::Off, "192.0.2.7:1".parse().unwrap(), &parts).is_none());
    }
}
