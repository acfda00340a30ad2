//! Values as Interlock's labels have them.

use std::time::Duration;

use super::fault::Fault;
use crate::{
    config::value::{self, ValueError},
    route::{Redirect, WHOLE_HOST},
};

/// Longest host name in DNS.
const MAX_HOST: usize = 253;
/// Longest part of one.
const MAX_HOST_PART: usize = 63;
/// Interlock's default, and what it makes of 0.
pub const DEFAULT_INTERVAL: Duration = Duration::from_secs(5);
/// Longest interval: an hour. A check that is rarer says nothing.
const LONGEST_INTERVAL_MS: u64 = 3_600_000;

/// A switch. In Interlock its presence alone counts, so that a label without a value is on; what it says counts here.
pub fn flag(text: &str) -> Result<bool, ValueError> {
    const WORDS: &[&str] = &["", "true", "false", "1", "0", "yes", "no", "on", "off"];
    const VALUES: &[bool] = &[true, true, false, true, false, true, false, true, false];
    value::one_of(text, WORDS, VALUES).map_err(|_| ValueError::Word {
        text: text.to_owned(),
        words: &["true", "false"],
    })
}

/// `none` or `required`: whether the upstream's certificate is verified.
pub fn verify(text: &str) -> Result<bool, ValueError> {
    value::one_of(text, &["none", "required"], &[false, true])
}

/// A host name in lower case, or `*.` and one.
pub fn host(text: &str) -> Result<String, Fault> {
    let lower = text.trim().trim_end_matches('.').to_ascii_lowercase();
    let name = lower.strip_prefix("*.").unwrap_or(&lower);
    let good = |part: &str| {
        let edge = |c: Option<char>| c.is_some_and(|c| c != '-');
        part.len() <= MAX_HOST_PART
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
            && edge(part.chars().next())
            && edge(part.chars().next_back())
    };
    if lower.len() <= MAX_HOST && name.split('.').all(good) {
        Ok(lower)
    } else {
        Err(Fault::Host(text.to_owned()))
    }
}

/// A path prefix without a `/` at its end; an empty one is the whole host.
pub fn path(text: &str) -> Result<String, Fault> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(WHOLE_HOST.into());
    }
    let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '?' | '#' | '"' | '\\');
    let dots = || text.split('/').any(|part| part == "." || part == "..");
    if !text.starts_with('/') || text.contains("//") || text.contains(odd) || dots() {
        return Err(Fault::Path(text.to_owned()));
    }
    match text.trim_end_matches('/') {
        "" => Ok(WHOLE_HOST.into()),
        path => Ok(path.to_owned()),
    }
}

/// Milliseconds; empty and 0 are the default, as in Interlock.
pub fn interval(text: &str) -> Result<Duration, Fault> {
    match text.trim() {
        "" => Ok(DEFAULT_INTERVAL),
        digits => match digits.parse::<u64>() {
            Ok(0) => Ok(DEFAULT_INTERVAL),
            Ok(ms) if ms <= LONGEST_INTERVAL_MS => Ok(Duration::from_millis(ms)),
            _ => Err(Fault::Interval(text.to_owned())),
        },
    }
}

/// A file in the folder of certificates, or the name of a secret. A container must not name any other file.
pub fn file(text: &str) -> Result<Option<String>, Fault> {
    let text = text.trim();
    let inside = |part: &str| !matches!(part, "" | "." | "..");
    match text {
        "" => Ok(None),
        _ if text.split('/').all(inside) && !text.contains(char::is_control) => Ok(Some(text.to_owned())),
        _ => Err(Fault::File(text.to_owned())),
    }
}

/// The name of a cookie: a token of HTTP.
pub fn cookie(text: &str) -> Result<Option<String>, Fault> {
    let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    match text.trim() {
        "" => Ok(None),
        name if name.chars().all(token) => Ok(Some(name.to_owned())),
        other => Err(Fault::Cookie(other.to_owned())),
    }
}

/// `from,to;from,to`.
pub fn redirects(text: &str) -> Result<Vec<Redirect>, Fault> {
    let pairs = text.split(';').map(str::trim).filter(|pair| !pair.is_empty());
    let redirect = |pair: &str| {
        let parts: Vec<&str> = pair.split(',').map(str::trim).collect();
        match parts.as_slice() {
            [from, to] if !from.is_empty() && !to.is_empty() && !pair.contains(char::is_control) => {
                Ok(Redirect {
                    from: (*from).to_owned(),
                    to: (*to).to_owned(),
                })
            }
            _ => Err(Fault::Redirect(pair.to_owned())),
        }
    };
    pairs.map(redirect).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_switch_says_what_it_says() {
        for on in ["", "true", "True", "1", "yes", "on", " true "] {
            assert_eq!(flag(on), Ok(true), "{on:?}");
        }
        for off in ["false", "FALSE", "0", "no", "off"] {
            assert_eq!(flag(off), Ok(false), "{off:?}");
        }
        let error = flag("maybe").unwrap_err();
        assert!(error.remedy().contains("true, false"), "{}", error.remedy());
    }

    #[test]
    fn hosts_paths_and_intervals() {
        assert_eq!(host("Vote.MyEnterprise.com."), Ok("vote.myenterprise.com".into()));
        assert_eq!(host("*.apps.example.com"), Ok("*.apps.example.com".into()));
        assert_eq!(host("web_1"), Ok("web_1".into()));
        let long = "a".repeat(64);
        for bad in [
            "", ".", "a..b", "-a.b", "a-.b", "a b", "http://a", "a:80", "*", "~^a", "ä.de", &long,
        ] {
            assert_eq!(host(bad), Err(Fault::Host(bad.into())));
        }
        for (text, want) in [
            ("", Some("/")),
            ("/", Some("/")),
            ("/shop", Some("/shop")),
            ("/shop/", Some("/shop")),
            ("/a/b", Some("/a/b")),
            ("shop", None),
            ("/a//b", None),
            ("/a?b", None),
            ("/a/../b", None),
            ("/a b", None),
        ] {
            assert_eq!(path(text).ok().as_deref(), want, "{text}");
        }
        assert_eq!(interval("250"), Ok(Duration::from_millis(250)));
        assert_eq!(
            (interval("0"), interval("")),
            (Ok(DEFAULT_INTERVAL), Ok(DEFAULT_INTERVAL))
        );
        for bad in ["-1", "5s", "99999999999999999999", "3600001"] {
            assert!(interval(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_container_names_no_file_outside_the_folder() {
        assert_eq!(file("vote.pem"), Ok(Some("vote.pem".into())));
        assert_eq!(file("vote/cert.pem"), Ok(Some("vote/cert.pem".into())));
        for bad in ["/etc/shadow", "../key.pem", "a/../../b", "a//b", "./a"] {
            assert_eq!(file(bad), Err(Fault::File(bad.into())));
        }
    }

    #[test]
    fn redirects_are_pairs() {
        let two = redirects("http://a,http://b; http://c , http://d ;").unwrap();
        assert_eq!(two.len(), 2);
        assert_eq!(
            (two[1].from.as_str(), two[1].to.as_str()),
            ("http://c", "http://d")
        );
        assert!(redirects("http://a").is_err() && redirects("a,b,c").is_err() && redirects("a,").is_err());
    }
}
