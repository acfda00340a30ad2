//! The first message of a TLS client: which server it wants, without ending its TLS.

use std::io;

use bytes::BytesMut;
use rustls::server::Acceptor;
use tokio::net::TcpStream;

/// Longest first message: one record, with room for the ones of large keys.
const LONGEST: usize = 18 * 1024;

/// Reads the message; the bytes as they came, and the server name in it.
///
/// # Errors
/// The client went, or it speaks no TLS.
pub async fn read(stream: &TcpStream) -> io::Result<(BytesMut, Option<String>)> {
    let mut bytes = BytesMut::with_capacity(1024);
    let mut acceptor = Acceptor::default();
    let mut fed = 0;
    loop {
        stream.readable().await?;
        match stream.try_read_buf(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        if let Some(name) = name(&mut acceptor, &bytes, &mut fed)? {
            return Ok((bytes, name));
        }
        if bytes.len() > LONGEST {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "too long a first message",
            ));
        }
    }
}

/// The name, once all of the message is there.
fn name(acceptor: &mut Acceptor, bytes: &[u8], fed: &mut usize) -> io::Result<Option<Option<String>>> {
    while *fed < bytes.len() {
        let mut rest = &bytes[*fed..];
        *fed += acceptor.read_tls(&mut rest)?;
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                return Ok(Some(
                    accepted.client_hello().server_name().map(str::to_ascii_lowercase),
                ));
            }
            Ok(None) => {}
            Err((error, _alert)) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }
    Ok(None)
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
                found = found.or(name(&mut acceptor, &bytes[..end], &mut fed).unwrap());
            }
            assert_eq!(found, Some(Some("vote.example".into())), "{step} bytes at a time");
        }
        let mut fed = 0;
        assert!(name(&mut Acceptor::default(), b"GET / HTTP/1.1\r\n\r\n", &mut fed).is_err());
    }
}
