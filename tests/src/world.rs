//! What the maps hold before a packet comes: a value that every body of the core is loaded from.

use std::net::IpAddr;

use lb_common::{
    addr::{Addr16, Be16, Hop},
    limits::RING_ROW,
    maps::{
        self, Affinity, AffinityKey, Backend, Device, Ours, Service, ServiceKey, Settings, Timeouts,
        backend_flags, backend_state, device_flags, flow_state,
    },
};

use weir::{datapath::Filter, plan::address_of, ring::leaders};

use crate::packet::{Mac, ToIp};

/// TCP's protocol number.
pub const TCP: u8 = 6;
/// UDP's protocol number.
pub const UDP: u8 = 17;

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

/// Seconds for idle times in rows: established TCP.
pub const ESTABLISHED_S: u32 = 3600;
/// Unfinished handshake.
pub const SYN_S: u32 = 60;
/// Closed TCP.
pub const CLOSING_S: u32 = 30;
/// UDP.
pub const UDP_S: u32 = 90;

/// A NIC whose driver does all that XDP can ask for.
const NIC_FLAGS: u16 = device_flags::XDP | device_flags::XDP_TX | device_flags::XDP_FRAGS;

/// Name, interface index, MAC, flags and MTU of every device but the node.
pub const DEVICES: [(u16, &str, u32, Mac, u16, u32); 7] = [
    (NIC, "nic", 11, [0x02, 0, 0, 0, 0, 0x11], NIC_FLAGS, MTU),
    (
        BRIDGE,
        "bridge",
        21,
        [0x02, 0, 0, 0, 0, 0x21],
        device_flags::BRIDGE,
        MTU,
    ),
    (NIC2, "nic2", 31, [0x02, 0, 0, 0, 0, 0x31], NIC_FLAGS, MTU),
    (
        NARROW,
        "narrow",
        41,
        [0x02, 0, 0, 0, 0, 0x41],
        NIC_FLAGS,
        NARROW_MTU,
    ),
    (
        PLAIN,
        "plain",
        51,
        [0x02, 0, 0, 0, 0, 0x51],
        device_flags::XDP_TX,
        MTU,
    ),
    (JUMBO, "jumbo", 61, [0x02, 0, 0, 0, 0, 0x61], NIC_FLAGS, JUMBO_MTU),
    (
        JUMBO_PLAIN,
        "jumbo1",
        71,
        [0x02, 0, 0, 0, 0, 0x71],
        device_flags::XDP | device_flags::XDP_TX,
        JUMBO_MTU,
    ),
];

/// The MAC of a device.
pub fn mac_of(slot: u16) -> Mac {
    DEVICES.iter().find(|d| d.0 == slot).expect("a slot in use").3
}

/// The interface index of a device; `lo` for the node.
pub fn ifindex_of(slot: u16) -> u32 {
    DEVICES.iter().find(|d| d.0 == slot).map_or(1, |d| d.2)
}

/// One connection: what its two flow entries say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conn {
    /// Protocol number.
    pub proto: u8,
    /// Client.
    pub client: (IpAddr, u16),
    /// What the client talks to.
    pub vip: (IpAddr, u16),
    /// What the backend is reached at.
    pub backend: (IpAddr, u16),
    /// What the backend sees as its peer; the client itself without SNAT.
    pub source: (IpAddr, u16),
    /// Backend id.
    pub id: u32,
    /// Epoch of the backend when chosen.
    pub epoch: u32,
    /// Service id.
    pub service: u32,
    /// [`flow_state`] bits but for `REVERSE` and `SNAT`.
    pub state: u32,
    /// Next hop of the client.
    pub hop: Hop,
}

impl Conn {
    /// With these state bits.
    pub fn state(mut self, bits: u32) -> Self {
        self.state = bits;
        self
    }
    /// Established.
    pub fn established(self) -> Self {
        self.state(flow_state::ESTABLISHED)
    }
    /// Of another epoch.
    pub fn epoch(mut self, epoch: u32) -> Self {
        self.epoch = epoch;
        self
    }
    /// With another next hop of the client.
    pub fn hop(mut self, mac: Mac, slot: u16) -> Self {
        self.hop = Hop::new(mac, slot);
        self
    }
    /// With another source towards the backend.
    pub fn source(mut self, ip: impl ToIp, port: u16) -> Self {
        self.source = (ip.ip(), port);
        self
    }
    /// From another port of the client; the source towards the backend goes along if it kept the client's port.
    pub fn client_port(mut self, port: u16) -> Self {
        if self.source.1 == self.client.1 {
            self.source.1 = port;
        }
        self.client.1 = port;
        self
    }
    /// The two entries: (key, value, whether it is the reverse one).
    pub fn entries(&self) -> [FlowEntry; 2] {
        let snat = if self.source == self.client {
            0
        } else {
            flow_state::SNAT
        };
        let entry = |key: [(IpAddr, u16); 2], value: [(IpAddr, u16); 2], reverse: u32| FlowEntry {
            proto: self.proto,
            src: key[0],
            dst: key[1],
            to_src: value[0],
            to_dst: value[1],
            backend: self.id,
            epoch: self.epoch,
            service: self.service,
            state: self.state | snat | reverse,
            hop: self.hop,
        };
        [
            entry([self.client, self.vip], [self.source, self.backend], 0),
            entry(
                [self.backend, self.source],
                [self.vip, self.client],
                flow_state::REVERSE,
            ),
        ]
    }
}

/// One entry of a flow table, without its times and checksum differences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowEntry {
    /// Protocol number.
    pub proto: u8,
    /// Source in the packet.
    pub src: (IpAddr, u16),
    /// Destination in the packet.
    pub dst: (IpAddr, u16),
    /// Source after translation.
    pub to_src: (IpAddr, u16),
    /// Destination after translation.
    pub to_dst: (IpAddr, u16),
    /// Backend id.
    pub backend: u32,
    /// Epoch.
    pub epoch: u32,
    /// Service id.
    pub service: u32,
    /// All state bits.
    pub state: u32,
    /// Next hop.
    pub hop: Hop,
}

impl std::fmt::Display for FlowEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let end = |(ip, port): (IpAddr, u16)| std::net::SocketAddr::new(ip, port).to_string();
        write!(
            f,
            "proto {} {} > {} becomes {} > {} backend {} epoch {} service {} state {:#x} hop {:02x?}@{}",
            self.proto,
            end(self.src),
            end(self.dst),
            end(self.to_src),
            end(self.to_dst),
            self.backend,
            self.epoch,
            self.service,
            self.state,
            self.hop.mac(),
            self.hop.slot()
        )
    }
}

/// One service with its ring.
#[derive(Clone, Debug)]
pub struct ServiceRow {
    /// Key.
    pub key: ServiceKey,
    /// Value.
    pub value: Service,
    /// Backend ids, repeated until the row is full; `None`: every active backend in id order.
    pub ring: Option<Vec<u32>>,
    /// Timeouts, seconds.
    pub timeouts: [u32; 4],
}

/// What the maps hold.
#[derive(Clone, Debug)]
pub struct World {
    /// Services; the index plus one is the id and the ring row.
    pub services: Vec<ServiceRow>,
    /// Backends; the index plus one is the id.
    pub backends: Vec<Backend>,
    /// SNAT sources.
    pub sources: Vec<IpAddr>,
    /// VIPs.
    pub vips: Vec<(IpAddr, u32)>,
    /// Allow and deny: (service, prefix, bits of the prefix, action).
    pub acl: Vec<(u32, IpAddr, u8, u32)>,
    /// Connections and the seconds since each was last heard of.
    pub conns: Vec<(Conn, u32)>,
    /// Affinity.
    pub affinity: Vec<(AffinityKey, Affinity)>,
    /// SNAT ports and the rest.
    pub settings: Settings,
    /// More addresses in `OURS`.
    pub ours: Vec<IpAddr>,
    /// Fill the flow table of IPv4 or IPv6 up with live flows of somebody else.
    pub flow_table_full: bool,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// The devices and nothing else. SNAT ports 16,384 to 32,767.
    pub fn new() -> Self {
        Self {
            services: Vec::new(),
            backends: Vec::new(),
            sources: Vec::new(),
            vips: Vec::new(),
            acl: Vec::new(),
            conns: Vec::new(),
            affinity: Vec::new(),
            settings: Settings {
                snat_port_min: 16_384,
                snat_port_max: 32_767,
                event_sample: 0,
                loopback_ifindex: 1,
                _pad: 0,
            },
            ours: Vec::new(),
            flow_table_full: false,
        }
    }

    /// One more service; later calls add to it. Its VIP answers echo.
    pub fn service(mut self, vip: impl ToIp, port: u16, proto: u8) -> Self {
        let vip = vip.ip();
        let id = self.services.len() as u32 + 1;
        if !self.vips.iter().any(|(v, _)| *v == vip) {
            self.vips.push((vip, maps::vip_flags::ECHO));
        }
        self.services.push(ServiceRow {
            key: ServiceKey {
                vip: Addr16::from(vip),
                port: Be16::new(port),
                proto: proto.into(),
            },
            value: Service {
                id,
                generation: 1,
                ring_row: id,
                previous_row: maps::NO_RING,
                ..Service::default()
            },
            ring: None,
            timeouts: [ESTABLISHED_S, SYN_S, CLOSING_S, UDP_S],
        });
        self
    }

    fn last_service(&mut self) -> &mut ServiceRow {
        self.services
            .last_mut()
            .expect("a service before what belongs to it")
    }

    fn last_backend(&mut self) -> &mut Backend {
        self.backends
            .last_mut()
            .expect("a backend before what belongs to it")
    }

    /// The VIPs so far do not answer echo (they are the node's own).
    pub fn silent_vip(mut self) -> Self {
        self.vips.iter_mut().for_each(|(_, flags)| *flags = 0);
        self
    }

    /// [`maps::service_flags`] for the last service.
    pub fn flags(mut self, flags: u32) -> Self {
        self.last_service().value.flags |= flags;
        self
    }

    /// The alternates of the last service; unless given, those that its ring makes.
    pub fn alternates(mut self, ids: [u32; 2]) -> Self {
        self.last_service().value.alternates = ids;
        self
    }

    /// The ring of the last service: these ids over and over.
    pub fn ring(mut self, ids: &[u32]) -> Self {
        self.last_service().ring = Some(ids.to_vec());
        self
    }

    /// The last service has no ring at all.
    pub fn no_ring(mut self) -> Self {
        self.last_service().value.ring_row = maps::NO_RING;
        self
    }

    /// An ACL entry of the last service, "10.0.0.0/8".
    pub fn acl(mut self, prefix: &str, action: u32) -> Self {
        let (ip, bits) = prefix.split_once('/').expect("a prefix length");
        let service = self.last_service();
        service.value.flags |= maps::service_flags::ACL;
        let id = service.value.id;
        self.acl
            .push((id, ip.ip(), bits.parse().expect("a prefix length"), action));
        self
    }

    /// An entry of the deny list for all services; the last service asks it.
    pub fn firewall(mut self, prefix: &str) -> Self {
        let (ip, bits) = prefix.split_once('/').expect("a prefix length");
        self.last_service().value.flags |= maps::service_flags::FIREWALL;
        let bits = bits.parse().expect("a prefix length");
        self.acl
            .push((maps::EVERY_SERVICE, ip.ip(), bits, maps::ACL_DENY));
        self
    }

    fn backend(mut self, addr: IpAddr, port: u16, hop: Hop, flags: u16) -> Self {
        let service = self.services.len() as u32;
        assert!(service > 0, "a service before its backends");
        if flags != 0 {
            self.ours.push(addr);
        }
        let family: Vec<usize> = (0..self.sources.len())
            .filter(|i| self.sources[*i].is_ipv4() == addr.is_ipv4())
            .collect();
        self.backends.push(Backend {
            hop,
            addr: Addr16::from(addr),
            port: Be16::new(port),
            flags,
            state: backend_state::ACTIVE,
            epoch: 100 + self.backends.len() as u32,
            service,
            snat_first: family.first().map_or(0, |i| *i as u16),
            snat_count: family.len() as u16,
            _pad: 0,
        });
        self
    }

    /// A backend reached by a NIC, the MAC of its next hop known.
    pub fn remote(self, addr: impl ToIp, port: u16, slot: u16, mac: Mac) -> Self {
        self.backend(addr.ip(), port, Hop::new(mac, slot), 0)
    }

    /// A container on the bridge.
    pub fn local(self, addr: impl ToIp, port: u16) -> Self {
        self.backend(addr.ip(), port, Hop::new([0; 6], BRIDGE), backend_flags::LOCAL)
    }

    /// A process of the node.
    pub fn node(self, addr: impl ToIp, port: u16) -> Self {
        self.backend(addr.ip(), port, Hop::new([0; 6], NODE), backend_flags::NODE)
    }

    /// State of the last backend.
    pub fn backend_state(mut self, state: u32) -> Self {
        self.last_backend().state = state;
        self
    }

    /// Epoch of the last backend.
    pub fn epoch(mut self, epoch: u32) -> Self {
        self.last_backend().epoch = epoch;
        self
    }

    /// A source address for SNAT; before the backends that shall use it.
    pub fn source(mut self, addr: impl ToIp) -> Self {
        self.sources.push(addr.ip());
        self
    }

    /// The range of SNAT ports, inclusive.
    pub fn snat_ports(mut self, first: u16, last: u16) -> Self {
        (self.settings.snat_port_min, self.settings.snat_port_max) = (first, last);
        self
    }

    /// A connection last heard of `age` seconds ago.
    pub fn conn(mut self, conn: Conn, age: u32) -> Self {
        self.conns.push((conn, age));
        self
    }

    /// Both flow tables are full of live flows.
    pub fn full(mut self) -> Self {
        self.flow_table_full = true;
        self
    }

    /// A client of the last service is bound to a backend.
    pub fn affinity(mut self, client: impl ToIp, id: u32, epoch: u32) -> Self {
        let service = self.services.len() as u32;
        let key = AffinityKey {
            client: Addr16::from(client.ip()),
            service,
        };
        self.affinity.push((key, Affinity { backend: id, epoch }));
        self
    }

    /// `OURS`: what packets of ours carry.
    pub fn filter(&self) -> Box<Ours> {
        let vips = self.vips.iter().map(|(vip, _)| vip);
        let services = self.services.iter().map(|service| address_of(&service.key));
        let filter = Filter {
            addresses: vips.chain(&self.sources).chain(&self.ours).copied().collect(),
            ports: services.map(|address| (address.protocol, address.port)).collect(),
        };
        filter.value()
    }

    /// The value of a service, with its alternates.
    pub fn value_of(&self, service: &ServiceRow) -> Service {
        let mut value = service.value;
        if value.alternates == [0; 2] {
            value.alternates = leaders(&self.ring_of(service));
        }
        value
    }

    /// The ring of a service, filled.
    pub fn ring_of(&self, service: &ServiceRow) -> Vec<u32> {
        let active = || {
            (1..=self.backends.len() as u32)
                .filter(|id| {
                    let backend = &self.backends[*id as usize - 1];
                    backend.service == service.value.id && backend.state == backend_state::ACTIVE
                })
                .collect()
        };
        let ids: Vec<u32> = service.ring.clone().unwrap_or_else(active);
        (0..RING_ROW)
            .map(|i| if ids.is_empty() { 0 } else { ids[i % ids.len()] })
            .collect()
    }

    /// `DEVICES` by slot.
    pub fn devices(&self) -> Vec<(u16, Device)> {
        DEVICES
            .iter()
            .map(|(slot, _, ifindex, mac, flags, mtu)| {
                let hop = Hop::new(*mac, *slot);
                (
                    *slot,
                    Device {
                        ifindex: *ifindex,
                        mtu: *mtu,
                        mac_high: hop.mac_high(),
                        mac_low: hop.mac_low(),
                        flags: *flags,
                        ..Device::default()
                    },
                )
            })
            .collect()
    }

    /// `TIMEOUTS` of a service.
    pub fn timeouts(service: &ServiceRow, hz: u32) -> Timeouts {
        let [established, syn, closing, udp] = service.timeouts.map(|s| s * hz);
        Timeouts {
            established,
            syn,
            closing,
            udp,
        }
    }
}
