//! Any bytes as the beginning of a connection: a header of the PROXY protocol, if it begins like one, and the first message of TLS. The
//! first byte cuts the message: however its bytes come, what is understood is the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rustls::server::Acceptor;
use weir_l7::{
    proxy_protocol,
    table::host,
    tls::hello::{accept, name},
};

/// Longest rest of a header that may be waited for.
const LONGEST: usize = 4096;

fuzz_target!(|bytes: &[u8]| {
    let Some((cut, bytes)) = bytes.split_first() else {
        return;
    };
    let Some(rest) = header(bytes) else { return };
    let whole = understood(rest, rest.len());
    let pieces = understood(rest, usize::from(*cut).max(1));
    assert_eq!(whole, pieces, "{cut} bytes at a time");
    if let Ok(Some(Some(name))) = whole {
        assert!(!name.bytes().any(|byte| byte.is_ascii_uppercase()), "{name:?}");
        if let Some(normal) = host::normal(&name) {
            assert_eq!(host::normal(&normal).as_deref(), Some(&*normal));
        }
    }
});

/// What is behind a header; `None` if the connection ends with it.
fn header(bytes: &[u8]) -> Option<&[u8]> {
    let Some((fixed, rest)) = bytes.split_first_chunk::<16>() else {
        return Some(bytes);
    };
    let Ok(length) = proxy_protocol::length(fixed) else {
        return Some(bytes);
    };
    assert!(length <= LONGEST);
    let (header, behind) = rest.split_at_checked(length)?;
    let client = proxy_protocol::source(fixed, header).ok()?;
    // What only looks like one family must not come around a list of prefixes of the other.
    if let Some(client) = client {
        assert_eq!(client.ip(), client.ip().to_canonical());
        let written = proxy_protocol::header(client, client);
        let (fixed, rest) = written
            .split_first_chunk::<16>()
            .expect("a header has a fixed part");
        assert_eq!(proxy_protocol::length(fixed), Ok(rest.len()));
        assert_eq!(proxy_protocol::source(fixed, rest), Ok(Some(client)));
    }
    Some(behind)
}

/// The server name of a first message that comes in pieces of this size. `Ok(None)`: not all of it is there; `Err`: it is none.
fn understood(bytes: &[u8], step: usize) -> Result<Option<Option<String>>, ()> {
    let (mut acceptor, mut fed) = (Acceptor::default(), 0);
    let mut end = 0;
    while end < bytes.len() {
        end = (end + step).min(bytes.len());
        let accepted = accept(&mut acceptor, &bytes[..end], &mut fed).map_err(|_| ())?;
        assert!(fed <= end, "{fed} bytes were taken of {end}");
        if let Some(accepted) = accepted {
            return Ok(Some(name(&accepted)));
        }
        assert_eq!(fed, end, "bytes are left and nothing was understood");
    }
    Ok(None)
}
