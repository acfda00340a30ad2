//! Whether a frame that XDP meets is for this node, and whether a reply comes from where its backend is.
//!
//! A NIC in promiscuous mode, or behind a switch that floods, sees the frames of its neighbours. The stack drops those
//! later; XDP must tell them apart by itself. For TC the kernel has done so ([`Packet::is_for_device`]).

use lb_common::{
    addr::Hop,
    maps::{Device, backend_flags, device_flags},
    slot::Flow,
};

use crate::{
    forward,
    headers::Ethernet,
    packet::{Hook, Packet},
    send::Ip,
    tables::Tables,
    verdict::Verdict,
};

/// "Go on" as a [`Verdict`], which is all that a function out of line can return. It never leaves this module.
const TAKE: Verdict = Verdict::OPEN;

/// Judges a packet of a client whose earlier ones came by the device of `slot`. `Some` is the end of the packet.
#[inline(always)]
pub fn refuse_request<P: Packet, T: Tables>(packet: &P, tables: T, slot: u16) -> Option<Verdict> {
    if P::HOOK != Hook::Xdp || is_own(packet, tables, slot) {
        return None;
    }
    refuse_foreign(packet, tables)
}

/// Judges a packet without a flow. `Some` is the end of the packet.
#[inline(always)]
pub fn refuse_foreign<P: Packet, T: Tables>(packet: &P, tables: T) -> Option<Verdict> {
    if P::HOOK != Hook::Xdp {
        return None;
    }
    match judge(packet, tables) {
        TAKE => None,
        verdict => Some(verdict),
    }
}

/// Judges a reply: it must come from the backend's side, or anybody could speak for it. `Some` is the end of the packet.
#[inline(always)]
pub fn refuse_reply<P: Packet, T: Tables, A: Ip>(packet: &P, tables: T, flow: &Flow<A>) -> Option<Verdict> {
    if P::HOOK == Hook::Egress {
        return None;
    }
    let backend = tables.backend(flow.backend())?;
    if is_own(packet, tables, backend.hop.slot()) {
        return None;
    }
    let known = forward::is_backend_of(backend, flow);
    match judge_reply(packet, tables, backend.flags, known as u32) {
        TAKE => None,
        verdict => Some(verdict),
    }
}

/// Whether the frame came by the device of `slot`; at XDP also whether it is addressed to its own MAC.
#[inline(always)]
fn is_own<P: Packet, T: Tables>(packet: &P, tables: T, slot: u16) -> bool {
    let Some(device) = tables.device(slot as u32) else {
        return false;
    };
    device.ifindex == packet.device() && (P::HOOK != Hook::Xdp || is_addressed(packet, device))
}

/// Whether the frame is addressed to the MAC that the device sends from, and has kept its VLAN tag if it had one.
#[inline(always)]
fn is_addressed<P: Packet>(packet: &P, device: &Device) -> bool {
    let own = Hop::from_words(device.mac_high, device.mac_low, 0);
    match packet.get::<Ethernet>(0) {
        Some(eth) => {
            own.same_mac(Hop::from_words(eth.dst_high, eth.dst_low, 0))
                && device.flags & device_flags::VLAN_OFFLOAD == 0
        }
        None => false,
    }
}

/// The same for any device and any of its MACs.
#[inline(never)]
fn judge<P: Packet, T: Tables>(packet: &P, tables: T) -> Verdict {
    // What the agent has not told of yet is left to TC.
    let device = match tables.device_slot(packet.device()) {
        Some(slot) => tables.device(slot),
        None => None,
    };
    match device {
        None => Verdict::TO_TC,
        Some(device) if device.flags & device_flags::VLAN_OFFLOAD != 0 => Verdict::TO_TC,
        Some(device) if is_addressed(packet, device) || has_further(packet, device) => TAKE,
        Some(_) => Verdict::PASS,
    }
}

/// Whether the frame is addressed to one of a device's further MACs.
#[inline(always)]
fn has_further<P: Packet>(packet: &P, device: &Device) -> bool {
    let Some(eth) = packet.get::<Ethernet>(0) else {
        return false;
    };
    let to = Hop::from_words(eth.dst_high, eth.dst_low, 0);
    to.has_mac()
        && device
            .macs
            .iter()
            .any(|mac| to.same_mac(Hop::from_words(mac.high, mac.low, 0)))
}

/// Judges a reply that came by another device than its backend's, or to another MAC than that device's.
///
/// A container on two networks answers by the one that has its default route, a remote backend by any uplink. When the
/// backend is not `known` any more, neither is its side.
#[inline(never)]
fn judge_reply<P: Packet, T: Tables>(packet: &P, tables: T, flags: u16, known: u32) -> Verdict {
    let verdict = if P::HOOK == Hook::Xdp {
        judge(packet, tables)
    } else {
        TAKE
    };
    if verdict != TAKE || known == 0 {
        return verdict;
    }
    if tables
        .settings()
        .is_some_and(|s| s.loopback_ifindex == packet.device())
    {
        return if flags & backend_flags::NODE != 0 {
            TAKE
        } else {
            Verdict::PASS
        };
    }
    let device = match tables.device_slot(packet.device()) {
        Some(slot) => tables.device(slot),
        None => None,
    };
    let uplink = device.is_some_and(|device| device.flags & device_flags::UPLINK != 0);
    let from_uplink = flags & (backend_flags::LOCAL | backend_flags::NODE) == 0;
    if uplink == from_uplink && flags & backend_flags::NODE == 0 {
        TAKE
    } else {
        Verdict::PASS
    }
}
