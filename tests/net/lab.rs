//! Client, balancer and backends in namespaces, wired by veth.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::Result;
use lb_tests::{
    netns::{Namespace, PassAll},
    packet::ToIp as _,
};

/// Bytes of a bulk transfer, each way.
pub const BULK: usize = 10 << 20;
/// Longest wait for one read; only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(20);

/// How the balancer is wired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wiring {
    /// Clients on one device, backends on another.
    TwoArm,
    /// Clients and backends on one segment and one device of the balancer.
    OneArm,
}

/// The namespaces. Backends are `203.0.113.11` and on, `2001:db8:b::11` and on.
pub struct Lab {
    pub client: Namespace,
    pub node: Namespace,
    pub backends: Vec<Namespace>,
    pub interfaces: &'static str,
    _switch: Namespace,
    _programs: Vec<PassAll>,
}

pub const VIP4: &str = "198.51.100.1";
pub const VIP6: &str = "2001:db8:f::1";

impl Lab {
    /// Wires `backends` backends. XDP forwards between all devices: every sender completes its checksums.
    pub fn new(wiring: Wiring, backends: usize) -> Result<Self> {
        let (client, node) = (Namespace::new("client")?, Namespace::new("node")?);
        let switch = Namespace::new("switch")?;
        let mut programs = Vec::new();
        switch.bridge("br0")?;
        let mut plug = |namespace: &Namespace, device: &str, port: &str| -> Result<()> {
            namespace.veth(device, &switch, port)?;
            switch.ip(&format!("link set {port} master br0"))?;
            namespace.complete_checksums(device)?;
            programs.push(switch.pass_all(port)?);
            Ok(())
        };
        plug(&node, "b0", "node")?;
        node.address("b0", "203.0.113.1/24")?;
        node.address("b0", "2001:db8:b::1/64")?;
        let mut all = Vec::new();
        for i in 0..backends {
            let backend = Namespace::new("backend")?;
            plug(&backend, "e0", &format!("backend{i}"))?;
            backend.address("e0", &format!("203.0.113.{}/24", 11 + i))?;
            backend.address("e0", &format!("2001:db8:b::{}/64", 11 + i))?;
            all.push(backend);
        }
        let (via4, via6) = match wiring {
            Wiring::OneArm => {
                plug(&client, "e0", "client")?;
                client.address("e0", "203.0.113.200/24")?;
                client.address("e0", "2001:db8:b::200/64")?;
                ("203.0.113.1", "2001:db8:b::1")
            }
            Wiring::TwoArm => {
                client.veth("e0", &node, "c0")?;
                client.complete_checksums("e0")?;
                programs.push(client.pass_all("e0")?);
                client.address("e0", "192.0.2.10/24")?;
                client.address("e0", "2001:db8:c::10/64")?;
                node.address("c0", "192.0.2.1/24")?;
                node.address("c0", "2001:db8:c::1/64")?;
                ("192.0.2.1", "2001:db8:c::1")
            }
        };
        client.ip(&format!("route add {VIP4}/32 via {via4}"))?;
        client.ip(&format!("route add {VIP6}/128 via {via6}"))?;
        let interfaces = if wiring == Wiring::OneArm {
            "[\"b0\"]"
        } else {
            "[\"b0\", \"c0\"]"
        };
        Ok(Self {
            client,
            node,
            backends: all,
            interfaces,
            _switch: switch,
            _programs: programs,
        })
    }

    /// The configuration of one service with every backend.
    pub fn config(&self, vip: &str, listen: &str, port: u16) -> String {
        let mut text = format!(
            "interfaces = {}\n[vips.lab]\naddress = \"{vip}\"\n[[services]]\nname = \"lab\"\nvip = \"lab\"\nlisten = \"{listen}\"\n",
            self.interfaces
        );
        for i in 0..self.backends.len() {
            let address = SocketAddr::new(address_of(i, vip.contains(':')), port);
            text.push_str(&format!("[[services.backends]]\naddress = \"{address}\"\n"));
        }
        text
    }
}

/// Address of a backend.
pub fn address_of(index: usize, v6: bool) -> IpAddr {
    let text = if v6 {
        format!("2001:db8:b::{}", 11 + index)
    } else {
        format!("203.0.113.{}", 11 + index)
    };
    text.as_str().ip()
}

/// The bytes of a transfer: xorshift, so that nothing lost, doubled or swapped goes unseen.
pub fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut x = seed | 1;
    let mut all = Vec::with_capacity(length + 8);
    while all.len() < length {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        all.extend(x.to_ne_bytes());
    }
    all.truncate(length);
    all
}

/// A TCP server in a backend's namespace (port 0: any): says who it is, takes as many bytes as it is told, and sends
/// them back. Its port.
pub fn serve_tcp(backend: &Namespace, index: usize, v6: bool, port: u16) -> Result<u16> {
    let listener = backend.run(|| TcpListener::bind(SocketAddr::new(address_of(index, v6), port)))?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        // Ends when the process does: the listener is never closed before.
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || converse(stream, index as u8));
        }
    });
    Ok(port)
}

fn converse(mut stream: TcpStream, index: u8) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&[index])?;
    let mut length = [0; 8];
    stream.read_exact(&mut length)?;
    let mut taken = vec![0; u64::from_be_bytes(length) as usize];
    stream.read_exact(&mut taken)?;
    // What was taken is judged by who sent it: it comes back.
    stream.write_all(&taken)
}

/// One conversation from the client's namespace: which backend answered. Fails if one byte differs.
pub fn talk_tcp(client: &Namespace, to: SocketAddr, length: usize) -> Result<u8> {
    client.run(|| {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut index = [0];
        stream.read_exact(&mut index)?;
        let data = bytes(length as u64, length);
        stream.write_all(&(length as u64).to_be_bytes())?;
        stream.write_all(&data)?;
        let mut back = vec![0; length];
        stream.read_exact(&mut back)?;
        anyhow::ensure!(back == data, "the transfer came back changed");
        Ok(index[0])
    })
}

/// A UDP server in a backend's namespace that answers with its index before the question.
pub fn serve_udp(backend: &Namespace, index: usize, v6: bool, port: u16) -> Result<u16> {
    let socket = backend.run(|| UdpSocket::bind(SocketAddr::new(address_of(index, v6), port)))?;
    let port = socket.local_addr()?.port();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer[1..]) {
            buffer[0] = index as u8;
            if socket.send_to(&buffer[..=length], from).is_err() {
                return;
            }
        }
    });
    Ok(port)
}

/// One question by UDP from a new port: which backend answered.
pub fn talk_udp(client: &Namespace, to: SocketAddr, question: &[u8]) -> Result<u8> {
    client.run(|| {
        let any: IpAddr = if to.is_ipv6() {
            [0u16; 8].into()
        } else {
            [0u8; 4].into()
        };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect(to)?;
        socket.send(question)?;
        let mut answer = vec![0; question.len() + 2];
        let length = socket.recv(&mut answer)?;
        anyhow::ensure!(
            answer[1..length] == *question,
            "the answer is not to the question"
        );
        Ok(answer[0])
    })
}
