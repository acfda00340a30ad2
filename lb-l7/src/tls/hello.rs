//! The first message of a TLS client: which server it wants, without ending its TLS.

use std::io;

use bytes::BytesMut;
use rustls::server::{Accepted, Acceptor};
use tokio::{io::AsyncReadExt as _, net::TcpStream};

/// Longest first message: one record, with room for the ones of large keys.
const LONGEST: usize = 18 * 1024;

/// What a client began with.
pub struct Hello {
    /// As it came, for whoever it is passed on to.
    pub bytes: BytesMut,
    /// As it is understood.
    pub accepted: Accepted,
    /// So many bytes are in `accepted`: what is behind them belongs to what comes next.
    pub fed: usize,
}

impl Hello {
    /// The server that the client wants, as tables name it.
    pub fn name(&self) -> Option<String> {
        name(&self.accepted)
    }
}

/// The server that a client wants, in lower case.
pub fn name(accepted: &Accepted) -> Option<String> {
    accepted.client_hello().server_name().map(str::to_ascii_lowercase)
}

/// Reads the message.
///
/// # Errors
/// The client went, or it speaks no TLS.
pub async fn read(stream: &mut TcpStream) -> io::Result<Hello> {
    // No memory is spent on a client that says nothing.
    stream.readable().await?;
    let mut bytes = BytesMut::with_capacity(1024);
    let mut acceptor = Acceptor::default();
    let mut fed = 0;
    loop {
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(accepted) = accept(&mut acceptor, &bytes, &mut fed)? {
            return Ok(Hello { bytes, accepted, fed });
        }
        if bytes.len() > LONGEST {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "too long a first message",
            ));
        }
    }
}

/// The message, once all of it is there. `fed` counts the bytes that were taken from `bytes`, which may have grown since.
///
/// # Errors
/// It is none of TLS.
pub fn accept(acceptor: &mut Acceptor, bytes: &[u8], fed: &mut usize) -> io::Result<Option<Accepted>> {
    let mut found = None;
    while *fed < bytes.len() && found.is_none() {
        let mut rest = &bytes[*fed..];
        *fed += acceptor.read_tls(&mut rest)?;
        found = acceptor
            .accept()
            .map_err(|(error, _alert)| io::Error::new(io::ErrorKind::InvalidData, error))?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::*;

    fn hello(name: &str) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let mut client =
            ClientConnection::new(Arc::new(config), name.to_owned().try_into().unwrap()).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_name_is_found_however_the_message_is_cut() {
        let bytes = hello("Vote.example");
        for step in [1, 7, 100, bytes.len()] {
            let (mut acceptor, mut fed, mut found) = (Acceptor::default(), 0, None);
            for end in (0..bytes.len()).step_by(step).chain([bytes.len()]) {
                found = found.or(accept(&mut acceptor, &bytes[..end], &mut fed).unwrap());
            }
            let found = found.and_then(|accepted| super::name(&accepted));
            assert_eq!(found.as_deref(), Some("vote.example"), "{step} bytes at a time");
        }
        let mut fed = 0;
        assert!(accept(&mut Acceptor::default(), b"GET / HTTP/1.1\r\n\r\n", &mut fed).is_err());
    }
}
