//! The routing table beside its definition.

use weir_l7::table::{Found, Table, host};

/// One route.
pub struct Route {
    /// Its place among all.
    pub place: usize,
    host: String,
    path: String,
    rewrite: bool,
}

/// All of them.
pub struct Routes {
    all: Vec<Route>,
    table: Table<usize>,
}

impl Route {
    /// What the agent would take for one.
    fn read(line: &str) -> Option<Self> {
        let (address, rest) = line.split_once(' ').unwrap_or((line, ""));
        let (host, path) = address.split_at(address.find('/')?);
        let name = host.strip_prefix("*.").unwrap_or(host);
        let is_name = host == "*" || host::normal(name).is_some_and(|normal| normal == name);
        let is_path = path == "/" || !path.ends_with('/');
        (is_name && is_path).then(|| Self {
            place: 0,
            host: host.to_owned(),
            path: path.to_owned(),
            rewrite: rest == "rewrite",
        })
    }

    /// What is taken off the path.
    pub fn prefix(&self) -> &str {
        if self.rewrite && self.path != "/" {
            &self.path
        } else {
            ""
        }
    }

    fn has_host(&self, host: &str) -> bool {
        match self.host.strip_prefix("*.") {
            Some(parent) => host
                .strip_suffix(parent)
                .is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
            None => self.host == "*" || self.host == host,
        }
    }

    fn has_path(&self, path: &str) -> bool {
        self.path == "/" || path == self.path || path.starts_with(&format!("{}/", self.path))
    }
}

impl Routes {
    pub fn new(lines: &[String]) -> Self {
        let read = lines.iter().filter_map(|line| Route::read(line)).enumerate();
        let all: Vec<Route> = read.map(|(place, route)| Route { place, ..route }).collect();
        let entries = all
            .iter()
            .map(|route| (route.host.clone(), route.path.clone(), route.place));
        let table = Table::new(entries);
        Self { all, table }
    }

    /// What the table finds, which is what looking at every route does.
    pub fn find(&self, host: &str, path: &str) -> Option<&Route> {
        let fits = |route: &&Route| route.has_host(host) && route.has_path(path);
        // Exact, then the longest wildcard, then the default; among those the longest path, and of equal ones the first.
        let rank = |route: &Route| {
            let of_host = if route.host == "*" { 0 } else { route.host.len() };
            (
                route.host == host && host != "*",
                of_host,
                route.path.len(),
                usize::MAX - route.place,
            )
        };
        let best = self.all.iter().filter(fits).max_by_key(|route| rank(route));
        let found = self.table.find(host, path);
        match (&found, best) {
            (Found::This(place), Some(best)) => assert_eq!(**place, best.place, "{host}{path}"),
            (Found::NoPath, None) => assert!(self.all.iter().any(|route| route.has_host(host))),
            (Found::NoHost, None) => assert!(
                self.all
                    .iter()
                    .all(|route| route.host == "*" || !route.has_host(host))
            ),
            _ => panic!("{found:?} for {host}{path}"),
        }
        best
    }
}
