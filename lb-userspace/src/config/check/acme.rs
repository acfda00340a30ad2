//! `[l7.acme]`.

use std::{net::IpAddr, time::Duration};

use toml::Spanned;

use super::{
    super::{
        l7::Acme,
        raw::{Given, RawAcme, Strings},
        value,
    },
    Check, sections,
};

/// A shorter one would wear the authority out.
const SHORTEST: Duration = Duration::from_secs(1);
/// No public authority gives certificates for so long.
const LONGEST_RENEWAL: Duration = Duration::from_secs(366 * 24 * 3600);
/// Longest name of the DNS.
const LONGEST_HOST: usize = 253;

pub(super) fn acme(check: &mut Check<'_>, given: &Spanned<RawAcme>) -> Acme {
    let raw = given.get_ref();
    let base = Acme::default();
    agreed(check, &raw.agree_terms, given);
    let remedy =
        "name those that may have a certificate: `hosts = [\"vote.example.com\", \"*.apps.example.com\"]`";
    if raw.hosts.is_none() {
        check.missing("l7.acme.hosts", Some(given.span()), remedy);
    }
    let ca = raw
        .ca
        .as_ref()
        .map(|_| sections::absolute(check, "l7.acme.ca", &raw.ca, "/etc/weir/acme-ca.pem"));
    let renew_before = raw.renew_before.as_ref().map(|_| {
        let parse = value::duration_between(SHORTEST, LONGEST_RENEWAL);
        check.text_or("l7.acme.renew-before", &raw.renew_before, SHORTEST, parse)
    });
    Acme {
        directory: directory(check, &raw.directory).unwrap_or(base.directory),
        contact: texts(
            check,
            "l7.acme.contact",
            &raw.contact,
            is_mail,
            "write mail addresses such as `ops@example.com`",
        ),
        agree_terms: true,
        hosts: texts(check, "l7.acme.hosts", &raw.hosts, is_pattern, remedy)
            .iter()
            .map(|host| host.to_ascii_lowercase())
            .collect(),
        ca,
        renew_before,
        retry: check.text_or(
            "l7.acme.retry",
            &raw.retry,
            base.retry,
            value::duration_from(SHORTEST),
        ),
    }
}

/// Nobody agrees to terms but the operator.
fn agreed(check: &mut Check<'_>, agree: &Given<bool>, section: &Spanned<RawAcme>) {
    let remedy = "read the authority's terms of service and write `agree-terms = true`, or remove [l7.acme]";
    match agree {
        Some(agree) if *agree.get_ref() => {}
        Some(agree) => {
            let fault = "no authority gives certificates to who does not agree to its terms";
            check.fault("l7.acme.agree-terms", Some(agree.span()), fault, remedy);
        }
        None => check.missing("l7.acme.agree-terms", Some(section.span()), remedy),
    }
}

fn directory(check: &mut Check<'_>, given: &Given<String>) -> Option<String> {
    let text = given.as_ref()?;
    let host = text
        .get_ref()
        .strip_prefix("https://")
        .and_then(|rest| rest.split('/').next());
    let is_odd = |c: char| c.is_whitespace() || c.is_control() || c == '@';
    if host.is_some_and(|host| !host.is_empty()) && !text.get_ref().contains(is_odd) {
        return Some(text.get_ref().clone());
    }
    let fault = format!("`{}` is not the URL of a directory", text.get_ref());
    let remedy = "write `https://…` as the authority's documents have it";
    check.fault("l7.acme.directory", Some(text.span()), fault, remedy);
    None
}

/// A list of which every item is sound; what is wrong with each is noted.
fn texts(
    check: &mut Check<'_>,
    key: &str,
    given: &Given<Strings>,
    is_sound: fn(&str) -> bool,
    remedy: &str,
) -> Vec<String> {
    let Some(list) = given else { return Vec::new() };
    let all = &list.get_ref().0;
    if all.is_empty() {
        check.fault(key, Some(list.span()), "the list is empty", remedy);
    }
    for text in all.iter().filter(|text| !is_sound(text)) {
        let fault = format!("`{text}` cannot be used");
        check.fault(key, Some(list.span()), fault, remedy);
    }
    all.clone()
}

fn is_mail(text: &str) -> bool {
    let is_odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, ',' | '?' | ':');
    matches!(text.split_once('@'), Some((who, host)) if !who.is_empty() && !host.is_empty())
        && !text.contains(is_odd)
}

/// A host, or `*.` and a host.
fn is_pattern(text: &str) -> bool {
    let host = text.strip_prefix("*.").unwrap_or(text);
    let is_label = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    host.len() <= LONGEST_HOST && host.parse::<IpAddr>().is_err() && host.split('.').all(is_label)
}
