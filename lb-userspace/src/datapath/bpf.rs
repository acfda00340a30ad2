//! The maps of the kernel behind the reconciler's trait.

use std::{collections::BTreeMap, io, net::IpAddr, path::Path};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lb_common::{
    addr::Addr16,
    limits::RING_ROW,
    maps::{AclData, Backend, Device, NO_RING, Ours, RingRow, Service, ServiceKey, Settings, Timeouts, Vip},
};

use super::{Capacities, Dump, MapError, MapOp, Maps, batch::Table, shape::AclKey};

/// Bits of the service id in front of an ACL prefix.
const ACL_SERVICE_BITS: u32 = 32;
/// Bits of an IPv4-mapped address in front of the IPv4 address.
const MAPPED_BITS: u32 = 96;
/// Backends read by one call; a dump stops at the first such block without any used id.
const BACKEND_BLOCK: u32 = 8192;

/// The pinned maps that the agent writes.
#[derive(Debug)]
pub struct KernelMaps {
    services: Table<ServiceKey, Service>,
    rings: Table<u32, RingRow>,
    backends: Table<u32, Backend>,
    timeouts: Table<u32, Timeouts>,
    acl: Table<AclKey, u32>,
    vips: Table<Addr16, Vip>,
    devices: Table<u32, Device>,
    device_slots: Table<u32, u32>,
    snat_addresses: Table<u32, Addr16>,
    ours: Table<u32, Ours>,
    settings: Table<u32, Settings>,
    flows4: u32,
    flows6: u32,
}

impl KernelMaps {
    /// Opens the pins in `maps` (`Pins::maps`).
    pub fn open(maps: &Path) -> Result<Self, MapError> {
        use lb_common::slot::{Bucket4, Bucket6};
        Ok(Self {
            services: Table::open(maps, "SERVICES")?,
            rings: Table::open(maps, "RINGS")?,
            backends: Table::open(maps, "BACKENDS")?,
            timeouts: Table::open(maps, "TIMEOUTS")?,
            acl: Table::open(maps, "ACL")?,
            vips: Table::open(maps, "VIPS")?,
            devices: Table::open(maps, "DEVICES")?,
            device_slots: Table::open(maps, "DEVICE_SLOTS")?,
            snat_addresses: Table::open(maps, "SNAT_ADDRESSES")?,
            ours: Table::open(maps, "OURS")?,
            settings: Table::open(maps, "SETTINGS")?,
            flows4: Table::<u32, Bucket4>::open(maps, "FLOWS4")?.capacity,
            flows6: Table::<u32, Bucket6>::open(maps, "FLOWS6")?.capacity,
        })
    }

    /// `DEVICES` in use or kept for a device that may come back, by slot: what a new agent needs to keep slots stable.
    pub fn devices(&self) -> Result<BTreeMap<u16, Device>, MapError> {
        let all = self.devices.range(0, self.devices.capacity)?;
        Ok(all
            .into_iter()
            .zip(0_u16..)
            .filter(|(d, _)| *d != Device::default())
            .map(|(d, slot)| (slot, d))
            .collect())
    }

    fn put_device(&self, slot: u16, device: &Device) -> Result<(), MapError> {
        let before = self.devices.get(&slot.into())?.unwrap_or_default();
        if before.ifindex != 0
            && before.ifindex != device.ifindex
            && self.device_slots.get(&before.ifindex)? == Some(slot.into())
        {
            self.device_slots.remove(&before.ifindex)?;
        }
        // The record before its index: whoever finds the slot finds it filled.
        self.devices.put(&slot.into(), device)?;
        if device.ifindex != 0 {
            self.device_slots.put(&device.ifindex, &slot.into())?;
        }
        Ok(())
    }

    /// The heartbeat is not the plan's: it stays.
    fn put_settings(&self, settings: Settings) -> Result<(), MapError> {
        let heartbeat = self.settings.get(&0)?.unwrap_or_default().heartbeat;
        self.settings.put(
            &0,
            &Settings {
                heartbeat,
                ..settings
            },
        )
    }

    fn put_ring(&self, row: u32, ring: &[u32]) -> Result<(), MapError> {
        if !ring.len().is_multiple_of(RING_ROW) {
            return Err(MapError::Kernel {
                map: "RINGS",
                operation: "update",
                source: io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("{} entries are no whole rows", ring.len()),
                ),
            });
        }
        let mut value = Box::new(RingRow {
            backends: [0; RING_ROW],
        });
        for (index, part) in (row..).zip(ring.chunks_exact(RING_ROW)) {
            value.backends.copy_from_slice(part);
            self.rings.put(&index, &value)?;
        }
        Ok(())
    }

    fn read_ring(&self, row: u32, rows: u32) -> Result<Vec<u32>, MapError> {
        let mut ring = Vec::with_capacity(rows as usize * RING_ROW);
        for part in self.rings.range(row, rows)? {
            ring.extend_from_slice(&part.backends);
        }
        Ok(ring)
    }

    fn used_backends(&self) -> Result<BTreeMap<u32, Backend>, MapError> {
        let mut used = BTreeMap::new();
        let mut first = 0;
        while first < self.backends.capacity {
            let block = self.backends.range(first, BACKEND_BLOCK)?;
            let before = used.len();
            used.extend((first..).zip(block).filter(|(_, backend)| backend.epoch != 0));
            // Ids are handed out from the bottom: a whole block without one ends them.
            if used.len() == before {
                break;
            }
            first += BACKEND_BLOCK;
        }
        Ok(used)
    }
}

/// The trie key of a prefix of a service.
pub fn acl_key(service: u32, prefix: IpNet) -> AclKey {
    let prefix = prefix.trunc();
    let bits = match prefix {
        IpNet::V4(v4) => MAPPED_BITS + u32::from(v4.prefix_len()),
        IpNet::V6(v6) => u32::from(v6.prefix_len()),
    };
    AclKey {
        prefix_bits: ACL_SERVICE_BITS + bits,
        data: AclData {
            service,
            addr: prefix.addr().into(),
        },
    }
}

/// The service and prefix of a trie key; `None`: no key that [`acl_key`] makes.
pub fn acl_prefix(key: &AclKey) -> Option<(u32, IpNet)> {
    let bits = key.prefix_bits.checked_sub(ACL_SERVICE_BITS)?;
    let prefix = match IpAddr::from(key.data.addr) {
        IpAddr::V4(v4) if bits >= MAPPED_BITS => {
            IpNet::V4(Ipv4Net::new(v4, (bits - MAPPED_BITS).try_into().ok()?).ok()?)
        }
        IpAddr::V4(v4) => IpNet::V6(Ipv6Net::new(v4.to_ipv6_mapped(), bits.try_into().ok()?).ok()?),
        IpAddr::V6(v6) => IpNet::V6(Ipv6Net::new(v6, bits.try_into().ok()?).ok()?),
    };
    Some((key.data.service, prefix))
}

impl Maps for KernelMaps {
    fn apply(&mut self, op: &MapOp) -> Result<(), MapError> {
        match op {
            MapOp::PutDevice { slot, device } => self.put_device(*slot, device),
            MapOp::PutSnatAddress { index, address } => {
                self.snat_addresses.put(&u32::from(*index), &(*address).into())
            }
            MapOp::PutBackend { id, backend } => self.backends.put(id, backend),
            MapOp::PutTimeouts { service, timeouts } => self.timeouts.put(service, timeouts),
            MapOp::PutAcl {
                service,
                prefix,
                action,
            } => self.acl.put(&acl_key(*service, *prefix), action),
            MapOp::DelAcl { service, prefix } => self.acl.remove(&acl_key(*service, *prefix)).map(drop),
            MapOp::PutRing { row, ring } => self.put_ring(*row, ring),
            MapOp::PutOurs { filter } => self.ours.put(&0, &filter.value()),
            MapOp::PutVip { vip, value } => self.vips.put(&(*vip).into(), value),
            MapOp::PutService { key, service } => self.services.put(key, service),
            MapOp::DelService { key } => self.services.remove(key).map(drop),
            MapOp::DelVip { vip } => self.vips.remove(&(*vip).into()).map(drop),
            MapOp::PutSettings { settings } => self.put_settings(*settings),
        }
    }

    fn dump(&self) -> Result<Dump, MapError> {
        let services: BTreeMap<_, _> = self.services.all()?.into_iter().collect();
        let mut dump = Dump {
            backends: self.used_backends()?,
            acl: self
                .acl
                .walk()?
                .iter()
                .filter_map(|(key, action)| Some((acl_prefix(key)?, *action)))
                .collect(),
            vips: self
                .vips
                .all()?
                .into_iter()
                .map(|(vip, value)| (vip.into(), value))
                .collect(),
            devices: self
                .devices()?
                .into_iter()
                .filter(|(_, d)| d.ifindex != 0)
                .collect(),
            snat_addresses: self
                .snat_addresses
                .range(0, self.snat_addresses.capacity)?
                .into_iter()
                .zip(0_u16..)
                .filter(|(address, _)| *address != Addr16::default())
                .map(|(address, index)| (index, address.into()))
                .collect(),
            settings: Settings {
                heartbeat: 0,
                ..self.settings.get(&0)?.unwrap_or_default()
            },
            ..Dump::default()
        };
        for service in services.values() {
            if let Some(timeouts) = self.timeouts.get(&service.id)? {
                dump.timeouts.insert(service.id, timeouts);
            }
            for (row, mask) in [
                (service.ring_row, service.ring_mask),
                (service.previous_row, service.previous_mask),
            ] {
                if row != NO_RING && !dump.rings.contains_key(&row) {
                    dump.rings
                        .insert(row, self.read_ring(row, mask.saturating_add(1))?);
                }
            }
        }
        dump.services = services;
        Ok(dump)
    }

    fn capacities(&self) -> Capacities {
        Capacities {
            services: self.services.capacity,
            backends: self.backends.capacity,
            ring_rows: self.rings.capacity,
            acl: self.acl.capacity,
            flows4: self.flows4,
            flows6: self.flows6,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acl_keys_round_trip() {
        for text in [
            "10.1.2.0/24",
            "0.0.0.0/0",
            "10.1.2.3/32",
            "2001:db8::/32",
            "::/0",
            "::1/128",
        ] {
            let prefix: IpNet = text.parse().unwrap();
            assert_eq!(acl_prefix(&acl_key(7, prefix)), Some((7, prefix)), "{text}");
        }
        // Host bits do not make another key.
        assert_eq!(
            acl_key(1, "10.1.2.3/8".parse().unwrap()),
            acl_key(1, "10.0.0.0/8".parse().unwrap())
        );
    }
}
