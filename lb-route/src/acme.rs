//! Certificates that the shim gets by itself: `[l7.acme]` of the agent's configuration.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::settings::millis;

/// Let's Encrypt.
pub const DEFAULT_DIRECTORY: &str = "https://acme-v02.api.letsencrypt.org/directory";
/// First wait after an order that failed.
pub const DEFAULT_RETRY: Duration = Duration::from_secs(60);

/// How certificates are ordered (RFC 8555), proven by HTTP-01.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Acme {
    /// URL of the authority's directory.
    pub directory: String,
    /// Mail addresses to which the authority may write.
    pub contact: Vec<String>,
    /// The operator agrees to the authority's terms of service. Nothing is ordered otherwise.
    pub agree_terms: bool,
    /// Hosts that may have a certificate, lower case; `*.` in front is every name below. What labels say alone orders none.
    pub hosts: Vec<String>,
    /// Authorities that have signed the certificate of the directory's own server, PEM; `None`: those of the node.
    pub ca: Option<PathBuf>,
    /// Renewed so long before its end, milliseconds in JSON; `None`: when a third of its time is left.
    #[serde(rename = "renew_before_ms", with = "millis_if_any")]
    pub renew_before: Option<Duration>,
    /// First wait after an order that failed, milliseconds in JSON; each next one is twice as long.
    #[serde(rename = "retry_ms", with = "millis")]
    pub retry: Duration,
}

// === impl Acme ===

impl Acme {
    /// Whether the operator lets this host have a certificate.
    pub fn allows(&self, host: &str) -> bool {
        self.hosts.iter().any(|pattern| match pattern.strip_prefix("*.") {
            Some(parent) => host
                .strip_suffix(parent)
                .is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
            None => host == pattern,
        })
    }
}

impl Default for Acme {
    fn default() -> Self {
        Self {
            directory: DEFAULT_DIRECTORY.into(),
            contact: Vec::new(),
            agree_terms: false,
            hosts: Vec::new(),
            ca: None,
            renew_before: None,
            retry: DEFAULT_RETRY,
        }
    }
}

/// A duration that may be absent, as whole milliseconds.
mod millis_if_any {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
        let millis = value.map(|value| u64::try_from(value.as_millis()).unwrap_or(u64::MAX));
        millis.serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(from)?.map(Duration::from_millis))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hosts_that_the_operator_names_are_allowed() {
        let acme = Acme {
            hosts: vec!["vote.example".into(), "*.apps.example".into()],
            ..Acme::default()
        };
        for host in ["vote.example", "a.apps.example", "a.b.apps.example"] {
            assert!(acme.allows(host), "{host}");
        }
        for host in [
            "x.vote.example",
            "apps.example",
            ".apps.example",
            "evilapps.example",
            "apps.example.evil",
            "",
        ] {
            assert!(!acme.allows(host), "{host}");
        }
    }

    #[test]
    fn it_travels_as_it_is() {
        let text = r#"{"agree_terms":true,"hosts":["a"],"renew_before_ms":1500}"#;
        let acme: Acme = serde_json::from_str(text).unwrap();
        assert_eq!(
            (acme.renew_before, acme.retry),
            (Some(Duration::from_millis(1500)), DEFAULT_RETRY)
        );
        let again: Acme = serde_json::from_str(&serde_json::to_string(&acme).unwrap()).unwrap();
        assert_eq!(again, acme);
        let none: Acme = serde_json::from_str("{}").unwrap();
        assert_eq!(none, Acme::default());
        assert!(!none.agree_terms);
    }
}
