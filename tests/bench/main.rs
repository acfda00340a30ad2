//! The benchmarks, a kind each: `cargo xtask bench <kind>` builds what they need and runs them.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "a benchmark that cannot go on reports it by panicking"
)]

mod prog;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("prog") => prog::run(),
        other => bail!("no benchmark {other:?}: run it by `cargo xtask bench`"),
    }
}
