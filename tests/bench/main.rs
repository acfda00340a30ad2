//! The benchmarks, a kind each: `cargo xtask bench <kind>` builds what they need and runs them.

mod l7;
mod net;
mod nodes;
mod prog;
mod scale;
mod update;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let only = std::env::args().nth(2);
    match std::env::args().nth(1).as_deref() {
        Some("prog") => prog::run(only.as_deref().unwrap_or_default()),
        Some("update") => update::run(),
        Some("scale") => scale::run(),
        Some("net") => net::run(),
        Some("nodes") => nodes::run(),
        Some("l7") => l7::run(),
        Some("l7-profile") => l7::profile(),
        other => bail!("no benchmark {other:?}: run it by `cargo xtask bench`"),
    }
}
