//! Keys and values of every BPF map: `repr(C)`, no implicit padding, sizes asserted.
//!
//! Byte order is in the types ([`Be16`], [`Addr4`], [`Addr16`], [`Hop`]); plain integers are host order.
//! IPv4 addresses outside the flow tables are written IPv4-mapped. Times are the low 32 bits of the kernel's
//! jiffies, compared by wrapping subtraction.

use crate::{
    addr::{Addr4, Addr16, Be16, Hop},
    counter::{COUNTER_SLOTS, DROP_SLOTS},
    flow::Address,
    limits::{OURS_WORDS, PORT_WORDS, RING_ROW},
};

/// Version of the set of maps; part of the pin path. Raised when maps cannot be adopted any more.
pub const SCHEMA: u32 = 1;
/// Version of the layouts below, compared before pinned maps are adopted. Raise it with every change here.
pub const ABI_VERSION: u32 = 3;

/// The only value of `META`: what the pinned maps are.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// [`SCHEMA`] of the agent that made the maps; 0 until they are complete.
    pub schema: u32,
    /// [`ABI_VERSION`] of that agent.
    pub abi: u32,
    /// Ticks of the flow clock (jiffies) per second.
    pub hz: u32,
    /// Explicit padding.
    pub _pad: u32,
}

/// The only value of `SETTINGS`: what the programs need to know of the configuration.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// First port for SNAT, host order.
    pub snat_port_min: u16,
    /// Last port for SNAT, host order, inclusive.
    pub snat_port_max: u16,
    /// One of so many new flows is told to `EVENTS`; 0 is off.
    pub event_sample: u32,
    /// Interface index of the loopback device, towards processes of the node.
    pub loopback_ifindex: u32,
    /// Explicit padding.
    pub _pad: u32,
}

/// Key of `SERVICES`: what a packet must match to be balanced.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    /// Virtual IP.
    pub vip: Addr16,
    /// Port; 0 is every port that has no service of its own.
    pub port: Be16,
    /// IP protocol number (6 or 17).
    pub proto: u16,
}

/// Value of `SERVICES`. One update of it commits a new ring.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Index into `TIMEOUTS` and `SERVICE_STATS`, and the ACL's and affinity's key.
    pub id: u32,
    /// [`service_flags`].
    pub flags: u32,
    /// Raised by one with every ring that is committed.
    pub generation: u32,
    /// First row of the ring in `RINGS`, or [`NO_RING`].
    pub ring_row: u32,
    /// Rows of the ring minus one: 0, or a power of two minus one.
    pub ring_mask: u32,
    /// First row of the ring before, or [`NO_RING`]. Its rows are not reused before a second has passed.
    pub previous_row: u32,
    /// Rows of the ring before, minus one.
    pub previous_mask: u32,
    /// Backends with the most entries in the ring, 0 for none: where a re-steer goes when the ring offers it only the
    /// backend that failed.
    pub alternates: [u32; 2],
}

/// `ring_row` of a service without a ring: no backend takes new flows.
pub const NO_RING: u32 = u32::MAX;

/// Bits of [`Service::flags`].
pub mod service_flags {
    /// Flows of one client go to one backend.
    pub const AFFINITY: u32 = 1 << 0;
    /// `ACL` has entries of this service.
    pub const ACL: u32 = 1 << 1;
    /// A client without a matching ACL entry is refused (there is an allow list).
    pub const ACL_DEFAULT_DENY: u32 = 1 << 2;
    /// SNAT even towards local containers.
    pub const SNAT_ALWAYS: u32 = 1 << 3;
    /// Never SNAT: replies are routed back through this node by other means.
    pub const SNAT_NEVER: u32 = 1 << 4;
    /// TCP packets of unknown flows are answered by RST instead of silence.
    pub const RESET_UNKNOWN: u32 = 1 << 5;
    /// A SYN that finds no backend is answered by RST instead of silence.
    pub const REFUSE_WHEN_EMPTY: u32 = 1 << 6;
    /// `ACL` has entries of [`EVERY_SERVICE`](super::EVERY_SERVICE), which deny before the service's own are asked.
    pub const FIREWALL: u32 = 1 << 10;
}

/// Value of `TIMEOUTS`, by service id: idle times in ticks of the flow clock.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP, handshake done.
    pub established: u32,
    /// TCP, no SYN-ACK yet.
    pub syn: u32,
    /// TCP, closed by both sides or reset.
    pub closing: u32,
    /// UDP.
    pub udp: u32,
}

/// One row of `RINGS`: backend ids, 0 for none.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RingRow {
    /// Backend ids.
    pub backends: [u32; RING_ROW],
}

/// Value of `BACKENDS`, by backend id. The address, port and service of an id never change within one epoch.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backend {
    /// Next hop. Without a MAC the kernel's neighbour table decides; the slot is right all the same.
    pub hop: Hop,
    /// Address.
    pub addr: Addr16,
    /// Port; 0 keeps the port the client used.
    pub port: Be16,
    /// [`backend_flags`].
    pub flags: u16,
    /// [`backend_state`].
    pub state: u32,
    /// Tells this user of the id from earlier ones.
    pub epoch: u32,
    /// Id of the service it belongs to.
    pub service: u32,
    /// First of its source addresses in `SNAT_ADDRESSES`.
    pub snat_first: u16,
    /// How many source addresses there are.
    pub snat_count: u16,
    /// Explicit padding.
    pub _pad: u32,
}

/// Values of [`Backend::state`].
pub mod backend_state {
    /// Unused, or gone: its flows are reset (TCP) or moved (UDP).
    pub const DEAD: u32 = 0;
    /// Takes new flows.
    pub const ACTIVE: u32 = 1;
    /// Takes no new flows; old ones go on.
    pub const DRAINING: u32 = 2;
}

/// Bits of [`Backend::flags`].
pub mod backend_flags {
    /// A container on a bridge of this node: replies come back by themselves, so DNAT alone will do.
    pub const LOCAL: u16 = 1 << 0;
    /// An address of this node: delivered up the stack, the reply is caught on its way out.
    pub const NODE: u16 = 1 << 1;
}

/// Value of `DEVICES`, by slot. Slot 0 stands for the node's own processes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Interface index; 0: slot unused.
    pub ifindex: u32,
    /// Largest IP packet, bytes.
    pub mtu: u32,
    /// Bytes 0–3 of its MAC as a raw word.
    pub mac_high: u32,
    /// Bytes 4–5 of its MAC as a raw word.
    pub mac_low: u16,
    /// [`device_flags`].
    pub flags: u16,
    /// Its name, zeros behind it. It stays when the device goes: one that comes under this name gets the slot again.
    pub name: [u8; DEVICE_NAME],
}

/// Bytes of a device's name and its zeros (IFNAMSIZ).
pub const DEVICE_NAME: usize = 16;

/// Bits of [`Device::flags`].
pub mod device_flags {
    /// An XDP program of another device may redirect frames to this one: its driver takes them.
    pub const XDP: u16 = 1 << 0;
    /// A bridge: containers on it reach each other without passing our programs.
    pub const BRIDGE: u16 = 1 << 1;
    /// Our XDP program is on this device and may send frames back out of it.
    pub const XDP_TX: u16 = 1 << 2;
    /// With [`XDP`]: frames of several buffers, too.
    pub const XDP_FRAGS: u16 = 1 << 3;
}

/// Value of `VIPS`: an address that belongs to services.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vip {
    /// [`vip_flags`].
    pub flags: u32,
}

/// Bits of [`Vip::flags`].
pub mod vip_flags {
    /// Answer ICMP echo. Not set for the node's own address, whose stack answers.
    pub const ECHO: u32 = 1 << 0;
}

/// Value of `FLOWS4` and `FLOWS6`: what to do with a packet of this direction.
///
/// The two directions of a connection are two entries. The key of the other one is
/// `{src: dst, dst: src, sport: dport, dport: sport}` of this value, so it is not stored.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow<A: Address> {
    /// Source address after translation.
    pub src: A,
    /// Destination address after translation.
    pub dst: A,
    /// Source port after translation.
    pub sport: Be16,
    /// Destination port after translation.
    pub dport: Be16,
    /// One's complement difference that the new addresses make (RFC 1624), folded.
    pub addr_delta: u16,
    /// One's complement difference that the new ports make, folded.
    pub port_delta: u16,
    /// Forward: the client's next hop as last seen. Reverse: where replies go.
    pub hop: Hop,
    /// Backend id.
    pub backend: u32,
    /// The backend's epoch when it was chosen.
    pub epoch: u32,
    /// Service id.
    pub service: u32,
    /// [`flow_state`].
    pub state: u32,
    /// Flow clock when a packet of this direction was last stamped (at most once in 128 ticks).
    pub last_seen: u32,
    /// Flow clock when the flow was created.
    pub created: u32,
    /// Makes an IPv4 entry fill two cache lines of the hash table exactly.
    pub _pad: A::Pad,
}

/// Value of `FLOWS4`.
pub type Flow4 = Flow<Addr4>;
/// Value of `FLOWS6`.
pub type Flow6 = Flow<Addr16>;

/// Bits of [`Flow::state`]. Both directions carry the same bits but for `REVERSE`.
///
/// BPF has no 32-bit atomics in Rust, so each byte has one writer: the creator (bits 0–7), packets of the backend
/// (8–15), packets of the client (16–23).
pub mod flow_state {
    /// This entry translates replies.
    pub const REVERSE: u32 = 1 << 0;
    /// The source address is translated too.
    pub const SNAT: u32 = 1 << 1;
    /// Shift of the number of re-steers so far.
    pub const TRIES_SHIFT: u32 = 4;
    /// Mask of the number of re-steers, unshifted.
    pub const TRIES_MASK: u32 = 0xf;
    /// Bits that packets of the backend write.
    pub const BY_BACKEND: u32 = 0xff << 8;
    /// The backend has answered: SYN-ACK (TCP) or any packet (UDP).
    pub const ESTABLISHED: u32 = 1 << 8;
    /// The backend refused the SYN; the next SYN goes elsewhere.
    pub const REFUSED: u32 = 1 << 9;
    /// The backend has sent FIN.
    pub const FIN_BACKEND: u32 = 1 << 10;
    /// The backend has sent RST, and nothing else since.
    pub const RESET_BACKEND: u32 = 1 << 11;
    /// Bits that packets of the client write.
    pub const BY_CLIENT: u32 = 0xff << 16;
    /// The client has sent FIN.
    pub const FIN_CLIENT: u32 = 1 << 16;
    /// The client has sent RST, and nothing else since.
    pub const RESET_CLIENT: u32 = 1 << 17;
    /// Either side has sent RST.
    pub const RESET: u32 = RESET_BACKEND | RESET_CLIENT;
}

/// Key of `AFFINITY`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AffinityKey {
    /// Client address.
    pub client: Addr16,
    /// Service id.
    pub service: u32,
}

/// Value of `AFFINITY`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// Backend id.
    pub backend: u32,
    /// Its epoch.
    pub epoch: u32,
}

/// Key of `FRAGMENTS` (RFC 791, RFC 8200).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// Source address.
    pub src: Addr16,
    /// Destination address.
    pub dst: Addr16,
    /// Identification, raw memory word (IPv4: 16 bits).
    pub id: u32,
    /// IP protocol number.
    pub proto: u32,
}

/// Value of `FRAGMENTS`: the ports of the first fragment.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentPorts {
    /// Source port.
    pub sport: Be16,
    /// Destination port.
    pub dport: Be16,
}

/// Data of an `ACL` key, after the prefix length (bits, the 32 of `service` included).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AclData {
    /// Service id (whole, so its byte order does not matter).
    pub service: u32,
    /// Client prefix, IPv4-mapped.
    pub addr: Addr16,
}

/// Service id of the `ACL` entries that hold for every service. No service has it.
pub const EVERY_SERVICE: u32 = 0;
/// `ACL` value: the client may use the service.
pub const ACL_ALLOW: u32 = 1;
/// `ACL` value: the client may not.
pub const ACL_DENY: u32 = 2;

/// Value of `BACKEND_STATS` (per CPU).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendStats {
    /// Packets from clients.
    pub packets_in: u64,
    /// IP bytes from clients.
    pub bytes_in: u64,
    /// Packets to clients.
    pub packets_out: u64,
    /// IP bytes to clients.
    pub bytes_out: u64,
    /// Flows created.
    pub flows: u64,
    /// SYNs it answered by RST or an ICMP error.
    pub refused: u64,
    /// SYNs taken away from it.
    pub resteered: u64,
    /// Flows whose handshake it finished.
    pub established: u64,
}

/// Value of `SERVICE_STATS` (per CPU).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceStats {
    /// Flows created.
    pub flows: u64,
    /// Dropped packets by [`DropReason`](crate::counter::DropReason).
    pub drops: [u64; DROP_SLOTS],
}

impl Default for ServiceStats {
    fn default() -> Self {
        Self {
            flows: 0,
            drops: [0; DROP_SLOTS],
        }
    }
}

/// The only value of `STATS` (per CPU), by [`Counter`](crate::counter::Counter).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Counters.
    pub counters: [u64; COUNTER_SLOTS],
}

/// The only value of `DROPS` (per CPU), by [`DropReason`](crate::counter::DropReason).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drops {
    /// Dropped packets.
    pub reasons: [u64; DROP_SLOTS],
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            counters: [0; COUNTER_SLOTS],
        }
    }
}

impl Default for Drops {
    fn default() -> Self {
        Self {
            reasons: [0; DROP_SLOTS],
        }
    }
}

/// The only value of `OURS`: filters over the addresses that packets of ours carry, and over the ports of services.
///
/// A clear bit of both a packet's addresses proves that it is not ours; a clear bit of its destination port proves that
/// no service could open a flow for it. A set bit proves nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ours {
    /// Bits of addresses by `flow::ours_bit`.
    pub words: [u64; OURS_WORDS],
    /// Bits of ports by `flow::port_bit`; all of them while a service has every port.
    pub ports: [u64; PORT_WORDS],
}

/// One record of `EVENTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// Client address.
    pub client: Addr16,
    /// Virtual IP.
    pub vip: Addr16,
    /// Client port.
    pub client_port: Be16,
    /// Service port.
    pub vip_port: Be16,
    /// [`event_kind`].
    pub kind: u32,
    /// Backend id, or 0.
    pub backend: u32,
    /// IP protocol number.
    pub proto: u32,
    /// Drop reason index when `kind` is [`event_kind::DROP`].
    pub reason: u32,
    /// Service id.
    pub service: u32,
}

/// Values of [`Event::kind`].
pub mod event_kind {
    /// A flow was created.
    pub const NEW_FLOW: u32 = 1;
    /// A packet of a service was dropped.
    pub const DROP: u32 = 2;
    /// A SYN went to another backend.
    pub const RESTEER: u32 = 3;
}

const _: () = {
    assert!(size_of::<Meta>() == 16);
    assert!(size_of::<Settings>() == 16);
    assert!(size_of::<ServiceKey>() == 20);
    assert!(size_of::<Service>() == 36);
    assert!(size_of::<Backend>() == 48);
    assert!(size_of::<Device>() == 32);
    assert!(size_of::<Flow4>() == 64);
    assert!(size_of::<Flow6>() == 72);
    assert!(size_of::<AffinityKey>() == 20);
    assert!(size_of::<FragmentKey>() == 40);
    assert!(size_of::<AclData>() == 20);
    assert!(size_of::<Event>() == 56);
};

#[cfg(feature = "user")]
mod pod {
    use super::*;
    use crate::flow::{FlowKey4, FlowKey6};

    macro_rules! pod {
        ($($type:ty),+ $(,)?) => {
            // SAFETY: `repr(C)` or `repr(transparent)` over integers; sizes above leave no implicit padding.
            $(unsafe impl aya::Pod for $type {})+
        };
    }
    pod!(
        Meta,
        Settings,
        ServiceKey,
        Service,
        Timeouts,
        RingRow,
        Backend,
        Device,
        Vip,
        Flow4,
        Flow6,
        FlowKey4,
        FlowKey6,
        AffinityKey,
        Affinity,
        FragmentKey,
        FragmentPorts,
        AclData,
        BackendStats,
        ServiceStats,
        Stats,
        Drops,
        Ours,
        Event,
        Addr16,
        Addr4,
    );
}
