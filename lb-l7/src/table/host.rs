//! The host of a request, as tables name it.

use std::borrow::Cow;

/// Longest name of the DNS.
const LONGEST: usize = 253;

/// Lower case, without the port and the dot at the end; `None` if no host is named like that.
///
/// IPv6 addresses keep their brackets.
pub fn normal(text: &str) -> Option<Cow<'_, str>> {
    let host = if text.starts_with('[') {
        let end = text.find(']')?;
        let (host, rest) = text.split_at(end + 1);
        let inside = &host[1..end];
        if inside.is_empty()
            || !inside
                .bytes()
                .all(|b| b.is_ascii_hexdigit() || b == b':' || b == b'.')
        {
            return None;
        }
        is_port(rest)?;
        host
    } else {
        let (host, rest) = text.split_at(text.find(':').unwrap_or(text.len()));
        is_port(rest)?;
        let host = host.strip_suffix('.').unwrap_or(host);
        let named = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
        // Without a label between two dots, and before the first one.
        if host.len() > LONGEST || !host.bytes().all(named) || host.split('.').any(str::is_empty) {
            return None;
        }
        host
    };
    Some(if host.bytes().any(|b| b.is_ascii_uppercase()) {
        Cow::Owned(host.to_ascii_lowercase())
    } else {
        Cow::Borrowed(host)
    })
}

/// Nothing, or a colon and a port (which may be empty).
fn is_port(rest: &str) -> Option<()> {
    let port = match rest.strip_prefix(':') {
        Some(port) => port,
        None if rest.is_empty() => return Some(()),
        None => return None,
    };
    (port.is_empty() || (port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok()))
        .then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_every_form() {
        for (text, host) in [
            ("vote.example.com", "vote.example.com"),
            ("Vote.Example.COM:8080", "vote.example.com"),
            ("vote.example.com.", "vote.example.com"),
            ("vote.example.com.:443", "vote.example.com"),
            ("my_host", "my_host"),
            ("192.0.2.1:80", "192.0.2.1"),
            ("[2001:DB8::1]:80", "[2001:db8::1]"),
            ("[::1]", "[::1]"),
            ("host:", "host"),
        ] {
            assert_eq!(normal(text).as_deref(), Some(host), "{text}");
        }
        for text in [
            "",
            ".",
            ":80",
            "a b",
            "a/b",
            "a@b",
            "a:b",
            "a:99999",
            "a:80:80",
            "[::1",
            "[]",
            "[::1]x",
            "a..b",
            "a..",
            "..",
            ".a",
            "ho\u{e9}t",
            "a,b",
            "a%20",
            "a\"b",
            "a<b",
        ] {
            assert_eq!(normal(text), None, "{text}");
        }
        assert_eq!(normal(&"a".repeat(254)), None);
    }
}
