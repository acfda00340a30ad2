//! TLS of checks: who is trusted and what is shown. The server is always verified.

use std::{
    collections::BTreeMap,
    fmt, fs,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use rustls::{ClientConfig, RootCertStore, client::Resumption, crypto::ring, pki_types::ServerName};

use crate::{
    model::{TlsCheck, TlsFiles},
    pem::{PemError, certificates, private_key},
};

/// Why a session cannot be attempted: faults of this node's files, not of the server.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or is not what it should be.
    #[error(transparent)]
    File(#[from] PemError),
    /// The key does not belong to the certificate, or the like.
    #[error("client certificate {path}: {source}")]
    Identity { path: PathBuf, source: rustls::Error },
    /// The node has no certificate authorities.
    #[error("this node has no certificate authorities: set `ca` in `[tls.<name>]`")]
    NoAuthorities,
    /// Not a name that a certificate can have.
    #[error("`{0}` is not a server name; correct `server-name`")]
    Name(String),
    /// The library refused its own parameters.
    #[error("TLS: {0}")]
    Library(#[from] rustls::Error),
}

/// Client sides by the files they are made of; made anew when a file changes, so that renewed certificates count.
#[derive(Default)]
pub struct Clients(Mutex<BTreeMap<Option<TlsFiles>, Made>>);

struct Made {
    stamps: Vec<Option<SystemTime>>,
    client: Arc<ClientConfig>,
}

// === impl Clients ===

impl fmt::Debug for Clients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Neither certificates nor keys.
        f.write_str("Clients(..)")
    }
}

impl Clients {
    /// The client side of these files, or of the node's own authorities.
    ///
    /// # Errors
    /// A file cannot be read or used. Nothing is remembered then: the next call reads again.
    pub fn client(&self, files: Option<&TlsFiles>) -> Result<Arc<ClientConfig>, TlsError> {
        let stamps = stamps(files);
        // A poisoned lock guards finished values only.
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = files.cloned();
        if let Some(known) = made.get(&key).filter(|known| known.stamps == stamps) {
            return Ok(known.client.clone());
        }
        let client = Arc::new(make(files)?);
        made.insert(
            key,
            Made {
                stamps,
                client: client.clone(),
            },
        );
        Ok(client)
    }
}

/// The name that the server's certificate must have.
pub(super) fn server_name(check: &TlsCheck, to: SocketAddr) -> Result<ServerName<'static>, TlsError> {
    match &check.server_name {
        Some(name) => ServerName::try_from(name.clone()).map_err(|_| TlsError::Name(name.clone())),
        None => Ok(ServerName::IpAddress(to.ip().into())),
    }
}

fn stamps(files: Option<&TlsFiles>) -> Vec<Option<SystemTime>> {
    let identity = files.and_then(|files| files.identity.as_ref());
    let ca = files.and_then(|files| files.ca.as_ref());
    ca.into_iter()
        .chain(identity.into_iter().flat_map(|(cert, key)| [cert, key]))
        .map(|path| fs::metadata(path).and_then(|meta| meta.modified()).ok())
        .collect()
}

fn make(files: Option<&TlsFiles>) -> Result<ClientConfig, TlsError> {
    let mut roots = RootCertStore::empty();
    match files.and_then(|files| files.ca.as_ref()) {
        Some(path) => {
            for certificate in certificates(path)? {
                roots.add(certificate).map_err(|error| PemError::Content {
                    path: path.clone(),
                    fault: error.to_string(),
                })?;
            }
        }
        None => {
            // One unreadable authority of many is not missed.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(TlsError::NoAuthorities);
            }
        }
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut client = match files.and_then(|files| files.identity.as_ref()) {
        Some((cert, key)) => builder
            .with_client_auth_cert(certificates(cert)?, private_key(key)?)
            .map_err(|source| TlsError::Identity {
                path: cert.clone(),
                source,
            })?,
        None => builder.with_no_client_auth(),
    };
    // A resumed session would not show the certificate: an expired one is to be noticed.
    client.resumption = Resumption::disabled();
    client.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(client)
}
