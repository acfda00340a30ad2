//! `weir drain`, `weir undrain`, `weir resync`.

use super::{DrainArgs, UndrainArgs, humane::span, print};
use crate::admin::{
    api::{BackendName, Done, DrainRequest},
    client::Client,
};

pub(super) async fn drain(client: &Client, args: &DrainArgs) -> anyhow::Result<()> {
    let request = DrainRequest {
        backend: args.backend.clone(),
        deadline_ms: args.deadline.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
        all: args.all,
    };
    let done: Done = client.post("/v1/drain", &request).await?;
    let until = args.deadline.map_or("until they end or its deadline passes".into(), |d| {
        format!("for at most {}", span(d))
    });
    let verb = format!("takes no new flows; old flows go on {until}");
    Ok(print(&report(&done.backends, &verb))?)
}

pub(super) async fn undrain(client: &Client, args: &UndrainArgs) -> anyhow::Result<()> {
    let request = DrainRequest { backend: args.backend.clone(), deadline_ms: None, all: args.all };
    let done: Done = client.post("/v1/undrain", &request).await?;
    Ok(print(&report(&done.backends, "serves again as its source says"))?)
}

pub(super) async fn resync(client: &Client) -> anyhow::Result<()> {
    let _: Done = client.post("/v1/resync", &()).await?;
    Ok(print("the maps hold the desired state\n")?)
}

/// A line for each backend.
fn report(backends: &[BackendName], what: &str) -> String {
    backends.iter().map(|b| format!("{}/{} ({}) {what}\n", b.service, b.name, b.address)).collect()
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
