//! From fields to bytes.

use std::net::IpAddr;

use super::{Checksum, Ip, L4, Packet, checksum};

impl Packet {
    /// The frame.
    pub fn build(&self) -> Vec<u8> {
        let mut frame = Vec::with_capacity(64);
        frame.extend(self.to);
        frame.extend(self.from);
        for (kind, id) in &self.tags {
            frame.extend(kind.to_be_bytes());
            frame.extend(id.to_be_bytes());
        }
        frame.extend(self.ethertype.to_be_bytes());
        frame.extend(self.ip_bytes());
        if let Some(length) = self.cut {
            frame.truncate(length);
        }
        frame
    }

    /// The frame without its Ethernet header: an IP packet, or the raw payload.
    pub fn ip_bytes(&self) -> Vec<u8> {
        match &self.ip {
            None => self.payload.clone(),
            Some(ip) => self.with_header(ip, self.l4_bytes(ip)),
        }
    }

    /// Length of the IP packet, bytes: what the byte counters count.
    pub fn ip_len(&self) -> u64 {
        self.ip_bytes().len() as u64
    }

    /// Length of the IP header with options or extension headers.
    pub fn ip_header_length(&self) -> usize {
        let ip = self.ip.as_ref().expect("an IP packet");
        if self.is_v4() {
            return 20 + ip.options.len();
        }
        let fragment = if ip.fragment.is_some() { 8 } else { 0 };
        40 + ip
            .extensions
            .iter()
            .map(|(_, body)| body.len() + 2)
            .sum::<usize>()
            + fragment
    }

    /// Whether the packet is IPv4.
    pub fn is_v4(&self) -> bool {
        self.ip.as_ref().expect("an IP packet").src.is_ipv4()
    }

    /// The checksum field of the layer-4 header, as built.
    pub fn l4_checksum(&self) -> u16 {
        let ip = self.ip.as_ref().expect("an IP packet");
        let bytes = self.l4_bytes(ip);
        let at = match self.l4 {
            L4::Tcp { .. } => 16,
            L4::Udp { .. } => 6,
            L4::Icmp { .. } => 2,
            L4::None => panic!("no layer 4"),
        };
        u16::from_be_bytes([bytes[at], bytes[at + 1]])
    }

    fn protocol_number(&self) -> u8 {
        match self.l4 {
            L4::Tcp { .. } => 6,
            L4::Udp { .. } => 17,
            L4::Icmp { .. } if self.is_v4() => 1,
            L4::Icmp { .. } => 58,
            L4::None => 59,
        }
    }

    /// Layer-4 header and payload, with its checksum.
    fn l4_bytes(&self, ip: &Ip) -> Vec<u8> {
        let mut bytes = Vec::new();
        let at = match &self.l4 {
            L4::None => return self.payload.clone(),
            L4::Tcp {
                sport,
                dport,
                seq,
                ack,
                flags,
                window,
                options,
                header_words,
            } => {
                let words = header_words.unwrap_or((5 + options.len() / 4) as u8);
                bytes.extend(sport.to_be_bytes());
                bytes.extend(dport.to_be_bytes());
                bytes.extend(seq.to_be_bytes());
                bytes.extend(ack.to_be_bytes());
                bytes.extend([words << 4, *flags]);
                bytes.extend(window.to_be_bytes());
                bytes.extend([0; 4]);
                bytes.extend(options);
                16
            }
            L4::Udp { sport, dport, length } => {
                let length = length.unwrap_or((8 + self.payload.len()) as u16);
                bytes.extend(sport.to_be_bytes());
                bytes.extend(dport.to_be_bytes());
                bytes.extend(length.to_be_bytes());
                bytes.extend([0; 2]);
                6
            }
            L4::Icmp { kind, code, rest } => {
                bytes.extend([*kind, *code, 0, 0]);
                bytes.extend(rest.to_be_bytes());
                2
            }
        };
        bytes.extend(&self.payload);
        let sum = self.l4_sum(ip, &bytes);
        bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    fn l4_sum(&self, ip: &Ip, bytes: &[u8]) -> u16 {
        let protocol = self.protocol_number();
        let right = match self.l4 {
            L4::Icmp { .. } if ip.src.is_ipv4() => checksum::of(bytes),
            _ => checksum::segment(ip.src, ip.dst, protocol, bytes),
        };
        // RFC 768, RFC 8200: a UDP checksum of zero means none, so a computed zero is sent as all ones.
        let right = if protocol == 17 && right == 0 {
            0xffff
        } else {
            right
        };
        match self.checksum {
            Checksum::Right => right,
            Checksum::Wrong(xor) => right ^ xor,
            Checksum::Partial => checksum::fold(checksum::pseudo(ip.src, ip.dst, protocol, bytes.len())),
            Checksum::Absent => 0,
        }
    }

    /// The IP header before the part of `l4` that this packet carries.
    fn with_header(&self, ip: &Ip, l4: Vec<u8>) -> Vec<u8> {
        let total = l4.len();
        let (offset, more, body) = match ip.fragment {
            None => (0, false, &l4[..]),
            Some((from, to)) => (from, to < total, &l4[from..to.min(total)]),
        };
        let protocol = ip.protocol.unwrap_or_else(|| self.protocol_number());
        match (ip.src, ip.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let words = ip.header_words.unwrap_or((5 + ip.options.len() / 4) as u8);
                let length = ip
                    .total_length
                    .unwrap_or((20 + ip.options.len() + body.len()) as u16);
                let flags = u16::from(ip.dont_fragment) << 14 | u16::from(more) << 13;
                let mut header = vec![0x40 | words, ip.tos];
                header.extend(length.to_be_bytes());
                header.extend((ip.id as u16).to_be_bytes());
                header.extend((flags | (offset / 8) as u16).to_be_bytes());
                header.extend([ip.ttl, protocol, 0, 0]);
                header.extend(src.octets());
                header.extend(dst.octets());
                header.extend(&ip.options);
                let sum = checksum::of(&header);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                header.extend(body);
                header
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let mut numbers: Vec<u8> = ip.extensions.iter().map(|(number, _)| *number).collect();
                if ip.fragment.is_some() {
                    numbers.push(44);
                }
                numbers.push(protocol);
                let mut chain = Vec::new();
                for (i, (_, rest)) in ip.extensions.iter().enumerate() {
                    chain.extend([numbers[i + 1], ((rest.len() + 2) / 8 - 1) as u8]);
                    chain.extend(rest);
                }
                if ip.fragment.is_some() {
                    chain.extend([protocol, 0]);
                    chain.extend((offset as u16 | u16::from(more)).to_be_bytes());
                    chain.extend(ip.id.to_be_bytes());
                }
                let length = ip.total_length.unwrap_or((chain.len() + body.len()) as u16);
                let mut header = (0x6000_0000 | u32::from(ip.tos) << 20).to_be_bytes().to_vec();
                header.extend(length.to_be_bytes());
                header.extend([numbers[0], ip.ttl]);
                header.extend(src.octets());
                header.extend(dst.octets());
                header.extend(chain);
                header.extend(body);
                header
            }
            _ => unreachable!("`Packet::ip` checks the families"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{checksum, eth, flag};

    #[test]
    fn built_checksums_verify() {
        for (src, dst) in [("10.0.0.1", "10.0.0.2"), ("2001:db8::1", "2001:db8::2")] {
            let packet = eth([2; 6], [4; 6])
                .ip(src, dst)
                .tcp(1, 2, flag::SYN)
                .payload(b"odd");
            let bytes = packet.ip_bytes();
            let l4 = &bytes[packet.ip_header_length()..];
            let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
            assert_eq!(checksum::segment(src, dst, 6, l4), 0);
        }
    }

    #[test]
    fn fragments_make_up_the_datagram() {
        let whole = eth([2; 6], [4; 6])
            .ip("10.0.0.1", "10.0.0.2")
            .udp(1, 2)
            .payload(&[7; 40]);
        let joined = [whole.clone().fragment(0, 24), whole.clone().fragment(24, 48)]
            .iter()
            .flat_map(|f| f.ip_bytes()[20..].to_vec())
            .collect::<Vec<_>>();
        assert_eq!(joined, whole.ip_bytes()[20..]);
        assert_eq!(whole.clone().fragment(0, 24).ip_bytes()[6..8], [0x20, 0]);
        assert_eq!(whole.fragment(24, 48).ip_bytes()[6..8], [0, 3]);
    }
}
