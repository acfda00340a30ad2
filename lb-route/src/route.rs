//! The domain words of HTTP: what a service is to the kernel, a route is to the L7 shim. No wire types, no I/O.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::SocketAddr,
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// The host of the route that takes requests for hosts which nobody claims.
pub const ANY_HOST: &str = "*";
/// The path of a route that takes the whole host.
pub const WHOLE_HOST: &str = "/";

/// A whole share of new requests, in tenths.
const WHOLE_SHARE: u32 = 10;

/// What a request must match: host and path. The identity of a route; the longest matching path wins.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RouteAddress {
    /// Host name, lower case, without a port; `*.` in front is every name below, [`ANY_HOST`] alone every other host.
    pub host: String,
    /// Path prefix: begins with `/`, ends with none unless it is [`WHOLE_HOST`], and ends where a segment does.
    pub path: String,
}

impl fmt::Display for RouteAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.host, self.path)
    }
}

/// How requests are spread over the upstreams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// One after the other.
    #[default]
    RoundRobin,
    /// The one with the fewest open requests.
    LeastConnections,
    /// By the client's address: one client stays with one upstream.
    ClientIp,
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RoundRobin => "round-robin",
            Self::LeastConnections => "least-connections",
            Self::ClientIp => "client-ip",
        })
    }
}

/// TLS towards clients.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RouteTls {
    /// HTTPS is offered, whether there is a certificate for every host or not.
    pub serve: bool,
    /// Plain HTTP is answered by a redirect to HTTPS.
    pub only: bool,
    /// TLS is not ended here: the connection is passed on by its server name.
    pub passthrough: bool,
    /// Certificate chain: a file name in `l7.certificates`, or a Docker secret. `None`: the one of every host.
    pub certificate: Option<String>,
    /// Its private key. `None`: in the same file.
    pub key: Option<String>,
}

/// TLS towards upstreams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamTls {
    /// The upstream's certificate is verified.
    pub verify: bool,
}

/// A host whose requests are sent elsewhere by a redirect.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Redirect {
    /// Host or URL that is asked for.
    pub from: String,
    /// URL that is answered.
    pub to: String,
}

/// Everything about a route that is not its address and not its upstreams.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RouteSettings {
    /// The path of the route is taken off before the request goes to an upstream.
    pub rewrite: bool,
    /// How requests are spread.
    pub balance: Balance,
    /// Cookie that keeps a client with its upstream.
    pub sticky_cookie: Option<String>,
    /// TLS towards clients.
    pub tls: RouteTls,
    /// TLS towards upstreams; `None`: plain HTTP.
    pub upstream_tls: Option<UpstreamTls>,
    /// Paths whose requests may become WebSockets. Empty: any may.
    pub websocket_endpoints: BTreeSet<String>,
    /// Hosts that are sent elsewhere.
    pub redirects: BTreeSet<Redirect>,
    /// Only shims of this cluster serve it; `None`: every shim.
    pub cluster: Option<String>,
}

impl RouteSettings {
    /// The settings in which two differ, by the names of their fields in JSON.
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        let compared = [
            ("rewrite", self.rewrite == other.rewrite),
            ("balance", self.balance == other.balance),
            ("sticky_cookie", self.sticky_cookie == other.sticky_cookie),
            ("tls", self.tls == other.tls),
            ("upstream_tls", self.upstream_tls == other.upstream_tls),
            (
                "websocket_endpoints",
                self.websocket_endpoints == other.websocket_endpoints,
            ),
            ("redirects", self.redirects == other.redirects),
            ("cluster", self.cluster == other.cluster),
        ];
        let differ = compared.into_iter().filter(|(_, same)| !same);
        differ.map(|(name, _)| name).collect()
    }
}

/// Whether a backend may take new flows, as its source and the operator wish.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendState {
    /// Takes new flows.
    #[default]
    Active,
    /// Takes no new flows; old ones go on until they end or the drain deadline passes.
    Draining,
    /// Known, but not serving (starting, unhealthy, paused): takes no new flows, old ones go on without a deadline.
    Unready,
}

/// A backend of a route, as much of it as a shim needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upstream {
    /// Where to reach it.
    pub address: SocketAddr,
    /// Who it is, for people: container name.
    #[serde(default)]
    pub name: String,
    /// Share of new requests relative to the other upstreams; 0 takes none.
    #[serde(default = "one")]
    pub weight: u32,
    /// State.
    #[serde(default)]
    pub state: BackendState,
    /// How long upgraded connections may go on once it is draining or removed, milliseconds.
    #[serde(default, rename = "drain_ms", with = "crate::settings::millis")]
    pub drain: Duration,
}

/// A route as it shall be served. Host and path are unique among routes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound(deserialize = "U: Deserialize<'de>"))]
pub struct Route<U = Upstream> {
    /// Host name, as in [`RouteAddress`].
    pub host: String,
    /// Other host names with the same upstreams and settings.
    #[serde(default)]
    pub aliases: BTreeSet<String>,
    /// Path prefix, as in [`RouteAddress`].
    #[serde(default = "whole_host")]
    pub path: String,
    /// Settings.
    #[serde(default)]
    pub settings: RouteSettings,
    /// Containers that serve it, ordered by address, no address twice.
    pub upstreams: Vec<U>,
    /// Upstreams that have come back and are given their share little by little: tenths of it, 1 to 9, by address.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub slow: BTreeMap<SocketAddr, u8>,
    /// What of the labels is only approximated, or means nothing here; for people.
    #[serde(default)]
    pub remarks: BTreeSet<String>,
}

impl<U> Route<U> {
    /// Its identity.
    pub fn address(&self) -> RouteAddress {
        RouteAddress {
            host: self.host.clone(),
            path: self.path.clone(),
        }
    }

    /// What an upstream's weight is to be multiplied by: tenths while any upstream of the route has less than its whole share,
    /// so that proportions hold; else 1.
    pub fn share(&self, upstream: SocketAddr) -> u32 {
        if self.slow.is_empty() {
            return 1;
        }
        self.slow
            .get(&upstream)
            .map_or(WHOLE_SHARE, |tenths| u32::from(*tenths).min(WHOLE_SHARE))
    }

    /// The same route with other words for its upstreams.
    pub fn with_upstreams<V>(&self, word: impl FnMut(&U) -> V) -> Route<V> {
        Route {
            host: self.host.clone(),
            aliases: self.aliases.clone(),
            path: self.path.clone(),
            settings: self.settings.clone(),
            upstreams: self.upstreams.iter().map(word).collect(),
            slow: self.slow.clone(),
            remarks: self.remarks.clone(),
        }
    }
}

fn one() -> u32 {
    1
}

fn whole_host() -> String {
    WHOLE_HOST.into()
}
