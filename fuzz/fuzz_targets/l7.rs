//! Any bytes where the L7 shim reads what strangers write by itself: hosts, paths, tokens of ACME and the PROXY protocol. A host that is one is
//! the same when it is looked at again, and every request leads somewhere or nowhere, without a panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use weir_l7::{
    acme::challenge,
    proxy_protocol,
    table::{Table, host},
};

fuzz_target!(|bytes: &[u8]| {
    if let Some((fixed, rest)) = bytes.split_first_chunk::<16>() {
        let _ = (proxy_protocol::length(fixed), proxy_protocol::source(fixed, rest));
    }
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.lines();
    let (asked, path) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    if let Some(token) = challenge::token(path) {
        // It goes back to whoever asks.
        assert!(!token.contains(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_'));
    }
    let entries = lines.map(|line| {
        let (host, path) = line.split_at(line.find('/').unwrap_or(line.len()));
        (host.to_owned(), path.to_owned(), ())
    });
    let table = Table::new(entries);
    if let Some(normal) = host::normal(asked) {
        assert_eq!(host::normal(&normal).as_deref(), Some(&*normal));
        let _ = table.find(&normal, path);
    }
});
