//! Labels of one family, read with every fault kept.

use std::collections::BTreeMap;

use super::fault::Fault;
use crate::{config::value, route::UpstreamTls};

/// The labels of one family, and what is wrong with them so far.
pub(super) struct Reader<'l> {
    labels: &'l BTreeMap<String, String>,
    prefix: &'static str,
    /// Label and fault.
    pub(super) faults: Vec<(String, Fault)>,
}

impl<'l> Reader<'l> {
    pub(super) fn new(labels: &'l BTreeMap<String, String>, prefix: &'static str) -> Self {
        Self {
            labels,
            prefix,
            faults: Vec::new(),
        }
    }

    /// The value of a label, trimmed.
    pub(super) fn get(&self, name: &str) -> Option<&'l str> {
        self.labels
            .get(&format!("{}{name}", self.prefix))
            .map(|text| text.trim())
    }

    /// The value as something, or the default when the label is absent (or faulty, which is noted).
    pub(super) fn value<T, E: Into<Fault>>(
        &mut self,
        name: &str,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> T {
        match self.get(name).map(parse) {
            Some(Ok(value)) => value,
            Some(Err(fault)) => {
                self.fault(name, fault.into());
                default
            }
            None => default,
        }
    }

    /// Values of `<name>` and of `<name>.<anything>`, each with its label.
    pub(super) fn numbered(&self, name: &str) -> Vec<(&'l str, &'l str)> {
        let full = format!("{}{name}", self.prefix);
        let of = |label: &str| {
            label
                .strip_prefix(&full)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        self.family()
            .filter(|(label, _)| of(label))
            .map(|(label, text)| (label, text.trim()))
            .collect()
    }

    /// Every label of the family, in order.
    pub(super) fn family(&self) -> impl Iterator<Item = (&'l str, &'l str)> + use<'l> {
        let (labels, prefix) = (self.labels, self.prefix);
        labels
            .iter()
            .filter(move |(label, _)| label.starts_with(prefix))
            .map(|(label, text)| (label.as_str(), text.as_str()))
    }

    /// Labels that are none of `known`, as they are and without the prefix.
    pub(super) fn unknown(&self, known: &'static [&'static str]) -> Vec<(&'l str, &'l str)> {
        let prefix = self.prefix;
        self.family()
            .map(|(label, _)| (label, &label[prefix.len()..]))
            .filter(|(_, name)| {
                let base = name.split('.').next().unwrap_or(name);
                !known.contains(name) && !known.iter().any(|k| k.strip_suffix("[.N]") == Some(base))
            })
            .collect()
    }

    /// What is to be said of labels that are none of `known`: Interlock does not read them either.
    pub(super) fn unknown_remarks(&self, known: &'static [&'static str]) -> Vec<String> {
        let remark = |(label, name): (&str, &str)| match value::nearest(name, known) {
            Some(near) => format!(
                "{label} is no label of Interlock and has no effect; did you mean {}{near}?",
                self.prefix
            ),
            None => format!("{label} is no label of Interlock and has no effect"),
        };
        self.unknown(known).into_iter().map(remark).collect()
    }

    /// Notes that no label names the host, which `label` would; a label that is nearly so is named.
    pub(super) fn no_host(&mut self, label: &'static str, known: &'static [&'static str]) {
        let slip = |(_, name): &(&str, &str)| value::nearest(name, known) == Some(label);
        let instead_of = self.unknown(known).into_iter().find(slip);
        let fault = Fault::NoHost {
            label: format!("{}{label}", self.prefix),
            instead_of: instead_of.map(|(label, _)| label.to_owned()),
        };
        self.fault(label, fault);
    }

    /// `port`; an empty one is none.
    pub(super) fn port(&mut self) -> Option<u16> {
        self.value("port", None, |text| match text {
            "" => Ok(None),
            text => value::port(text).map(Some),
        })
    }

    /// A text that says something.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        self.get(name).filter(|text| !text.is_empty()).map(Into::into)
    }

    /// `ssl_backend` and `ssl_backend_tls_verify`.
    pub(super) fn upstream_tls(&mut self, remarks: &mut Vec<String>) -> Option<UpstreamTls> {
        let on = self.value("ssl_backend", false, super::value::flag);
        let verify = self.value("ssl_backend_tls_verify", false, super::value::verify);
        if on && !verify {
            remarks.push(format!(
                "the certificate of the upstream is not verified, which is Interlock's default; \
                 {}ssl_backend_tls_verify=required verifies it",
                self.prefix
            ));
        }
        on.then_some(UpstreamTls { verify })
    }

    /// Notes a fault of a label of the family.
    pub(super) fn fault(&mut self, name: &str, fault: Fault) {
        self.faults.push((format!("{}{name}", self.prefix), fault));
    }
}
