//! Where the state comes from: the agent's stream, or a file. What was good last is kept whatever happens to either.

mod agent;
mod store;

pub use agent::follow;
pub use store::{Store, StoreError, read};
