//! Every capacity and boundary number, defined once.
//!
//! Capacities of maps are defaults: the agent's `[limits]` may choose other sizes when the maps are first created.

/// Services (VIP, port, protocol) that fit in `SERVICES`.
pub const DEFAULT_SERVICES: u32 = 1024;
/// Backend records in `BACKENDS`; id 0 is never a backend.
pub const DEFAULT_BACKENDS: u32 = 16_384;
/// Largest configurable number of backend records.
pub const MAX_BACKENDS: u32 = 1 << 17;
/// IPv4 connections at once.
pub const DEFAULT_FLOWS4: u32 = 1 << 18;
/// IPv6 connections at once.
pub const DEFAULT_FLOWS6: u32 = DEFAULT_FLOWS4;
/// Percent of the flows of a table that one service may hold.
pub const DEFAULT_FLOW_SHARE: u32 = 50;
/// Largest configurable number of connections of one family.
pub const MAX_FLOWS: u32 = 1 << 25;

/// Buckets of `FLOWS4` or `FLOWS6` for so many flows: a multiple of `slot::OVERFLOW_BUCKETS`, one bucket of four slots for
/// each flow, which takes two. So the rated load is half of the slots: there fewer than one new flow in a million finds no
/// room, if all others are established (docs/decisions/flow-table.md).
pub const fn flow_buckets(flows: u32) -> u32 {
    let group = crate::slot::OVERFLOW_BUCKETS;
    flows.div_ceil(group) * group
}
/// Rows in `RINGS`, 64 KiB each. A service holds the rows of one ring; a change takes as many again, and gives the old
/// ones back a second later. So 1,000 services of 100 backends need 2,000 rows and some to spare: `ring_rows = 2200`.
pub const DEFAULT_RING_ROWS: u32 = 512;

/// log2 of the entries in one row of `RINGS`.
pub const RING_ROW_BITS: u32 = 14;
/// Entries of one row of `RINGS`: the ring of a service with few backends.
pub const RING_ROW: usize = 1 << RING_ROW_BITS;
/// Rows of the largest ring (2^16 entries).
pub const RING_ROWS_LARGE: u32 = 4;
/// Rows of a ring by backends: from so many on, so many rows, the last that applies. Removing one backend then moves at
/// most 1 % of the survivors' entries on average, up to 500 backends (measured: 0.9 % for 31 on one row, 0.9 % for 127 on
/// two, 0.9 % for 500 on four).
pub const RING_ROWS_BY_BACKENDS: [(usize, u32); 3] = [(0, 1), (32, 2), (128, RING_ROWS_LARGE)];

/// Network devices known to the datapath; slot 0 is the node itself.
pub const MAX_DEVICES: u32 = 256;
/// Source addresses for SNAT, of both families.
pub const MAX_SNAT_ADDRESSES: u32 = 1024;
/// Prefixes of all allow and deny lists together.
pub const MAX_ACL_ENTRIES: u32 = 65_536;
/// Prefixes of the deny list for all services: half of the entries, so that the lists of services find room.
pub const MAX_FIREWALL_PREFIXES: u32 = MAX_ACL_ENTRIES / 2;
/// Clients remembered for client-IP affinity (LRU).
pub const MAX_AFFINITY: u32 = 65_536;
/// Datagrams whose later fragments may still come (LRU).
pub const MAX_FRAGMENTS: u32 = 16_384;
/// Bytes of the event ring buffer.
pub const EVENTS_BYTES: u32 = 1 << 18;

/// log2 of the bits in the address filter of `OURS`.
pub const OURS_BITS: u32 = 16;
/// 64-bit words of the address filter in `OURS`.
pub const OURS_WORDS: usize = 1 << (OURS_BITS - 6);
/// 64-bit words of the port filter in `OURS`: a bit for each port of TCP, then of UDP.
pub const PORT_WORDS: usize = 2 << (16 - 6);

/// log2 of the bits in the filter of routed VIPs in `OURS`.
pub const ROUTED_BITS: u32 = 10;
/// 64-bit words of the filter of routed VIPs in `OURS`.
pub const ROUTED_WORDS: usize = 1 << (ROUTED_BITS - 6);

/// Mark of packets that a TC program has sent on, unless configured.
pub const DEFAULT_MARK: u32 = 0x0800_0000;
/// Seconds without a sign of life of the agent after which the kernel's own neighbour table is asked for next hops.
pub const AGENT_SILENT_S: u32 = 10;
/// Seconds for which the first fragment of a datagram is remembered.
pub const FRAGMENT_AGE_S: u32 = 30;
/// How often a later fragment is sent round to wait for the first one.
pub const FRAGMENT_ROUNDS: u32 = 8;
/// Windows of `RATES` in a second.
pub const RATE_WINDOWS: u32 = 10;
/// What `RATES` allows one CPU in one window, by `maps::limited`: a thousand errors and RSTs a second, which is Linux' own
/// limit, and ten thousand turns of fragments.
pub const RATE_LIMITS: [u32; 3] = [100, 100, 1000];

/// First SNAT port unless configured: below the default `net.ipv4.ip_local_port_range` (32768–60999).
pub const DEFAULT_SNAT_PORT_MIN: u16 = 1_024;
/// Last SNAT port unless configured.
pub const DEFAULT_SNAT_PORT_MAX: u16 = 32_767;
/// Ports tried for a new flow before it is dropped as `snat_ports_exhausted`.
pub const SNAT_PROBES: u32 = 8;
/// Other backends tried when a SYN goes unanswered or is refused.
pub const MAX_RESTEERS: u32 = 3;
/// Further MACs of one device: its master's, and unicast addresses that somebody has added to it.
pub const DEVICE_MACS: usize = 6;
/// IPv6 extension headers looked through.
pub const MAX_IPV6_EXTENSIONS: usize = 6;

/// Default idle timeout of an established TCP flow, seconds: longer than the two hours after which Linux sends its first
/// keep-alive, and than the 2 h 4 min that RFC 5382 (REQ-5) asks for.
pub const DEFAULT_TCP_ESTABLISHED_S: u32 = 7_800;
/// Default timeout of a TCP flow whose handshake is not finished, seconds.
pub const DEFAULT_TCP_SYN_S: u32 = 60;
/// Mask of a slot's index in a slot id.
pub const SLOTS_MASK: u32 = crate::slot::SLOTS as u32 - 1;
/// log2 of [`STAMP_TICKS`].
pub const STAMP_SHIFT: u32 = 5;
/// Ticks between two stamps of a slot: a third of a second at the slowest rate (HZ=100).
pub const STAMP_TICKS: u32 = 1 << STAMP_SHIFT;
/// Idle time that a TCP flow keeps after a RST of one side alone, seconds: the RST may have been somebody else's guess.
pub const RESET_IDLE_S: u32 = 120;
/// Default timeout of a TCP flow closed by both sides, seconds: for so long Linux keeps a closed connection in
/// TIME-WAIT, and its source port must not come back before.
pub const DEFAULT_TCP_CLOSING_S: u32 = 60;
/// Default idle timeout of a UDP flow, seconds: what RFC 4787 (REQ-5) recommends.
pub const DEFAULT_UDP_S: u32 = 300;
/// Longest configurable timeout, seconds: the flow clock is 32 bits of jiffies and compares by wrapping.
pub const MAX_TIMEOUT_S: u32 = 7 * 86_400;
/// Default time for which a service from labels is kept after its last container, seconds.
pub const DEFAULT_REMEMBER_S: u32 = 600;
/// Default drain deadline of a removed backend, seconds.
pub const DEFAULT_DRAIN_S: u32 = 30;

/// Oldest kernel release that is supported: (major, minor).
pub const KERNEL_FLOOR: (u32, u32) = (6, 1);
