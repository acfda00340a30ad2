//! `[defaults.check]`, `[services.check]`, the tables of passive ejection, and `[tls.<name>]`.

use std::{collections::BTreeMap, fmt, ops::Range, path::PathBuf};

use toml::Spanned;

use super::{
    super::{
        health::{self, CheckError, CheckPolicy},
        raw::{Given, RawCheck, RawPassive, RawTls},
        value::{self, ValueError},
    },
    Check,
};
use crate::model::{self, Passive, TlsFiles};

/// The sections of `[tls]`.
pub(super) fn tls(
    check: &mut Check<'_>,
    raw: &BTreeMap<String, Spanned<RawTls>>,
) -> BTreeMap<String, TlsFiles> {
    let mut found = BTreeMap::new();
    for (name, given) in raw {
        let key = format!("tls.{name}");
        check.keep(&key, given.span(), value::name(name));
        let section = given.get_ref();
        let mut path = |name: &str, given: &Given<String>| -> Option<PathBuf> {
            let path = PathBuf::from(given.as_ref()?.get_ref());
            if !path.is_absolute() {
                let fault = format!("`{}` is not an absolute path", path.display());
                let remedy = format!("write a path like `/etc/weir/{name}.pem`");
                check.fault(
                    format!("{key}.{name}"),
                    given.as_ref().map(Spanned::span),
                    fault,
                    remedy,
                );
            }
            Some(path)
        };
        let ca = path("ca", &section.ca);
        let identity = match (path("cert", &section.cert), path("key", &section.key)) {
            (Some(cert), Some(private)) => Some((cert, private)),
            (None, None) => None,
            (Some(_), None) => {
                check.missing(
                    &format!("{key}.key"),
                    Some(given.span()),
                    "name the key of `cert`",
                );
                None
            }
            (None, Some(_)) => {
                check.missing(
                    &format!("{key}.cert"),
                    Some(given.span()),
                    "name the certificate of `key`",
                );
                None
            }
        };
        found.insert(name.clone(), TlsFiles { ca, identity });
    }
    found
}

/// A check on the ground of another one. What it consists of is not judged yet: see [`fits`].
pub(super) fn active(
    check: &mut Check<'_>,
    key: &str,
    raw: &RawCheck,
    base: &model::Check,
    tls: &BTreeMap<String, TlsFiles>,
) -> model::Check {
    let at = |name: &str| format!("{key}.{name}");
    let mut made = base.clone();
    if let Some(list) = &raw.kind {
        let texts = list.get_ref().0.iter().map(String::as_str);
        // One string may hold several, as in a label.
        let texts: Vec<&str> = texts.flat_map(|text| text.split(',')).map(str::trim).collect();
        if let Some(kinds) = check.keep(&at("kind"), list.span(), health::kind_list(texts)) {
            made.kinds = kinds.kinds;
            if kinds.docker {
                check.fault(
                    at("kind"),
                    Some(list.span()),
                    "a HEALTHCHECK is a container's, and counts wherever there is one",
                    "remove `docker`; to insist on one, say so in the container's labels",
                );
            }
        }
    }
    if let Some(port) = &raw.port {
        let parsed = value::port(&port.get_ref().to_string());
        made.port = check.keep(&at("port"), port.span(), parsed);
    }
    let interval = value::duration_from(health::SHORTEST_INTERVAL);
    let times = &mut made.timing;
    times.interval = check.text_or(&at("interval"), &raw.interval, times.interval, &interval);
    times.fast_interval = check.text_or(
        &at("fast-interval"),
        &raw.fast_interval,
        times.fast_interval,
        &interval,
    );
    let timeout = value::duration_from(health::SHORTEST_TIMEOUT);
    times.timeout = check.text_or(&at("timeout"), &raw.timeout, times.timeout, timeout);
    times.rise = number_or(check, &at("rise"), &raw.rise, times.rise, health::threshold);
    times.fall = number_or(check, &at("fall"), &raw.fall, times.fall, health::threshold);
    times.grace = check.text_or(&at("grace"), &raw.grace, times.grace, value::duration);
    times.slow_start = check.text_or(
        &at("slow-start"),
        &raw.slow_start,
        times.slow_start,
        value::duration,
    );

    let http = &mut made.http;
    http.method = check.text_or(&at("method"), &raw.method, http.method, health::method);
    http.path = check.text_or(&at("path"), &raw.path, http.path.clone(), health::path);
    http.host = check.text_or(&at("host"), &raw.host, http.host.clone(), some(health::host));
    http.body = check.text_or(&at("body"), &raw.body, http.body.clone(), some(health::body));
    if let Some(list) = &raw.status {
        let texts = list
            .get_ref()
            .0
            .iter()
            .flat_map(|text| text.split(','))
            .map(str::trim);
        let parsed = value::items(texts, health::status);
        http.status = check.keep(&at("status"), list.span(), parsed).unwrap_or_default();
    }
    let name = &made.tls.server_name;
    made.tls.server_name = check.text_or(
        &at("server-name"),
        &raw.server_name,
        name.clone(),
        some(health::server_name),
    );
    if let Some(name) = &raw.tls {
        let sections = CheckPolicy {
            tls: tls.clone(),
            ..CheckPolicy::default()
        };
        match sections.tls(name.get_ref()) {
            Ok(files) => made.tls.files = Some(files),
            Err(error) => unfit(check, &at("tls"), Some(name.span()), &error),
        }
    }
    made
}

/// Notes why a finished check cannot be made of backends at these ports.
pub(super) fn fits(
    check: &mut Check<'_>,
    key: &str,
    raw: &RawCheck,
    made: &model::Check,
    ports: impl IntoIterator<Item = u16>,
    span: Range<usize>,
) {
    if made.kinds.is_empty() {
        if raw.kind.is_none() && raw.is_given() {
            unfit(check, key, Some(span), &CheckError::NoKind);
        }
        return;
    }
    if let Some(error) = ports.into_iter().find_map(|port| health::fits(made, port).err()) {
        unfit(check, key, Some(span), &error);
    }
}

fn unfit(check: &mut Check<'_>, key: &str, span: Option<Range<usize>>, error: &CheckError) {
    check.fault(key, span, error, error.remedy("kind", "port"));
}

/// Passive ejection on the ground of other numbers, and whether it is switched on.
pub(super) fn passive(check: &mut Check<'_>, key: &str, raw: &RawPassive, base: &Passive) -> Passive {
    let at = |name: &str| format!("{key}.{name}");
    let time = value::duration_from(std::time::Duration::from_secs(1));
    let most = u32::MAX;
    Passive {
        window: check.text_or(&at("window"), &raw.window, base.window, &time),
        failures: number_or(check, &at("failures"), &raw.failures, base.failures, |text| {
            health::number(text, 1, most)
        }),
        ratio: number_or(check, &at("ratio"), &raw.ratio, base.ratio, |text| {
            health::percent(text, 1)
        }),
        eject: check.text_or(&at("eject"), &raw.eject, base.eject, &time),
        eject_max: check.text_or(&at("eject-max"), &raw.eject_max, base.eject_max, &time),
        keep: number_or(check, &at("keep"), &raw.keep, base.keep, |text| {
            health::percent(text, 0)
        }),
    }
}

fn number_or(
    check: &mut Check<'_>,
    key: &str,
    given: &Given<u32>,
    base: u32,
    parse: impl Fn(&str) -> Result<u32, ValueError>,
) -> u32 {
    let Some(number) = given else { return base };
    let parsed = parse(&number.get_ref().to_string());
    check.keep(key, number.span(), parsed).unwrap_or(base)
}

fn some<T>(parse: impl Fn(&str) -> Result<T, ValueError>) -> impl Fn(&str) -> Result<Option<T>, ValueError>
where
    T: fmt::Debug,
{
    move |text| parse(text).map(Some)
}
