//! Certificates that the shim gets by itself (ACME, RFC 8555, proven by HTTP-01).
//!
//! [`Wanted`] says for which hosts, [`follow`] orders them one by one and keeps them in a [`Folder`], from where [`crate::tls`]
//! serves them like any other file. [`challenge`] answers the authority's questions: from the account's key alone, so that
//! every shim with the same account answers for an order of another one.

mod account;
mod board;
pub mod challenge;
mod client;
mod folder;
mod follow;
mod order;
mod schedule;
mod validity;
mod wanted;

pub use board::{Board, Trouble};
pub use challenge::answer;
pub use folder::{Folder, FolderError};
pub use follow::follow;
pub use validity::Validity;
pub use wanted::Wanted;

/// An error and what it comes from, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = cause.source();
    }
    text
}
