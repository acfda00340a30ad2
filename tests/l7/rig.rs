//! An agent with one route, to one server, and a shim that serves it.

use std::net::TcpStream;

use serde_json::json;

use super::{
    agent::{Agent, route},
    origin::{Origin, Raw},
    shim::Shim,
    wire::Wire,
};

/// Host `a`, and who answers for it.
pub struct Rig {
    pub origin: Origin,
    pub shim: Shim,
    pub agent: Agent,
    pub folder: tempfile::TempDir,
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
        folder,
    }
}

/// The same with a server that the test answers for.
pub struct RawRig {
    pub server: Raw,
    pub shim: Shim,
    pub folder: tempfile::TempDir,
    _agent: Agent,
}

impl RawRig {
    /// A client that asks, and the server's side of what has been asked.
    pub fn ask(&self) -> (Wire, TcpStream) {
        let mut wire = Wire::connect(self.shim.address());
        wire.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
        (wire, self.server.accept().0)
    }
}

/// With these settings of `[l7]`.
pub fn with_raw(settings: serde_json::Value) -> RawRig {
    let folder = tempfile::tempdir().unwrap();
    let server = Raw::start();
    let agent = Agent::start(folder.path(), &settings, &json!([route("a", &[server.address])]));
    RawRig {
        server,
        shim: Shim::start(folder.path()),
        folder,
        _agent: agent,
    }
}
