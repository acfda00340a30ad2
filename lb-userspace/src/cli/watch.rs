//! `weir status`, once or again and again.

use std::{
    io::{self, IsTerminal},
    time::{Duration, SystemTime},
};

use super::{StatusArgs, look, print, print_json, status::render};
use crate::{
    admin::{api::Counters, client::Client},
    status::Status,
};

/// Time between the two readings of the counters that a single `weir status` takes its rates from.
const SAMPLE: Duration = Duration::from_millis(500);

/// Home and erase below: the next picture replaces the last one without flicker.
const CLEAR: &str = "\u{1b}[H\u{1b}[J";

pub(super) async fn status(client: &Client, args: &StatusArgs) -> anyhow::Result<()> {
    if args.json && args.watch.is_none() {
        return print_json(&client.get::<Status>("/v1/status").await?);
    }
    let mut before = client.get::<Counters>("/v1/counters").await;
    let mut wait = SAMPLE;
    loop {
        tokio::time::sleep(wait).await;
        let status: Status = client.get("/v1/status").await?;
        // A datapath that cannot be read shall not hide the status: without counters there are no rates.
        let after = client.get::<Counters>("/v1/counters").await;
        let readings = match (&before, &after) {
            (Ok(before), Ok(after)) => Some((before, after)),
            _ => None,
        };
        let text = match args.json {
            true => serde_json::to_string(&status)? + "\n",
            false => render(&status, readings, SystemTime::now(), look()),
        };
        let Some(every) = args.watch else {
            print(&text)?;
            return Ok(());
        };
        let clear = if io::stdout().is_terminal() && !args.json {
            CLEAR
        } else {
            ""
        };
        print(&format!("{clear}{text}"))?;
        (before, wait) = (after, every);
    }
}
