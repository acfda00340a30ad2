//! The PROXY protocol, version 2, as a balancer before us speaks it: who the client is.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use tokio::{io::AsyncReadExt as _, net::TcpStream};

/// What every header begins with.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, command, family, length.
const FIXED: usize = 16;
/// Longest rest that is read: addresses and their additions.
const LONGEST: usize = 4096;

/// Why a header is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Something else.
    #[error("no header of the PROXY protocol, version 2")]
    NoHeader,
    /// Of the version before, which is lines of text.
    #[error("a header of the PROXY protocol, version 1; have version 2 sent (send-proxy-v2)")]
    Old,
    /// Its length does not fit what it says.
    #[error("a header of the PROXY protocol with a wrong length")]
    Length,
    /// A command that is not known.
    #[error("a header of the PROXY protocol with an unknown command")]
    Command,
}

/// Reads a header, and nothing behind it: the client's address, or `peer` if the balancer speaks for itself.
///
/// # Errors
/// There is none, though there must be.
pub async fn read(stream: &mut TcpStream, peer: SocketAddr) -> io::Result<SocketAddr> {
    let invalid = |error: HeaderError| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut fixed = [0; FIXED];
    stream.read_exact(&mut fixed).await?;
    let length = length(&fixed).map_err(invalid)?;
    let mut rest = vec![0; length];
    stream.read_exact(&mut rest).await?;
    Ok(source(&fixed, &rest).map_err(invalid)?.unwrap_or(peer))
}

/// How many bytes follow the fixed part.
pub fn length(fixed: &[u8; FIXED]) -> Result<usize, HeaderError> {
    if fixed.starts_with(b"PROXY ") {
        return Err(HeaderError::Old);
    }
    if fixed[..12] != SIGNATURE || fixed[12] >> 4 != 2 {
        return Err(HeaderError::NoHeader);
    }
    let length = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if length > LONGEST {
        return Err(HeaderError::Length);
    }
    Ok(length)
}

/// The client's address; `None` if the header has none.
pub fn source(fixed: &[u8; FIXED], rest: &[u8]) -> Result<Option<SocketAddr>, HeaderError> {
    match fixed[12] & 0x0f {
        // LOCAL: a check by the balancer itself.
        0 => return Ok(None),
        1 => {}
        _ => return Err(HeaderError::Command),
    }
    let port = |at: usize| rest.get(at..at + 2).map(|p| u16::from_be_bytes([p[0], p[1]]));
    let (ip, port) = match fixed[13] >> 4 {
        1 => {
            let ip = rest.first_chunk::<4>().map(|ip| IpAddr::V4(Ipv4Addr::from(*ip)));
            (ip, port(8))
        }
        2 => {
            let ip = rest.first_chunk::<16>().map(|ip| IpAddr::V6(Ipv6Addr::from(*ip)));
            (ip, port(32))
        }
        // Unix sockets, and what comes after this was written.
        _ => return Ok(None),
    };
    match (ip, port) {
        (Some(ip), Some(port)) => Ok(Some(SocketAddr::new(ip.to_canonical(), port))),
        _ => Err(HeaderError::Length),
    }
}

/// A header that tells the client and where it came to.
pub fn header(client: SocketAddr, local: SocketAddr) -> Vec<u8> {
    let mut header = SIGNATURE.to_vec();
    // Version 2, PROXY.
    header.push(0x21);
    let mut put = |family: u8, source: &[u8], target: &[u8]| {
        // Two addresses and two ports: 12 or 36.
        let length = (source.len() + target.len() + 4) as u16;
        header.push(family);
        header.extend(length.to_be_bytes());
        header.extend(source);
        header.extend(target);
    };
    match (client.ip(), local.ip().to_canonical()) {
        (IpAddr::V4(source), IpAddr::V4(target)) => put(0x11, &source.octets(), &target.octets()),
        (source, target) => put(0x21, &six(source).octets(), &six(target).octets()),
    }
    header.extend(client.port().to_be_bytes());
    header.extend(local.port().to_be_bytes());
    header
}

fn six(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fixed(command: u8, family: u8, length: u16) -> [u8; FIXED] {
        let mut fixed = [0; FIXED];
        fixed[..12].copy_from_slice(&SIGNATURE);
        fixed[12] = 0x20 | command;
        fixed[13] = family;
        fixed[14..].copy_from_slice(&length.to_be_bytes());
        fixed
    }

    #[test]
    fn addresses_of_both_families_are_read() {
        let v4 = [192, 0, 2, 7, 10, 0, 0, 1, 0x1f, 0x90, 0, 80];
        assert_eq!(
            source(&fixed(1, 0x11, 12), &v4),
            Ok(Some("192.0.2.7:8080".parse().unwrap()))
        );
        let mut v6 = [0; 36];
        v6[..2].copy_from_slice(&[0x20, 0x01]);
        v6[32..34].copy_from_slice(&443_u16.to_be_bytes());
        assert_eq!(
            source(&fixed(1, 0x21, 36), &v6),
            Ok(Some("[2001::]:443".parse().unwrap()))
        );
        assert_eq!(source(&fixed(0, 0, 0), &[]), Ok(None));
        assert_eq!(source(&fixed(1, 0x31, 0), &[]), Ok(None));
        assert_eq!(source(&fixed(2, 0x11, 12), &v4), Err(HeaderError::Command));
        assert_eq!(source(&fixed(1, 0x11, 12), &v4[..9]), Err(HeaderError::Length));
        assert_eq!(length(&fixed(1, 0x11, 12)), Ok(12));
        assert_eq!(length(&fixed(1, 0x11, 60_000)), Err(HeaderError::Length));
        assert_eq!(length(b"GET / HTTP/1.1\r\n"), Err(HeaderError::NoHeader));
        assert_eq!(length(b"PROXY TCP4 192.0"), Err(HeaderError::Old));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(a in any::<IpAddr>(), b in any::<IpAddr>(), ports in any::<(u16, u16)>()) {
            let client = SocketAddr::new(a.to_canonical(), ports.0);
            let header = header(client, SocketAddr::new(b, ports.1));
            let (fixed, rest) = header.split_first_chunk::<16>().unwrap();
            prop_assert_eq!(length(fixed), Ok(rest.len()));
            prop_assert_eq!(source(fixed, rest), Ok(Some(client)));
        }

        #[test]
        fn no_bytes_make_it_panic(fixed in any::<[u8; 16]>(), rest in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = (length(&fixed), source(&fixed, &rest));
        }
    }
}
