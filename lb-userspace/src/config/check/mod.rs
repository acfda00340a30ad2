//! Raw → checked: every value is judged, every fault is kept, and only a file without one becomes a [`Config`].

mod acme;
mod docker;
mod etcd;
mod health;
mod l7;
mod node;
mod sections;
mod services;
pub(super) mod shared;
mod swarm;

use std::{fmt, ops::Range, path::Path, sync::Arc};

use toml::Spanned;

use super::{
    Config, ConfigErrors, ConfigFault, Policy, Shared,
    errors::position,
    raw::{self, Given, Strings},
    value::{self, ValueError},
};

/// Checks a text; `path` is for messages. The services of the text are judged by the text alone, so that a node's file
/// stands by itself; for all others `shared` is what the text is silent about.
pub(super) fn check(path: &Path, text: &str, shared: Arc<Shared>) -> Result<Config, ConfigErrors> {
    let (raw, faults) = raw::read::<raw::RawConfig>(text);
    let mut check = Check { text, faults };
    let vips = sections::vips(&mut check, &raw);
    let tls = health::tls(&mut check, &raw.tls);
    let own = sections::policy(&mut check, &raw.defaults, vips, tls, &Policy::built_in());
    let policy = shared::joined(&raw, &own, &shared);
    let config = Config {
        path: path.to_owned(),
        // A node that publishes its containers balances nothing by itself.
        interfaces: match (&raw.interfaces, &raw.node) {
            (None, Some(_)) => Vec::new(),
            (given, _) => sections::interfaces(&mut check, given.as_ref()),
        },
        limits: sections::limits(&mut check, &raw.limits),
        snat: sections::snat(&mut check, &raw.snat, &own.vips),
        firewall: &sections::firewall(&mut check, &raw.firewall) | &shared.firewall,
        docker: docker::engines(&mut check, &raw.docker, &policy),
        swarm: swarm::swarms(&mut check, raw.swarm.as_ref(), &policy),
        etcd: raw.etcd.as_ref().map(|given| etcd::etcd(&mut check, given)),
        node: raw.node.as_ref().map(|given| node::node(&mut check, given)),
        nodes: raw
            .nodes
            .as_ref()
            .map(|given| node::nodes(&mut check, given, &policy)),
        admin: sections::admin(&mut check, &raw.admin),
        startup_wait: check.text_or(
            "startup.wait",
            &raw.startup.wait,
            super::DEFAULT_STARTUP_WAIT,
            value::duration,
        ),
        event_sample: raw
            .events
            .sample
            .as_ref()
            .map(|sample| *sample.get_ref())
            .or(shared.event_sample)
            .unwrap_or(0),
        bpf: sections::bpf(&mut check, &raw.bpf),
        l7: l7::l7(&mut check, &raw.l7),
        services: services::services(&mut check, &raw.services, &own),
        policy,
        text: text.into(),
        shared,
    };
    node::together(&mut check, &config, &raw.node, &raw.nodes);
    check.end(path, config)
}

/// The text and the faults found in it so far.
struct Check<'t> {
    text: &'t str,
    faults: Vec<ConfigFault>,
}

impl Check<'_> {
    /// The checked value, or every fault in the order of the text.
    fn end<T>(self, path: &Path, value: T) -> Result<T, ConfigErrors> {
        let mut faults = self.faults;
        if faults.is_empty() {
            return Ok(value);
        }
        faults.sort_by_key(|fault| fault.position);
        Err(ConfigErrors {
            path: path.to_owned(),
            faults,
        })
    }

    /// Notes a fault.
    fn fault(
        &mut self,
        key: impl Into<String>,
        span: Option<Range<usize>>,
        fault: impl fmt::Display,
        remedy: impl Into<String>,
    ) {
        self.faults.push(ConfigFault {
            key: key.into(),
            position: span.map(|span| position(self.text, &span)),
            fault: fault.to_string(),
            remedy: remedy.into(),
        });
    }

    /// Unwraps a parsed value or notes why it is none.
    fn keep<T>(&mut self, key: &str, span: Range<usize>, result: Result<T, ValueError>) -> Option<T> {
        result
            .map_err(|error| self.fault(key, Some(span), &error, error.remedy()))
            .ok()
    }

    /// A string value, or the default when it is absent (or faulty, which is noted).
    fn text_or<T>(
        &mut self,
        key: &str,
        given: &Given<String>,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, ValueError>,
    ) -> T {
        given
            .as_ref()
            .and_then(|text| self.keep(key, text.span(), parse(text.get_ref())))
            .unwrap_or(default)
    }

    /// A list of strings; empty when it is absent or faulty.
    fn list<T: PartialEq>(
        &mut self,
        key: &str,
        given: Option<&Spanned<Strings>>,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Vec<T> {
        given
            .and_then(|list| {
                let texts = list.get_ref().0.iter().map(String::as_str);
                self.keep(key, list.span(), value::items(texts, parse))
            })
            .unwrap_or_default()
    }

    /// Notes that a required key is missing.
    fn missing(&mut self, key: &str, span: Option<Range<usize>>, remedy: &str) {
        self.fault(key, span, "is missing", remedy);
    }
}
