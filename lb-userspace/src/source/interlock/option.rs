//! Lines of HAProxy and nginx that labels carry: balance algorithms, health checks, options. What has no counterpart
//! is named, not lost.

use std::{sync::Arc, time::Duration};

use super::{fault::Fault, value};
use crate::{
    config::health::{self, SHORTEST_INTERVAL},
    model::{Check, CheckKind, CheckTiming, HttpCheck, HttpMethod, TlsCheck},
    route::Balance,
};

/// HAProxy's algorithms, without their arguments.
pub const ALGORITHMS: &[&str] = &[
    "roundrobin",
    "static-rr",
    "leastconn",
    "first",
    "source",
    "uri",
    "url_param",
    "hdr",
    "rdp-cookie",
];
/// Options that say what is done here anyway.
const ALWAYS: &[&str] = &[
    "forwardfor",
    "http-server-close",
    "http-keep-alive",
    "redispatch",
    "keepalive",
    "zone",
];
/// Health checks of HAProxy that speak another protocol: that the port answers is what is seen of them here.
const OTHER_CHECKS: &[&str] = &[
    "tcp-check",
    "ssl-hello-chk",
    "mysql-check",
    "pgsql-check",
    "redis-check",
    "smtpchk",
    "ldap-check",
    "lb-agent-chk",
];

/// What lines of HAProxy and nginx come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lines {
    /// How requests are spread, if a line says so.
    pub balance: Option<Balance>,
    /// Cookie that keeps a client with its upstream.
    pub sticky_cookie: Option<String>,
    /// The request of an HTTP check.
    pub request: Option<HttpCheck>,
    /// Interval between two checks.
    pub interval: Option<Duration>,
    /// Passed checks that bring an upstream back.
    pub rise: Option<u32>,
    /// Failed checks that take one out.
    pub fall: Option<u32>,
    /// Time in which an upstream that comes back is given its share.
    pub slow_start: Option<Duration>,
    /// Port to check instead of the upstream's own.
    pub check_port: Option<u16>,
    /// What is approximated, or means nothing here.
    pub remarks: Vec<String>,
}

impl Lines {
    /// The value of a balance label.
    pub fn balance(&mut self, text: &str) -> Result<(), Fault> {
        let word = text.trim().to_ascii_lowercase();
        let word = word.split([' ', '(', '\t']).next().unwrap_or_default();
        let (balance, why) = match word {
            "" | "roundrobin" => (Balance::RoundRobin, ""),
            "static-rr" => (
                Balance::RoundRobin,
                "there are no weights here, so that it is the same",
            ),
            "leastconn" => (Balance::LeastConnections, ""),
            "source" => (Balance::ClientIp, ""),
            "first" => (
                Balance::LeastConnections,
                "no upstream is filled up before the next one",
            ),
            "uri" => (
                Balance::RoundRobin,
                "the address asked for does not choose the upstream",
            ),
            "url_param" | "hdr" | "rdp-cookie" => (
                Balance::ClientIp,
                "the client's address, not the request, keeps it with its upstream",
            ),
            _ => return Err(Fault::Balance(text.to_owned())),
        };
        self.balance = Some(balance);
        if !why.is_empty() {
            self.remarks.push(format!(
                "balance `{}` is approximated by `{balance}`: {why}",
                text.trim()
            ));
        }
        Ok(())
    }

    /// The value of a health check label: what HAProxy has after `option`, or a path.
    pub fn health_check(&mut self, text: &str) -> Result<(), Fault> {
        let words: Vec<&str> = text.split_whitespace().collect();
        match words.as_slice() {
            [] => Ok(()),
            // Interlock's documents show it so, although HAProxy would refuse it.
            [path] if path.starts_with('/') => self.http("GET", path, &[], text),
            ["httpchk"] => self.http("OPTIONS", "/", &[], text),
            ["httpchk", path] if path.starts_with('/') => self.http("OPTIONS", path, &[], text),
            ["httpchk", method, path, rest @ ..] => self.http(method, path, rest, text),
            [other, ..] if OTHER_CHECKS.contains(other) => {
                self.remarks.push(format!(
                    "health check `{other}` is approximated by a TCP connection: that protocol is not spoken here"
                ));
                Ok(())
            }
            _ => Err(Fault::HealthCheck(text.to_owned())),
        }
    }

    fn http(&mut self, method: &str, path: &str, rest: &[&str], text: &str) -> Result<(), Fault> {
        let fault = || Fault::HealthCheck(text.to_owned());
        let method = match method.to_ascii_uppercase().as_str() {
            "GET" => HttpMethod::Get,
            "HEAD" => HttpMethod::Head,
            "OPTIONS" => HttpMethod::Options,
            _ => return Err(fault()),
        };
        let path = health::path(path).map_err(|_| fault())?;
        // After the version there may be headers: `HTTP/1.1\r\nHost:\ vote.example.com`, escaped for HAProxy's file.
        let version = rest.join(" ").replace("\\ ", " ");
        let mut headers = version.split("\\r\\n").skip(1).map(str::trim);
        let host = headers.find_map(|header| {
            let (name, value) = header.split_once(':')?;
            name.eq_ignore_ascii_case("host").then(|| value.trim().to_owned())
        });
        let host = match host.as_deref() {
            Some(host) => Some(value::host(host)?),
            None => None,
        };
        self.request = Some(HttpCheck {
            method,
            path,
            host,
            ..HttpCheck::default()
        });
        Ok(())
    }

    /// A backend option: what HAProxy has after `option`, or a line of nginx' `upstream`.
    pub fn option(&mut self, text: &str) -> Result<(), Fault> {
        let line = text.trim().trim_end_matches(';');
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [] => {}
            ["httpchk", ..] => self.health_check(line)?,
            [check, ..] if OTHER_CHECKS.contains(check) => self.health_check(line)?,
            ["check" | "inter" | "rise" | "fall" | "slowstart", ..] => self.server_words(&words),
            ["least_conn"] => self.balance = Some(Balance::LeastConnections),
            ["ip_hash"] | ["hash", "$remote_addr" | "$binary_remote_addr", ..] => {
                self.balance = Some(Balance::ClientIp);
            }
            ["least_time" | "random", ..] => {
                self.balance = Some(Balance::LeastConnections);
                self.remarks.push(format!(
                    "`{line}` is approximated by `{}`",
                    Balance::LeastConnections
                ));
            }
            ["sticky", "cookie", name, ..] => self.sticky_cookie = value::cookie(name)?,
            [always, ..] if ALWAYS.contains(always) => {}
            _ => self.remarks.push(format!(
                "backend option `{line}` has no counterpart and no effect"
            )),
        }
        Ok(())
    }

    /// `check inter 2s rise 2 fall 3 port 8081`: words of HAProxy's `server` line.
    fn server_words(&mut self, words: &[&str]) {
        let mut rest = words.iter();
        while let Some(word) = rest.next() {
            let known = match *word {
                "check" => true,
                "inter" => rest
                    .next()
                    .and_then(|v| haproxy_time(v))
                    .map(|v| self.interval = Some(v))
                    .is_some(),
                "rise" => rest
                    .next()
                    .and_then(|v| count(v))
                    .map(|v| self.rise = Some(v))
                    .is_some(),
                "fall" => rest
                    .next()
                    .and_then(|v| count(v))
                    .map(|v| self.fall = Some(v))
                    .is_some(),
                "slowstart" => rest
                    .next()
                    .and_then(|v| haproxy_time(v))
                    .map(|v| self.slow_start = Some(v))
                    .is_some(),
                "port" => {
                    let port = rest.next().and_then(|v| crate::config::value::port(v).ok());
                    port.map(|v| self.check_port = Some(v)).is_some()
                }
                _ => false,
            };
            if !known {
                self.remarks.push(format!(
                    "backend option `{}`: `{word}` has no effect",
                    words.join(" ")
                ));
            }
        }
    }

    /// The check that the lines come to; every upstream of HAProxy is checked by TCP at least. `upstream_tls` is whether
    /// upstreams speak TLS, and whether they are verified; they are asked for the `host` of the route then.
    pub fn check(&mut self, upstream_tls: Option<bool>, host: Option<&str>) -> Arc<Check> {
        let plain = CheckTiming::default();
        let mut interval = self.interval.unwrap_or(value::DEFAULT_INTERVAL);
        if interval < SHORTEST_INTERVAL {
            interval = SHORTEST_INTERVAL;
            let ms = SHORTEST_INTERVAL.as_millis();
            self.remarks
                .push(format!("the health check interval is raised to {ms} ms"));
        }
        let kind = match (&self.request, upstream_tls) {
            (None, _) => CheckKind::Tcp,
            (Some(_), None) => CheckKind::Http,
            (Some(_), Some(true)) => CheckKind::Https,
            (Some(_), Some(false)) => {
                self.remarks.push(
                    "the health check is made by TCP alone: HTTPS is not checked where its certificate is not verified"
                        .into(),
                );
                CheckKind::Tcp
            }
        };
        Arc::new(Check {
            port: self.check_port,
            http: self.request.clone().unwrap_or_default(),
            tls: TlsCheck {
                server_name: host.filter(|_| kind == CheckKind::Https).map(Into::into),
                files: None,
            },
            on_link: false,
            timing: CheckTiming {
                interval,
                fast_interval: plain.fast_interval.min(interval),
                timeout: plain.timeout.min(interval),
                rise: self.rise.unwrap_or(plain.rise),
                fall: self.fall.unwrap_or(plain.fall),
                slow_start: self.slow_start.unwrap_or(plain.slow_start),
                ..plain
            },
            ..Check::of(vec![kind])
        })
    }
}

/// HAProxy's times: milliseconds, or with a unit.
fn haproxy_time(text: &str) -> Option<Duration> {
    match text.parse::<u64>() {
        Ok(0) => None,
        Ok(_) => value::interval(text).ok(),
        Err(_) => crate::config::value::duration(text)
            .ok()
            .filter(|time| !time.is_zero()),
    }
}

/// Results in a row that decide.
fn count(text: &str) -> Option<u32> {
    health::threshold(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn option(text: &str) -> Lines {
        let mut lines = Lines::default();
        lines.option(text).unwrap();
        lines
    }

    #[test]
    fn every_algorithm_maps_or_is_named_as_approximated() {
        for (text, want, exact) in [
            ("roundrobin", Balance::RoundRobin, true),
            ("static-rr", Balance::RoundRobin, false),
            ("leastconn", Balance::LeastConnections, true),
            ("first", Balance::LeastConnections, false),
            ("source", Balance::ClientIp, true),
            ("uri depth 2", Balance::RoundRobin, false),
            ("url_param userid check_post", Balance::ClientIp, false),
            ("hdr(User-Agent)", Balance::ClientIp, false),
            ("rdp-cookie(mstshash)", Balance::ClientIp, false),
            ("", Balance::RoundRobin, true),
        ] {
            let mut lines = Lines::default();
            lines.balance(text).unwrap();
            assert_eq!(
                (lines.balance, lines.remarks.is_empty()),
                (Some(want), exact),
                "{text}"
            );
        }
        let error = Lines::default().balance("leastcon").unwrap_err();
        assert!(error.remedy("").contains("`leastconn`"), "{}", error.remedy(""));
        for algorithm in ALGORITHMS {
            assert_eq!(Lines::default().balance(algorithm), Ok(()), "{algorithm}");
        }
    }

    #[test]
    fn http_checks_of_every_form() {
        let request = |text: &str| {
            let mut lines = Lines::default();
            lines.health_check(text).map(|()| lines.request)
        };
        let http = |method, path: &str, host: Option<&str>| {
            Ok(Some(HttpCheck {
                method,
                path: path.into(),
                host: host.map(Into::into),
                ..HttpCheck::default()
            }))
        };
        assert_eq!(request("httpchk"), http(HttpMethod::Options, "/", None));
        assert_eq!(request("httpchk /ok"), http(HttpMethod::Options, "/ok", None));
        assert_eq!(request("httpchk GET /ping"), http(HttpMethod::Get, "/ping", None));
        assert_eq!(request("/ping"), http(HttpMethod::Get, "/ping", None));
        assert_eq!(
            request(r"httpchk HEAD /ping HTTP/1.1\r\nHost:\ vote.example.com"),
            http(HttpMethod::Head, "/ping", Some("vote.example.com"))
        );
        assert_eq!(request("redis-check"), Ok(None));
        for bad in ["httpchk POST /x", "ping", "httpchk GET ping"] {
            assert_eq!(request(bad), Err(Fault::HealthCheck(bad.into())));
        }
    }

    #[test]
    fn options_that_mean_something_here() {
        let lines = option("check inter 2s rise 1 fall 4 port 8081");
        assert_eq!(
            (lines.interval, lines.rise, lines.fall, lines.check_port),
            (Some(Duration::from_secs(2)), Some(1), Some(4), Some(8081))
        );
        assert_eq!(option("inter 500").interval, Some(Duration::from_millis(500)));
        assert_eq!(option("least_conn;").balance, Some(Balance::LeastConnections));
        assert_eq!(
            option("hash $remote_addr consistent;").balance,
            Some(Balance::ClientIp)
        );
        assert_eq!(
            option("sticky cookie srv_id expires=1h;")
                .sticky_cookie
                .as_deref(),
            Some("srv_id")
        );
        assert_eq!(option("httpchk GET /").request.unwrap().method, HttpMethod::Get);
        for done in [
            "forwardfor",
            "forwardfor except 127.0.0.1",
            "keepalive 32;",
            "redispatch",
        ] {
            assert_eq!(option(done), Lines::default(), "{done}");
        }
        for odd in [
            "abortonclose",
            "server 10.0.0.1:80 backup;",
            "check weight 3",
            "rise no",
        ] {
            assert!(!option(odd).remarks.is_empty(), "{odd}");
        }
    }

    #[test]
    fn a_check_keeps_its_times_in_order() {
        let mut lines = Lines {
            interval: Some(Duration::from_millis(300)),
            ..Lines::default()
        };
        let check = lines.check(None, None);
        assert_eq!(check.kinds, [CheckKind::Tcp]);
        assert_eq!(check.timing.timeout, Duration::from_millis(300));
        assert_eq!(check.timing.fast_interval, Duration::from_millis(300));
        lines.interval = Some(Duration::from_millis(1));
        assert_eq!(lines.check(None, None).timing.interval, SHORTEST_INTERVAL);
        assert_eq!(lines.remarks.len(), 1);
    }

    #[test]
    fn https_is_checked_where_it_is_verified() {
        let mut lines = option("httpchk GET /");
        let check = lines.check(Some(true), Some("vote.example.com"));
        assert_eq!(check.kinds, [CheckKind::Https]);
        assert_eq!(check.tls.server_name.as_deref(), Some("vote.example.com"));
        assert!(lines.remarks.is_empty());
        assert_eq!(lines.check(Some(false), None).kinds, [CheckKind::Tcp]);
        assert_eq!(lines.remarks.len(), 1);
    }
}
