//! `[node]` and `[nodes]`.

use std::{collections::BTreeMap, time::Duration};

use toml::Spanned;

use super::{
    super::{
        Allowed, Config, NodeConfig, NodeRule, NodesConfig, Policy,
        node::{DEFAULT_KEEP, DEFAULT_TTL, is_node_name},
        raw::{Given, RawNode, RawNodes},
        value,
    },
    Check, docker,
};

/// Questions to etcd that a lease outlives, whatever becomes of them: the one that is lost, and two tries elsewhere.
const QUESTIONS: u32 = 3;
/// etcd counts leases in seconds, and takes none that an election could outlive.
const SHORTEST_TTL: Duration = Duration::from_secs(2);

pub(super) fn node(check: &mut Check<'_>, given: &Spanned<RawNode>) -> NodeConfig {
    let raw = given.get_ref();
    let name = match &raw.name {
        Some(name) => name.get_ref().clone(),
        None => nix::unistd::gethostname()
            .ok()
            .and_then(|name| name.into_string().ok())
            .unwrap_or_default(),
    };
    if !is_node_name(&name) {
        let span = raw.name.as_ref().map_or(given.span(), Spanned::span);
        let fault = match raw.name {
            Some(_) => format!("`{name}` is not the name of a node"),
            None => format!("this host's name, `{name}`, is not the name of a node"),
        };
        let remedy = "set it to letters, digits, `-`, `_` and `.`, starting with a letter or a digit";
        check.fault("node.name", Some(span), fault, remedy);
    }
    NodeConfig {
        name,
        addresses: check.list("node.addresses", raw.addresses.as_ref(), value::address),
        ttl: check.text_or(
            "node.ttl",
            &raw.ttl,
            DEFAULT_TTL,
            value::duration_from(SHORTEST_TTL),
        ),
        withdraw: check.text_or("node.on-stop", &raw.on_stop, false, |text| {
            value::one_of(text, &["keep", "withdraw"], &[false, true])
        }),
    }
}

pub(super) fn nodes(check: &mut Check<'_>, given: &Spanned<RawNodes>, policy: &Policy) -> NodesConfig {
    let raw = given.get_ref();
    let allow = docker::allowed(
        check,
        "nodes",
        [&raw.allow_vips, &raw.allow_ports, &raw.allow_services],
        policy,
    );
    let addresses = raw
        .allow_addresses
        .as_ref()
        .map(|list| check.list("nodes.allow-addresses", Some(list), value::prefix));
    let mut rules = BTreeMap::new();
    for (name, rule) in &raw.node {
        let at = format!("nodes.node.{name}");
        if !is_node_name(name) {
            let fault = format!("`{name}` is not the name of a node");
            check.fault(
                at.as_str(),
                Some(rule.span()),
                fault,
                "name it as its own `node.name` does",
            );
            continue;
        }
        let raw = rule.get_ref();
        let own = docker::allowed(
            check,
            &at,
            [&raw.allow_vips, &raw.allow_ports, &raw.allow_services],
            policy,
        );
        let rule = NodeRule {
            enabled: raw.enabled.as_ref().is_none_or(|flag| *flag.get_ref()),
            // A list of its own takes the place of the one for all.
            allow: Allowed {
                vips: own.vips.or_else(|| allow.vips.clone()),
                ports: own.ports.or_else(|| allow.ports.clone()),
                services: own.services.or_else(|| allow.services.clone()),
            },
        };
        rules.insert(name.clone(), rule);
    }
    NodesConfig {
        keep: check.text_or("nodes.keep", &raw.keep, DEFAULT_KEEP, value::duration),
        allow,
        addresses,
        rules,
    }
}

/// What the sections need of each other.
pub(super) fn together(
    check: &mut Check<'_>,
    config: &Config,
    node: &Given<RawNode>,
    nodes: &Given<RawNodes>,
) {
    let remedy = "add the section `[etcd]`: nodes and balancers meet there";
    let spans = [
        node.as_ref().map(Spanned::span),
        nodes.as_ref().map(Spanned::span),
    ];
    if let Some(span) = spans
        .into_iter()
        .flatten()
        .next()
        .filter(|_| config.etcd.is_none())
    {
        check.missing("etcd", Some(span), remedy);
    }
    let (Some(given), Some(own)) = (node, &config.node) else {
        return;
    };
    let engines = config.docker.iter().filter(|engine| !engine.remote).count();
    if engines != 1 {
        check.fault(
            "node",
            Some(given.span()),
            format!("a node publishes one engine, its own, and {engines} are configured that are not `remote`"),
            "configure one `[docker]`; each further engine of the machine needs a `weir node` with a file and a name of its own",
        );
    }
    if let Some(etcd) = config
        .etcd
        .as_ref()
        .filter(|etcd| own.ttl < etcd.timeout * QUESTIONS)
    {
        check.fault(
            "node.ttl",
            given.get_ref().ttl.as_ref().map(Spanned::span),
            format!(
                "{:?} may pass while one endpoint of etcd is found to be silent",
                own.ttl
            ),
            format!(
                "write at least `{:?}`, three times `etcd.timeout`",
                etcd.timeout * QUESTIONS
            ),
        );
    }
}
