//! The part of a plan that belongs to no single service: devices, SNAT addresses, settings, the `OURS` filter, VIPs.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use lb_common::{
    addr::Hop,
    limits::{DEVICE_MACS, MAX_SNAT_ADDRESSES},
    maps::{self, ACL_DENY, EVERY_SERVICE, backend_flags, device_flags, vip_flags},
};

use super::{Inputs, Policy};
use crate::{
    datapath::{DeviceInfo, MapOp, Place, Topology, slots::name_bytes},
    model::{Attachment, SnatMode},
    plan::programmed::Programmed,
};

/// A list of source addresses: device slot, or `None` for the configured ones; whether IPv6.
type SnatKey = (Option<u16>, bool);

/// Ranges of `SNAT_ADDRESSES`: (first, count).
pub(super) type SnatRanges = BTreeMap<SnatKey, (u16, u16)>;

/// Where a backend can be reached, as map fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reach {
    pub hop: Hop,
    pub flags: u16,
    pub snat: (u16, u16),
}

/// Writes that bring devices and settings up to date. A device that has gone is not among them: see [`gone_devices`].
pub(super) fn device_ops(programmed: &Programmed, inputs: &Inputs<'_>) -> Vec<MapOp> {
    let mut ops = Vec::new();
    for (slot, info) in &inputs.topology.devices {
        let device = record(info);
        if programmed.devices.get(slot) != Some(&device) {
            ops.push(MapOp::PutDevice { slot: *slot, device });
        }
    }
    let Policy {
        snat_port_min,
        snat_port_max,
        event_sample,
        mark,
        ..
    } = *inputs.policy;
    let loopback_ifindex = match inputs.topology.loopback_ifindex {
        // The topology has not been read yet: what is there stays.
        0 => programmed.settings.loopback_ifindex,
        ifindex => ifindex,
    };
    let flow_share = match inputs.may_remove {
        true => flow_share(inputs),
        // Not every source has been read: how many services there are is not known.
        false => programmed.settings.flow_share,
    };
    let settings = maps::Settings {
        snat_port_min,
        snat_port_max,
        event_sample,
        loopback_ifindex,
        adopting: maps::adopting::NONE,
        flow_share,
        mark,
        heartbeat: 0,
    };
    if settings != programmed.settings {
        ops.push(MapOp::PutSettings { settings });
    }
    ops
}

/// How many flows of IPv4 and IPv6 one service may hold; 0 for any number: a single service takes nothing from others.
fn flow_share(inputs: &Inputs<'_>) -> [u32; 2] {
    if inputs.desired.services.len() < 2 {
        return [0; 2];
    }
    let capacities = inputs.capacities;
    [capacities.flows4, capacities.flows6].map(|flows| {
        let share = u64::from(flows) * u64::from(inputs.policy.flow_share) / 100;
        u32::try_from(share).unwrap_or(u32::MAX).max(1)
    })
}

/// Writes that bring the deny list for all services up to date: additions, and removals for after the services, which
/// may still ask the list until then.
pub(super) fn firewall_ops(programmed: &Programmed, inputs: &Inputs<'_>) -> (Vec<MapOp>, Vec<MapOp>) {
    let (wanted, present) = (&inputs.policy.firewall, &programmed.firewall);
    let put = |prefix: &IpNet| MapOp::PutAcl {
        service: EVERY_SERVICE,
        prefix: *prefix,
        action: ACL_DENY,
    };
    let delete = |prefix: &IpNet| MapOp::DelAcl {
        service: EVERY_SERVICE,
        prefix: *prefix,
    };
    (
        wanted.difference(present).map(put).collect(),
        present.difference(wanted).map(delete).collect(),
    )
}

/// Clears the slots of devices that have gone; nothing before the topology has been read.
pub(super) fn gone_devices(programmed: &Programmed, topology: &Topology) -> Vec<MapOp> {
    if topology.loopback_ifindex == 0 {
        return Vec::new();
    }
    let gone = programmed
        .devices
        .iter()
        .filter(|(slot, _)| !topology.devices.contains_key(slot));
    gone.map(|(slot, device)| MapOp::PutDevice {
        slot: *slot,
        // The name stays: the slot is its own when it comes back.
        device: maps::Device {
            name: device.name,
            ..maps::Device::default()
        },
    })
    .collect()
}

/// Finds or makes a range of `SNAT_ADDRESSES` for every list of addresses. A list that has its range keeps it: records
/// name ranges by index, so an index changes its meaning only when no record and no list uses it.
pub(super) fn snat_ranges(programmed: &Programmed, inputs: &Inputs<'_>) -> (SnatRanges, Vec<MapOp>) {
    let mut lists: Vec<(SnatKey, Vec<IpAddr>)> = Vec::new();
    for v6 in [false, true] {
        let of_family = |all: &[IpAddr]| {
            all.iter()
                .copied()
                .filter(|ip| ip.is_ipv6() == v6)
                .collect::<Vec<_>>()
        };
        lists.push(((None, v6), of_family(&inputs.policy.snat_addresses)));
        let devices = inputs.topology.devices.iter();
        lists.extend(devices.map(|(slot, info)| ((Some(*slot), v6), of_family(&info.addresses))));
    }
    lists.retain(|(_, list)| !list.is_empty());

    let mut ranges = SnatRanges::new();
    let mut ops = Vec::new();
    let mut used = vec![false; MAX_SNAT_ADDRESSES as usize];
    lists.retain(|(key, list)| {
        let found = (0..used.len().saturating_sub(list.len())).find(|first| {
            list.iter()
                .enumerate()
                .all(|(i, ip)| programmed.snat.get(&((first + i) as u16)) == Some(ip))
        });
        let Some(first) = found else { return true };
        used[first..first + list.len()].fill(true);
        ranges.insert(*key, (first as u16, list.len() as u16));
        false
    });
    if lists.is_empty() {
        return (ranges, ops);
    }
    for slot in programmed.slots.values() {
        let first = usize::from(slot.record.snat_first).min(used.len());
        let end = (first + usize::from(slot.record.snat_count)).min(used.len());
        used[first..end].fill(true);
    }
    for (key, list) in lists {
        let free =
            (0..used.len().saturating_sub(list.len())).find(|i| !used[*i..*i + list.len()].contains(&true));
        // Without room the list has no range, and the services that need it are refused by name.
        let Some(first) = free else { continue };
        used[first..first + list.len()].fill(true);
        ranges.insert(key, (first as u16, list.len() as u16));
        for (i, address) in list.into_iter().enumerate() {
            let index = (first + i) as u16;
            if programmed.snat.get(&index) != Some(&address) {
                ops.push(MapOp::PutSnatAddress { index, address });
            }
        }
    }
    (ranges, ops)
}

/// The map fields for a backend in this place; `Err` names why it cannot serve.
pub(super) fn reach(
    place: &Place,
    v6: bool,
    mode: SnatMode,
    attachment: Attachment,
    ranges: &SnatRanges,
) -> Result<Reach, NoSnat> {
    let translated = attachment == Attachment::IsolatedContainer && mode != SnatMode::Never;
    let range = |slot: Option<u16>| ranges.get(&(slot, v6)).copied();
    let reach = match place {
        Place::Node => Reach {
            hop: Hop::UNKNOWN,
            flags: backend_flags::NODE,
            snat: range(None).unwrap_or_default(),
        },
        // Its replies reach its own network alone: like a remote one it gets a source there, and the replies pass here.
        Place::Bridge { slot } if translated => Reach {
            hop: Hop::new([0; 6], *slot),
            flags: 0,
            snat: range(Some(*slot)).ok_or(NoSnat)?,
        },
        // On a bridge only its own address will do: containers answer others by their default route.
        Place::Bridge { slot } => Reach {
            hop: Hop::new([0; 6], *slot),
            flags: backend_flags::LOCAL,
            snat: match range(Some(*slot)) {
                Some(range) => range,
                None if mode == SnatMode::Always => return Err(NoSnat),
                None => (0, 0),
            },
        },
        Place::Remote { slot, mac, .. } => Reach {
            hop: Hop::new(mac.unwrap_or_default(), *slot),
            flags: if mode == SnatMode::Never {
                backend_flags::DIRECT
            } else {
                0
            },
            snat: match range(None).or_else(|| range(Some(*slot))) {
                Some(range) => range,
                None if mode == SnatMode::Never => (0, 0),
                None => return Err(NoSnat),
            },
        },
        Place::Unroutable => Reach {
            hop: Hop::UNKNOWN,
            flags: 0,
            snat: (0, 0),
        },
    };
    Ok(reach)
}

/// The node has no source address of the backend's family on the way to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoSnat;

/// The value of a VIP: echo is answered unless the node's own stack does, and so are unused ports.
pub(super) fn vip_value(vip: IpAddr, inputs: &Inputs<'_>) -> maps::Vip {
    let own = inputs.policy.own_vips.contains(&vip);
    if inputs.topology.node_addresses.contains(&vip) && !own {
        return maps::Vip { flags: 0 };
    }
    let mut flags = vip_flags::ECHO;
    if let Some(silent) = inputs.policy.routed_vips.get(&vip) {
        flags |= vip_flags::ROUTED;
        if *silent {
            flags |= vip_flags::UNUSED_DROP;
        }
    }
    maps::Vip { flags }
}

/// Writes for VIPs that are routed here, whether they have a service or not: a router sends on what comes back to it.
pub(super) fn routed_vip_ops(programmed: &Programmed, inputs: &Inputs<'_>) -> Vec<MapOp> {
    if inputs.topology.loopback_ifindex == 0 {
        // The topology has not been read yet: which of them the node has is not known.
        return Vec::new();
    }
    let vips = inputs.policy.routed_vips.keys();
    vips.map(|vip| (*vip, vip_value(*vip, inputs)))
        .filter(|(vip, value)| programmed.vips.get(vip) != Some(value))
        .map(|(vip, value)| MapOp::PutVip { vip, value })
        .collect()
}

fn record(info: &DeviceInfo) -> maps::Device {
    let [a, b, c, d, e, f] = info.mac;
    let on = [
        (info.xdp.back, device_flags::XDP_TX),
        (info.xdp.redirect, device_flags::XDP),
        (info.xdp.frags, device_flags::XDP_FRAGS),
        (info.bridge, device_flags::BRIDGE),
        (info.uplink, device_flags::UPLINK),
        (info.vlan_offload, device_flags::VLAN_OFFLOAD),
    ];
    let flags = on
        .into_iter()
        .filter(|(on, _)| *on)
        .fold(0, |all, (_, flag)| all | flag);
    let mut macs = [maps::DeviceMac::default(); DEVICE_MACS];
    for (room, [a, b, c, d, e, f]) in macs.iter_mut().zip(&info.further_macs) {
        room.high = u32::from_ne_bytes([*a, *b, *c, *d]);
        room.low = u16::from_ne_bytes([*e, *f]);
    }
    maps::Device {
        ifindex: info.ifindex,
        mtu: info.mtu,
        mac_high: u32::from_ne_bytes([a, b, c, d]),
        mac_low: u16::from_ne_bytes([e, f]),
        flags,
        macs,
        name: name_bytes(&info.name),
    }
}
