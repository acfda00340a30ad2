//! The domain words of HTTP: what a service is to the kernel, a route is to the L7 shim. No wire types, no I/O.

use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};

use crate::model::Backend;

/// The host of the route that takes requests for hosts which nobody claims.
pub const ANY_HOST: &str = "*";
/// The path of a route that takes the whole host.
pub const WHOLE_HOST: &str = "/";

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

/// One name of a route as one source object wishes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteWish {
    /// Address: an alias is an address of its own.
    pub address: RouteAddress,
    /// Host that this is an alias of; of a route that is none, its own.
    pub of: String,
    /// Settings.
    pub settings: RouteSettings,
    /// What of the labels is only approximated, or means nothing here; for people.
    pub remarks: Vec<String>,
    /// Where this object is reached.
    pub upstream: Backend,
}

/// A route as it shall be served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Host name, as in [`RouteAddress`].
    pub host: String,
    /// Other host names with the same upstreams and settings.
    pub aliases: BTreeSet<String>,
    /// Path prefix, as in [`RouteAddress`].
    pub path: String,
    /// Settings.
    pub settings: RouteSettings,
    /// Containers that serve it, ordered by address, no address twice.
    pub upstreams: Vec<Backend>,
    /// What of the labels is only approximated, or means nothing here; for people.
    pub remarks: BTreeSet<String>,
}
