//! The kernel side as the reconciler sees it: a few map operations behind a trait.

pub mod access;
pub mod adopt;
pub mod announce;
pub mod announcements;
pub mod attach;
pub mod batch;
pub mod bpf;
pub mod counters;
pub mod detach;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
pub mod features;
pub mod filter;
pub mod flow_table;
pub mod flows;
pub mod frames;
pub mod heartbeat;
pub mod load;
pub mod lock;
pub mod net;
pub mod netlink;
pub mod object;
pub mod preflight;
pub mod shape;
pub mod slots;
pub mod state;
pub mod sweep;
pub mod sysctl;
pub mod uplinks;
pub mod xdp;

use std::{collections::BTreeMap, net::IpAddr};

pub use filter::Filter;
use lb_common::maps;

/// One change of one map entry. Applying it twice is applying it once.
#[derive(Clone, Debug, PartialEq)]
pub enum MapOp {
    /// `DEVICES` and its index by interface.
    PutDevice { slot: u16, device: maps::Device },
    /// `SNAT_ADDRESSES`.
    PutSnatAddress { index: u16, address: IpAddr },
    /// `BACKENDS`.
    PutBackend { id: u32, backend: maps::Backend },
    /// `TIMEOUTS`.
    PutTimeouts { service: u32, timeouts: maps::Timeouts },
    /// `ACL`; the value is `maps::ACL_ALLOW` or `maps::ACL_DENY`.
    PutAcl {
        service: u32,
        prefix: ipnet::IpNet,
        action: u32,
    },
    /// Removes from `ACL`; a missing key is success.
    DelAcl { service: u32, prefix: ipnet::IpNet },
    /// Consecutive rows of `RINGS` from `row` on; `ring.len()` is a multiple of a row.
    PutRing { row: u32, ring: Vec<u32> },
    /// `OURS`: the whole of it.
    PutOurs { filter: Filter },
    /// `VIPS`.
    PutVip { vip: IpAddr, value: maps::Vip },
    /// `SERVICES`: this commits.
    PutService {
        key: maps::ServiceKey,
        service: maps::Service,
    },
    /// Removes from `SERVICES`; a missing key is success.
    DelService { key: maps::ServiceKey },
    /// Removes from `VIPS`; a missing key is success.
    DelVip { vip: IpAddr },
    /// `SETTINGS`.
    PutSettings { settings: maps::Settings },
}

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The map is full.
    #[error(
        "map {map} is full ({capacity} entries): raise `limits.{setting}` and run `weir detach` before the next start"
    )]
    Full {
        map: &'static str,
        capacity: u32,
        setting: &'static str,
    },
    /// Anything else the kernel said.
    #[error("map {map}: {operation} failed: {source}")]
    Kernel {
        map: &'static str,
        operation: &'static str,
        source: std::io::Error,
    },
}

/// What is in the maps that the agent writes, read back. Empty entries (unused backend ids, zero rings) are left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dump {
    /// `SERVICES`.
    pub services: BTreeMap<maps::ServiceKey, maps::Service>,
    /// `BACKENDS` by id, those with a non-zero epoch.
    pub backends: BTreeMap<u32, maps::Backend>,
    /// The rings that `services` name, by first row.
    pub rings: BTreeMap<u32, Vec<u32>>,
    /// `TIMEOUTS` of the services.
    pub timeouts: BTreeMap<u32, maps::Timeouts>,
    /// `ACL` by (service, prefix).
    pub acl: BTreeMap<(u32, ipnet::IpNet), u32>,
    /// `VIPS`.
    pub vips: BTreeMap<IpAddr, maps::Vip>,
    /// `DEVICES` by slot, those in use.
    pub devices: BTreeMap<u16, maps::Device>,
    /// `SNAT_ADDRESSES` in use by index.
    pub snat_addresses: BTreeMap<u16, IpAddr>,
    /// `SETTINGS`.
    pub settings: maps::Settings,
}

/// Sizes the maps really have (pinned maps keep the sizes they were made with).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Capacities {
    /// `SERVICES`.
    pub services: u32,
    /// `BACKENDS`.
    pub backends: u32,
    /// `RINGS`.
    pub ring_rows: u32,
    /// `ACL`.
    pub acl: u32,
    /// Flows that `FLOWS4` is made for.
    pub flows4: u32,
    /// Flows that `FLOWS6` is made for.
    pub flows6: u32,
}

/// The maps the agent writes. The reconciler owns the only one.
pub trait Maps: Send {
    /// Applies one operation.
    fn apply(&mut self, op: &MapOp) -> Result<(), MapError>;
    /// Reads everything back: at start (adoption) and at every resync.
    fn dump(&self) -> Result<Dump, MapError>;
    /// Sizes.
    fn capacities(&self) -> Capacities;
}

/// Where an address is, seen from this node: what the plan needs to fill a backend record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// One of the node's own addresses.
    Node,
    /// Directly on a bridge of this node (a local container).
    Bridge { slot: u16 },
    /// Elsewhere, by this device; `mac` of the next hop once its neighbour entry is known.
    /// `uplink`: it is beyond a device of `interfaces`, where no container of this node can be.
    Remote {
        slot: u16,
        mac: Option<[u8; 6]>,
        uplink: bool,
    },
    /// There is no route.
    Unroutable,
}

/// The network as the kernel describes it, a value that `datapath::net` publishes and the plan reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Devices with a datapath program, by slot (1..); slot 0 is the node itself.
    pub devices: BTreeMap<u16, DeviceInfo>,
    /// Place of every backend address that was asked for.
    pub places: BTreeMap<IpAddr, Place>,
    /// The node's own addresses.
    pub node_addresses: Vec<IpAddr>,
    /// Interface index of `lo`.
    pub loopback_ifindex: u32,
}

/// What XDP may send through a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XdpSend {
    /// Our program is on it and may send frames back.
    pub back: bool,
    /// Programs of other devices may redirect frames to it.
    pub redirect: bool,
    /// Those may consist of several buffers.
    pub frags: bool,
}

/// One device of [`Topology`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Interface name.
    pub name: String,
    /// Interface index.
    pub ifindex: u32,
    /// MAC.
    pub mac: [u8; 6],
    /// MTU, bytes.
    pub mtu: u32,
    /// What XDP may send through it.
    pub xdp: XdpSend,
    /// It is a bridge.
    pub bridge: bool,
    /// It is named in `interfaces`.
    pub uplink: bool,
    /// It has VLAN devices and takes the tags off before XDP sees a frame.
    pub vlan_offload: bool,
    /// MACs besides its own whose frames are for this node: its master's, and further unicast addresses.
    pub further_macs: Vec<[u8; 6]>,
    /// The node's addresses on it: used for SNAT when none are configured, always so on bridges.
    pub addresses: Vec<IpAddr>,
}
