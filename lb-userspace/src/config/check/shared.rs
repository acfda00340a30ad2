//! The texts of etcd's keys.

use std::path::Path;

use toml::Spanned;

use super::{
    super::{
        Config, ConfigErrors, Interface, Policy, Shared, StaticService, Vip,
        raw::{self, RawConfig, RawService, RawShared, Strings},
    },
    Check, sections, services,
};

/// `<prefix>/config`.
pub(in super::super) fn shared(key: &Path, text: &str, node: &Config) -> Result<Shared, ConfigErrors> {
    let (raw, faults) = raw::read::<RawShared>(text);
    let mut check = Check { text, faults };
    let names = node.interfaces.iter().map(|interface| match interface {
        Interface::Auto => "auto".to_owned(),
        Interface::Named(name) => name.clone(),
    });
    let raw = RawConfig {
        interfaces: Some(Spanned::new(0..0, Strings(names.collect()))),
        vips: raw.vips,
        defaults: raw.defaults,
        firewall: raw.firewall,
        events: raw.events,
        ..RawConfig::default()
    };
    let vips = sections::vips(&mut check, &raw);
    let shared = Shared {
        policy: sections::policy(
            &mut check,
            &raw.defaults,
            vips,
            node.policy.checks.tls.clone(),
            &Policy::built_in(),
        ),
        firewall: sections::firewall(&mut check, &raw.firewall),
        event_sample: raw.events.sample.as_ref().map(|sample| *sample.get_ref()),
    };
    check.end(key, shared)
}

/// `<prefix>/services/<name>`.
pub(in super::super) fn service(
    key: &Path,
    name: &str,
    text: &str,
    policy: &Policy,
) -> Result<StaticService, ConfigErrors> {
    let (mut raw, faults) = raw::read::<RawService>(text);
    let mut check = Check { text, faults };
    match &raw.name {
        Some(given) if given.get_ref() != name => {
            let fault = format!("`{}` is not the name of its key, `{name}`", given.get_ref());
            check.fault(
                "name",
                Some(given.span()),
                fault,
                "remove the line: the key names the service",
            );
        }
        Some(_) => {}
        None => raw.name = Some(Spanned::new(0..0, name.to_owned())),
    }
    let service = services::service(&mut check, "", &Spanned::new(0..0, raw), policy);
    // Without a name or a VIP there is a fault that says so.
    let none = || StaticService {
        name: name.to_owned(),
        wishes: Vec::new(),
    };
    check.end(key, service.unwrap_or_else(none))
}

/// What the file says, and what the nodes share where it is silent. A shared VIP whose name or address is in the file is
/// the file's.
pub(super) fn joined(raw: &RawConfig, own: &Policy, shared: &Shared) -> Policy {
    let taken = |vip: &&Vip| {
        let addresses = &vip.addresses;
        own.vips
            .iter()
            .any(|own| own.name == vip.name || addresses.iter().any(|a| own.addresses.contains(a)))
    };
    let more = shared.policy.vips.iter().filter(|vip| !taken(vip));
    let vips = own.vips.iter().chain(more).cloned().collect();
    // Its faults have been noted already.
    let mut silent = Check {
        text: "",
        faults: Vec::new(),
    };
    sections::policy(
        &mut silent,
        &raw.defaults,
        vips,
        own.checks.tls.clone(),
        &shared.policy,
    )
}
