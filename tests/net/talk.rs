//! Servers and clients that prove what arrived: who answered, whom they saw, and every byte.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result};
use lb_tests::netns::Namespace;

/// Bytes of a bulk transfer, each way.
pub const BULK: usize = 10 << 20;
/// Timeout for a connection and for one read, and for everything else that is waited for. Only a failing test waits so long.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What a server says of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Answer {
    /// Which server.
    pub index: u8,
    /// The address that it saw.
    pub seen: IpAddr,
}

/// A TCP client with a conversation that can go on.
#[derive(Debug)]
pub struct Talk {
    stream: TcpStream,
    pub answer: Answer,
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

/// A TCP server in a namespace (port 0: any): says who it is and whom it sees, then sends back whatever it is told the
/// length of, again and again. Its address.
pub fn serve_tcp(namespace: &Namespace, index: usize, address: SocketAddr) -> Result<SocketAddr> {
    let listener = listen_tcp(namespace, address)?;
    let address = listener.local_addr()?;
    // Ends when the process does: the listener is never closed before.
    serve_on(listener, index);
    Ok(address)
}

/// A listener in a namespace, that nobody serves yet.
pub fn listen_tcp(namespace: &Namespace, address: SocketAddr) -> Result<TcpListener> {
    namespace
        .run(|| TcpListener::bind(address))
        .with_context(|| address.to_string())
}

/// Serves a listener on threads of its own.
pub fn serve_on(listener: TcpListener, index: usize) {
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || converse(stream, index as u8));
        }
    });
}

fn converse(mut stream: TcpStream, index: u8) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let seen = match stream.peer_addr()?.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let mut greeting = vec![index];
    greeting.extend(seen.octets());
    stream.write_all(&greeting)?;
    let mut length = [0; 8];
    loop {
        stream.read_exact(&mut length)?;
        let mut taken = vec![0; u64::from_be_bytes(length) as usize];
        stream.read_exact(&mut taken)?;
        // What was taken is judged by who sent it: it comes back.
        stream.write_all(&taken)?;
    }
}

// === impl Talk ===

impl Talk {
    /// Connects from this thread's namespace and reads the greeting.
    pub fn open(to: SocketAddr) -> Result<Self> {
        Self::of(TcpStream::connect_timeout(&to, PATIENCE).context("connect")?)
    }

    /// Reads the greeting of a connection.
    pub fn of(mut stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let mut greeting = [0; 17];
        stream.read_exact(&mut greeting).context("greeting")?;
        let mut seen = [0; 16];
        seen.copy_from_slice(&greeting[1..]);
        let answer = Answer {
            index: greeting[0],
            seen: Ipv6Addr::from(seen).to_canonical(),
        };
        Ok(Self { stream, answer })
    }

    /// Sends so many bytes and takes them back. Fails if one differs.
    pub fn say(&mut self, length: usize) -> Result<()> {
        self.tell(length)?;
        self.hear(length)
    }

    /// Sends so many bytes, which come back to [`Talk::hear`].
    pub fn tell(&mut self, length: usize) -> Result<()> {
        let mut message = (length as u64).to_be_bytes().to_vec();
        message.extend(bytes(length as u64, length));
        self.stream.write_all(&message).context("write")
    }

    /// Takes back what [`Talk::tell`] has sent. Fails if one byte differs.
    pub fn hear(&mut self, length: usize) -> Result<()> {
        let data = bytes(length as u64, length);
        let mut back = vec![0; length];
        self.stream.read_exact(&mut back).context("read")?;
        anyhow::ensure!(back == data, "the transfer came back changed");
        Ok(())
    }
}

/// One conversation from a client's namespace: who answered.
pub fn talk_tcp(client: &Namespace, to: SocketAddr, length: usize) -> Result<Answer> {
    client.run(|| {
        let mut talk = Talk::open(to)?;
        talk.say(length)?;
        Ok(talk.answer)
    })
}

/// A UDP server in a namespace that answers with its index before the question. Its address.
pub fn serve_udp(namespace: &Namespace, index: usize, address: SocketAddr) -> Result<SocketAddr> {
    let socket = namespace.run(|| UdpSocket::bind(address))?;
    let address = socket.local_addr()?;
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer[1..]) {
            buffer[0] = index as u8;
            if socket.send_to(&buffer[..=length], from).is_err() {
                return;
            }
        }
    });
    Ok(address)
}

/// One question by UDP from a new port: which server answered.
pub fn talk_udp(client: &Namespace, to: SocketAddr, question: &[u8]) -> Result<u8> {
    client.run(|| {
        let socket = UdpSocket::bind(SocketAddr::new(any(to), 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect(to)?;
        socket.send(question)?;
        let mut answer = vec![0; question.len() + 2];
        let length = socket.recv(&mut answer).context("no answer")?;
        anyhow::ensure!(
            answer[1..length] == *question,
            "the answer is not to the question"
        );
        Ok(answer[0])
    })
}

/// The unspecified address of the same family.
pub fn any(like: SocketAddr) -> IpAddr {
    if like.is_ipv6() {
        [0u16; 8].into()
    } else {
        [0u8; 4].into()
    }
}
