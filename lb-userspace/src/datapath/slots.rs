//! Slots of `DEVICES`: small numbers for devices, stable for as long as flows may name them.

use std::collections::BTreeMap;

use lb_common::{limits::MAX_DEVICES, maps::Device};

/// Which interface index has which slot. Slot 0 is the node itself and never given out.
#[derive(Clone, Debug, Default)]
pub struct Slots {
    by_ifindex: BTreeMap<u32, u16>,
    /// The slot given out last: freed slots rest until the others have been used.
    last: u16,
}

impl Slots {
    /// With the slots that an earlier agent gave out.
    pub fn adopt(devices: &BTreeMap<u16, Device>) -> Self {
        Self {
            by_ifindex: devices
                .iter()
                .filter(|(slot, _)| **slot != 0)
                .map(|(slot, d)| (d.ifindex, *slot))
                .collect(),
            last: devices.keys().next_back().copied().unwrap_or(0),
        }
    }

    /// The slot of a device, a new one if it has none; `None`: all are taken.
    pub fn assign(&mut self, ifindex: u32) -> Option<u16> {
        if let Some(slot) = self.by_ifindex.get(&ifindex) {
            return Some(*slot);
        }
        let end = MAX_DEVICES as u16;
        let taken = |slot: &u16| self.by_ifindex.values().any(|used| used == slot);
        let slot = (self.last + 1..end)
            .chain(1..=self.last.min(end - 1))
            .find(|slot| !taken(slot))?;
        self.by_ifindex.insert(ifindex, slot);
        self.last = slot;
        Some(slot)
    }

    /// The slot of a device, if it has one.
    pub fn get(&self, ifindex: u32) -> Option<u16> {
        self.by_ifindex.get(&ifindex).copied()
    }

    /// Frees the slots of all devices but these.
    pub fn retain(&mut self, keep: impl Fn(u32) -> bool) {
        self.by_ifindex.retain(|ifindex, _| keep(*ifindex));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_stable_and_reused_last() {
        let adopted = [(
            2,
            Device {
                ifindex: 7,
                ..Device::default()
            },
        )]
        .into();
        let mut slots = Slots::adopt(&adopted);
        assert_eq!(slots.assign(7), Some(2));
        assert_eq!(slots.assign(8), Some(3));
        slots.retain(|ifindex| ifindex != 8);
        assert_eq!(slots.get(8), None);
        assert_eq!(slots.assign(9), Some(4));
        for ifindex in 100..100 + 253 - 1 {
            assert!(slots.assign(ifindex).is_some(), "{ifindex}");
        }
        assert_eq!(slots.assign(999), Some(slots.get(999).unwrap()));
        assert_eq!(slots.assign(1000), None);
        assert!(!slots.by_ifindex.values().any(|slot| *slot == 0));
    }
}
