//! The network that the rows happen in, for every family and protocol.

use std::net::IpAddr;

use lb_common::addr::Hop;
use lb_tests::{
    packet::{Mac, Packet, ToIp as _, eth, flag},
    world::{Conn, NIC, TCP, UDP, World, mac_of},
};

pub const CLIENT_MAC: Mac = [0x06, 0, 0, 0, 0, 0x0c];
pub const B1_MAC: Mac = [0x06, 0, 0, 0, 0, 0xb1];
pub const B2_MAC: Mac = [0x06, 0, 0, 0, 0, 0xb2];
/// A container's veth, as the bridge knows it.
pub const CONTAINER_MAC: Mac = [0x06, 0, 0, 0, 0, 0xcc];

/// The client's port: inside the range of SNAT ports, so that it is kept.
pub const CPORT: u16 = 20_000;
/// Port of the service.
pub const SPORT: u16 = 80;
/// Port of the backends.
pub const BPORT: u16 = 8080;

/// Family and protocol of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Net {
    pub v6: bool,
    pub proto: u8,
}

pub const TCP4: Net = Net {
    v6: false,
    proto: TCP,
};
pub const TCP6: Net = Net { v6: true, proto: TCP };
pub const UDP4: Net = Net {
    v6: false,
    proto: UDP,
};
pub const UDP6: Net = Net { v6: true, proto: UDP };
pub const ALL: [Net; 4] = [TCP4, TCP6, UDP4, UDP6];
pub const TCPS: [Net; 2] = [TCP4, TCP6];
pub const UDPS: [Net; 2] = [UDP4, UDP6];

impl std::fmt::Display for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}{}",
            if self.proto == TCP { "tcp" } else { "udp" },
            if self.v6 { 6 } else { 4 }
        )
    }
}

impl Net {
    fn pick(self, v4: &str, v6: &str) -> IpAddr {
        if self.v6 { v6 } else { v4 }.ip()
    }
    pub fn client(self) -> IpAddr {
        self.pick("192.0.2.10", "2001:db8:c::10")
    }
    pub fn vip(self) -> IpAddr {
        self.pick("198.51.100.1", "2001:db8:f::1")
    }
    pub fn source(self) -> IpAddr {
        self.pick("203.0.113.1", "2001:db8:b::1")
    }
    pub fn source2(self) -> IpAddr {
        self.pick("203.0.113.2", "2001:db8:b::2")
    }
    pub fn b1(self) -> IpAddr {
        self.pick("203.0.113.11", "2001:db8:b::11")
    }
    pub fn b2(self) -> IpAddr {
        self.pick("203.0.113.12", "2001:db8:b::12")
    }
    pub fn container(self) -> IpAddr {
        self.pick("172.17.0.2", "fd00:17::2")
    }
    pub fn node(self) -> IpAddr {
        self.pick("203.0.113.5", "2001:db8:b::5")
    }
    pub fn stranger(self) -> IpAddr {
        self.pick("192.0.2.99", "2001:db8:c::99")
    }
    pub fn is_tcp(self) -> bool {
        self.proto == TCP
    }

    /// A service without backends, one SNAT source.
    pub fn service(self) -> World {
        World::new()
            .source(self.source())
            .service(self.vip(), SPORT, self.proto)
    }
    /// The service with one remote backend, id 1, epoch 100.
    pub fn one(self) -> World {
        self.service().remote(self.b1(), BPORT, NIC, B1_MAC)
    }
    /// The service with two remote backends, ids 1 and 2.
    pub fn two(self) -> World {
        self.one().remote(self.b2(), BPORT, NIC, B2_MAC)
    }

    /// A packet between two ends: what opens a flow if `flags` is SYN; UDP knows no flags.
    pub fn packet(self, src: (IpAddr, u16), dst: (IpAddr, u16), flags: u8) -> Packet {
        let frame = eth(CLIENT_MAC, mac_of(NIC)).ip(src.0, dst.0);
        if self.is_tcp() {
            frame.tcp(src.1, dst.1, flags)
        } else {
            frame.udp(src.1, dst.1).payload(b"datagram")
        }
    }
    /// Client to VIP.
    pub fn request(self, flags: u8) -> Packet {
        self.packet((self.client(), CPORT), (self.vip(), SPORT), flags)
    }
    /// What opens a flow.
    pub fn open(self) -> Packet {
        self.request(flag::SYN)
    }
    /// `packet` as it goes to the first remote backend.
    pub fn to_b1(self, packet: &Packet) -> Packet {
        let out = packet
            .clone()
            .eth(mac_of(NIC), B1_MAC)
            .addresses(self.source(), self.b1())
            .ttl(63);
        out.ports(CPORT, BPORT)
    }
    /// `packet` as it goes to the second remote backend.
    pub fn to_b2(self, packet: &Packet) -> Packet {
        self.to_b1(packet)
            .eth(mac_of(NIC), B2_MAC)
            .addresses(self.source(), self.b2())
    }
    /// First backend to SNAT source.
    pub fn reply(self, flags: u8) -> Packet {
        self.packet((self.b1(), BPORT), (self.source(), CPORT), flags)
            .eth(B1_MAC, mac_of(NIC))
    }
    /// `packet` as it goes to the client.
    pub fn to_client(self, packet: &Packet) -> Packet {
        let out = packet
            .clone()
            .eth(mac_of(NIC), CLIENT_MAC)
            .addresses(self.vip(), self.client())
            .ttl(63);
        out.ports(SPORT, CPORT)
    }

    /// The connection by the first remote backend, nothing heard of it yet.
    pub fn conn(self) -> Conn {
        Conn {
            proto: self.proto,
            client: (self.client(), CPORT),
            vip: (self.vip(), SPORT),
            backend: (self.b1(), BPORT),
            source: (self.source(), CPORT),
            id: 1,
            epoch: 100,
            service: 1,
            state: 0,
            hop: Hop::new(CLIENT_MAC, NIC),
        }
    }
    /// The connection by the second remote backend.
    pub fn conn2(self) -> Conn {
        Conn {
            backend: (self.b2(), BPORT),
            id: 2,
            epoch: 101,
            ..self.conn()
        }
    }
    /// The connection by a backend that sees the client itself.
    pub fn direct(self, backend: IpAddr) -> Conn {
        Conn {
            backend: (backend, BPORT),
            source: (self.client(), CPORT),
            ..self.conn()
        }
    }
}
