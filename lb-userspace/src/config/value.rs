//! Values as people write them, in labels and in the file: one parser and one set of limits for both. Pure.

use std::{fmt, net::IpAddr, time::Duration};

use ipnet::IpNet;
use lb_common::limits;

use crate::model::{EmptyPolicy, Protocol, ServiceAddress, SnatMode};

/// Weight of a backend that says nothing.
pub const DEFAULT_WEIGHT: u32 = 1;
/// Largest weight: beyond it the smallest share is less than one entry of a ring.
pub const MAX_WEIGHT: u32 = 1_000;
/// Shortest timeout of a flow: the flow clock ticks in jiffies and is compared coarsely, so a shorter one could end a flow
/// that is alive.
pub const SHORTEST_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest service name: it is a metric label and a column of `weir status`.
pub const MAX_NAME: usize = 63;

/// What a service listens on: one port (0: every port) of one protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Listen {
    /// Port, host order; 0 is every port of the VIP that has no service of its own.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.port, self.protocol)
    }
}

/// A value that means nothing. `Display` is the fault, [`ValueError::remedy`] what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not `port[/protocol]`.
    #[error("`{0}` is not a port and protocol")]
    Listen(String),
    /// A list without an item.
    #[error("the list is empty")]
    EmptyList,
    /// The same item twice.
    #[error("`{0}` is in the list twice")]
    Twice(String),
    /// Not a port number.
    #[error("`{0}` is not a port number")]
    Port(String),
    /// Not a weight.
    #[error("`{0}` is not a weight")]
    Weight(String),
    /// Not a duration.
    #[error("`{text}` is not a duration: {why}")]
    Duration { text: String, why: String },
    /// A duration outside its limits.
    #[error("{} is {} than {}", show(*.value), if value > limit { "longer" } else { "shorter" }, show(*.limit))]
    DurationLimit { value: Duration, limit: Duration },
    /// Not one of the words.
    #[error("`{text}` is not one of the known words")]
    Word {
        text: String,
        words: &'static [&'static str],
    },
    /// Not a prefix.
    #[error("`{0}` is not an address or a prefix")]
    Prefix(String),
    /// A prefix with bits beyond its length.
    #[error("`{0}` has bits set beyond its prefix length")]
    HostBits(IpNet),
    /// Not a name.
    #[error("`{0}` is not a name")]
    Name(String),
    /// Not an address.
    #[error("`{0}` is not an IP address")]
    Address(String),
    /// An address that no packet of a service can carry.
    #[error("{0} is not a unicast address")]
    NotUnicast(IpAddr),
    /// Not a whole number within its limits.
    #[error("`{text}` is not a number from {least} to {most}")]
    Number { text: String, least: u32, most: u32 },
    /// Not the path of a request.
    #[error("`{0}` is not a path")]
    Path(String),
    /// Not a host name.
    #[error("`{0}` is not the name of a host")]
    Host(String),
    /// Not a status code or a range of them.
    #[error("`{0}` is not a status code of HTTP")]
    Status(String),
    /// A text that is empty or too long.
    #[error("a text of {0} bytes cannot be looked for")]
    Text(usize),
    /// `none` in a list with others.
    #[error("`none` is in a list with others")]
    NoneAndOthers,
}

impl ValueError {
    /// What to write instead.
    pub fn remedy(&self) -> String {
        match self {
            Self::Listen(_) => {
                "write `80/tcp`, `53/udp`, `80` (tcp), or `*/tcp` for every port; several with commas".into()
            }
            Self::EmptyList => "name at least one, or leave the setting out".into(),
            Self::Twice(item) => format!("remove one `{item}`"),
            Self::Port(_) => "write a number from 1 to 65535".into(),
            Self::Weight(_) => format!("write a whole number from 0 (drain) to {MAX_WEIGHT}"),
            Self::Duration { .. } => "write a number with a unit: `250ms`, `30s`, `5m`, `1h30m`".into(),
            Self::DurationLimit { value, limit } if value > limit => {
                format!("write at most `{}`", show(*limit))
            }
            Self::DurationLimit { limit, .. } => format!("write at least `{}`", show(*limit)),
            Self::Word { text, words } => match nearest(text, words) {
                Some(word) => format!("did you mean `{word}`? Known: {}", words.join(", ")),
                None => format!("write one of: {}", words.join(", ")),
            },
            Self::Prefix(_) => "write `192.0.2.0/24`, `2001:db8::/32` or a single address".into(),
            Self::HostBits(net) => format!("write `{}`", net.trunc()),
            Self::Name(_) => format!(
                "use a-z, 0-9, `-` and `_`, starting with a letter or a digit, at most {MAX_NAME} characters"
            ),
            Self::Address(_) => {
                "write an IPv4 or IPv6 address such as `203.0.113.10` or `2001:db8::10`".into()
            }
            Self::NotUnicast(_) => "use an address that a client can connect to".into(),
            Self::Number { least, most, .. } => format!("write a whole number from {least} to {most}"),
            Self::Path(_) => "write a path with its query, such as `/_ping` or `/health?full=1`".into(),
            Self::Host(_) => "write a name such as `app.example.com`, or an address".into(),
            Self::Status(_) => "write `200`, or `200-399`; several with commas".into(),
            Self::Text(_) => "write 1 to 1024 bytes".into(),
            Self::NoneAndOthers => "write `none` alone, or remove it".into(),
        }
    }
}

/// A duration as people write it.
fn show(duration: Duration) -> String {
    jiff::SignedDuration::try_from(duration).map_or_else(|_| format!("{duration:?}"), |d| format!("{d:#}"))
}

/// The known word that was probably meant.
pub fn nearest<'w>(text: &str, words: &[&'w str]) -> Option<&'w str> {
    // Two slips, or a third of a long word: further away it is a guess that misleads.
    let limit = |word: &str| 2.max(word.len() / 3);
    let length = text.chars().count();
    words
        .iter()
        // Comparing costs the product of both lengths, and a label may be of any length.
        .filter(|word| length.abs_diff(word.chars().count()) <= limit(word))
        .map(|word| (strsim::damerau_levenshtein(text, word), *word))
        .filter(|(distance, word)| *distance <= limit(word))
        .min()
        .map(|(_, word)| word)
}

/// A service name: `[a-z0-9][a-z0-9_-]*`.
pub fn name(text: &str) -> Result<String, ValueError> {
    let known = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = text.as_bytes();
    let good = bytes.first().is_some_and(|c| known(*c))
        && bytes.iter().all(|c| known(*c) || matches!(c, b'-' | b'_'))
        && bytes.len() <= MAX_NAME;
    if good {
        Ok(text.to_owned())
    } else {
        Err(ValueError::Name(text.to_owned()))
    }
}

/// One of `80/tcp`, `53/udp`, `80`, `0/tcp`, `*/udp`.
pub fn listen(text: &str) -> Result<Listen, ValueError> {
    let fault = || ValueError::Listen(text.to_owned());
    let (port, protocol) = match text.trim().split_once('/') {
        Some((port, protocol)) => (port.trim(), protocol.trim()),
        None => (text.trim(), "tcp"),
    };
    let protocol = match protocol.to_ascii_lowercase().as_str() {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return Err(fault()),
    };
    let port = match port {
        "*" => 0,
        // `u16::from_str` takes a leading `+`.
        digits if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().map_err(|_| fault())?,
        _ => return Err(fault()),
    };
    Ok(Listen { port, protocol })
}

/// Items of a comma list, none of them empty, none twice.
fn list<T: PartialEq>(
    text: &str,
    parse: impl Fn(&str) -> Result<T, ValueError>,
) -> Result<Vec<T>, ValueError> {
    items(
        text.split(',').map(str::trim).filter(|item| !item.is_empty()),
        parse,
    )
}

/// Items of a list: at least one, none twice.
pub fn items<'t, T: PartialEq>(
    texts: impl IntoIterator<Item = &'t str>,
    parse: impl Fn(&str) -> Result<T, ValueError>,
) -> Result<Vec<T>, ValueError> {
    let mut found = Vec::new();
    for text in texts {
        let item = parse(text)?;
        if found.contains(&item) {
            return Err(ValueError::Twice(text.to_owned()));
        }
        found.push(item);
    }
    if found.is_empty() {
        return Err(ValueError::EmptyList);
    }
    Ok(found)
}

/// A comma list of [`listen`].
pub fn listens(text: &str) -> Result<Vec<Listen>, ValueError> {
    list(text, listen)
}

/// A comma list of [`prefix`].
pub fn prefixes(text: &str) -> Result<Vec<IpNet>, ValueError> {
    list(text, prefix)
}

/// A prefix, or an address as the prefix of itself.
pub fn prefix(text: &str) -> Result<IpNet, ValueError> {
    let net: IpNet = text
        .parse()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| ValueError::Prefix(text.to_owned()))?;
    if net.trunc() == net {
        Ok(net)
    } else {
        Err(ValueError::HostBits(net))
    }
}

/// A port of a container or backend: 1–65535.
pub fn port(text: &str) -> Result<u16, ValueError> {
    text.trim()
        .parse()
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| ValueError::Port(text.to_owned()))
}

/// A weight: 0–[`MAX_WEIGHT`].
pub fn weight(text: &str) -> Result<u32, ValueError> {
    text.trim()
        .parse()
        .ok()
        .filter(|weight| *weight <= MAX_WEIGHT)
        .ok_or_else(|| ValueError::Weight(text.to_owned()))
}

/// A duration from zero to [`limits::MAX_TIMEOUT_S`].
pub fn duration(text: &str) -> Result<Duration, ValueError> {
    at_most(
        any_duration(text)?,
        Duration::from_secs(limits::MAX_TIMEOUT_S.into()),
    )
}

/// A duration of at least `least` and at most `most`.
pub fn duration_between(least: Duration, most: Duration) -> impl Fn(&str) -> Result<Duration, ValueError> {
    move |text| at_least(at_most(any_duration(text)?, most)?, least)
}

fn any_duration(text: &str) -> Result<Duration, ValueError> {
    let fault = |why: String| ValueError::Duration {
        text: text.to_owned(),
        why,
    };
    let signed: jiff::SignedDuration = text
        .trim()
        .parse()
        .map_err(|e: jiff::Error| fault(e.to_string()))?;
    Duration::try_from(signed).map_err(|_| fault("it is negative".into()))
}

/// A [`duration`] of at least `limit`.
pub fn duration_from(limit: Duration) -> impl Fn(&str) -> Result<Duration, ValueError> {
    move |text| at_least(duration(text)?, limit)
}

/// An idle timeout of flows.
pub fn timeout(text: &str) -> Result<Duration, ValueError> {
    duration_from(SHORTEST_TIMEOUT)(text)
}

fn at_least(value: Duration, limit: Duration) -> Result<Duration, ValueError> {
    if value < limit {
        return Err(ValueError::DurationLimit { value, limit });
    }
    Ok(value)
}

fn at_most(value: Duration, limit: Duration) -> Result<Duration, ValueError> {
    if value > limit {
        return Err(ValueError::DurationLimit { value, limit });
    }
    Ok(value)
}

/// One of the words; `values` has a value for each.
pub fn one_of<T: Copy>(text: &str, words: &'static [&'static str], values: &[T]) -> Result<T, ValueError> {
    let lower = text.trim().to_ascii_lowercase();
    words
        .iter()
        .zip(values)
        .find_map(|(word, value)| (*word == lower).then_some(*value))
        .ok_or_else(|| ValueError::Word {
            text: text.to_owned(),
            words,
        })
}

/// `true` or `false`; a label that is merely there means nothing.
pub fn boolean(text: &str) -> Result<bool, ValueError> {
    one_of(text, &["true", "false"], &[true, false])
}

/// `client-ip` or `none`.
pub fn affinity(text: &str) -> Result<bool, ValueError> {
    one_of(text, &["client-ip", "none"], &[true, false])
}

/// `auto`, `always` or `never`.
pub fn snat(text: &str) -> Result<SnatMode, ValueError> {
    one_of(
        text,
        &["auto", "always", "never"],
        &[SnatMode::Auto, SnatMode::Always, SnatMode::Never],
    )
}

/// `drainers-then-refuse`, `refuse` or `drop`.
pub fn when_empty(text: &str) -> Result<EmptyPolicy, ValueError> {
    one_of(
        text,
        &["drainers-then-refuse", "refuse", "drop"],
        &[
            EmptyPolicy::DrainersThenRefuse,
            EmptyPolicy::Refuse,
            EmptyPolicy::Drop,
        ],
    )
}

/// A unicast address.
pub fn address(text: &str) -> Result<IpAddr, ValueError> {
    let ip: IpAddr = text
        .trim()
        .parse()
        .map_err(|_| ValueError::Address(text.to_owned()))?;
    // An IPv4-mapped IPv6 address is the IPv4 address in every map key: take it as such.
    let ip = ip.to_canonical();
    if is_unicast(ip) {
        Ok(ip)
    } else {
        Err(ValueError::NotUnicast(ip))
    }
}

/// Every combination of the addresses and what is listened on.
pub fn service_addresses(vips: &[IpAddr], listens: &[Listen]) -> Vec<ServiceAddress> {
    let of = |vip: &IpAddr| {
        let vip = *vip;
        listens.iter().map(move |listen| ServiceAddress {
            vip,
            port: listen.port,
            protocol: listen.protocol,
        })
    };
    vips.iter().flat_map(of).collect()
}

/// Whether a client can connect to it.
pub fn is_unicast(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    !ip.is_unspecified() && !ip.is_multicast() && !broadcast
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listens_of_every_form() {
        use Protocol::{Tcp, Udp};
        let rows: &[(&str, Option<(u16, Protocol)>)] = &[
            ("80/tcp", Some((80, Tcp))),
            ("80", Some((80, Tcp))),
            (" 53 / UDP ", Some((53, Udp))),
            ("0/tcp", Some((0, Tcp))),
            ("*/udp", Some((0, Udp))),
            ("65535/tcp", Some((65535, Tcp))),
            ("65536/tcp", None),
            ("-1/tcp", None),
            ("+80/tcp", None),
            ("80/sctp", None),
            ("80/", None),
            ("/tcp", None),
            ("", None),
            ("http", None),
            ("80/tcp/udp", None),
            ("80-90/tcp", None),
        ];
        for (text, want) in rows {
            let got = listen(text).ok().map(|l| (l.port, l.protocol));
            assert_eq!(got, *want, "{text}");
        }
        assert_eq!(listens("80, 443/tcp ,53/udp").unwrap().len(), 3);
        assert_eq!(listens(" , "), Err(ValueError::EmptyList));
        assert_eq!(listens("80,80/tcp"), Err(ValueError::Twice("80/tcp".into())));
    }

    #[test]
    fn durations_of_every_form() {
        let ms = Duration::from_millis;
        for (text, want) in [
            ("30s", Some(ms(30_000))),
            ("5m", Some(ms(300_000))),
            ("1h30m", Some(ms(5_400_000))),
            ("1h 30m", Some(ms(5_400_000))),
            ("250ms", Some(ms(250))),
            ("0s", Some(ms(0))),
            ("30", None),
            ("-5s", None),
            ("", None),
            ("soon", None),
            ("8d", None),
            ("200h", None),
        ] {
            assert_eq!(duration(text).ok(), want, "{text}: {:?}", duration(text));
        }
        let error = duration("200h").unwrap_err();
        assert!(error.to_string().contains("longer"), "{error}");
        assert!(error.remedy().contains("at most"), "{}", error.remedy());
        let error = duration_from(ms(1000))("10ms").unwrap_err();
        assert!(error.to_string().contains("shorter"), "{error}");
    }

    #[test]
    fn words_numbers_prefixes_and_names() {
        assert_eq!(boolean("True"), Ok(true));
        assert_eq!(boolean(" false "), Ok(false));
        assert!(boolean("").is_err());
        assert!(boolean("1").is_err());
        assert_eq!(affinity("client-ip"), Ok(true));
        assert!(affinity("clientip").unwrap_err().remedy().contains("`client-ip`"));
        assert_eq!(snat("always"), Ok(SnatMode::Always));
        assert_eq!(when_empty("drop"), Ok(EmptyPolicy::Drop));
        assert_eq!(weight("0"), Ok(0));
        assert_eq!(weight("1000"), Ok(1000));
        assert!(weight("1001").is_err() && weight("-1").is_err() && weight("1.5").is_err());
        assert!(port("0").is_err() && port("65536").is_err());
        assert_eq!(port("8080"), Ok(8080));
        assert_eq!(prefix("192.0.2.7").unwrap().to_string(), "192.0.2.7/32");
        let error = prefix("192.0.2.7/24").unwrap_err();
        assert_eq!(error.remedy(), "write `192.0.2.0/24`");
        assert_eq!(prefixes("10.0.0.0/8, 2001:db8::/32").unwrap().len(), 2);
        for good in ["web", "w", "0a", "a-b_c"] {
            assert_eq!(name(good).as_deref(), Ok(good));
        }
        for bad in ["", "-a", "_a", "Web", "a.b", "ä", &"a".repeat(64)] {
            assert!(name(bad).is_err(), "{bad}");
        }
        assert_eq!(address("::ffff:192.0.2.1"), Ok("192.0.2.1".parse().unwrap()));
        assert!(address("224.0.0.1").is_err() && address("0.0.0.0").is_err() && address("x").is_err());
    }

    #[test]
    fn the_nearest_word_is_no_wild_guess() {
        assert_eq!(nearest("lisen", &["listen", "port"]), Some("listen"));
        assert_eq!(nearest("wieght", &["weight", "drain"]), Some("weight"));
        assert_eq!(nearest("zebra", &["weight", "drain"]), None);
        // Compared, it would take gigabytes.
        assert_eq!(nearest(&"weight".repeat(10_000_000), &["weight"]), None);
    }
}
