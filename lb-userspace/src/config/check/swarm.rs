//! `[swarm]` and `[[swarm]]`.

use std::time::Duration;

use toml::Spanned;

use super::{
    super::{
        DEFAULT_POLL, DEFAULT_SWARM_LIVENESS, Policy, SwarmConfig,
        raw::{OneOrMany, RawSwarm},
        value,
    },
    Check, docker,
};

/// Managers that are asked more often do little else.
const SHORTEST_POLL: Duration = Duration::from_millis(100);
/// A manager that takes longer to answer is well: it asks the leader first.
const SHORTEST_LIVENESS: Duration = Duration::from_secs(1);

/// All swarms that are switched on.
pub(super) fn swarms(
    check: &mut Check<'_>,
    raw: Option<&OneOrMany<RawSwarm>>,
    policy: &Policy,
) -> Vec<SwarmConfig> {
    let Some(raw) = raw else { return Vec::new() };
    docker::each(
        check,
        "swarm",
        raw,
        |raw| &raw.name,
        |check, at, raw, name| swarm(check, at, raw, name, policy),
    )
}

/// One swarm; `at` is the section for messages.
fn swarm(
    check: &mut Check<'_>,
    at: &str,
    raw: &RawSwarm,
    name: Option<String>,
    policy: &Policy,
) -> Option<SwarmConfig> {
    let key = |key: &str| format!("{at}.{key}");
    let texts = raw.endpoints.as_ref();
    if texts.is_none_or(|list| list.get_ref().0.is_empty()) {
        let remedy = "name the managers: `endpoints = [\"tcp://m1:2376\", \"tcp://m2:2376\"]`";
        check.missing(&key("endpoints"), texts.map(Spanned::span), remedy);
    }
    let mut endpoints = Vec::new();
    for text in texts.iter().flat_map(|list| &list.get_ref().0) {
        let span = texts.map(Spanned::span);
        let files = [&raw.tls_ca, &raw.tls_cert, &raw.tls_key];
        let endpoint = docker::endpoint(check, &key("endpoints"), text, span, files);
        if !endpoints.contains(&endpoint) {
            endpoints.push(endpoint);
        }
    }
    let liveness = value::duration_from(SHORTEST_LIVENESS);
    let swarm = SwarmConfig {
        name,
        endpoints,
        poll: check.text_or(
            &key("poll"),
            &raw.poll,
            DEFAULT_POLL,
            value::duration_from(SHORTEST_POLL),
        ),
        liveness: check.text_or(&key("liveness"), &raw.liveness, DEFAULT_SWARM_LIVENESS, &liveness),
        keep: check.text_or(&key("keep"), &raw.keep, None, |text| liveness(text).map(Some)),
        allow: docker::allowed(
            check,
            at,
            [&raw.allow_vips, &raw.allow_ports, &raw.allow_services],
            policy,
        ),
    };
    let enabled = raw.enabled.as_ref().is_none_or(|flag| *flag.get_ref());
    enabled.then_some(swarm)
}
