//! Slots of `DEVICES`: small numbers for devices, stable for as long as flows may name them.

use std::collections::BTreeMap;

use lb_common::{
    limits::MAX_DEVICES,
    maps::{DEVICE_NAME, Device},
};

/// Which device has which slot. Slot 0 is the node itself and never given out.
///
/// A device that goes leaves its slot resting: one that comes under the same name, or the same one under another name, gets it
/// again, and the flows that name it go on.
#[derive(Clone, Debug, Default)]
pub struct Slots {
    by_slot: BTreeMap<u16, Owner>,
    /// The slot given out last: freed slots rest until the others have been used.
    last: u16,
}

/// Whose a slot is.
#[derive(Clone, Debug)]
struct Owner {
    ifindex: u32,
    name: String,
    /// The device is there.
    present: bool,
}

impl Slots {
    /// With the slots that an earlier agent gave out.
    pub fn adopt(devices: &BTreeMap<u16, Device>) -> Self {
        let owner = |device: &Device| Owner {
            ifindex: device.ifindex,
            name: name_of(device),
            present: device.ifindex != 0,
        };
        Self {
            by_slot: devices
                .iter()
                .filter(|(slot, _)| **slot != 0)
                .map(|(slot, device)| (*slot, owner(device)))
                .collect(),
            last: devices.keys().next_back().copied().unwrap_or(0),
        }
    }

    /// The slot of a device, a new one if it has none; `None`: all are taken.
    pub fn assign(&mut self, ifindex: u32, name: &str) -> Option<u16> {
        let resting = |test: &dyn Fn(&Owner) -> bool| {
            let mut all = self.by_slot.iter();
            all.find(|(_, owner)| !owner.present && test(owner))
                .map(|(slot, _)| *slot)
        };
        let end = MAX_DEVICES as u16;
        let in_turn = || (self.last + 1..end).chain(1..=self.last.min(end - 1));
        let known = self.slot(ifindex);
        let found = known
            .or_else(|| resting(&|owner| owner.name == name))
            .or_else(|| resting(&|owner| owner.ifindex == ifindex));
        let slot = match found {
            Some(slot) => slot,
            None => {
                let slot = in_turn()
                    .find(|slot| !self.by_slot.contains_key(slot))
                    .or_else(|| in_turn().find(|slot| !self.by_slot[slot].present))?;
                self.last = slot;
                slot
            }
        };
        let owner = Owner {
            ifindex,
            name: name.to_owned(),
            present: true,
        };
        self.by_slot.insert(slot, owner);
        Some(slot)
    }

    fn slot(&self, ifindex: u32) -> Option<u16> {
        let mut all = self.by_slot.iter();
        all.find(|(_, owner)| owner.present && owner.ifindex == ifindex)
            .map(|(slot, _)| *slot)
    }

    /// The slot of a device, if it has one.
    pub fn get(&self, ifindex: u32) -> Option<u16> {
        self.slot(ifindex)
    }

    /// Lets the slots of all devices but these rest.
    pub fn retain(&mut self, keep: impl Fn(u32) -> bool) {
        for owner in self.by_slot.values_mut() {
            owner.present &= keep(owner.ifindex);
        }
    }
}

/// A name as `DEVICES` has it: the kernel's names have a zero more than fits here.
pub fn name_bytes(name: &str) -> [u8; DEVICE_NAME] {
    let mut bytes = [0; DEVICE_NAME];
    for (to, from) in bytes[..DEVICE_NAME - 1].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    bytes
}

/// The name in a record.
pub fn name_of(device: &Device) -> String {
    let bytes: Vec<u8> = device
        .name
        .iter()
        .copied()
        .take_while(|byte| *byte != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(ifindex: u32, name: &str) -> Device {
        Device {
            ifindex,
            name: name_bytes(name),
            ..Device::default()
        }
    }

    #[test]
    fn slots_are_stable_and_reused_last() {
        let mut slots = Slots::adopt(&[(2, device(7, "eth7"))].into());
        assert_eq!(slots.assign(7, "eth7"), Some(2));
        assert_eq!(slots.assign(8, "br8"), Some(3));
        slots.retain(|ifindex| ifindex != 8);
        assert_eq!(slots.get(8), None);
        assert_eq!(slots.assign(9, "br9"), Some(4));
        for ifindex in 100..100 + 253 - 1 {
            let name = format!("br{ifindex}");
            assert!(slots.assign(ifindex, &name).is_some(), "{ifindex}");
        }
        assert_eq!(slots.assign(999, "br999"), Some(slots.get(999).unwrap()));
        assert_eq!(slots.assign(1000, "br1000"), None);
        assert!(!slots.by_slot.contains_key(&0));
    }

    #[test]
    fn a_device_that_comes_back_gets_its_slot() {
        let mut slots = Slots::default();
        assert_eq!(slots.assign(7, "eth0"), Some(1));
        assert_eq!(slots.assign(8, "br0"), Some(2));
        // Renamed while it serves.
        assert_eq!(slots.assign(7, "wan0"), Some(1));
        // Made anew under its name.
        slots.retain(|ifindex| ifindex != 7);
        assert_eq!(slots.get(7), None);
        assert_eq!(slots.assign(12, "wan0"), Some(1));
        // Renamed while it was not ours.
        slots.retain(|ifindex| ifindex != 12);
        assert_eq!(slots.assign(12, "lan0"), Some(1));
        // The name counts more than the number, which may be another's now.
        slots.retain(|ifindex| ifindex != 12 && ifindex != 8);
        assert_eq!(slots.assign(12, "br0"), Some(2));
        // An agent that starts while the device is away knows it by what the map keeps.
        let mut slots = Slots::adopt(&[(5, device(0, "eth0")), (6, device(3, "eth1"))].into());
        assert_eq!((slots.get(0), slots.get(3)), (None, Some(6)));
        assert_eq!(slots.assign(20, "eth0"), Some(5));
    }

    #[test]
    fn names_fit_their_field() {
        for name in ["", "lo", "fifteen-letters"] {
            assert_eq!(name_of(&device(1, name)), name);
        }
    }
}
