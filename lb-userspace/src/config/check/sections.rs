//! Every section but the services.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;
use lb_common::limits as common;
use toml::Spanned;

use super::{
    super::{
        Admin, Announce, Bpf, CheckPolicy, DEFAULT_ADMIN_SOCKET, DEFAULT_METRICS, DEFAULT_PIN_PATH,
        Interface, Limits, Policy, Snat, UnusedPorts, Vip, XdpMode, health as value_health,
        raw::{
            Given, RawAdmin, RawBpf, RawConfig, RawDefaults, RawFirewall, RawLimits, RawSnat, RawTimeouts,
            Strings,
        },
        value,
    },
    Check, health,
};
use crate::model::{FlowTimeouts, TlsFiles};

/// Longest interface name: `IFNAMSIZ` with its final zero.
const MAX_INTERFACE_NAME: usize = 15;
/// Rings and services of more entries than this are a slip of the pen, not a machine.
const MAX_ENTRIES: u32 = 1 << 26;

pub(super) fn interfaces(check: &mut Check<'_>, given: Option<&Spanned<Strings>>) -> Vec<Interface> {
    let remedy =
        "name the devices towards clients and remote backends: `interfaces = [\"eth0\"]`, or `[\"auto\"]`";
    let Some(list) = given else {
        check.missing("interfaces", None, remedy);
        return Vec::new();
    };
    let mut found = Vec::new();
    if list.get_ref().0.is_empty() {
        check.fault("interfaces", Some(list.span()), "the list is empty", remedy);
    }
    for name in &list.get_ref().0 {
        if name == "auto" {
            found.push(Interface::Auto);
        } else if is_interface(name) {
            found.push(Interface::Named(name.clone()));
        } else {
            let fault = format!("`{name}` is not an interface name");
            check.fault(
                "interfaces",
                Some(list.span()),
                fault,
                "`ip link` lists the names",
            );
        }
    }
    found.sort();
    found.dedup();
    found
}

fn is_interface(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_INTERFACE_NAME
        && !matches!(name, "." | "..")
        && !name.chars().any(|c| c.is_whitespace() || matches!(c, '/' | ':'))
}

pub(super) fn vips(check: &mut Check<'_>, raw: &RawConfig) -> Vec<Vip> {
    let mut found: Vec<Vip> = Vec::new();
    for (name, given) in &raw.vips {
        let key = format!("vips.{name}");
        let vip = given.get_ref();
        check.keep(&key, given.span(), value::name(name));
        let address_key = format!("{key}.address");
        if vip.address.is_none() {
            check.missing(
                &address_key,
                Some(given.span()),
                "write `address = \"203.0.113.10\"`",
            );
        }
        let addresses = check.list(&address_key, vip.address.as_ref(), value::address);
        for address in &addresses {
            if let Some(other) = found.iter().find(|other| other.addresses.contains(address)) {
                check.fault(
                    &address_key,
                    vip.address.as_ref().map(Spanned::span),
                    format!("{address} belongs to vips.{} already", other.name),
                    "give every VIP addresses of its own",
                );
            }
        }
        let node_address = vip.node_address.as_ref().is_some_and(|flag| *flag.get_ref());
        let announced = check.text_or(&format!("{key}.announce"), &vip.announce, false, |text| {
            value::one_of(text, &["address", "none"], &[true, false])
        });
        if announced && node_address {
            check.fault(
                format!("{key}.announce"),
                vip.announce.as_ref().map(Spanned::span),
                "the node's own address is on its interface already",
                "remove `announce`, or `node-address` if the node does not have this address",
            );
        }
        let unused_key = format!("{key}.unused-ports");
        let unused_ports = check.text_or(&unused_key, &vip.unused_ports, UnusedPorts::Refuse, |text| {
            value::one_of(
                text,
                &["refuse", "drop"],
                &[UnusedPorts::Refuse, UnusedPorts::Drop],
            )
        });
        if vip.unused_ports.is_some() && (announced || node_address) {
            check.fault(
                unused_key,
                vip.unused_ports.as_ref().map(Spanned::span),
                "the node has this address: its own stack answers for other ports",
                "remove `unused-ports`, which is for a VIP that is routed to the node",
            );
        }
        let announce = match interface(check, raw, &key, vip.interface.as_ref(), announced, given) {
            Some(interface) if announced => Announce::Address { interface },
            _ => Announce::None,
        };
        found.push(Vip {
            name: name.clone(),
            addresses,
            announce,
            node_address,
            unused_ports,
        });
    }
    found
}

/// The interface to announce on: the one given, else the only one configured.
fn interface<T>(
    check: &mut Check<'_>,
    raw: &RawConfig,
    key: &str,
    given: Option<&Spanned<String>>,
    announced: bool,
    vip: &Spanned<T>,
) -> Option<String> {
    let key = format!("{key}.interface");
    match given {
        Some(name) if !is_interface(name.get_ref()) => {
            let fault = format!("`{}` is not an interface name", name.get_ref());
            check.fault(key, Some(name.span()), fault, "`ip link` lists the names");
            None
        }
        Some(name) if !announced => {
            let fault = "means nothing without `announce = \"address\"`";
            check.fault(key, Some(name.span()), fault, "add that, or remove this");
            None
        }
        Some(name) => Some(name.get_ref().clone()),
        None if announced => {
            let configured = raw.interfaces.as_ref().map(|list| list.get_ref().0.as_slice());
            match configured {
                Some([only]) if only != "auto" => Some(only.clone()),
                _ => {
                    check.missing(
                        &key,
                        Some(vip.span()),
                        "name the interface that shall have the address",
                    );
                    None
                }
            }
        }
        None => None,
    }
}

/// `[defaults]`, with what `base` says where they are silent.
pub(super) fn policy(
    check: &mut Check<'_>,
    raw: &RawDefaults,
    vips: Vec<Vip>,
    tls: BTreeMap<String, TlsFiles>,
    base: &Policy,
) -> Policy {
    let mut defaults = base.defaults.clone();
    defaults.snat = check.text_or("defaults.snat", &raw.snat, defaults.snat, value::snat);
    defaults.when_empty = check.text_or(
        "defaults.when-empty",
        &raw.when_empty,
        defaults.when_empty,
        value::when_empty,
    );
    if let Some(flag) = &raw.reset_unknown {
        defaults.reset_unknown = *flag.get_ref();
    }
    defaults.timeouts = timeouts(check, "defaults.timeouts", &raw.timeouts, defaults.timeouts);
    defaults.when_unhealthy = check.text_or(
        "defaults.when-unhealthy",
        &raw.when_unhealthy,
        defaults.when_unhealthy,
        value_health::when_unhealthy,
    );
    let checks = CheckPolicy {
        check: health::active(check, "defaults.check", &raw.check, &base.checks.check, &tls),
        passive: health::passive(check, "defaults.passive", &raw.passive, &base.checks.passive),
        tls,
    };
    let enabled = raw.passive.enabled.as_ref().map(|flag| *flag.get_ref());
    let ejects = enabled.unwrap_or(base.defaults.passive.is_some());
    defaults.passive = ejects.then(|| checks.passive.clone());
    Policy {
        vips,
        defaults,
        drain: check.text_or("defaults.drain", &raw.drain, base.drain, value::duration),
        remember: check.text_or("defaults.remember", &raw.remember, base.remember, value::duration),
        checks,
    }
}

pub(super) fn timeouts(
    check: &mut Check<'_>,
    key: &str,
    raw: &RawTimeouts,
    base: FlowTimeouts,
) -> FlowTimeouts {
    let mut one = |name: &str, given: &Given<String>, base: Duration| {
        check.text_or(&format!("{key}.{name}"), given, base, value::timeout)
    };
    FlowTimeouts {
        tcp_established: one("tcp-established", &raw.tcp_established, base.tcp_established),
        tcp_syn: one("tcp-syn", &raw.tcp_syn, base.tcp_syn),
        tcp_closing: one("tcp-closing", &raw.tcp_closing, base.tcp_closing),
        udp: one("udp", &raw.udp, base.udp),
    }
}

pub(super) fn limits(check: &mut Check<'_>, raw: &RawLimits) -> Limits {
    let base = Limits::default();
    let mut one = |name: &str, given: &Given<u32>, base: u32, least: u32, most: u32| match given {
        Some(size) if (least..=most).contains(size.get_ref()) => *size.get_ref(),
        Some(size) => {
            let fault = format!("{} is out of range", size.get_ref());
            let remedy = format!("choose {least} to {most}");
            check.fault(format!("limits.{name}"), Some(size.span()), fault, remedy);
            base
        }
        None => base,
    };
    // Three ring copies of one large service must fit.
    let least_rows = 3 * common::RING_ROWS_LARGE;
    let limits = Limits {
        services: one("services", &raw.services, base.services, 1, MAX_ENTRIES),
        // Id 0 is never a backend.
        backends: one("backends", &raw.backends, base.backends, 2, common::MAX_BACKENDS),
        ring_rows: one("ring-rows", &raw.ring_rows, base.ring_rows, least_rows, 1 << 16),
        flows4: one("flows4", &raw.flows4, base.flows4, 1, common::MAX_FLOWS),
        flows6: one("flows6", &raw.flows6, base.flows6, 1, common::MAX_FLOWS),
        flow_share: one("flow-share", &raw.flow_share, base.flow_share, 1, 100),
        events_bytes: one("events", &raw.events, base.events_bytes, 4096, 1 << 30),
    };
    if let Some(events) = raw
        .events
        .as_ref()
        .filter(|_| !limits.events_bytes.is_power_of_two())
    {
        let fault = format!("{} bytes is not a power of two", limits.events_bytes);
        let remedy = format!("write {}", limits.events_bytes.next_power_of_two());
        check.fault("limits.events", Some(events.span()), fault, remedy);
    }
    limits
}

pub(super) fn snat(check: &mut Check<'_>, raw: &RawSnat, vips: &[Vip]) -> Snat {
    let given = raw.addresses.as_ref().filter(|list| !list.get_ref().0.is_empty());
    let addresses = check.list("snat.addresses", given, value::address);
    if addresses.len() > common::MAX_SNAT_ADDRESSES as usize {
        let fault = format!("{} addresses are too many", addresses.len());
        let remedy = format!("name at most {}", common::MAX_SNAT_ADDRESSES);
        check.fault("snat.addresses", given.map(Spanned::span), fault, remedy);
    }
    let floating = |address| {
        let of = |vip: &&Vip| !vip.node_address && vip.addresses.contains(address);
        vips.iter().find(of)
    };
    for (address, vip) in addresses.iter().filter_map(|a| Some((a, floating(a)?))) {
        let fault = format!(
            "{address} is the VIP `{}`, which another node may hold in a second",
            vip.name
        );
        let remedy = "name addresses that stay on this node";
        check.fault("snat.addresses", given.map(Spanned::span), fault, remedy);
    }
    let mut ports = common::DEFAULT_SNAT_PORT_MIN..=common::DEFAULT_SNAT_PORT_MAX;
    if let Some(text) = &raw.ports {
        match port_range(text.get_ref()) {
            Some(range) => ports = range,
            None => {
                let fault = format!("`{}` is not a range of ports", text.get_ref());
                let remedy = "write the first and the last, from 1024 on: `1024-32767`";
                check.fault("snat.ports", Some(text.span()), fault, remedy);
            }
        }
    }
    Snat { addresses, ports }
}

/// The deny list for all services.
pub(super) fn firewall(check: &mut Check<'_>, raw: &RawFirewall) -> BTreeSet<IpNet> {
    // An empty list is the same as none: it is what remains when the last prefix is deleted.
    let given = raw.deny.as_ref().filter(|list| !list.get_ref().0.is_empty());
    let mut deny = BTreeSet::new();
    for (text, list) in given
        .iter()
        .flat_map(|list| list.get_ref().0.iter().map(move |text| (text, list)))
    {
        let prefix = value::prefix(text).and_then(|prefix| match deny.contains(&prefix) {
            false => Ok(prefix),
            true => Err(value::ValueError::Twice(text.clone())),
        });
        deny.extend(check.keep("firewall.deny", list.span(), prefix));
    }
    if deny.len() > common::MAX_FIREWALL_PREFIXES as usize {
        let fault = format!("{} prefixes are too many", deny.len());
        let remedy = format!("name at most {}: join neighbours", common::MAX_FIREWALL_PREFIXES);
        check.fault("firewall.deny", given.map(Spanned::span), fault, remedy);
    }
    deny
}

fn port_range(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-')?;
    let (first, last) = (value::port(first).ok()?, value::port(last).ok()?);
    (1024 <= first && first <= last).then_some(first..=last)
}

pub(super) fn admin(check: &mut Check<'_>, raw: &RawAdmin) -> Admin {
    let allow_remote = raw.allow_remote.as_ref().is_some_and(|flag| *flag.get_ref());
    let mut metrics = DEFAULT_METRICS;
    if let Some(text) = &raw.metrics {
        match text.get_ref().parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() || allow_remote => metrics = address,
            Ok(address) => check.fault(
                "admin.metrics",
                Some(text.span()),
                format!("{address} is not a loopback address, and metrics name every service"),
                "use 127.0.0.1 or [::1], or add `allow-remote = true`",
            ),
            Err(_) => check.fault(
                "admin.metrics",
                Some(text.span()),
                format!("`{}` is not an address and port", text.get_ref()),
                format!("write `{DEFAULT_METRICS}`"),
            ),
        }
    }
    Admin {
        socket: absolute(check, "admin.socket", &raw.socket, DEFAULT_ADMIN_SOCKET),
        metrics,
    }
}

/// The mark of packets that have been sent on: at least one bit.
fn mark(check: &mut Check<'_>, given: Option<&Spanned<u32>>) -> u32 {
    let mark = given.map_or(common::DEFAULT_MARK, |mark| *mark.get_ref());
    if mark == 0 {
        check.fault(
            "bpf.mark",
            given.map(Spanned::span),
            "no bit is set: packets that were sent on could not be told from others",
            format!(
                "choose bits that nothing else on this node uses, or leave it at {:#010x}",
                common::DEFAULT_MARK
            ),
        );
    }
    mark
}

pub(super) fn bpf(check: &mut Check<'_>, raw: &RawBpf) -> Bpf {
    let modes = [XdpMode::Auto, XdpMode::Native, XdpMode::Generic, XdpMode::Off];
    Bpf {
        pin_path: absolute(check, "bpf.pin-path", &raw.pin_path, DEFAULT_PIN_PATH),
        xdp: check.text_or("bpf.xdp", &raw.xdp, XdpMode::Auto, |text| {
            value::one_of(text, &["auto", "native", "generic", "off"], &modes)
        }),
        mark: mark(check, raw.mark.as_ref()),
    }
}

pub(super) fn absolute(check: &mut Check<'_>, key: &str, given: &Given<String>, default: &str) -> PathBuf {
    match given {
        Some(path) if Path::new(path.get_ref()).is_absolute() => path.get_ref().into(),
        Some(path) => {
            let fault = format!("`{}` is not an absolute path", path.get_ref());
            check.fault(
                key,
                Some(path.span()),
                fault,
                format!("write a path like `{default}`"),
            );
            default.into()
        }
        None => default.into(),
    }
}
