//! What differs between two frames, field by field.

use std::{fmt::Write as _, net::Ipv4Addr, net::Ipv6Addr};

/// `None` if the frames are equal; else a line for each field that differs, and both frames in hex.
pub fn diff(expected: &[u8], found: &[u8]) -> Option<String> {
    if expected == found {
        return None;
    }
    let (want, have) = (dissect(expected), dissect(found));
    let mut text = String::new();
    for (name, value) in &want {
        match have.iter().find(|(n, _)| n == name) {
            Some((_, other)) if other == value => {}
            Some((_, other)) => {
                writeln!(text, "    {name}: expected {value}, found {other}").expect("a string")
            }
            None => writeln!(text, "    {name}: expected {value}, found nothing").expect("a string"),
        }
    }
    for (name, value) in &have {
        if !want.iter().any(|(n, _)| n == name) {
            writeln!(text, "    {name}: expected nothing, found {value}").expect("a string");
        }
    }
    let _ = writeln!(
        text,
        "    expected {}\n    found    {}",
        hex(expected),
        hex(found)
    );
    Some(text)
}

fn hex(bytes: &[u8]) -> String {
    let shown: String = bytes.iter().take(160).map(|b| format!("{b:02x}")).collect();
    if bytes.len() > 160 {
        format!("{shown}… ({} bytes)", bytes.len())
    } else {
        shown
    }
}

type Fields = Vec<(String, String)>;

/// Names every field of a frame as far as its bytes go.
fn dissect(frame: &[u8]) -> Fields {
    let mut fields = Fields::new();
    fields.push(("length".into(), frame.len().to_string()));
    if frame.len() < 14 {
        fields.push(("bytes".into(), hex(frame)));
        return fields;
    }
    fields.push(("eth.to".into(), hex(&frame[..6])));
    fields.push(("eth.from".into(), hex(&frame[6..12])));
    let mut at = 12;
    while at + 4 <= frame.len() && matches!(word(frame, at), 0x8100 | 0x88a8) {
        fields.push((format!("tag.{at}"), hex(&frame[at..at + 4])));
        at += 4;
    }
    if at + 2 > frame.len() {
        return fields;
    }
    fields.push(("eth.type".into(), format!("{:04x}", word(frame, at))));
    match word(frame, at) {
        0x0800 => ipv4("ip", &frame[at + 2..], &mut fields),
        0x86dd => ipv6("ip", &frame[at + 2..], &mut fields),
        _ => fields.push(("body".into(), hex(&frame[at + 2..]))),
    }
    fields
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn ipv4(name: &str, bytes: &[u8], fields: &mut Fields) {
    let header = usize::from(bytes.first().map_or(0, |b| b & 15)) * 4;
    if bytes.len() < 20 || header < 20 || bytes.len() < header {
        return fields.push((format!("{name}.bytes"), hex(bytes)));
    }
    let mut put = |field: &str, value: String| fields.push((format!("{name}.{field}"), value));
    put("version+words", format!("{:02x}", bytes[0]));
    put("tos", bytes[1].to_string());
    put("length", word(bytes, 2).to_string());
    put("id", format!("{:04x}", word(bytes, 4)));
    put("fragment", format!("{:04x}", word(bytes, 6)));
    put("ttl", bytes[8].to_string());
    put("protocol", bytes[9].to_string());
    put("checksum", format!("{:04x}", word(bytes, 10)));
    put(
        "src",
        Ipv4Addr::new(bytes[12], bytes[13], bytes[14], bytes[15]).to_string(),
    );
    put(
        "dst",
        Ipv4Addr::new(bytes[16], bytes[17], bytes[18], bytes[19]).to_string(),
    );
    put("options", hex(&bytes[20..header]));
    if word(bytes, 6) & 0x1fff == 0 {
        layer4(name, bytes[9], &bytes[header..], fields);
    } else {
        fields.push((format!("{name}.data"), hex(&bytes[header..])));
    }
}

fn ipv6(name: &str, bytes: &[u8], fields: &mut Fields) {
    if bytes.len() < 40 {
        return fields.push((format!("{name}.bytes"), hex(bytes)));
    }
    let address = |at: usize| {
        let octets: [u8; 16] = bytes[at..at + 16].try_into().expect("sixteen bytes");
        Ipv6Addr::from(octets).to_string()
    };
    let mut put = |field: &str, value: String| fields.push((format!("{name}.{field}"), value));
    put("version+class+label", hex(&bytes[..4]));
    put("length", word(bytes, 4).to_string());
    put("next", bytes[6].to_string());
    put("hops", bytes[7].to_string());
    put("src", address(8));
    put("dst", address(24));
    let (mut next, mut at) = (bytes[6], 40);
    while matches!(next, 0 | 43 | 44 | 60) && at + 8 <= bytes.len() {
        let length = if next == 44 {
            8
        } else {
            8 * (usize::from(bytes[at + 1]) + 1)
        };
        let end = (at + length).min(bytes.len());
        put(&format!("extension.{next}@{at}"), hex(&bytes[at..end]));
        let later = next == 44 && word(bytes, at + 2) & 0xfff8 != 0;
        (next, at) = (bytes[at], end);
        if later {
            return fields.push((format!("{name}.data"), hex(&bytes[at..])));
        }
    }
    layer4(name, next, &bytes[at..], fields);
}

fn layer4(name: &str, protocol: u8, bytes: &[u8], fields: &mut Fields) {
    let mut put = |field: &str, value: String| fields.push((format!("{name}.{field}"), value));
    match protocol {
        6 if bytes.len() >= 20 => {
            put("tcp.sport", word(bytes, 0).to_string());
            put("tcp.dport", word(bytes, 2).to_string());
            put("tcp.seq", format!("{:?}", &bytes[4..8]));
            put("tcp.ack", format!("{:?}", &bytes[8..12]));
            put("tcp.words", format!("{:02x}", bytes[12]));
            put("tcp.flags", format!("{:02x}", bytes[13]));
            put("tcp.window", word(bytes, 14).to_string());
            put("tcp.checksum", format!("{:04x}", word(bytes, 16)));
            put("tcp.rest", hex(&bytes[18..]));
        }
        17 if bytes.len() >= 8 => {
            put("udp.sport", word(bytes, 0).to_string());
            put("udp.dport", word(bytes, 2).to_string());
            put("udp.length", word(bytes, 4).to_string());
            put("udp.checksum", format!("{:04x}", word(bytes, 6)));
            put("udp.payload", hex(&bytes[8..]));
        }
        1 | 58 if bytes.len() >= 8 => {
            put("icmp.type+code", hex(&bytes[..2]));
            put("icmp.checksum", format!("{:04x}", word(bytes, 2)));
            put("icmp.rest", hex(&bytes[4..8]));
            match (protocol, bytes[0]) {
                (1, 3 | 11 | 12) => ipv4(&format!("{name}.quoted"), &bytes[8..], fields),
                (58, 1..=4) => ipv6(&format!("{name}.quoted"), &bytes[8..], fields),
                _ => put("icmp.body", hex(&bytes[8..])),
            }
        }
        _ => put("l4", hex(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::eth, diff};

    #[test]
    fn names_the_field_that_differs() {
        let a = eth([2; 6], [4; 6])
            .ip("10.0.0.1", "10.0.0.2")
            .udp(1, 2)
            .payload(b"x");
        assert_eq!(diff(&a.build(), &a.build()), None);
        let text = diff(&a.build(), &a.clone().ttl(63).build()).unwrap();
        assert!(text.contains("ip.ttl: expected 64, found 63"), "{text}");
        assert!(!text.contains("udp.sport"), "{text}");
    }
}
