//! `weir events`: the sampled event stream as lines.

use super::{EventsArgs, humane::clock, print};
use crate::admin::{api::EventRecord, client::Client};

pub(super) async fn events(client: &Client, args: &EventsArgs) -> anyhow::Result<()> {
    let mut failed = None;
    let followed = client
        .follow("/v1/events", |record: EventRecord| {
            let text = match args.json {
                true => serde_json::to_string(&record).unwrap_or_default() + "\n",
                false => line(&record),
            };
            failed = print(&text).err();
            failed.is_none()
        })
        .await;
    if let Some(error) = failed {
        return Err(error.into());
    }
    followed?;
    anyhow::bail!("the agent has ended the stream: it was stopped or restarted")
}

/// `12:00:00.000Z  new_flow  web  192.0.2.7:4000 → 10.0.0.1:80/tcp → web-1 172.17.0.2:8080`
fn line(record: &EventRecord) -> String {
    let mut parts = vec![clock(record.time), format!("{:<8}", record.kind)];
    parts.extend(record.service.clone());
    if let (Some(client), Some(vip)) = (record.client, record.vip) {
        let protocol = record.protocol.map_or("?".into(), |p| p.to_string());
        let backend = record
            .backend
            .as_ref()
            .map_or(String::new(), |b| format!(" → {b}"));
        parts.push(format!("{client} → {vip}/{protocol}{backend}"));
    }
    parts.extend(record.reason.clone());
    parts.extend(
        record
            .count
            .map(|n| format!("{n} events: this reader was too slow")),
    );
    parts.join("  ").replace(char::is_control, "?") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{admin::fixture, model::Protocol};

    #[test]
    fn an_event_is_one_line() {
        let mut record = EventRecord {
            time: *fixture::NOW,
            kind: "drop".into(),
            client: Some("192.0.2.7:4000".parse().unwrap()),
            vip: Some("10.0.0.1:80".parse().unwrap()),
            protocol: Some(Protocol::Tcp),
            service: Some("web".into()),
            backend: None,
            reason: Some("no_backend".into()),
            count: None,
        };
        assert_eq!(
            line(&record),
            "00:00:00.000Z  drop      web  192.0.2.7:4000 → 10.0.0.1:80/tcp  no_backend\n"
        );
        record.backend = Some("web\n-1 172.17.0.2:8080".into());
        assert!(line(&record).contains("/tcp → web?-1 172.17.0.2:8080"));
    }
}
