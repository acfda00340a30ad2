//! Records of `EVENTS` as people read them.

use std::{net::SocketAddr, time::SystemTime};

use lb_common::{
    counter::DropReason,
    maps::{self, event_kind},
};

use super::api::EventRecord;
use crate::{model::Protocol, status::Status};

/// Names what an event speaks of, as far as it is still known.
pub fn record(event: &maps::Event, status: &Status, time: SystemTime) -> EventRecord {
    let service = status.services.iter().find(|s| s.id == event.service);
    let backend = service.and_then(|s| s.backends.iter().find(|b| b.id == event.backend));
    let backend = match (backend, event.backend) {
        (Some(b), _) => Some(format!("{} {}", b.name, b.address)),
        (None, 0) => None,
        (None, id) => Some(format!("#{id}")),
    };
    let kind = match event.kind {
        event_kind::NEW_FLOW => "new_flow",
        event_kind::DROP => "drop",
        event_kind::RESTEER => "resteer",
        _ => "unknown",
    };
    EventRecord {
        time,
        kind: kind.into(),
        client: Some(SocketAddr::new(event.client.into(), event.client_port.get())),
        vip: Some(SocketAddr::new(event.vip.into(), event.vip_port.get())),
        protocol: [Protocol::Tcp, Protocol::Udp]
            .into_iter()
            .find(|p| u32::from(p.number()) == event.proto),
        service: service.map(|s| s.name.clone()),
        backend,
        reason: (event.kind == event_kind::DROP)
            .then(|| {
                DropReason::ALL
                    .get(event.reason as usize)
                    .map(|r| r.name().to_owned())
            })
            .flatten(),
        count: None,
    }
}

/// Says that a reader was too slow.
pub fn lost(count: u64, time: SystemTime) -> EventRecord {
    EventRecord {
        time,
        kind: "lost".into(),
        client: None,
        vip: None,
        protocol: None,
        service: None,
        backend: None,
        reason: None,
        count: Some(count),
    }
}

#[cfg(test)]
mod tests {
    use lb_common::addr::{Addr4, Be16};

    use super::*;
    use crate::admin::fixture;

    #[test]
    fn events_are_named_as_far_as_known() {
        let event = maps::Event {
            client: Addr4::from_octets([192, 0, 2, 7]).mapped(),
            vip: Addr4::from_octets([10, 0, 0, 1]).mapped(),
            client_port: Be16::new(4000),
            vip_port: Be16::new(80),
            kind: event_kind::DROP,
            backend: 11,
            proto: 6,
            reason: DropReason::NoFlow as u32,
            service: 1,
        };
        let status = fixture::status();
        let known = record(&event, &status, *fixture::NOW);
        assert_eq!(known.client, Some("192.0.2.7:4000".parse().unwrap()));
        assert_eq!(known.backend.as_deref(), Some("web-1 172.17.0.2:8080"));
        assert_eq!(
            (known.service.as_deref(), known.reason.as_deref()),
            (Some("web"), Some("no_flow"))
        );
        let gone = record(
            &maps::Event {
                service: 9,
                kind: event_kind::NEW_FLOW,
                ..event
            },
            &status,
            *fixture::NOW,
        );
        assert_eq!(
            (gone.service, gone.backend.as_deref(), gone.reason),
            (None, Some("#11"), None)
        );
    }
}
