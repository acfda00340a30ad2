//! VIPs on interfaces: put there, told to the neighbours, taken away again.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use rtnetlink::Handle;

use super::{
    announcements::{Presence, REPEAT},
    netlink::{self, Link, OwnAddress},
    state::StateFile,
};

/// EtherType of ARP.
const ETH_ARP: u16 = 0x0806;
/// EtherType of IPv6.
const ETH_IPV6: u16 = 0x86dd;
/// All nodes of the link (RFC 4291).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// IPv6 next header of ICMPv6.
const ICMPV6: u8 = 58;
/// Neighbour advertisement (RFC 4861, 4.4).
const ADVERTISEMENT: u8 = 136;

/// Makes the announced addresses those wanted: (interface, VIP); `own` are the node's addresses as they are now. Returns faults; an interface that is not there yet
/// is one, and is served when it comes.
pub async fn apply(
    handle: &Handle,
    links: &[Link],
    own: &[OwnAddress],
    state: &StateFile,
    wanted: &BTreeSet<(String, IpAddr)>,
) -> Vec<String> {
    let mut faults = Vec::new();
    let devices = netlink::by_name(links);
    let ours = state.get().addresses;
    for (device, address) in ours.difference(wanted) {
        if let Some(link) = devices.get(device.as_str())
            && let Err(e) = netlink::remove_address(handle, link.ifindex, *address).await
        {
            faults.push(format!("device {device}: {e}"));
            continue;
        }
        faults.extend(record(state, |set| {
            set.remove(&(device.clone(), *address));
        }));
    }
    for (device, address) in wanted {
        let Some(link) = devices.get(device.as_str()) else {
            faults.push(format!(
                "VIP {address}: interface {device} does not exist: correct `announce.interface`"
            ));
            continue;
        };
        let entry = (device.clone(), *address);
        let present = own
            .iter()
            .any(|o| o.ifindex == link.ifindex && o.address == *address);
        if present {
            // Ours from before, or the node's own, which we must not take away later.
            continue;
        }
        // Recorded first: an agent that dies in between leaves nothing behind that detach does not know.
        faults.extend(record(state, |set| {
            set.insert(entry.clone());
        }));
        if let Err(e) = netlink::add_address(handle, link.ifindex, *address).await {
            faults.push(format!("VIP {address} on {device}: {e}"));
        }
    }
    faults
}

fn record(state: &StateFile, change: impl FnOnce(&mut BTreeSet<(String, IpAddr)>)) -> Option<String> {
    state
        .update(|changes| change(&mut changes.addresses))
        .err()
        .map(|e| format!("state file: {e}"))
}

/// The VIPs to announce that are on devices whose links are up, as the neighbours should know them.
pub fn present(
    links: &[Link],
    own: &[OwnAddress],
    wanted: &BTreeSet<(String, IpAddr)>,
) -> BTreeSet<Presence> {
    let devices = netlink::by_name(links);
    let presence = |(device, address): &(String, IpAddr)| {
        let link = devices.get(device.as_str())?;
        let usable =
            |own: &OwnAddress| own.ifindex == link.ifindex && own.address == *address && !own.unusable;
        let speaks = link.up && !link.loopback && link.mac != [0; 6];
        (speaks && own.iter().any(usable)).then_some(Presence {
            ifindex: link.ifindex,
            mac: link.mac,
            carrier_ups: link.carrier_ups,
            address: *address,
        })
    };
    wanted.iter().filter_map(presence).collect()
}

/// Sends gratuitous ARP requests or unsolicited neighbour advertisements, so that no one keeps an old MAC.
pub fn tell_neighbours(presence: &Presence) -> io::Result<()> {
    let frame = match presence.address {
        IpAddr::V4(v4) => gratuitous_arp(presence.mac, v4),
        IpAddr::V6(v6) => advertisement(presence.mac, v6),
    };
    (0..REPEAT).try_for_each(|_| send_frame(presence.ifindex, &frame))
}

/// RFC 5227, section 3: an ARP request in which sender and target are the address.
fn gratuitous_arp(mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend(ETH_ARP.to_be_bytes());
    // Ethernet, IPv4, their address lengths, request.
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend([0; 6]);
    frame.extend(address.octets());
    frame
}

/// RFC 4861, section 7.2.6: an advertisement that overrides what the neighbours know.
fn advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    let mut icmp = vec![ADVERTISEMENT, 0, 0, 0, 0x20, 0, 0, 0];
    icmp.extend(address.octets());
    // Option: target link-layer address, one unit of 8 bytes.
    icmp.extend([2, 1]);
    icmp.extend(mac);
    let sum = checksum(address, ALL_NODES, &icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = vec![0x33, 0x33, 0, 0, 0, 1];
    frame.extend(mac);
    frame.extend(ETH_IPV6.to_be_bytes());
    frame.extend([0x60, 0, 0, 0]);
    frame.extend((icmp.len() as u16).to_be_bytes());
    // Hop limit 255: receivers drop advertisements that were forwarded.
    frame.extend([ICMPV6, 255]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(icmp);
    frame
}

/// The ICMPv6 checksum with its pseudo header (RFC 8200, 8.1); the checksum field of `body` is zero.
fn checksum(src: Ipv6Addr, dst: Ipv6Addr, body: &[u8]) -> u16 {
    let mut bytes = Vec::from(src.octets());
    bytes.extend(dst.octets());
    bytes.extend((body.len() as u32).to_be_bytes());
    bytes.extend([0, 0, 0, ICMPV6]);
    bytes.extend(body);
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Sends one whole Ethernet frame out of a device.
fn send_frame(ifindex: u32, frame: &[u8]) -> io::Result<()> {
    // SAFETY: no pointers are passed; the result is checked before use.
    let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_ifindex = ifindex.cast_signed();
    to.sll_halen = 6;
    to.sll_addr[..6].copy_from_slice(&frame[..6]);
    // SAFETY: `frame` and `to` are live and of the sizes given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            std::ptr::from_ref(&to).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if sent < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arp_frames_have_the_layout_of_rfc_826() {
        let frame = gratuitous_arp([2, 0, 0, 0, 0, 9], Ipv4Addr::new(10, 0, 0, 7));
        assert_eq!(frame.len(), 42);
        assert_eq!(frame[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(
            (&frame[28..32], &frame[38..42]),
            (&[10, 0, 0, 7][..], &[10, 0, 0, 7][..])
        );
    }

    #[test]
    fn advertisements_carry_a_correct_checksum() {
        let address: Ipv6Addr = "2001:db8::7".parse().unwrap();
        let frame = advertisement([2, 0, 0, 0, 0, 9], address);
        assert_eq!(frame.len(), 14 + 40 + 32);
        // Summed with its checksum in place, a correct message gives zero.
        assert_eq!(checksum(address, ALL_NODES, &frame[54..]), 0);
    }
}
