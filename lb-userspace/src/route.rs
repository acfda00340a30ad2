//! The domain words of HTTP: what a service is to the kernel, a route is to the L7 shim. They are defined in `lb-route`,
//! which the shim uses too; here is what only the agent knows. No wire types, no I/O.

pub use lb_route::{
    ANY_HOST, Balance, Redirect, RouteAddress, RouteSettings, RouteTls, Upstream, UpstreamTls, WHOLE_HOST,
};

use serde::{Deserialize, Serialize};

use crate::model::Backend;

/// A route as it shall be served, with everything that is known of its backends.
pub type Route = lb_route::Route<Backend>;

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

impl From<&Backend> for Upstream {
    fn from(backend: &Backend) -> Self {
        Self {
            address: backend.address,
            name: backend.name.clone(),
            weight: backend.weight,
            state: backend.state,
            drain: backend.drain,
        }
    }
}
