//! `weir run` and `weir detach`.
use std::path::Path;

use super::{DetachArgs, Exit, RunArgs};
use crate::admin::client::Client;

pub(super) fn run(_: &RunArgs, _: Option<&Path>) -> anyhow::Result<Exit> {
    anyhow::bail!("x")
}
pub(super) fn detach(_: &DetachArgs, _: &Client) -> anyhow::Result<Exit> {
    anyhow::bail!("x")
}
