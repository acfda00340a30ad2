//! The file as written. Unknown keys are refused; no value is judged here.

use std::{collections::BTreeMap, fmt, marker::PhantomData, ops::Range};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::errors::{ConfigFault, position};

/// A value and where the file says it.
pub(super) type Given<T> = Option<Spanned<T>>;

/// One string or a list of them.
#[derive(Debug)]
pub(super) struct Strings(pub(super) Vec<String>);

/// Every section.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawConfig {
    pub(super) interfaces: Given<Strings>,
    pub(super) vips: BTreeMap<String, Spanned<RawVip>>,
    pub(super) defaults: RawDefaults,
    pub(super) limits: RawLimits,
    pub(super) snat: RawSnat,
    pub(super) firewall: RawFirewall,
    pub(super) docker: OneOrMany<RawDocker>,
    pub(super) swarm: Option<OneOrMany<RawSwarm>>,
    pub(super) etcd: Given<RawEtcd>,
    pub(super) node: Given<RawNode>,
    pub(super) nodes: Given<RawNodes>,
    pub(super) admin: RawAdmin,
    pub(super) startup: RawStartup,
    pub(super) events: RawEvents,
    pub(super) bpf: RawBpf,
    pub(super) tls: BTreeMap<String, Spanned<RawTls>>,
    pub(super) l7: RawL7,
    pub(super) services: Vec<Spanned<RawService>>,
}

/// `[vips.<name>]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawVip {
    pub(super) address: Given<Strings>,
    pub(super) announce: Given<String>,
    pub(super) interface: Given<String>,
    pub(super) node_address: Given<bool>,
    pub(super) unused_ports: Given<String>,
}

/// `[defaults]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawDefaults {
    pub(super) drain: Given<String>,
    pub(super) snat: Given<String>,
    pub(super) when_empty: Given<String>,
    pub(super) reset_unknown: Given<bool>,
    pub(super) when_unhealthy: Given<String>,
    pub(super) remember: Given<String>,
    pub(super) timeouts: RawTimeouts,
    pub(super) check: RawCheck,
    pub(super) passive: RawPassive,
}

/// `[defaults.check]` and `[services.check]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawCheck {
    pub(super) kind: Given<Strings>,
    pub(super) port: Given<u16>,
    pub(super) interval: Given<String>,
    pub(super) fast_interval: Given<String>,
    pub(super) timeout: Given<String>,
    pub(super) rise: Given<u32>,
    pub(super) fall: Given<u32>,
    pub(super) grace: Given<String>,
    pub(super) slow_start: Given<String>,
    pub(super) method: Given<String>,
    pub(super) path: Given<String>,
    pub(super) host: Given<String>,
    pub(super) status: Given<Strings>,
    pub(super) body: Given<String>,
    pub(super) tls: Given<String>,
    pub(super) server_name: Given<String>,
}

impl RawCheck {
    /// Whether anything but the kind is said.
    pub(super) fn is_given(&self) -> bool {
        let texts = [
            &self.interval,
            &self.fast_interval,
            &self.timeout,
            &self.grace,
            &self.slow_start,
            &self.method,
            &self.path,
            &self.host,
            &self.body,
            &self.tls,
            &self.server_name,
        ];
        let numbers = [&self.rise, &self.fall];
        texts.iter().any(|given| given.is_some())
            || numbers.iter().any(|given| given.is_some())
            || self.port.is_some()
            || self.status.is_some()
    }
}

/// `[defaults.passive]` and `[services.passive]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawPassive {
    pub(super) enabled: Given<bool>,
    pub(super) window: Given<String>,
    pub(super) failures: Given<u32>,
    pub(super) ratio: Given<u32>,
    pub(super) eject: Given<String>,
    pub(super) eject_max: Given<String>,
    pub(super) keep: Given<u32>,
}

/// `[tls.<name>]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawTls {
    pub(super) ca: Given<String>,
    pub(super) cert: Given<String>,
    pub(super) key: Given<String>,
}

/// `[defaults.timeouts]` and `[services.timeouts]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawTimeouts {
    pub(super) tcp_established: Given<String>,
    pub(super) tcp_syn: Given<String>,
    pub(super) tcp_closing: Given<String>,
    pub(super) udp: Given<String>,
}

/// `[limits]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawLimits {
    pub(super) services: Given<u32>,
    pub(super) backends: Given<u32>,
    #[serde(alias = "ring_rows")]
    pub(super) ring_rows: Given<u32>,
    pub(super) flows4: Given<u32>,
    pub(super) flows6: Given<u32>,
    pub(super) flow_share: Given<u32>,
    pub(super) events: Given<u32>,
}

/// `[snat]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawSnat {
    pub(super) addresses: Given<Strings>,
    pub(super) ports: Given<String>,
}

/// `[firewall]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawFirewall {
    pub(super) deny: Given<Strings>,
}

/// A section once, or once for each: `[docker]`, or `[[docker]]` for each engine.
#[derive(Debug)]
pub(super) enum OneOrMany<T> {
    /// The only one.
    One(Box<T>),
    /// Each with a name.
    Named(Vec<Spanned<T>>),
}

/// One engine.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawDocker {
    pub(super) name: Given<String>,
    pub(super) enabled: Given<bool>,
    pub(super) endpoint: Given<String>,
    pub(super) remote: Given<bool>,
    pub(super) node_address: Given<Strings>,
    pub(super) tls_ca: Given<String>,
    pub(super) tls_cert: Given<String>,
    pub(super) tls_key: Given<String>,
    pub(super) resync: Given<String>,
    pub(super) liveness: Given<String>,
    pub(super) keep: Given<String>,
    pub(super) allow_vips: Given<Strings>,
    pub(super) allow_ports: Given<Strings>,
    pub(super) allow_services: Given<Strings>,
}

/// `[node]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawNode {
    pub(super) name: Given<String>,
    pub(super) addresses: Given<Strings>,
    pub(super) ttl: Given<String>,
    pub(super) on_stop: Given<String>,
}

/// `[nodes]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawNodes {
    pub(super) keep: Given<String>,
    pub(super) allow_addresses: Given<Strings>,
    pub(super) allow_vips: Given<Strings>,
    pub(super) allow_ports: Given<Strings>,
    pub(super) allow_services: Given<Strings>,
    pub(super) node: BTreeMap<String, Spanned<RawNodeRule>>,
}

/// `[nodes.node.<name>]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawNodeRule {
    pub(super) enabled: Given<bool>,
    pub(super) allow_vips: Given<Strings>,
    pub(super) allow_ports: Given<Strings>,
    pub(super) allow_services: Given<Strings>,
}

/// One swarm.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawSwarm {
    pub(super) name: Given<String>,
    pub(super) enabled: Given<bool>,
    pub(super) endpoints: Given<Strings>,
    pub(super) tls_ca: Given<String>,
    pub(super) tls_cert: Given<String>,
    pub(super) tls_key: Given<String>,
    pub(super) poll: Given<String>,
    pub(super) liveness: Given<String>,
    pub(super) keep: Given<String>,
    pub(super) allow_vips: Given<Strings>,
    pub(super) allow_ports: Given<Strings>,
    pub(super) allow_services: Given<Strings>,
}

/// `[etcd]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawEtcd {
    pub(super) endpoints: Given<Strings>,
    pub(super) ca: Given<String>,
    pub(super) cert: Given<String>,
    pub(super) key: Given<String>,
    pub(super) user: Given<String>,
    pub(super) password_file: Given<String>,
    pub(super) prefix: Given<String>,
    pub(super) timeout: Given<String>,
    pub(super) liveness: Given<String>,
    pub(super) cache: Given<String>,
}

/// What the nodes share: the text of one key in etcd.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawShared {
    pub(super) vips: BTreeMap<String, Spanned<RawVip>>,
    pub(super) defaults: RawDefaults,
    pub(super) firewall: RawFirewall,
    pub(super) events: RawEvents,
}

/// `[admin]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawAdmin {
    pub(super) socket: Given<String>,
    pub(super) metrics: Given<String>,
    pub(super) allow_remote: Given<bool>,
}

/// `[startup]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawStartup {
    pub(super) wait: Given<String>,
}

/// `[events]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawEvents {
    pub(super) sample: Given<u32>,
}

/// `[bpf]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawBpf {
    pub(super) pin_path: Given<String>,
    pub(super) xdp: Given<String>,
    pub(super) mark: Given<u32>,
}

/// `[l7]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawL7 {
    pub(super) listen: Given<Strings>,
    pub(super) http_port: Given<u16>,
    pub(super) https_port: Given<u16>,
    pub(super) max_connections: Given<u32>,
    pub(super) max_body: Option<u64>,
    pub(super) hsts: Option<u64>,
    pub(super) redirect_to_https: Given<Strings>,
    pub(super) cluster: Option<String>,
    pub(super) proxy_protocol: Given<Strings>,
    pub(super) send_proxy_protocol: Option<bool>,
    pub(super) trusted_proxies: Given<Strings>,
    pub(super) access_log: Given<String>,
    pub(super) status_page: Given<String>,
    pub(super) metrics: Given<String>,
    pub(super) certificates: Given<String>,
    pub(super) default_certificate: Given<String>,
    pub(super) min_tls: Given<String>,
    pub(super) acme: Given<RawAcme>,
    pub(super) timeouts: RawL7Timeouts,
}

/// `[l7.acme]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawAcme {
    pub(super) directory: Given<String>,
    pub(super) contact: Given<Strings>,
    pub(super) agree_terms: Given<bool>,
    pub(super) hosts: Given<Strings>,
    pub(super) ca: Given<String>,
    pub(super) renew_before: Given<String>,
    pub(super) retry: Given<String>,
}

/// `[l7.timeouts]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawL7Timeouts {
    pub(super) connect: Given<String>,
    pub(super) client: Given<String>,
    pub(super) server: Given<String>,
    pub(super) header: Given<String>,
    pub(super) request: Given<String>,
    pub(super) drain: Given<String>,
}

/// `[[services]]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawService {
    pub(super) name: Given<String>,
    pub(super) vip: Given<String>,
    pub(super) listen: Given<Strings>,
    pub(super) affinity: Given<String>,
    pub(super) snat: Given<String>,
    pub(super) allow: Given<Strings>,
    pub(super) deny: Given<Strings>,
    pub(super) when_empty: Given<String>,
    pub(super) reset_unknown: Given<bool>,
    pub(super) when_unhealthy: Given<String>,
    pub(super) timeouts: RawTimeouts,
    pub(super) check: RawCheck,
    pub(super) passive: RawPassive,
    pub(super) backends: Vec<Spanned<RawBackend>>,
}

/// `[[services.backends]]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawBackend {
    pub(super) address: Given<String>,
    pub(super) weight: Given<u32>,
    pub(super) drain: Given<String>,
    pub(super) name: Given<String>,
}

/// Reads the text. Every fault of syntax, every unknown key and every value of the wrong type comes back, not the
/// first alone: what serde complains of is cut out and the rest is read again.
pub(super) fn read<T: DeserializeOwned + Default>(text: &str) -> (T, Vec<ConfigFault>) {
    let (mut document, syntax) = DeTable::parse_recoverable(text);
    let mut faults: Vec<_> = syntax
        .iter()
        .map(|error| ConfigFault {
            key: String::new(),
            position: error.span().map(|span| position(text, &span)),
            fault: error.message().to_owned(),
            remedy: "correct the TOML".into(),
        })
        .collect();
    loop {
        match T::deserialize(toml::de::Deserializer::from(document.clone())) {
            Ok(raw) => return (raw, faults),
            Err(error) => {
                let span = error.span();
                let cut = span.as_ref().and_then(|span| cut(document.get_mut(), span));
                let found = cut.is_some();
                let (path, unknown) = cut.unwrap_or_default();
                faults.push(ConfigFault {
                    key: path,
                    position: span.map(|span| position(text, &span)),
                    fault: error.message().to_owned(),
                    remedy: if unknown {
                        "correct or remove the key; docs/config.md lists them all".into()
                    } else {
                        "docs/config.md says what belongs here".into()
                    },
                });
                if !found {
                    return (T::default(), faults);
                }
            }
        }
    }
}

/// Removes the innermost entry that the span lies in; its path, and whether the span is its key.
fn cut(table: &mut DeTable<'_>, span: &Range<usize>) -> Option<(String, bool)> {
    for (key, value) in table.iter_mut() {
        let found = match value.get_mut() {
            DeValue::Table(inner) => cut(inner, span).map(|(path, unknown)| (format!(".{path}"), unknown)),
            DeValue::Array(items) => items.iter_mut().enumerate().find_map(|(index, item)| {
                let DeValue::Table(inner) = item.get_mut() else {
                    return None;
                };
                cut(inner, span).map(|(path, unknown)| (format!("[{index}].{path}"), unknown))
            }),
            _ => None,
        };
        if let Some((path, unknown)) = found {
            return Some((format!("{}{path}", key.get_ref()), unknown));
        }
    }
    let within = |outer: Range<usize>| outer.start <= span.start && span.end <= outer.end;
    let (key, unknown) = table.iter().find_map(|(key, value)| {
        let unknown = within(key.span());
        (unknown || within(value.span())).then(|| (key.get_ref().to_string(), unknown))
    })?;
    table.remove(key.as_str());
    Some((key, unknown))
}

// === impl OneOrMany ===

impl<T: Default> Default for OneOrMany<T> {
    fn default() -> Self {
        Self::One(Box::default())
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Section<T>(PhantomData<T>);

        impl<'de, T: DeserializeOwned> Visitor<'de> for Section<T> {
            type Value = OneOrMany<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a section in single brackets, or several in double ones, each with a name")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(|one| OneOrMany::One(Box::new(one)))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                let mut all = Vec::new();
                while let Some(item) = items.next_element()? {
                    all.push(item);
                }
                Ok(OneOrMany::Named(all))
            }
        }

        deserializer.deserialize_any(Section(PhantomData))
    }
}

// === impl Strings ===

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMany;

        impl<'de> Visitor<'de> for OneOrMany {
            type Value = Strings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Strings, E> {
                Ok(Strings(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Strings, A::Error> {
                let mut strings = Vec::new();
                while let Some(item) = items.next_element()? {
                    strings.push(item);
                }
                Ok(Strings(strings))
            }
        }

        deserializer.deserialize_any(OneOrMany)
    }
}
