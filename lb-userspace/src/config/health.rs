//! Values of health checks as people write them, in labels and in the file, and what they are when nothing is said. Pure.

use std::{collections::BTreeMap, time::Duration};

use hyper::http::uri::{Authority, PathAndQuery};
use rustls::pki_types::ServerName;

use super::value::{self, ValueError};
use crate::model::{Check, CheckKind, HttpMethod, Passive, TlsFiles, UnhealthyPolicy};

/// A backend that is checked more often is kept busy by nothing else.
pub const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);
/// An answer across a network takes at least so long on a bad day.
pub const SHORTEST_TIMEOUT: Duration = Duration::from_millis(10);
/// Largest number of results in a row that decide.
pub const MAX_THRESHOLD: u32 = 100;
/// Longest text that a body is searched for, bytes.
const MAX_TEXT: usize = 1024;

/// What services get when they say nothing about checks, and what they may name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckPolicy {
    /// `[defaults.check]`; without kinds nothing is checked unless a service says so.
    pub check: Check,
    /// `[defaults.passive]`, whether it is switched on or not.
    pub passive: Passive,
    /// `[tls.<name>]`.
    pub tls: BTreeMap<String, TlsFiles>,
}

impl Default for CheckPolicy {
    fn default() -> Self {
        Self {
            check: Check::of(Vec::new()),
            passive: Passive::default(),
            tls: BTreeMap::new(),
        }
    }
}

/// What a check consists of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kinds {
    /// The container must have a HEALTHCHECK.
    pub docker: bool,
    /// What is tried besides.
    pub kinds: Vec<CheckKind>,
}

/// Why settings that are good by themselves do not go together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// Settings of a check, and no check.
    #[error("nothing is checked, so this has no effect")]
    NoKind,
    /// The backend keeps the client's port.
    #[error("the service is on every port, so there is no port to check")]
    NoPort,
    /// No such section.
    #[error("there is no section `[tls.{name}]`")]
    NoTls { name: String, known: Vec<String> },
    /// An answer without a body.
    #[error("a HEAD request is answered without a body")]
    HeadBody,
    /// The container has none.
    #[error("the container has no HEALTHCHECK")]
    NoHealthcheck,
}

impl CheckError {
    /// What to do, where `check` and `port` are the settings of those names.
    pub fn remedy(&self, check: &str, port: &str) -> String {
        match self {
            Self::NoKind => format!("set `{check}` to tcp, http or https, or remove this"),
            Self::NoPort => format!("set `{port}`"),
            Self::NoTls { known, .. } if known.is_empty() => "add it to the agent's configuration".into(),
            Self::NoTls { name, known } => {
                let names: Vec<&str> = known.iter().map(String::as_str).collect();
                match value::nearest(name, &names) {
                    Some(name) => format!("did you mean `{name}`?"),
                    None => format!("name one of: {}", known.join(", ")),
                }
            }
            Self::HeadBody => "use GET, or remove the text".into(),
            Self::NoHealthcheck => {
                format!(
                    "add one to the image, or remove `docker` from `{check}`: where there is one it counts anyway"
                )
            }
        }
    }
}

impl CheckPolicy {
    /// The files of a section.
    ///
    /// # Errors
    /// There is no such section.
    pub fn tls(&self, name: &str) -> Result<TlsFiles, CheckError> {
        self.tls.get(name).cloned().ok_or_else(|| CheckError::NoTls {
            name: name.into(),
            known: self.tls.keys().cloned().collect(),
        })
    }
}

/// Whether a finished check can be made of a backend at this port.
///
/// # Errors
/// It cannot.
pub fn fits(check: &Check, port: u16) -> Result<(), CheckError> {
    if check.port.is_none() && port == 0 {
        return Err(CheckError::NoPort);
    }
    let asks = check.kinds.iter().any(|kind| *kind != CheckKind::Tcp);
    if asks && check.http.method == HttpMethod::Head && check.http.body.is_some() {
        return Err(CheckError::HeadBody);
    }
    Ok(())
}

/// `docker`, `tcp`, `http`, `https`, several with commas: all must pass. `none` alone.
pub fn kinds(text: &str) -> Result<Kinds, ValueError> {
    kind_list(text.split(',').map(str::trim).filter(|item| !item.is_empty()))
}

/// As [`kinds`], of a list.
pub fn kind_list<'t>(texts: impl IntoIterator<Item = &'t str>) -> Result<Kinds, ValueError> {
    const WORDS: &[&str] = &["docker", "tcp", "http", "https", "none"];
    /// What a word stands for.
    #[derive(Clone, Copy, PartialEq)]
    enum Word {
        None,
        Docker,
        Kind(CheckKind),
    }
    let values = [
        Word::Docker,
        Word::Kind(CheckKind::Tcp),
        Word::Kind(CheckKind::Http),
        Word::Kind(CheckKind::Https),
        Word::None,
    ];
    let words = value::items(texts, |text| value::one_of(text, WORDS, &values))?;
    if words.len() > 1 && words.contains(&Word::None) {
        return Err(ValueError::NoneAndOthers);
    }
    let kind = |word: &Word| match word {
        Word::Kind(kind) => Some(*kind),
        Word::None | Word::Docker => None,
    };
    Ok(Kinds {
        docker: words.contains(&Word::Docker),
        kinds: words.iter().filter_map(kind).collect(),
    })
}

/// `GET`, `HEAD` or `OPTIONS`.
pub fn method(text: &str) -> Result<HttpMethod, ValueError> {
    let values = [HttpMethod::Get, HttpMethod::Head, HttpMethod::Options];
    value::one_of(text, &["get", "head", "options"], &values)
}

/// A path with its query, as in a request line.
pub fn path(text: &str) -> Result<String, ValueError> {
    match text.parse::<PathAndQuery>() {
        Ok(_) if text.starts_with('/') => Ok(text.into()),
        _ => Err(ValueError::Path(text.into())),
    }
}

/// A value of the header `Host`: a name or an address, with or without a port.
pub fn host(text: &str) -> Result<String, ValueError> {
    match text.parse::<Authority>() {
        Ok(authority) if !authority.as_str().contains('@') => Ok(text.into()),
        _ => Err(ValueError::Host(text.into())),
    }
}

/// A name or an address that a certificate can have.
pub fn server_name(text: &str) -> Result<String, ValueError> {
    match ServerName::try_from(text) {
        Ok(_) => Ok(text.into()),
        Err(_) => Err(ValueError::Host(text.into())),
    }
}

/// A status code or a range of them: `204`, `200-399`.
pub fn status(text: &str) -> Result<(u16, u16), ValueError> {
    let code = |text: &str| {
        let code = text.trim().parse().ok();
        code.filter(|code| (100..=599).contains(code))
            .ok_or_else(|| ValueError::Status(text.to_owned()))
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = (code(first)?, code(last)?);
    if range.0 > range.1 {
        return Err(ValueError::Status(text.to_owned()));
    }
    Ok(range)
}

/// A comma list of [`status`].
pub fn statuses(text: &str) -> Result<Vec<(u16, u16)>, ValueError> {
    value::items(
        text.split(',').map(str::trim).filter(|item| !item.is_empty()),
        status,
    )
}

/// Text to find in a body.
pub fn body(text: &str) -> Result<String, ValueError> {
    if text.is_empty() || text.len() > MAX_TEXT {
        return Err(ValueError::Text(text.len()));
    }
    Ok(text.into())
}

/// Results in a row: 1–[`MAX_THRESHOLD`].
pub fn threshold(text: &str) -> Result<u32, ValueError> {
    number(text, 1, MAX_THRESHOLD)
}

/// A percentage from `least` on.
pub fn percent(text: &str, least: u32) -> Result<u32, ValueError> {
    number(text, least, 100)
}

/// A whole number within limits.
pub fn number(text: &str, least: u32, most: u32) -> Result<u32, ValueError> {
    let fault = || ValueError::Number {
        text: text.into(),
        least,
        most,
    };
    let number = text.trim().parse().map_err(|_| fault())?;
    if (least..=most).contains(&number) {
        Ok(number)
    } else {
        Err(fault())
    }
}

/// `as-empty` or `serve-all`.
pub fn when_unhealthy(text: &str) -> Result<UnhealthyPolicy, ValueError> {
    let values = [UnhealthyPolicy::AsEmpty, UnhealthyPolicy::ServeAll];
    value::one_of(text, &["as-empty", "serve-all"], &values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_every_form() {
        use CheckKind::{Http, Https, Tcp};
        let of = |docker, kinds: &[CheckKind]| {
            Some(Kinds {
                docker,
                kinds: kinds.to_vec(),
            })
        };
        for (text, want) in [
            ("http", of(false, &[Http])),
            ("docker, TCP,https", of(true, &[Tcp, Https])),
            ("docker", of(true, &[])),
            ("none", of(false, &[])),
            ("none,http", None),
            ("http,http", None),
            ("", None),
            ("htttp", None),
        ] {
            assert_eq!(kinds(text).ok(), want, "{text}");
        }
        assert!(kinds("htpp").unwrap_err().remedy().contains("`http`"));
        for good in ["/", "/_ping", "/a/b?c=d&e=f", "/%20"] {
            assert_eq!(path(good).as_deref(), Ok(good));
        }
        for bad in ["", "health", "http://x/", "/a b", "/a\r\nX: y", "*"] {
            assert!(path(bad).is_err(), "{bad}");
        }
        for (text, good) in [
            ("app.example.com", true),
            ("app.example.com:8080", true),
            ("[2001:db8::1]:80", true),
            ("", false),
            ("a b", false),
            ("user@host", false),
            ("a\r\nX-Evil: 1", false),
        ] {
            assert_eq!(host(text).is_ok(), good, "{text}");
        }
        assert!(server_name("ucp.example.com").is_ok() && server_name("192.0.2.1").is_ok());
        assert!(server_name("ucp example").is_err() && server_name("ucp:443").is_err());
        assert_eq!(statuses("200-399"), Ok(vec![(200, 399)]));
        assert_eq!(
            statuses("200, 204,301-303"),
            Ok(vec![(200, 200), (204, 204), (301, 303)])
        );
        for bad in ["", "99", "600", "300-200", "2xx", "200-"] {
            assert!(statuses(bad).is_err(), "{bad}");
        }
        assert_eq!(method("HEAD"), Ok(HttpMethod::Head));
        assert!(method("POST").is_err());
        assert_eq!(threshold("3"), Ok(3));
        assert!(threshold("0").is_err() && threshold("101").is_err() && threshold("x").is_err());
        assert!(percent("0", 0).is_ok() && percent("0", 1).is_err() && percent("101", 0).is_err());
        assert!(body("").is_err() && body(&"x".repeat(1025)).is_err());
        assert_eq!(when_unhealthy("serve-all"), Ok(UnhealthyPolicy::ServeAll));
    }

    #[test]
    fn settings_that_do_not_go_together() {
        let mut check = Check::of(vec![CheckKind::Http]);
        assert_eq!(fits(&check, 80), Ok(()));
        assert_eq!(fits(&check, 0), Err(CheckError::NoPort));
        check.port = Some(81);
        assert_eq!(fits(&check, 0), Ok(()));
        check.http.method = HttpMethod::Head;
        check.http.body = Some("well".into());
        assert_eq!(fits(&check, 0), Err(CheckError::HeadBody));
        let error = CheckPolicy::default().tls("ucp").unwrap_err();
        assert!(error.to_string().contains("[tls.ucp]"));
    }
}
