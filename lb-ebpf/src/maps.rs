//! Every map: who writes it, who reads it, what happens when it is full.
//!
//! Sizes here are the defaults of `lb_common::limits`; the agent may set others when it first loads the programs.

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, RingBuf},
    macros::btf_map,
};
use lb_common::{
    addr::{Addr4, Addr16},
    limits,
    maps::{
        AclData, Affinity, AffinityKey, Backend, BackendStats, Cursor, Device, Drops, Event, FragmentKey,
        FragmentPorts, Meta, Ours, Rate, RingRow, Service, ServiceFlows, ServiceKey, ServiceStats, Settings,
        Stats, Timeouts, Vip, limited,
    },
    slot::{Bucket4, Bucket6, TableSettings},
};
use lb_ebpf::tables::Scratch;

/// The agent maps the flow tables into its memory.
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

/// Agent writes once. What the pinned maps are, and how fast the flow clock ticks.
#[btf_map]
pub static META: Array<Meta, 1> = Array::new();

/// Agent writes, programs read.
#[btf_map]
pub static SETTINGS: Array<Settings, 1> = Array::new();

/// Agent writes, programs read: one bit test spares foreign packets every look-up.
#[btf_map]
pub static OURS: Array<Ours, 1> = Array::new();

/// Agent writes, programs read. Full: the agent rejects the newest service by name.
#[btf_map]
pub static SERVICES: HashMap<ServiceKey, Service, { limits::DEFAULT_SERVICES as usize }> = HashMap::new();

/// Agent writes, programs read.
#[btf_map]
pub static TIMEOUTS: Array<Timeouts, { limits::DEFAULT_SERVICES as usize }> = Array::new();

/// Agent writes, programs read.
#[btf_map]
pub static VIPS: HashMap<Addr16, Vip, { limits::DEFAULT_SERVICES as usize }> = HashMap::new();

/// Agent writes rows that no service refers to, programs read. No free row: the agent rejects the newest service.
#[btf_map]
pub static RINGS: Array<RingRow, { limits::DEFAULT_RING_ROWS as usize }> = Array::new();

/// Agent writes, programs read. No free id: the agent rejects the newest backend.
#[btf_map]
pub static BACKENDS: Array<Backend, { limits::DEFAULT_BACKENDS as usize }> = Array::new();

/// Agent writes, programs read.
#[btf_map]
pub static DEVICES: Array<Device, { limits::MAX_DEVICES as usize }> = Array::new();

/// Agent writes, programs read: interface index → slot of `DEVICES`.
#[btf_map]
pub static DEVICE_SLOTS: HashMap<u32, u32, { limits::MAX_DEVICES as usize }> = HashMap::new();

/// Agent writes, programs read.
#[btf_map]
pub static SNAT_ADDRESSES: Array<Addr16, { limits::MAX_SNAT_ADDRESSES as usize }> = Array::new();

/// Agent writes, programs read. Full: the agent rejects the service whose list does not fit.
#[btf_map]
pub static ACL: LpmTrie<AclData, u32, { limits::MAX_ACL_ENTRIES as usize }> = LpmTrie::new();

/// Agent writes once: the key of the flow table's hash, and how many buckets there are.
#[btf_map]
pub static TABLE: Array<TableSettings, 1> = Array::new();

/// Programs write, the agent reads and ends flows: both directions of every flow (`lb_common::slot`). Full: a new flow
/// takes the place of one that has expired, is closed or half-open; of established ones only, it is dropped as
/// `flow_table_full`.
#[btf_map]
pub static FLOWS4: Array<Bucket4, { limits::flow_buckets(limits::DEFAULT_FLOWS4) as usize }, MMAPABLE> =
    Array::new();

/// See [`FLOWS4`].
#[btf_map]
pub static FLOWS6: Array<Bucket6, { limits::flow_buckets(limits::DEFAULT_FLOWS6) as usize }, MMAPABLE> =
    Array::new();

/// Programs write, agent puts right, by service id: flows that cannot be evicted.
#[btf_map]
pub static SERVICE_FLOWS: Array<ServiceFlows, { limits::DEFAULT_SERVICES as usize }, MMAPABLE> = Array::new();

/// Programs write and read. Full: the least recently used client is forgotten and the ring decides.
#[btf_map]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity, { limits::MAX_AFFINITY as usize }> = LruHashMap::new();

/// Programs write and read. Full: the oldest datagram's later fragments pass as foreign.
#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts, { limits::MAX_FRAGMENTS as usize }> =
    LruHashMap::new();

/// Programs write: whose turn it is among the SNAT sources, by backend.
#[btf_map]
pub static CURSORS: Array<Cursor, { limits::DEFAULT_BACKENDS as usize }> = Array::new();

/// Programs' own: the kernel's answer about a next hop, off the stack.
#[btf_map]
pub static FIB: PerCpuArray<[u32; 16], 1> = PerCpuArray::new();

/// Programs' own: how often they answered strangers of late.
#[btf_map]
pub static RATES: PerCpuArray<Rate, { limited::COUNT as usize }> = PerCpuArray::new();

/// Programs write, agent reads.
#[btf_map]
pub static STATS: PerCpuArray<Stats, 1> = PerCpuArray::new();

/// Programs write, agent reads.
#[btf_map]
pub static DROPS: PerCpuArray<Drops, 1> = PerCpuArray::new();

/// Programs write, agent reads, by backend id.
#[btf_map]
pub static BACKEND_STATS: PerCpuArray<BackendStats, { limits::DEFAULT_BACKENDS as usize }> =
    PerCpuArray::new();

/// Programs write, agent reads, by service id.
#[btf_map]
pub static SERVICE_STATS: PerCpuArray<ServiceStats, { limits::DEFAULT_SERVICES as usize }> =
    PerCpuArray::new();

/// Programs write, agent reads. Full: the event is lost, the packet is not.
#[btf_map]
pub static EVENTS: RingBuf<Event, { limits::EVENTS_BYTES as usize }> = RingBuf::new();

/// Agent writes: the TC programs of the maps that are being adopted, by `maps::earlier`; empty at other times.
#[btf_map]
pub static EARLIER: ProgramArray<2> = ProgramArray::new();

/// Programs' own: the packet at hand and the entries of a new flow, off the stack.
#[btf_map]
pub static SCRATCH4: PerCpuArray<Scratch<Addr4>, 1> = PerCpuArray::new();

/// See [`SCRATCH4`].
#[btf_map]
pub static SCRATCH6: PerCpuArray<Scratch<Addr16>, 1> = PerCpuArray::new();

/// Programs' own: what is written here and read back, the verifier takes for any word.
#[btf_map]
pub static OPAQUE: PerCpuArray<u64, 1> = PerCpuArray::new();
