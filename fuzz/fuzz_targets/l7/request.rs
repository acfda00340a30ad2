//! Text → a request as hyper gives it to the shim, its client, and the routes.

use std::net::IpAddr;

use hyper::{
    HeaderMap, Method, Request, Uri, Version,
    header::{HeaderName, HeaderValue},
    http::{
        request::Parts,
        uri::{self, Authority, PathAndQuery, Scheme},
    },
};
use weir_l7::{client::Stage, worker::Client};

/// What the text says.
pub struct Text {
    pub parts: Parts,
    pub client: Client,
    /// A line each.
    pub routes: Vec<String>,
}

impl Text {
    /// `None` if hyper would refuse it.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let mut lines = bytes.split(|byte| *byte == b'\n');
        let mut words = lines.next()?.split(|byte| *byte == b' ');
        let (method, target, version) = (words.next()?, words.next()?, words.next()?);
        let version = match version {
            b"HTTP/1.0" => Version::HTTP_10,
            b"HTTP/1.1" => Version::HTTP_11,
            b"HTTP/2" => Version::HTTP_2,
            _ => return None,
        };
        let mut headers = HeaderMap::new();
        let mut authority = None;
        for line in lines.by_ref().take_while(|line| !line.is_empty()) {
            if let Some(given) = line.strip_prefix(b":authority: ") {
                authority = Some(Authority::try_from(given).ok()?);
                continue;
            }
            let colon = line.iter().position(|byte| *byte == b':')?;
            let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
            headers.append(
                HeaderName::from_bytes(name).ok()?,
                HeaderValue::from_bytes(value).ok()?,
            );
        }
        let mut parts = Request::new(()).into_parts().0;
        parts.method = Method::from_bytes(method).ok()?;
        parts.uri = uri(target, version, authority)?;
        (parts.version, parts.headers) = (version, headers);
        let rest: Vec<String> = lines
            .map(|line| String::from_utf8_lossy(line).into_owned())
            .collect();
        let (client, routes) = rest
            .split_first()
            .map_or(("", &[][..]), |(first, rest)| (first.as_str(), rest));
        Some(Self {
            parts,
            client: self::client(client),
            routes: routes.to_vec(),
        })
    }
}

fn uri(target: &[u8], version: Version, authority: Option<Authority>) -> Option<Uri> {
    if version != Version::HTTP_2 {
        return Uri::try_from(target).ok();
    }
    let mut parts = uri::Parts::default();
    parts.path_and_query = Some(PathAndQuery::try_from(target).ok()?);
    parts.scheme = authority.is_some().then_some(Scheme::HTTP);
    parts.authority = authority;
    Uri::from_parts(parts).ok()
}

fn client(line: &str) -> Client {
    let mut words = line.split(' ');
    let ip: Option<IpAddr> = words.next().and_then(|word| word.parse().ok());
    // The shim's clients have canonical addresses.
    let ip = ip.unwrap_or(IpAddr::from([192, 0, 2, 7])).to_canonical();
    let rest: Vec<&str> = words.collect();
    let has = |word: &str| rest.contains(&word);
    Client::new((ip, 4000).into(), has("tls"), has("trusted"), Stage::new(0))
}
