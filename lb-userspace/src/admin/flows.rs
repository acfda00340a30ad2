//! Flow table entries as people read them.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use lb_common::{
    addr::Be16,
    flow::{Address, FlowKey},
    maps::{self, flow_state as s},
};

use super::api::FlowRow;
use crate::model::Protocol;

/// What to look for in the flow tables. Every filter that is set must match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowFilter {
    /// Ids of services.
    pub services: Option<BTreeSet<u32>>,
    /// Client address.
    pub client: Option<IpAddr>,
    /// Ids of backends.
    pub backends: Option<BTreeSet<u32>>,
    /// Stop after so many.
    pub limit: usize,
}

impl FlowFilter {
    /// Whether a flow is wanted.
    pub fn matches(&self, row: &FlowRow) -> bool {
        self.services
            .as_ref()
            .is_none_or(|ids| ids.contains(&row.service_id))
            && self
                .backends
                .as_ref()
                .is_none_or(|ids| ids.contains(&row.backend_id))
            && self.client.is_none_or(|client| client == row.client.ip())
    }
}

/// One entry of `FLOWS4` or `FLOWS6` as a row; `None` for the entries that translate replies.
///
/// `now` is the flow clock (low 32 bits of jiffies), `hz` its ticks per second. Names are left empty.
pub fn row<A: Address>(key: &FlowKey<A>, flow: &maps::Flow<A>, now: u32, hz: u32) -> Option<FlowRow> {
    if flow.state & s::REVERSE != 0 {
        return None;
    }
    let seconds = |since: u32| now.wrapping_sub(since) / hz.max(1);
    // Read on another CPU a stamp can be a tick ahead of `now`: that is no age of years.
    let past = |since: u32| {
        if (now.wrapping_sub(since) as i32) < 0 {
            0
        } else {
            seconds(since)
        }
    };
    Some(FlowRow {
        protocol: if key.proto == u32::from(Protocol::Udp.number()) {
            Protocol::Udp
        } else {
            Protocol::Tcp
        },
        client: socket(key.src, key.sport),
        vip: socket(key.dst, key.dport),
        backend: socket(flow.dst, flow.dport),
        snat: (flow.state & s::SNAT != 0).then(|| socket(flow.src, flow.sport)),
        service_id: flow.service,
        backend_id: flow.backend,
        service: String::new(),
        backend_name: String::new(),
        state: state_name(flow.state).into(),
        age_s: past(flow.created),
        idle_s: past(flow.last_seen),
    })
}

/// The word for the bits of [`maps::flow_state`].
pub fn state_name(state: u32) -> &'static str {
    let fins = state & (s::FIN_CLIENT | s::FIN_BACKEND);
    if state & s::RESET != 0 {
        "reset"
    } else if fins == s::FIN_CLIENT | s::FIN_BACKEND {
        "closed"
    } else if fins != 0 {
        "closing"
    } else if state & s::ESTABLISHED != 0 {
        "established"
    } else if state & s::REFUSED != 0 {
        "refused"
    } else {
        "opening"
    }
}

fn socket<A: Address>(addr: A, port: Be16) -> SocketAddr {
    SocketAddr::new(addr.wide().into(), port.get())
}

#[cfg(test)]
mod tests {
    use lb_common::{addr::Addr4, flow::FlowKey4, maps::Flow4};

    use super::*;

    fn entry(state: u32) -> (FlowKey4, Flow4) {
        let key = FlowKey {
            src: Addr4::from_octets([192, 0, 2, 7]),
            dst: Addr4::from_octets([10, 0, 0, 1]),
            sport: Be16::new(40_000),
            dport: Be16::new(80),
            proto: 6,
        };
        let flow = Flow4 {
            src: Addr4::from_octets([10, 0, 0, 9]),
            dst: Addr4::from_octets([172, 17, 0, 2]),
            sport: Be16::new(20_000),
            dport: Be16::new(8080),
            service: 1,
            backend: 11,
            state,
            created: u32::MAX - 99,
            last_seen: 900,
            ..Flow4::default()
        };
        (key, flow)
    }

    #[test]
    fn a_forward_entry_becomes_a_row_across_the_wrap_of_the_clock() {
        let (key, flow) = entry(s::ESTABLISHED | s::SNAT);
        let row = row(&key, &flow, 1_100, 100).unwrap();
        assert_eq!(row.client, "192.0.2.7:40000".parse().unwrap());
        assert_eq!(row.vip, "10.0.0.1:80".parse().unwrap());
        assert_eq!(row.backend, "172.17.0.2:8080".parse().unwrap());
        assert_eq!(row.snat, Some("10.0.0.9:20000".parse().unwrap()));
        assert_eq!((row.age_s, row.idle_s), (12, 2));
        assert_eq!(row.state, "established");
    }

    #[test]
    fn reverse_entries_are_no_rows_and_a_stamp_ahead_is_no_age() {
        let (key, flow) = entry(s::REVERSE);
        assert_eq!(row(&key, &flow, 1_100, 100), None);
        let (key, flow) = entry(0);
        let row = row(&key, &flow, 899, 100).unwrap();
        assert_eq!((row.idle_s, row.snat), (0, None));
    }

    #[test]
    fn states_have_words() {
        for (bits, word) in [
            (0, "opening"),
            (s::REFUSED, "refused"),
            (s::ESTABLISHED, "established"),
            (s::ESTABLISHED | s::FIN_CLIENT, "closing"),
            (s::ESTABLISHED | s::FIN_CLIENT | s::FIN_BACKEND, "closed"),
            (s::ESTABLISHED | s::RESET, "reset"),
        ] {
            assert_eq!(state_name(bits), word);
        }
    }

    #[test]
    fn every_filter_must_match() {
        let (key, flow) = entry(s::ESTABLISHED);
        let row = row(&key, &flow, 1_100, 100).unwrap();
        let any = FlowFilter::default();
        assert!(any.matches(&row));
        let mine = FlowFilter {
            services: Some([1].into()),
            client: Some("192.0.2.7".parse().unwrap()),
            backends: Some([11, 12].into()),
            limit: 1,
        };
        assert!(mine.matches(&row));
        assert!(
            !FlowFilter {
                backends: Some([12].into()),
                ..mine.clone()
            }
            .matches(&row)
        );
        assert!(
            !FlowFilter {
                services: Some([].into()),
                ..mine.clone()
            }
            .matches(&row)
        );
        assert!(
            !FlowFilter {
                client: Some("192.0.2.8".parse().unwrap()),
                ..mine
            }
            .matches(&row)
        );
    }
}
