//! Connecting to upstreams.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use lb_route::UpstreamTls;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};
use tokio_rustls::TlsConnector;

use super::{Link, UpstreamIo};
use crate::tls;

mod unverified;

/// Why an upstream could not be connected to: nothing has been sent then.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// It took too long.
    #[error("no connection within {0:?}")]
    Timeout(Duration),
    /// The system or the upstream said no.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Not even a beginning of HTTP.
    #[error(transparent)]
    Http(#[from] hyper::Error),
}

/// Makes connections; one for the whole process.
#[derive(Clone)]
pub struct Connector {
    verified: Offers,
    unverified: Offers,
}

/// What is offered to upstreams: what a request needs, as without TLS. By HTTP/2 no WebSocket would come through.
#[derive(Clone)]
struct Offers {
    h1: Arc<ClientConfig>,
    h2: Arc<ClientConfig>,
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connector").finish_non_exhaustive()
    }
}

impl Connector {
    /// Trusts the node's own certificate authorities.
    ///
    /// # Errors
    /// See [`tls::client`].
    pub fn new() -> Result<Self, rustls::Error> {
        let mut roots = RootCertStore::empty();
        let native = rustls_native_certs::load_native_certs();
        for fault in &native.errors {
            tracing::warn!("certificate authorities of the node: {fault}");
        }
        roots.add_parsable_certificates(native.certs);
        let verified = tls::client()?.with_root_certificates(roots).with_no_client_auth();
        let unverified = tls::client()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(unverified::Unverified::new()))
            .with_no_client_auth();
        Ok(Self {
            verified: Offers::new(verified),
            unverified: Offers::new(unverified),
        })
    }

    /// Connects. `host` is the name that the certificate has to be for, and that is sent as SNI; `first` goes before
    /// everything else.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect(
        &self,
        address: SocketAddr,
        tls: Option<UpstreamTls>,
        host: &str,
        h2: bool,
        first: Option<&[u8]>,
        patience: Duration,
    ) -> Result<Link, ConnectError> {
        let work = async {
            let mut stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            if let Some(first) = first {
                stream.write_all(first).await?;
            }
            let Some(tls) = tls else {
                return Ok(Link::new(UpstreamIo::Plain(stream), h2).await?);
            };
            let offers = if tls.verify {
                &self.verified
            } else {
                &self.unverified
            };
            let config = if h2 { &offers.h2 } else { &offers.h1 };
            let name =
                ServerName::try_from(host.to_owned()).unwrap_or_else(|_| ServerName::from(address.ip()));
            let stream = TlsConnector::from(Arc::clone(config))
                .connect(name, stream)
                .await?;
            let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            Ok(Link::new(UpstreamIo::Tls(Box::new(stream)), h2).await?)
        };
        tokio::time::timeout(patience, work)
            .await
            .map_err(|_| ConnectError::Timeout(patience))?
    }
}

impl Offers {
    fn new(mut config: ClientConfig) -> Self {
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let h1 = Arc::new(config.clone());
        config.alpn_protocols.insert(0, b"h2".to_vec());
        Self {
            h1,
            h2: Arc::new(config),
        }
    }
}
