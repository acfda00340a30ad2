//! A state that somebody wrote: every route stands or falls by itself, and one that falls stays as it was.

use std::{collections::BTreeSet, net::SocketAddr, path::Path};

use hyper::header::HeaderName;
use lb_route::{ANY_HOST, L7, Route, RouteAddress, State, WHOLE_HOST};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::{StoreError, store};
use crate::table::host;

/// What is wrong with one object of the file.
#[derive(Debug, thiserror::Error)]
pub enum FileFault {
    /// It is not of the form that it must have.
    #[error("{object}: {fault}; correct it, or take it out")]
    Text {
        /// Which object.
        object: String,
        /// What is wrong.
        fault: serde_json::Error,
    },
    /// A key that nobody reads.
    #[error("{object}: `{key}` means nothing here; is it spelt as the manual has it?")]
    Key {
        /// Which object.
        object: String,
        /// The key, with those that it is below.
        key: String,
    },
    /// No request can be for it.
    #[error(
        "{object}: `{host}` is no host; write a name without a port: `a.example`, `*.example`, or `*` for all others"
    )]
    Host {
        /// Which object.
        object: String,
        /// The host.
        host: String,
    },
    /// No request can have it.
    #[error("{object}: `{path}` is no path; write one that begins with `/`, without `?` and `#`")]
    Path {
        /// Which object.
        object: String,
        /// The path.
        path: String,
    },
    /// Its cookie cannot have this name.
    #[error("{object}: `{name}` cannot be the name of a cookie; write letters and digits, `srv_id`")]
    Cookie {
        /// Which object.
        object: String,
        /// The name.
        name: String,
    },
    /// Another one has been first.
    #[error("{object}: a route before it has {taken} already; let one of them go, or join their upstreams")]
    Taken {
        /// Which object.
        object: String,
        /// What both claim.
        taken: RouteAddress,
    },
    /// An upstream that cannot be one.
    #[error("{object}: upstream {address} {fault}")]
    Upstream {
        /// Which object.
        object: String,
        /// Where it would be.
        address: SocketAddr,
        /// Why it cannot be, and what to do.
        fault: &'static str,
    },
}

/// Reads a state, and what is wrong with parts of it. Of those, what was there before stays.
///
/// # Errors
/// There is no file, or no JSON of this form in it; without a state of before, wrong settings too.
pub fn read(path: &Path, before: Option<&State>) -> Result<(State, Vec<FileFault>), StoreError> {
    let fail = |fault| StoreError::Text {
        path: path.into(),
        fault,
    };
    let mut file: Map<String, Value> = store::read(path)?;
    let mut faults = Vec::new();
    let settings = match (settings(file.remove("settings"), &mut faults), before) {
        (Ok(settings), _) => settings,
        (Err(fault), None) => return Err(fail(fault)),
        (Err(fault), Some(before)) => {
            let object = "settings".into();
            faults.push(FileFault::Text { object, fault });
            before.settings.clone()
        }
    };
    let written: Vec<Value> =
        serde_json::from_value(file.remove("routes").unwrap_or(Value::Array(vec![]))).map_err(fail)?;
    faults.extend(file.into_iter().map(|(key, _)| FileFault::Key {
        object: path.display().to_string(),
        key,
    }));
    let mut routes = Vec::new();
    let mut taken = BTreeSet::new();
    for (place, value) in written.into_iter().enumerate() {
        let claimed = claimed(&value);
        let object = match &claimed {
            Some(address) => format!("route {} ({address})", place + 1),
            None => format!("route {}", place + 1),
        };
        let route = checked(&object, value, &mut faults).or_else(|| {
            let known = before.into_iter().flat_map(|state| &state.routes);
            let as_before = known.into_iter().find(|route| Some(route.address()) == claimed);
            as_before.cloned()
        });
        let Some(mut route) = route else { continue };
        if !taken.insert(route.address()) {
            let taken = route.address();
            faults.push(FileFault::Taken { object, taken });
            continue;
        }
        let path = route.path.clone();
        route.aliases.retain(|alias| {
            let address = RouteAddress {
                host: alias.clone(),
                path: path.clone(),
            };
            let is_free = taken.insert(address.clone());
            if !is_free {
                faults.push(FileFault::Taken {
                    object: object.clone(),
                    taken: address,
                });
            }
            is_free
        });
        routes.push(route);
    }
    routes.sort_by_key(Route::address);
    Ok((State { settings, routes }, faults))
}

fn settings(value: Option<Value>, faults: &mut Vec<FileFault>) -> Result<L7, serde_json::Error> {
    let Some(value) = value else {
        return Ok(L7::default());
    };
    let (settings, unread) = parse(value)?;
    // A word that nobody understands takes away no other one.
    faults.extend(unread.into_iter().map(|key| FileFault::Key {
        object: "settings".into(),
        key,
    }));
    Ok(settings)
}

/// Where a route that may be wrong claims to be.
fn claimed(value: &Value) -> Option<RouteAddress> {
    let host = value.get("host")?.as_str()?;
    let path = value.get("path").map_or(Some(WHOLE_HOST), Value::as_str)?;
    Some(RouteAddress {
        host: host_of(host).unwrap_or_else(|| host.to_owned()),
        path: path_of(path).unwrap_or_else(|| path.to_owned()),
    })
}

/// A route in the form that tables have; `None`, and why, if it has none.
fn checked(object: &str, value: Value, faults: &mut Vec<FileFault>) -> Option<Route> {
    let own = || object.to_owned();
    let found = faults.len();
    let mut route: Route = match parse(value) {
        Ok((route, unread)) => {
            let unread = unread.into_iter();
            faults.extend(unread.map(|key| FileFault::Key { object: own(), key }));
            route
        }
        Err(fault) => {
            faults.push(FileFault::Text { object: own(), fault });
            return None;
        }
    };
    let mut names = std::iter::once(route.host).chain(route.aliases).map(|host| {
        host_of(&host).unwrap_or_else(|| {
            faults.push(FileFault::Host {
                object: own(),
                host: host.clone(),
            });
            host
        })
    });
    route.host = names.next().unwrap_or_default();
    route.aliases = names.collect();
    route.aliases.remove(&route.host);
    match path_of(&route.path) {
        Some(path) => route.path = path,
        None => faults.push(FileFault::Path {
            object: own(),
            path: route.path.clone(),
        }),
    }
    // Names of headers are made of the same letters (RFC 6265, 4.1.1).
    if let Some(name) = &route.settings.sticky_cookie
        && HeaderName::from_bytes(name.as_bytes()).is_err()
    {
        faults.push(FileFault::Cookie {
            object: own(),
            name: name.clone(),
        });
    }
    route.upstreams.sort_by_key(|upstream| upstream.address);
    let mut wrong = |address, fault| {
        faults.push(FileFault::Upstream {
            object: own(),
            address,
            fault,
        });
    };
    for pair in route.upstreams.windows(2) {
        if pair[0].address == pair[1].address {
            wrong(pair[0].address, "is named twice; name it once, with a weight");
        }
    }
    for upstream in route.upstreams.iter().filter(|u| u.address.port() == 0) {
        wrong(upstream.address, "has no port; write the one that it listens on");
    }
    (faults.len() == found).then_some(route)
}

fn host_of(text: &str) -> Option<String> {
    if text == ANY_HOST {
        return Some(text.to_owned());
    }
    let (star, name) = match text.strip_prefix("*.") {
        Some(name) => ("*.", name),
        None => ("", text),
    };
    let is_bare = !name.contains(':') || name.ends_with(']');
    let name = host::normal(name).filter(|_| is_bare)?;
    Some(format!("{star}{name}"))
}

fn path_of(text: &str) -> Option<String> {
    let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '?' | '#');
    if !text.starts_with('/') || text.contains(odd) {
        return None;
    }
    let path = text.trim_end_matches('/');
    Some(if path.is_empty() { WHOLE_HOST } else { path }.to_owned())
}

/// A value as what it stands for, and the keys of it that mean nothing.
fn parse<T: DeserializeOwned + Serialize>(value: Value) -> Result<(T, Vec<String>), serde_json::Error> {
    let read: T = serde_json::from_value(value.clone())?;
    let mut unread = Vec::new();
    // What has been understood is said again.
    compare("", &value, &serde_json::to_value(&read)?, &mut unread);
    Ok((read, unread))
}

fn compare(at: &str, written: &Value, read: &Value, unread: &mut Vec<String>) {
    match (written, read) {
        (Value::Object(written), Value::Object(read)) => {
            for (key, value) in written {
                let at = match at {
                    "" => key.clone(),
                    at => format!("{at}.{key}"),
                };
                // What is empty may be left out.
                let is_empty = value.is_null() || value.as_object().is_some_and(Map::is_empty);
                match read.get(key) {
                    Some(read) => compare(&at, value, read, unread),
                    None if is_empty => {}
                    None => unread.push(at),
                }
            }
        }
        (Value::Array(written), Value::Array(read)) => {
            for (written, read) in written.iter().zip(read) {
                compare(at, written, read, unread);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn read_text(text: &str, before: Option<&State>) -> (State, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("routes.json");
        fs::write(&path, text).unwrap();
        let (state, faults) = read(&path, before).unwrap();
        (state, faults.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_wrong_route_takes_no_other_one_away() {
        let good = r#"{"host":"Good.Example.","path":"/x/","aliases":["ALSO.example"],"upstreams":[{"address":"10.0.0.1:80"}]}"#;
        for (wrong, named, fault) in [
            (
                r#"{"host":"b","upstreams":[{"address":"localhost:80"}]}"#,
                "route 2 (b/)",
                "socket address",
            ),
            (r#"{"host":"b","upstream":[]}"#, "route 2 (b/)", "`upstreams`"),
            (
                r#"{"host":"b","upstreams":[],"settings":{"sticky_cookie":"a; Domain=c"}}"#,
                "route 2 (b/)",
                "`a; Domain=c` cannot be the name",
            ),
            (
                r#"{"host":"b","upstreams":[],"settings":{"tls":{"onyl":true}}}"#,
                "route 2 (b/)",
                "`settings.tls.onyl`",
            ),
            (
                r#"{"host":"b","upstreams":[{"address":"10.0.0.1:80","wieght":2}]}"#,
                "route 2 (b/)",
                "`upstreams.wieght`",
            ),
            (
                r#"{"host":"b:80","upstreams":[]}"#,
                "route 2 (b:80/)",
                "`b:80` is no host",
            ),
            (
                r#"{"host":"b","aliases":["b c"],"upstreams":[]}"#,
                "route 2 (b/)",
                "`b c` is no host",
            ),
            (
                r#"{"host":"b","path":"shop","upstreams":[]}"#,
                "route 2 (bshop)",
                "`shop` is no path",
            ),
            (
                r#"{"host":"b","upstreams":[{"address":"10.0.0.1:80"},{"address":"10.0.0.1:80"}]}"#,
                "route 2 (b/)",
                "10.0.0.1:80 is named twice",
            ),
            (
                r#"{"host":"b","upstreams":[{"address":"10.0.0.1:0"}]}"#,
                "route 2 (b/)",
                "has no port",
            ),
            (
                r#"{"host":"good.example","path":"/x","upstreams":[]}"#,
                "route 2 (good.example/x)",
                "a route before it has good.example/x already",
            ),
            ("7", "route 2", "invalid type"),
        ] {
            let (state, faults) = read_text(&format!(r#"{{"routes":[{good},{wrong}]}}"#), None);
            assert_eq!(faults.len(), 1, "{faults:?}");
            assert!(
                faults[0].starts_with(named) && faults[0].contains(fault),
                "{faults:?}"
            );
            let hosts: Vec<String> = state.routes.iter().map(|r| r.address().to_string()).collect();
            assert_eq!(hosts, ["good.example/x"], "{wrong}");
            assert!(state.routes[0].aliases.contains("also.example"));
        }
    }

    #[test]
    fn what_is_right_has_no_faults() {
        let text = r#"{"settings":{"http_port":8080,"https_port":null,"timeouts":{"client_ms":5},"proxy_protocol":["10.0.0.0/8"]},
            "routes":[{"host":"*","upstreams":[],"slow":{}},{"host":"[::1]","upstreams":[{"address":"[::1]:80","weight":3,
            "state":"draining","drain_ms":1}],"settings":{"rewrite":true,"upstream_tls":{"verify":false}}}]}"#;
        let (state, faults) = read_text(text, None);
        assert_eq!((state.routes.len(), faults), (2, Vec::new()));
    }

    #[test]
    fn what_becomes_wrong_stays_as_it_was() {
        let (before, _) = read_text(
            r#"{"settings":{"http_port":81},"routes":[{"host":"a","upstreams":[{"address":"10.0.0.1:80"}]}]}"#,
            None,
        );
        let text = r#"{"settings":{"http_port":"x","acces_log":1},"routes":[{"host":"A","upstreams":[{"address":"x"}]},
            {"host":"new","aliases":["a"],"upstreams":[]}],"rotues":[]}"#;
        let (now, faults) = read_text(text, Some(&before));
        assert_eq!(
            (&now.settings, &now.routes[0]),
            (&before.settings, &before.routes[0])
        );
        assert!(now.routes[1].host == "new" && now.routes[1].aliases.is_empty());
        assert_eq!(faults.len(), 4, "{faults:?}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("routes.json");
        fs::write(&path, text).unwrap();
        assert!(read(&path, None).unwrap_err().to_string().contains("routes.json"));
    }
}
