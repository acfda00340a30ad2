//! Which frames that a device sees are for this node: what XDP cannot tell by the frame alone.

use std::{collections::BTreeSet, io, mem, os::fd::AsRawFd as _};

use lb_common::limits::DEVICE_MACS;

use super::netlink::Link;

/// `ETHTOOL_GFLAGS`: the old way to ask for a few offloads, which every kernel answers.
const ETHTOOL_GFLAGS: u32 = 0x25;
/// `ETH_FLAG_RXVLAN`.
const RX_VLAN: u32 = 1 << 8;

/// MACs besides its own whose frames a device takes for this node: its master's, and further unicast addresses. Those of
/// macvlans in this namespace are left out: their frames are for a device of its own.
pub fn further_macs(link: &Link, links: &[Link], all: &BTreeSet<(u32, [u8; 6])>) -> Vec<[u8; 6]> {
    let mut macs = wanted(link, links, all);
    macs.truncate(DEVICE_MACS);
    macs
}

/// Tells that a device has more further MACs than the programs can look through.
pub fn too_many_macs(link: &Link, links: &[Link], all: &BTreeSet<(u32, [u8; 6])>) -> Option<String> {
    let count = wanted(link, links, all).len();
    (count > DEVICE_MACS).then(|| {
        format!(
            "device {}: it takes frames for {count} MACs besides its own, and XDP for {DEVICE_MACS} of them; the others' frames \
             are left to the stack: set `bpf.xdp = \"off\"`, or remove what `bridge fdb show dev {} self` shows and nobody needs",
            link.name, link.name
        )
    })
}

fn wanted(link: &Link, links: &[Link], all: &BTreeSet<(u32, [u8; 6])>) -> Vec<[u8; 6]> {
    let master = links.iter().filter(|other| link.master == Some(other.ifindex));
    let of_master = master.map(|master| master.mac);
    let of_uppers: BTreeSet<[u8; 6]> = links
        .iter()
        .filter(|other| other.lower == Some(link.ifindex) && !other.vlan)
        .map(|other| other.mac)
        .collect();
    let further = all
        .iter()
        .filter(|(ifindex, mac)| *ifindex == link.ifindex && !of_uppers.contains(mac))
        .map(|(_, mac)| *mac);
    let mut macs = Vec::new();
    for mac in of_master.chain(further) {
        if mac != link.mac && mac != [0; 6] && !macs.contains(&mac) {
            macs.push(mac);
        }
    }
    macs
}

/// Whether a device has VLANs on it and takes their tags off before XDP sees a frame.
pub fn hides_tags(link: &Link, links: &[Link]) -> bool {
    let trunk = links
        .iter()
        .any(|other| other.vlan && other.lower == Some(link.ifindex));
    // A driver that does not answer has no offload.
    trunk && offloads(&link.name).is_ok_and(|flags| flags & RX_VLAN != 0)
}

/// The legacy offload flags of a device in the namespace of the calling thread.
fn offloads(name: &str) -> io::Result<u32> {
    /// `struct ethtool_value`.
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    let mut value = Value {
        command: ETHTOOL_GFLAGS,
        data: 0,
    };
    // SAFETY: integers, arrays of them and pointers, which may all be zero.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    let socket =
        std::net::UdpSocket::bind("127.0.0.1:0").or_else(|_| std::net::UdpSocket::bind("[::1]:0"))?;
    // SAFETY: the request and the value that it points to outlive the call, and have the layouts that it asks for.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value.data)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(ifindex: u32, last: u8) -> Link {
        Link {
            ifindex,
            name: format!("d{ifindex}"),
            mac: [2, 0, 0, 0, 0, last],
            mtu: 1500,
            bridge: false,
            veth: false,
            vlan_port: false,
            loopback: false,
            up: true,
            carrier_ups: 1,
            master: None,
            lower: None,
            vlan: false,
            ethernet: true,
            xdp_program: None,
        }
    }

    #[test]
    fn frames_for_the_master_and_further_addresses_are_ours_and_those_of_macvlans_are_theirs() {
        let nic = Link {
            master: Some(2),
            ..link(1, 1)
        };
        let links = [
            nic.clone(),
            link(2, 2),
            Link {
                lower: Some(1),
                ..link(3, 3)
            },
            Link {
                lower: Some(1),
                vlan: true,
                ..link(4, 1)
            },
        ];
        let mac = |last| [2, 0, 0, 0, 0, last];
        let all = [(1, mac(1)), (1, mac(3)), (1, mac(9)), (7, mac(8))].into();
        assert_eq!(further_macs(&nic, &links, &all), [mac(2), mac(9)]);
        assert_eq!(further_macs(&links[1], &links, &all), [[0; 6]; 0]);
        assert_eq!(too_many_macs(&nic, &links, &all), None);
        let many = (10..20).map(|last| (1, mac(last))).collect();
        assert_eq!(further_macs(&nic, &links, &many).len(), DEVICE_MACS);
        let fault = too_many_macs(&nic, &links, &many).unwrap();
        assert!(
            fault.contains("device d1") && fault.contains("11 MACs"),
            "{fault}"
        );
    }

    #[test]
    fn a_device_without_vlans_hides_none() {
        assert!(!hides_tags(&link(1, 1), &[link(1, 1)]));
        assert!(offloads("nosuchdevice").is_err());
    }
}
