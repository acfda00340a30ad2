//! The devices of the rows' world.

use lb_common::maps::device_flags;

use crate::packet::Mac;

/// Slot of the NIC that clients come by; XDP and TC.
pub const NIC: u16 = 1;
/// Slot of the container bridge; TC only.
pub const BRIDGE: u16 = 2;
/// Slot of a second NIC; XDP and TC.
pub const NIC2: u16 = 3;
/// Slot of a NIC whose MTU is [`NARROW_MTU`]; XDP and TC.
pub const NARROW: u16 = 4;
/// Slot of a NIC whose driver takes no frames that XDP redirects to it; XDP and TC.
pub const PLAIN: u16 = 5;
/// Slot of a NIC whose MTU is [`JUMBO_MTU`]; XDP and TC.
pub const JUMBO: u16 = 6;
/// Slot of such a NIC whose driver takes redirected frames of one buffer only; XDP and TC.
pub const JUMBO_PLAIN: u16 = 7;
/// Slot of the node itself.
pub const NODE: u16 = 0;

/// MTU of [`NARROW`], bytes.
pub const NARROW_MTU: u32 = 600;
/// MTU of [`JUMBO`], bytes: more than one page.
pub const JUMBO_MTU: u32 = 9000;
/// MTU of the other devices, bytes.
pub const MTU: u32 = 1500;

/// Flags of a NIC whose driver does all that XDP can ask for.
const XDP_UPLINK: u16 =
    device_flags::XDP | device_flags::XDP_TX | device_flags::XDP_FRAGS | device_flags::UPLINK;

/// Name, interface index, MAC, flags and MTU of every device but the node.
pub const DEVICES: [(u16, &str, u32, Mac, u16, u32); 7] = [
    (NIC, "nic", 11, [0x02, 0, 0, 0, 0, 0x11], XDP_UPLINK, MTU),
    (
        BRIDGE,
        "bridge",
        21,
        [0x02, 0, 0, 0, 0, 0x21],
        device_flags::BRIDGE,
        MTU,
    ),
    (NIC2, "nic2", 31, [0x02, 0, 0, 0, 0, 0x31], XDP_UPLINK, MTU),
    (
        NARROW,
        "narrow",
        41,
        [0x02, 0, 0, 0, 0, 0x41],
        XDP_UPLINK,
        NARROW_MTU,
    ),
    (
        PLAIN,
        "plain",
        51,
        [0x02, 0, 0, 0, 0, 0x51],
        device_flags::XDP_TX | device_flags::UPLINK,
        MTU,
    ),
    (
        JUMBO,
        "jumbo",
        61,
        [0x02, 0, 0, 0, 0, 0x61],
        XDP_UPLINK,
        JUMBO_MTU,
    ),
    (
        JUMBO_PLAIN,
        "jumbo1",
        71,
        [0x02, 0, 0, 0, 0, 0x71],
        device_flags::XDP | device_flags::XDP_TX | device_flags::UPLINK,
        JUMBO_MTU,
    ),
];

/// The MAC of a device.
pub fn mac_of(slot: u16) -> Mac {
    DEVICES.iter().find(|d| d.0 == slot).expect("a slot in use").3
}

/// The MAC of a device by interface index; that of `lo` is zero.
pub fn mac_by_ifindex(ifindex: u32) -> Mac {
    DEVICES.iter().find(|d| d.2 == ifindex).map_or([0; 6], |d| d.3)
}

/// The interface index of a device; `lo` for the node.
pub fn ifindex_of(slot: u16) -> u32 {
    DEVICES.iter().find(|d| d.0 == slot).map_or(1, |d| d.2)
}
