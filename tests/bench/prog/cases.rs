//! The paths through the packet core that are measured.

use std::net::IpAddr;

use lb_common::{addr::Hop, maps::flow_state};
use lb_ebpf::template::{address_word, port};
use lb_tests::{
    kernel::Program,
    packet::{Mac, Packet, ToIp as _, eth, flag},
    world::{Conn, NIC, TCP, UDP, World, mac_of},
};

/// Flows of the largest case.
pub const MANY: u32 = 1_000_000;
/// Backends of the service of the many flows: one a block of ports.
const BACKENDS: u32 = address_word(MANY) as u32 + 1;
/// First of the flows that packets of a benchmark open: no other case has their addresses.
pub const FRESH: u32 = 0xff << lb_ebpf::template::PORT_BITS;
/// Packets a run.
const PACKETS: u32 = 100_000;
/// Flows that one run opens; all have different ports.
const OPENED: u32 = 8_192;

const CLIENT_MAC: Mac = [0x06, 0, 0, 0, 0, 0x0c];
const BACKEND_MAC: Mac = [0x06, 0, 0, 0, 0, 0xb1];

/// XDP_DROP, XDP_PASS, XDP_TX, and TC_ACT_REDIRECT.
const XDP: [i32; 3] = [1, 2, 3];
const TC_REDIRECT: i32 = 7;

/// Which way the packets of a case go, and in which flows.
#[derive(Clone, Copy, Debug)]
pub enum Flows {
    /// In none: the client's address and port vary over so many values.
    None(u32),
    /// So many that are there.
    Known(Kind, u32),
    /// Each packet opens one.
    New(Kind),
}

/// Protocol and family of flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Tcp4,
    Udp4,
    Tcp6,
    /// TCP of a service without flows so far: all SNAT ports of its backend are free.
    NewTcp4,
    /// The same of UDP.
    NewUdp4,
}

/// One row of the table.
pub struct Case {
    pub name: &'static str,
    pub program: Program,
    pub packet: Packet,
    /// Whether the packets come from the backend.
    pub reverse: bool,
    pub flows: Flows,
    /// What the program returns.
    pub action: i32,
    /// What Katran takes for the like, ns.
    pub katran: Option<u32>,
}

/// What came out, ns per packet.
pub struct Figures {
    pub min: f64,
    pub median: f64,
    pub empty: f64,
}

// === impl Kind ===

impl Kind {
    const fn v6(self) -> bool {
        matches!(self, Self::Tcp6)
    }
    const fn proto(self) -> u8 {
        if matches!(self, Self::Udp4 | Self::NewUdp4) {
            UDP
        } else {
            TCP
        }
    }
    fn net(self, v4: &str, v6: &str, word: u16) -> IpAddr {
        match if self.v6() { v6.ip() } else { v4.ip() } {
            IpAddr::V4(ip) => IpAddr::from((u32::from(ip) | u32::from(word)).to_be_bytes()),
            IpAddr::V6(ip) => IpAddr::from((u128::from(ip) | u128::from(word)).to_be_bytes()),
        }
    }
    fn client(self, word: u16) -> IpAddr {
        self.net("10.1.0.0", "2001:db8:c::", word)
    }
    fn backend(self, word: u16) -> IpAddr {
        let v4 = match self {
            Self::NewTcp4 => "10.3.0.0",
            Self::NewUdp4 => "10.4.0.0",
            _ => "10.2.0.0",
        };
        self.net(v4, "2001:db8:b::", word)
    }
    fn vip(self) -> (IpAddr, u16) {
        let ip = self.net("198.51.100.1", "2001:db8:f::1", 0);
        let port = match self {
            Self::Tcp4 | Self::Tcp6 => 80,
            Self::NewTcp4 => 82,
            Self::Udp4 => 53,
            Self::NewUdp4 => 54,
        };
        (ip, port)
    }
    fn source(self) -> IpAddr {
        self.net("203.0.113.1", "2001:db8:a::1", 0)
    }
    /// Id of its service, and of the first of its backends.
    const fn ids(self) -> (u32, u32) {
        match self {
            Self::Tcp4 => (1, 1),
            Self::Udp4 => (2, BACKENDS + 1),
            Self::Tcp6 => (3, BACKENDS + 2),
            Self::NewTcp4 => (4, BACKENDS + 3),
            Self::NewUdp4 => (5, BACKENDS + 4),
        }
    }
    const fn backends(self) -> u32 {
        if matches!(self, Self::Tcp4) { BACKENDS } else { 1 }
    }

    /// The connection that is flow number `flow`, established. Its ports towards the backend are the client's.
    pub fn conn(self, flow: u32) -> Conn {
        let (word, port) = (address_word(flow), port(flow));
        let (service, first) = self.ids();
        let id = first + u32::from(word);
        Conn {
            proto: self.proto(),
            client: (self.client(word), port),
            vip: self.vip(),
            backend: (self.backend(word), 8080),
            source: (self.source(), port),
            id,
            epoch: 100 + id - 1,
            service,
            state: flow_state::ANSWERED | flow_state::ESTABLISHED,
            hop: Hop::new(CLIENT_MAC, NIC),
        }
    }

    fn packet(self, src: (IpAddr, u16), dst: (IpAddr, u16), flags: u8) -> Packet {
        let frame = eth(CLIENT_MAC, mac_of(NIC)).ip(src.0, dst.0);
        let payload = [b'x'; 40];
        match self.proto() {
            UDP => frame.udp(src.1, dst.1).payload(&payload),
            _ if flags & flag::SYN != 0 => frame.tcp(src.1, dst.1, flags),
            _ => frame.tcp(src.1, dst.1, flags).payload(&payload),
        }
    }
    /// A packet of the client of the flows; the address word and the port are put in by the kernel program.
    fn up(self, flags: u8) -> Packet {
        self.packet((self.client(0), 0), self.vip(), flags)
    }
    /// A packet of their backend.
    fn down(self) -> Packet {
        self.packet((self.backend(0), 8080), (self.source(), 0), flag::ACK)
    }
}

/// The services and backends of all cases.
pub fn world() -> World {
    let mut world = World::new()
        .snat_ports(16_384, 32_767)
        .source(Kind::Tcp4.source())
        .source(Kind::Tcp6.source());
    for kind in [Kind::Tcp4, Kind::Udp4, Kind::Tcp6, Kind::NewTcp4, Kind::NewUdp4] {
        let (vip, port) = kind.vip();
        world = world.service(vip, port, kind.proto());
        for word in 0..kind.backends() {
            world = world.remote(kind.backend(word as u16), 8080, NIC, BACKEND_MAC);
        }
    }
    world.service(Kind::Tcp4.vip().0, 81, TCP).no_ring()
}

/// Backend records that [`world`] needs, id 0 included.
pub const BACKEND_RECORDS: u32 = BACKENDS + 5;

impl Case {
    fn xdp(name: &'static str, packet: Packet, flows: Flows, action: i32) -> Self {
        Self {
            name,
            program: Program::Xdp,
            packet,
            reverse: false,
            flows,
            action,
            katran: None,
        }
    }
    fn katran(mut self, ns: u32) -> Self {
        self.katran = Some(ns);
        self
    }
    fn up(name: &'static str, kind: Kind, flows: u32) -> Self {
        Self::xdp(name, kind.up(flag::ACK), Flows::Known(kind, flows), XDP[2])
    }
    fn down(name: &'static str, kind: Kind, flows: u32) -> Self {
        let case = Self::xdp(name, kind.down(), Flows::Known(kind, flows), XDP[2]);
        Self {
            reverse: true,
            ..case
        }
    }
    fn tc(self) -> Self {
        Self {
            program: Program::Ingress,
            action: TC_REDIRECT,
            ..self
        }
    }

    /// Packets in one run.
    pub const fn packets(&self) -> u32 {
        match self.flows {
            Flows::New(_) => OPENED,
            _ => PACKETS,
        }
    }

    /// Byte offsets of the address word and of the port that vary.
    pub fn offsets(&self, frame: &[u8]) -> (u32, u32) {
        let v6 = frame[12] == 0x86;
        let (address, ports) = if v6 { (14 + 8 + 14, 54) } else { (14 + 12 + 2, 34) };
        (address, ports + if self.reverse { 2 } else { 0 })
    }
}

/// Every case; those of few flows come first, since flows only come and never go.
pub fn all() -> Vec<Case> {
    let (tcp, udp, six) = (Kind::Tcp4, Kind::Udp4, Kind::Tcp6);
    let (new_tcp, new_udp) = (Kind::NewTcp4, Kind::NewUdp4);
    let (vip, _) = tcp.vip();
    let syn = |port| tcp.packet((tcp.client(0), 0), (vip, port), flag::SYN);
    let foreign = tcp.packet((tcp.client(0), 0), ("192.0.2.77".ip(), 443), flag::ACK);
    let unknown = tcp.packet((tcp.client(0), 0), (vip, 9999), flag::ACK);
    vec![
        Case::xdp("foreign: neither address ours", foreign, Flows::None(1), XDP[1]).katran(30),
        Case::xdp(
            "foreign: our address, another port",
            unknown,
            Flows::None(1),
            XDP[1],
        )
        .katran(30),
        Case::up("TCP established, 1 flow", tcp, 1).katran(66),
        Case::down("TCP established, reply, 1 flow", tcp, 1).katran(66),
        Case::up("TCP established, 4,096 flows", tcp, 4_096).katran(99),
        Case::down("TCP established, reply, 4,096 flows", tcp, 4_096).katran(99),
        Case::up("UDP established, 1 flow", udp, 1).katran(110),
        Case::up("UDP established, 4,096 flows", udp, 4_096).katran(150),
        Case::down("UDP established, reply, 4,096 flows", udp, 4_096).katran(150),
        Case::up("TCP over IPv6 established, 1 flow", six, 1).katran(66),
        Case::up("TCP over IPv6 established, 4,096 flows", six, 4_096).katran(99),
        Case::down("TCP over IPv6 established, reply, 4,096 flows", six, 4_096).katran(99),
        Case::xdp(
            "TCP new flow: SYN, SNAT, two inserts",
            new_tcp.up(flag::SYN),
            Flows::New(new_tcp),
            XDP[2],
        )
        .katran(620),
        Case::xdp(
            "UDP new flow: SNAT, two inserts",
            new_udp.up(0),
            Flows::New(new_udp),
            XDP[2],
        )
        .katran(620),
        Case::xdp(
            "SYN to a service without backends",
            syn(81),
            Flows::None(1),
            XDP[0],
        ),
        Case::up("TC: TCP established, 1 flow", tcp, 1).tc(),
        Case::up("TC: TCP established, 4,096 flows", tcp, 4_096).tc(),
        Case::up("TCP established, 1,000,000 flows", tcp, MANY).katran(281),
        Case::down("TCP established, reply, 1,000,000 flows", tcp, MANY).katran(281),
        Case::xdp(
            "TCP new flow beside 1,000,000 others",
            new_tcp.up(flag::SYN),
            Flows::New(new_tcp),
            XDP[2],
        )
        .katran(620),
    ]
}

impl Figures {
    /// Of the rounds' differences and of their empty runs.
    pub fn of(mut net: Vec<f64>, mut empty: Vec<f64>) -> Self {
        net.sort_by(f64::total_cmp);
        empty.sort_by(f64::total_cmp);
        Self {
            min: net[0],
            median: net[net.len() / 2],
            empty: empty[empty.len() / 2],
        }
    }
}
