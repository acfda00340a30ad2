//! The routing table: pure. The most exact host wins, then the longest path.

use std::collections::HashMap;

use lb_route::{ANY_HOST, WHOLE_HOST};

pub mod host;
#[cfg(test)]
mod tests;

/// What hosts and paths lead to.
#[derive(Debug)]
pub struct Table<T> {
    exact: HashMap<Box<str>, Paths<T>>,
    /// By what follows `*.`.
    below: HashMap<Box<str>, Paths<T>>,
    any: Paths<T>,
}

/// Path prefixes of one host, the longest first.
type Paths<T> = Vec<(Box<str>, T)>;

/// What a look-up comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found<T> {
    /// It leads there.
    This(T),
    /// The host is known, and nothing of it has this path.
    NoPath,
    /// Nobody claims the host.
    NoHost,
}

impl<T> Table<T> {
    /// A table of hosts (`*.` in front: every name below; `*`: every other) and path prefixes. Of two equal ones the first
    /// counts.
    pub fn new(entries: impl IntoIterator<Item = (String, String, T)>) -> Self {
        let mut table = Self {
            exact: HashMap::new(),
            below: HashMap::new(),
            any: Vec::new(),
        };
        for (host, path, what) in entries {
            let paths = if host == ANY_HOST {
                &mut table.any
            } else if let Some(parent) = host.strip_prefix("*.") {
                table.below.entry(parent.into()).or_default()
            } else {
                table.exact.entry(host.into_boxed_str()).or_default()
            };
            if paths.iter().all(|(known, _)| **known != *path) {
                paths.push((path.into_boxed_str(), what));
            }
        }
        let all = table.exact.values_mut().chain(table.below.values_mut());
        for paths in all.chain([&mut table.any]) {
            paths.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
        }
        table
    }

    /// Whether it leads nowhere.
    pub fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.below.is_empty() && self.any.is_empty()
    }

    /// What a request for this host (as [`host::normal`] makes it) and path leads to.
    ///
    /// A host that has no such path is looked for under the wildcards too.
    pub fn find(&self, host: &str, path: &str) -> Found<&T> {
        let mut known = false;
        let mut look = |paths: &'_ Paths<T>| {
            known = true;
            paths.iter().position(|(prefix, _)| covers(prefix, path))
        };
        if let Some(paths) = self.exact.get(host)
            && let Some(at) = look(paths)
        {
            return Found::This(&paths[at].1);
        }
        if !self.below.is_empty() {
            let dots = host.bytes().enumerate().filter(|(_, byte)| *byte == b'.');
            for (dot, _) in dots {
                // The longest parent comes first.
                if let Some(paths) = self.below.get(&host[dot + 1..])
                    && let Some(at) = look(paths)
                {
                    return Found::This(&paths[at].1);
                }
            }
        }
        let any = self.any.iter().find(|(prefix, _)| covers(prefix, path));
        match any {
            Some((_, what)) => Found::This(what),
            None if known => Found::NoPath,
            None => Found::NoHost,
        }
    }
}

/// Whether a path is below a prefix: it goes on where a segment ends.
pub fn covers(prefix: &str, path: &str) -> bool {
    prefix == WHOLE_HOST
        || path
            .strip_prefix(prefix)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}
