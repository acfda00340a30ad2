//! The stream from the agent to its shims: a line of JSON for each message, over HTTP on a Unix socket that can do
//! nothing else.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{L7, Route, RouteAddress};

/// Name of the socket; it is in the folder of the agent's own.
pub const SOCKET_NAME: &str = "l7.sock";
/// The only call on that socket. It never ends by itself.
pub const WATCH_PATH: &str = "/v1/routes/watch";
/// How often a silent agent gives a sign of life.
pub const ALIVE_EVERY: Duration = Duration::from_secs(5);
/// Silence after which the stream is taken for dead.
pub const SILENCE: Duration = Duration::from_secs(16);

/// One line of the stream. The first is always [`Message::Full`], and comes when the agent knows its routes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Message {
    /// Everything: what was known before is forgotten.
    Full(Box<State>),
    /// Routes that are new or have changed, whole, and routes that are gone.
    Change {
        /// New or changed.
        put: Vec<Route>,
        /// Gone.
        remove: Vec<RouteAddress>,
    },
    /// Nothing has happened.
    Alive,
}

/// Everything that a shim serves by. The file that it keeps for its next start, and that `--routes` reads, is this.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Settings.
    #[serde(default)]
    pub settings: L7,
    /// Routes in the order of host and path.
    #[serde(default)]
    pub routes: Vec<Route>,
}

impl State {
    /// The routes that this shim serves: those that name another cluster are not its own.
    pub fn served(&self) -> impl Iterator<Item = &Route> {
        let own = |route: &&Route| {
            let cluster = &route.settings.cluster;
            cluster.is_none() || *cluster == self.settings.cluster
        };
        self.routes.iter().filter(own)
    }

    /// The message after which `old` is as this; `None` if it is already.
    pub fn since(&self, old: &Self) -> Option<Message> {
        if self == old {
            return None;
        }
        if self.settings != old.settings {
            return Some(Message::Full(Box::new(self.clone())));
        }
        let known: BTreeMap<RouteAddress, &Route> = old.routes.iter().map(|r| (r.address(), r)).collect();
        let now: BTreeMap<RouteAddress, &Route> = self.routes.iter().map(|r| (r.address(), r)).collect();
        let changed = now
            .iter()
            .filter(|(address, route)| known.get(address) != Some(route));
        Some(Message::Change {
            put: changed.map(|(_, route)| (*route).clone()).collect(),
            remove: known
                .into_keys()
                .filter(|address| !now.contains_key(address))
                .collect(),
        })
    }

    /// Takes in a message.
    pub fn apply(&mut self, message: Message) {
        match message {
            Message::Full(state) => *self = *state,
            Message::Change { put, remove } => {
                let routes = std::mem::take(&mut self.routes).into_iter();
                let mut routes: BTreeMap<RouteAddress, Route> = routes.map(|r| (r.address(), r)).collect();
                for address in &remove {
                    routes.remove(address);
                }
                routes.extend(put.into_iter().map(|route| (route.address(), route)));
                self.routes = routes.into_values().collect();
            }
            Message::Alive => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(text: &str) -> State {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn what_is_left_out_is_as_usual() {
        let state = state(r#"{"routes":[{"host":"a","upstreams":[{"address":"127.0.0.1:80"}]}]}"#);
        assert_eq!(state.settings, L7::default());
        let route = &state.routes[0];
        assert_eq!((route.path.as_str(), route.upstreams[0].weight), ("/", 1));
    }

    #[test]
    fn a_state_becomes_another_by_the_message_between_them() {
        let a = state(r#"{"routes":[{"host":"a","upstreams":[]},{"host":"b","upstreams":[]}]}"#);
        let b = state(
            r#"{"routes":[{"host":"b","upstreams":[{"address":"127.0.0.1:80"}]},{"host":"c","upstreams":[]}]}"#,
        );
        let c = state(r#"{"settings":{"http_port":8080},"routes":[{"host":"c","upstreams":[]}]}"#);
        for (from, to) in [(&a, &b), (&b, &a), (&a, &c), (&c, &b)] {
            let message = to.since(from).unwrap();
            // As it travels.
            let line = serde_json::to_string(&message).unwrap();
            let mut shim = from.clone();
            shim.apply(serde_json::from_str(&line).unwrap());
            assert_eq!(&shim, to, "{line}");
        }
        assert_eq!(a.since(&a), None);
        let Some(Message::Change { put, remove }) = b.since(&a) else {
            panic!("not a change")
        };
        assert_eq!((put.len(), remove.len()), (2, 1));
    }
}
