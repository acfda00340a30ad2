//! What a service's settings become in the maps: flags, timeouts, allow and deny lists.

use std::collections::BTreeMap;

use ipnet::IpNet;
use lb_common::{
    limits,
    maps::{self, ACL_ALLOW, ACL_DENY, service_flags},
};

use super::{Group, Planner, Policy, programmed::Entry, raise};
use crate::{
    datapath::{Capacities, MapOp},
    model::{EmptyPolicy, ServiceAddress, ServiceSettings, SnatMode},
};

pub(super) const ACL_FLAGS: u32 = service_flags::ACL | service_flags::ACL_DEFAULT_DENY;

impl Planner<'_> {
    /// The entries and flags of the allow and deny lists; `None` (and a rejection) when they do not fit.
    pub(super) fn acl(
        &mut self,
        address: ServiceAddress,
        entry: &Entry,
        settings: &ServiceSettings,
    ) -> Option<(BTreeMap<IpNet, u32>, u32)> {
        let mut acl: BTreeMap<IpNet, u32> = settings.allow.iter().map(|p| (p.trunc(), ACL_ALLOW)).collect();
        acl.extend(settings.deny.iter().map(|p| (p.trunc(), ACL_DENY)));
        let new = acl
            .keys()
            .filter(|prefix| !entry.acl.contains_key(*prefix))
            .count();
        let used = self.programmed.acl_entries() + self.acl_puts;
        if new > acl_room(self.inputs.capacities, used) {
            let fault = format!(
                "its {new} new allow and deny prefixes do not fit: {used} of {} are in use",
                self.inputs.capacities.acl
            );
            self.reject(address, "", fault, raise("acl"));
            return None;
        }
        self.acl_puts += new;
        let mut flags = 0;
        if !acl.is_empty() {
            flags |= service_flags::ACL;
        }
        if !settings.allow.is_empty() {
            flags |= service_flags::ACL_DEFAULT_DENY;
        }
        Some((acl, flags))
    }

    /// Removes entries that are not wished for, shortest prefix first, after the commit: see [`longest_first`].
    pub(super) fn delete_acl(&mut self, group: Group, entry: &Entry, wished: &BTreeMap<IpNet, u32>) {
        let mut gone: Vec<(IpNet, u32)> = entry.acl.iter().map(|(p, a)| (*p, *a)).collect();
        gone.retain(|(prefix, _)| !wished.contains_key(prefix));
        longest_first(&mut gone);
        for (prefix, _) in gone.into_iter().rev() {
            self.push(
                group,
                MapOp::DelAcl {
                    service: entry.id,
                    prefix,
                },
            );
        }
    }
}

pub(super) fn flags(settings: &ServiceSettings, policy: &Policy) -> u32 {
    let mut flags = match settings.snat {
        SnatMode::Auto => 0,
        SnatMode::Always => service_flags::SNAT_ALWAYS,
        SnatMode::Never => service_flags::SNAT_NEVER,
    };
    let on = [
        (settings.client_ip_affinity, service_flags::AFFINITY),
        (settings.reset_unknown, service_flags::RESET_UNKNOWN),
        (
            settings.when_empty != EmptyPolicy::Drop,
            service_flags::REFUSE_WHEN_EMPTY,
        ),
        (!policy.firewall.is_empty(), service_flags::FIREWALL),
    ];
    for (_, flag) in on.into_iter().filter(|(on, _)| *on) {
        flags |= flag;
    }
    flags
}

/// Timeouts in ticks of the flow clock, at least one.
pub(super) fn timeouts(settings: &ServiceSettings, hz: u32) -> maps::Timeouts {
    let ticks = |d: std::time::Duration| {
        let ticks = d.as_millis() * u128::from(hz) / 1000;
        u32::try_from(ticks)
            .unwrap_or(i32::MAX as u32)
            .clamp(1, i32::MAX as u32)
    };
    let t = settings.timeouts;
    maps::Timeouts {
        established: ticks(t.tcp_established),
        syn: ticks(t.tcp_syn),
        closing: ticks(t.tcp_closing),
        udp: ticks(t.udp),
    }
}

/// Prefixes in `ACL` that fit beside those in it.
fn acl_room(capacities: &Capacities, used: usize) -> usize {
    (capacities.acl.min(limits::MAX_ACL_ENTRIES) as usize).saturating_sub(used)
}

/// Longest prefix first: while a list is being put in, every client is judged by the old list or by the new one.
pub(super) fn longest_first(prefixes: &mut [(IpNet, u32)]) {
    prefixes.sort_by_key(|(prefix, _)| (std::cmp::Reverse(prefix.prefix_len()), *prefix));
}
