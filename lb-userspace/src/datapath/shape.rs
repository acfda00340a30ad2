//! What every pinned map must look like: compared with the kernel's word before a map is adopted, because the
//! loader takes whatever is pinned under the right name.

use aya::maps::MapType;
use lb_common::{
    addr::Addr16,
    limits, maps,
    slot::{Bucket4, Bucket6, TableSettings},
};

use super::Capacities;
use limits::flow_buckets;

/// Key of `ACL` as the kernel's prefix trie wants it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AclKey {
    /// Significant bits of `data`, host order; the 32 of the service are counted.
    pub prefix_bits: u32,
    /// Service and client prefix.
    pub data: maps::AclData,
}

// SAFETY: `repr(C)` over `u32`s only: no padding, every bit pattern is valid.
unsafe impl aya::Pod for AclKey {}

/// Which of the configured sizes a map has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// As written in the kernel object.
    Fixed,
    /// `limits.services`.
    Services,
    /// `limits.backends`.
    Backends,
    /// `limits.ring_rows`.
    RingRows,
    /// `limits.acl`.
    Acl,
    /// `limits.flows4`.
    Flows4,
    /// `limits.flows6`.
    Flows6,
}

impl Size {
    /// The configured number of entries; `None`: the object decides.
    pub fn of(self, limits: &Capacities) -> Option<u32> {
        match self {
            Self::Fixed => None,
            Self::Services => Some(limits.services),
            Self::Backends => Some(limits.backends),
            Self::RingRows => Some(limits.ring_rows),
            Self::Acl => Some(limits.acl),
            Self::Flows4 => Some(flow_buckets(limits.flows4)),
            Self::Flows6 => Some(flow_buckets(limits.flows6)),
        }
    }

    /// The key of `[limits]` to raise when such a map is full.
    pub fn setting(self) -> &'static str {
        match self {
            Self::Fixed => "services",
            Self::Services => "services",
            Self::Backends => "backends",
            Self::RingRows => "ring_rows",
            Self::Acl => "acl",
            Self::Flows4 => "flows4",
            Self::Flows6 => "flows6",
        }
    }
}

/// One pinned map.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Name in the object and of the pin.
    pub name: &'static str,
    /// Map type.
    pub kind: MapType,
    /// Key size, bytes.
    pub key: u32,
    /// Value size, bytes (of one CPU).
    pub value: u32,
    /// Entries.
    pub size: Size,
}

const fn shape<K, V>(name: &'static str, kind: MapType, size: Size) -> Shape {
    Shape {
        name,
        kind,
        key: size_of::<K>() as u32,
        value: size_of::<V>() as u32,
        size,
    }
}

/// Every map that is pinned. `SCRATCH` is not: nothing in it outlives a packet.
pub const SHAPES: &[Shape] = &[
    shape::<maps::ServiceKey, maps::Service>("SERVICES", MapType::Hash, Size::Services),
    shape::<u32, maps::RingRow>("RINGS", MapType::Array, Size::RingRows),
    shape::<u32, maps::Backend>("BACKENDS", MapType::Array, Size::Backends),
    shape::<u32, maps::BackendStats>("BACKEND_STATS", MapType::PerCpuArray, Size::Backends),
    shape::<u32, maps::ServiceStats>("SERVICE_STATS", MapType::PerCpuArray, Size::Services),
    shape::<u32, maps::Timeouts>("TIMEOUTS", MapType::Array, Size::Services),
    shape::<u32, TableSettings>("TABLE", MapType::Array, Size::Fixed),
    shape::<u32, Bucket4>("FLOWS4", MapType::Array, Size::Flows4),
    shape::<u32, Bucket6>("FLOWS6", MapType::Array, Size::Flows6),
    shape::<u32, maps::ServiceFlows>("SERVICE_FLOWS", MapType::Array, Size::Services),
    shape::<AclKey, u32>("ACL", MapType::LpmTrie, Size::Acl),
    shape::<Addr16, maps::Vip>("VIPS", MapType::Hash, Size::Services),
    shape::<u32, maps::Device>("DEVICES", MapType::Array, Size::Fixed),
    shape::<u32, u32>("DEVICE_SLOTS", MapType::Hash, Size::Fixed),
    shape::<u32, Addr16>("SNAT_ADDRESSES", MapType::Array, Size::Fixed),
    shape::<maps::AffinityKey, maps::Affinity>("AFFINITY", MapType::LruHash, Size::Fixed),
    shape::<maps::FragmentKey, maps::FragmentPorts>("FRAGMENTS", MapType::LruHash, Size::Fixed),
    shape::<u32, maps::Cursor>("CURSORS", MapType::Array, Size::Backends),
    shape::<u32, maps::Ours>("OURS", MapType::Array, Size::Fixed),
    shape::<u32, maps::Settings>("SETTINGS", MapType::Array, Size::Fixed),
    shape::<u32, maps::Stats>("STATS", MapType::PerCpuArray, Size::Fixed),
    shape::<u32, maps::Drops>("DROPS", MapType::PerCpuArray, Size::Fixed),
    shape::<(), ()>("EVENTS", MapType::RingBuf, Size::Fixed),
    shape::<u32, u32>("EARLIER", MapType::ProgramArray, Size::Fixed),
    shape::<u32, maps::Meta>("META", MapType::Array, Size::Fixed),
];

/// The shape of a map by name.
pub fn find(name: &str) -> Option<&'static Shape> {
    SHAPES.iter().find(|shape| shape.name == name)
}

/// Sizes when nothing is configured.
pub const DEFAULT_LIMITS: Capacities = Capacities {
    services: limits::DEFAULT_SERVICES,
    backends: limits::DEFAULT_BACKENDS,
    ring_rows: limits::DEFAULT_RING_ROWS,
    acl: limits::MAX_ACL_ENTRIES,
    flows4: limits::DEFAULT_FLOWS4,
    flows6: limits::DEFAULT_FLOWS6,
};
