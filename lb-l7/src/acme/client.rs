//! HTTP towards the authority: servers are verified, every wait has an end, and its word on when to come back is heard.

use std::{
    cell::Cell,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http_body_util::Limited;
use hyper::{HeaderMap, Request, StatusCode, header};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};

use super::chain;

/// How long the authority may take for an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest answer, bytes: a chain of certificates.
const LONGEST: usize = 1 << 20;
/// Furthest time to come back that is believed.
const FURTHEST: Duration = Duration::from_secs(7 * 24 * 3600);

tokio::task_local! {
    /// When the authority wants to see the order that is under way again.
    static LATER: Cell<Option<SystemTime>>;
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The file of authorities.
    #[error("{}: {fault}; name a PEM file with the root of the directory's own certificate in `ca` of [l7.acme]", path.display())]
    Roots {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        fault: String,
    },
    /// Nobody to trust.
    #[error(
        "this machine knows no certificate authorities; install ca-certificates, or name a file in `ca` of [l7.acme]"
    )]
    NoRoots,
    /// Of rustls.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
}

/// The client of one directory.
pub struct Http(Client<HttpsConnector<HttpConnector>, BodyWrapper<Bytes>>);

// === impl Http ===

impl Http {
    /// Trusts the authorities of this file, or those of the machine.
    pub fn new(ca: Option<&Path>) -> Result<Self, ClientError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots(ca)?)
            .with_no_client_auth();
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(config)
            .https_only()
            .enable_http1()
            .build();
        Ok(Self(Client::builder(TokioExecutor::new()).build(connector)))
    }
}

impl HttpClient for Http {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let url = request.uri().clone();
        let answer = self.0.request(request);
        Box::pin(async move {
            let fail = |text: String| Error::Other(text.into());
            let answer = tokio::time::timeout(PATIENCE, answer)
                .await
                .map_err(|_| fail(format!("{url}: no answer in {PATIENCE:?}")))?
                .map_err(|error| fail(format!("{url}: {}", chain(&error))))?;
            let (status, headers) = (answer.status(), answer.headers());
            if matches!(
                status,
                StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
            ) && let Some(later) = retry_after(headers, SystemTime::now())
            {
                let _outside_of_an_order = LATER.try_with(|cell| cell.set(Some(later)));
            }
            let kind = headers.get(header::CONTENT_TYPE);
            let explained = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/"));
            if !status.is_success() && !explained {
                return Err(fail(format!("{url} answered {status}")));
            }
            Ok(BytesResponse::from(
                answer.map(|body| Limited::new(body, LONGEST)),
            ))
        })
    }
}

/// Does this work, and tells when the authority wants it to be done again, if it said so.
pub async fn heard<T>(work: impl Future<Output = T>) -> (T, Option<SystemTime>) {
    LATER
        .scope(Cell::new(None), async {
            let done = work.await;
            (done, LATER.with(Cell::get))
        })
        .await
}

fn roots(ca: Option<&Path>) -> Result<RootCertStore, ClientError> {
    let mut roots = RootCertStore::empty();
    let Some(path) = ca else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        return if roots.is_empty() {
            Err(ClientError::NoRoots)
        } else {
            Ok(roots)
        };
    };
    let told = |fault: String| ClientError::Roots {
        path: path.into(),
        fault,
    };
    let given = CertificateDer::pem_file_iter(path).map_err(|error| told(error.to_string()))?;
    for certificate in given {
        let certificate = certificate.map_err(|error| told(error.to_string()))?;
        roots.add(certificate).map_err(|error| told(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(told("has no certificate in it".into()));
    }
    Ok(roots)
}

/// `Retry-After`: seconds or a date (RFC 9110, 10.2.3).
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<SystemTime> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let at = match text.parse() {
        Ok(seconds) => now.checked_add(Duration::from_secs(seconds))?,
        Err(_) => httpdate::parse_http_date(text).ok()?,
    };
    Some(at.min(now + FURTHEST))
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    #[test]
    fn times_to_come_back_are_understood_and_bounded() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_700);
        let after = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static(text));
            retry_after(&headers, now).and_then(|at| at.duration_since(now).ok())
        };
        assert_eq!(after("120"), Some(Duration::from_secs(120)));
        assert_eq!(
            after("Sun, 06 Nov 1994 08:49:37 GMT"),
            Some(Duration::from_secs(77))
        );
        assert_eq!(after("99999999999"), Some(FURTHEST));
        for text in ["", "soon", "-1", "18446744073709551615"] {
            assert_eq!(after(text), None, "{text}");
        }
    }

    #[test]
    fn a_file_without_authorities_is_a_fault_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        for text in [None, Some(""), Some("nonsense")] {
            if let Some(text) = text {
                std::fs::write(&path, text).unwrap();
            }
            let error = Http::new(Some(&path)).err().unwrap().to_string();
            assert!(error.contains("ca.pem") && error.contains("`ca`"), "{error}");
        }
    }
}
