//! An agent with one route, to one server, and a shim that serves it.

use serde_json::json;

use super::{
    agent::{Agent, route},
    origin::Origin,
    shim::Shim,
};

/// Host `a`, and who answers for it.
pub struct Rig {
    pub origin: Origin,
    pub shim: Shim,
    pub agent: Agent,
    _folder: tempfile::TempDir,
}

/// With these settings of `[l7]`.
pub fn rig(settings: serde_json::Value) -> Rig {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::start();
    let agent = Agent::start(folder.path(), &settings, &json!([route("a", &[origin.address])]));
    let shim = Shim::start(folder.path());
    Rig {
        origin,
        shim,
        agent,
        _folder: folder,
    }
}
