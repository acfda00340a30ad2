//! `weir drain`, `weir undrain`, `weir announce`, `weir resync`.

use super::{AnnounceArgs, DrainArgs, UndrainArgs, print};
use crate::admin::{
    api::{AnnounceQuery, Announced, AnnouncedVip, BackendName, Done, DrainRequest},
    client::Client,
};

pub(super) async fn drain(client: &Client, args: &DrainArgs) -> anyhow::Result<()> {
    let request = DrainRequest {
        backend: args.backend.clone(),
        all: args.all,
        deadline_ms: args
            .deadline
            .map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
    };
    let done: Done = client.post("/v1/drain", &request).await?;
    let over = match args.deadline {
        Some(time) => format!("{time:?} are over"),
        None => "its drain time is over".into(),
    };
    let what = format!("takes no new flows; old flows go on until they end or {over}");
    Ok(print(&report(&done.backends, &what))?)
}

pub(super) async fn undrain(client: &Client, args: &UndrainArgs) -> anyhow::Result<()> {
    let request = DrainRequest {
        backend: args.backend.clone(),
        all: args.all,
        deadline_ms: None,
    };
    let done: Done = client.post("/v1/undrain", &request).await?;
    if done.backends.is_empty() {
        return Ok(print(&format!("{} is no longer drained\n", args.backend))?);
    }
    Ok(print(&report(&done.backends, "serves again as its source says"))?)
}

pub(super) async fn resync(client: &Client) -> anyhow::Result<()> {
    let _: Done = client.post("/v1/resync", &()).await?;
    Ok(print("the maps hold the desired state\n")?)
}

pub(super) async fn announce(client: &Client, args: &AnnounceArgs) -> anyhow::Result<()> {
    let query = AnnounceQuery { vip: args.vip };
    let Announced { announced } = client.post("/v1/announce", &query).await?;
    let line = |one: &AnnouncedVip| format!("{} is announced on {}\n", one.vip, one.interface);
    Ok(print(&announced.iter().map(line).collect::<String>())?)
}

/// A line for each backend.
fn report(backends: &[BackendName], what: &str) -> String {
    backends
        .iter()
        .map(|b| format!("{}/{} ({}) {what}\n", b.service, b.name, b.address))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{fixture, select};

    #[test]
    fn each_backend_is_reported() {
        let found = select::matches(&fixture::status(), "web-1");
        assert_eq!(
            report(&found, "serves"),
            "web/web-1 (172.17.0.2:8080) serves\ndns/web-1 ([fd00::6]:53) serves\n"
        );
    }
}
