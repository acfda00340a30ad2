//! Keys and values of every BPF map: `repr(C)`, no implicit padding, sizes asserted.
//!
//! Byte order is in the types ([`Be16`], [`Addr4`], [`Addr16`], [`Hop`]); plain integers are host order.
//! IPv4 addresses outside the flow tables are written IPv4-mapped. Times are the low 32 bits of the kernel's
//! jiffies, compared by wrapping subtraction.

use crate::{
    addr::{Addr16, Be16, Hop},
    counter::{COUNTER_SLOTS, DROP_SLOTS},
    limits::{DEVICE_MACS, OURS_WORDS, PORT_WORDS, RING_ROW, ROUTED_WORDS},
};

pub use crate::adoption::{adopting, earlier};

/// Version of the set of maps; part of the pin path. Raised when maps cannot be adopted any more.
pub const SCHEMA: u32 = 2;
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
    /// [`adopting`]: whether maps of an earlier layout still have flows that these have not.
    pub adopting: u32,
    /// Flows of IPv4 and of IPv6 that one service may hold if they cannot be evicted; 0: as many as there is room for.
    pub flow_share: [u32; 2],
    /// Bits of the mark of packets that a TC program has sent on; 0: [`DEFAULT_MARK`](crate::limits::DEFAULT_MARK).
    pub mark: u32,
    /// Heartbeat of the agent: flow clock until which next hops in the maps are taken for right; 0: for ever.
    pub heartbeat: u32,
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
    /// Elsewhere, and it sees the client's own address: its replies name no address of ours, so `OURS` has its own.
    pub const DIRECT: u16 = 1 << 2;
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
    /// Further MACs whose frames are for this node: those of its master (bridge, bond) and its further unicast addresses.
    /// Zero: unused.
    pub macs: [DeviceMac; DEVICE_MACS],
    /// Its name, zeros behind it. It stays when the device goes: one that comes under this name gets the slot again.
    pub name: [u8; DEVICE_NAME],
}

/// A MAC in [`Device::macs`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceMac {
    /// Bytes 0–3 as a raw word.
    pub high: u32,
    /// Bytes 4–5 as a raw word.
    pub low: u16,
    /// Explicit padding.
    pub _pad: u16,
}

/// Bytes of a device's name and its zeros (IFNAMSIZ).
pub const DEVICE_NAME: usize = 16;

/// Bits of [`Device::flags`].
pub mod device_flags {
    /// An XDP program of another device may redirect frames to this one: its driver takes them.
    pub const XDP: u16 = 1 << 0;
    /// A bridge: containers on it reach each other without passing our programs.
    pub const BRIDGE: u16 = 1 << 1;
    /// Named in `interfaces`: clients and remote backends are behind it.
    pub const UPLINK: u16 = 1 << 2;
    /// It carries VLANs and takes their tags off before XDP sees a frame: XDP leaves all frames to TC, which is told.
    pub const VLAN_OFFLOAD: u16 = 1 << 3;
    /// Our XDP program is on this device and may send frames back out of it.
    pub const XDP_TX: u16 = 1 << 4;
    /// With [`XDP`]: frames of several buffers, too.
    pub const XDP_FRAGS: u16 = 1 << 5;
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
    /// Routed to this node and no address of it: nobody but the datapath can answer for a port that no service has.
    pub const ROUTED: u32 = 1 << 1;
    /// Such a port is met with silence instead of a refusal.
    pub const UNUSED_DROP: u32 = 1 << 2;
}

/// Bits of a flow's state, which lie in the head of its slots. What a forward slot says is so; the reverse slot's bits
/// are a copy of it but for `REVERSE`, and may lag behind.
pub mod flow_state {
    /// This slot translates replies.
    pub const REVERSE: u32 = 1 << 2;
    /// The source address is translated too.
    pub const SNAT: u32 = 1 << 3;
    /// UDP; else TCP.
    pub const UDP: u32 = 1 << 4;
    /// Shift of the number of re-steers so far.
    pub const TRIES_SHIFT: u32 = 6;
    /// Mask of the number of re-steers, unshifted.
    pub const TRIES_MASK: u32 = 0x3;
    /// The backend has answered: SYN-ACK (TCP) or any packet (UDP).
    pub const ANSWERED: u32 = 1 << 8;
    /// The client has acknowledged the SYN-ACK (TCP), or sent again after an answer (UDP). Until then the flow is half-open.
    pub const ESTABLISHED: u32 = 1 << 9;
    /// The backend refused the SYN; the next SYN goes elsewhere.
    pub const REFUSED: u32 = 1 << 10;
    /// The client has sent FIN.
    pub const FIN_CLIENT: u32 = 1 << 11;
    /// The backend has sent FIN.
    pub const FIN_BACKEND: u32 = 1 << 12;
    /// Distance from a FIN to its acknowledgement.
    pub const ACKED_SHIFT: u32 = 2;
    /// The backend has acknowledged the client's FIN.
    pub const FIN_CLIENT_ACKED: u32 = FIN_CLIENT << ACKED_SHIFT;
    /// The client has acknowledged the backend's FIN.
    pub const FIN_BACKEND_ACKED: u32 = FIN_BACKEND << ACKED_SHIFT;
    /// Both FINs.
    pub const FINS: u32 = FIN_CLIENT | FIN_BACKEND;
    /// Both FINs acknowledged: the flow is closed.
    pub const CLOSED: u32 = FIN_CLIENT_ACKED | FIN_BACKEND_ACKED;
    /// The client has sent RST, and nothing else since. Whether the backend took it nobody knows.
    pub const RESET_CLIENT: u32 = 1 << 15;
    /// The backend has sent RST, and nothing else since.
    pub const RESET_BACKEND: u32 = 1 << 16;
    /// Either side has sent RST.
    pub const RESET: u32 = RESET_BACKEND | RESET_CLIENT;
    /// The backend still has an earlier connection on the source port (it answered the SYN by a bare ACK): the next SYN
    /// takes another port.
    pub const PORT_BUSY: u32 = 1 << 17;

    /// Whether both sides have closed.
    #[inline(always)]
    pub const fn is_closed(state: u32) -> bool {
        state & CLOSED == CLOSED
    }

    /// Whether a flow counts towards its service's share of the table: it may not be evicted.
    #[inline(always)]
    pub const fn is_counted(state: u32) -> bool {
        state & ESTABLISHED != 0 && state & CLOSED != CLOSED
    }
}

/// Value of `CURSORS`, by backend id: whose turn it is among the SNAT sources towards a backend.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Sources dealt out so far.
    pub next: u64,
    /// Flow clock when all sources that were tried were in use, or 0.
    pub exhausted_at: u32,
    /// Explicit padding.
    pub _pad: u32,
}

/// Value of `SERVICE_FLOWS`, by service id: flows that cannot be evicted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceFlows {
    /// Of IPv4 and of IPv6.
    pub families: [u64; 2],
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

/// Value of `FRAGMENTS`: the ports of the first fragment; both 0 if it was none of ours.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentPorts {
    /// Source port.
    pub sport: Be16,
    /// Destination port.
    pub dport: Be16,
    /// Flow clock when it was met.
    pub seen: u32,
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
    /// Bits of routed VIPs by `flow::routed_bit`.
    pub routed: [u64; ROUTED_WORDS],
}

/// Values of `RATES` (per CPU), by [`limited`]: how often something was done in the current window.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// Flow clock when the window began.
    pub since: u32,
    /// How often since then.
    pub count: u32,
}

/// Indexes of `RATES`: what strangers can make the datapath do, and therefore is done only so often.
pub mod limited {
    /// ICMP errors, but for "too big".
    pub const ERRORS: u32 = 0;
    /// RSTs for ports that no service has.
    pub const RESETS: u32 = 1;
    /// Later fragments sent round once more.
    pub const FRAGMENTS: u32 = 2;
    /// How many there are.
    pub const COUNT: u32 = 3;
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
    assert!(size_of::<Settings>() == 32);
    assert!(size_of::<Cursor>() == 16);
    assert!(size_of::<ServiceKey>() == 20);
    assert!(size_of::<Service>() == 36);
    assert!(size_of::<Backend>() == 48);
    assert!(size_of::<Device>() == 80);
    assert!(size_of::<AffinityKey>() == 20);
    assert!(size_of::<FragmentKey>() == 40);
    assert!(size_of::<FragmentPorts>() == 8);
    assert!(size_of::<AclData>() == 20);
    assert!(size_of::<Event>() == 56);
};

#[cfg(feature = "user")]
mod pod {
    use super::*;
    use crate::addr::Addr4;
    use crate::flow::{FlowKey4, FlowKey6};
    use crate::slot::{Bucket4, Bucket6, TableSettings};

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
        DeviceMac,
        Vip,
        FlowKey4,
        FlowKey6,
        Bucket4,
        Bucket6,
        TableSettings,
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
        Rate,
        Event,
        Cursor,
        ServiceFlows,
        Addr16,
        Addr4,
    );
}
