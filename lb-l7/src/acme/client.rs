//! HTTP towards the authority: servers are verified, every wait has an end, and its word on when to come back is heard.

use std::{
    cell::Cell,
    path::{Path, PathBuf},
    pin::Pin,
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
    RootCertStore,
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
        let config = crate::tls::client()?
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
    use std::sync::Arc;

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

    /// A server that says this to whoever speaks TLS with it, and the file of who has signed its certificate.
    async fn server(folder: &Path, says: &'static str) -> (String, PathBuf) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let ca = folder.join("ca.pem");
        std::fs::write(&ca, made.cert.pem()).unwrap();
        let key =
            rustls::pki_types::PrivateKeyDer::from_pem_slice(made.signing_key.serialize_pem().as_bytes());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key.unwrap())
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://localhost:{}/dir", listener.local_addr().unwrap().port());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // Who does not trust it goes.
                if let Ok(mut stream) = acceptor.accept(stream).await {
                    let _request = stream.read(&mut [0; 4096]).await.unwrap();
                    stream.write_all(says.as_bytes()).await.unwrap();
                    stream.shutdown().await.unwrap();
                }
            }
        });
        (url, ca)
    }

    #[tokio::test]
    async fn who_proves_itself_is_heard_and_its_word_on_when_to_come_back_too() {
        let dir = tempfile::tempdir().unwrap();
        let says = "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 600\r\nContent-Length: 2\r\n\
                    Content-Type: application/problem+json\r\nConnection: close\r\n\r\n{}";
        let (url, ca) = server(dir.path(), says).await;
        let ask = |http: &Http| http.request(Request::get(&url).body(BodyWrapper::default()).unwrap());
        let http = Http::new(Some(&ca)).unwrap();
        let (answer, later) = heard(ask(&http)).await;
        assert_eq!(answer.unwrap().parts.status, 429);
        let left = later.unwrap().duration_since(SystemTime::now()).unwrap();
        assert!(Duration::from_secs(590) < left && left <= Duration::from_secs(600));
        // Nobody waits for what another order was told.
        assert_eq!(heard(async {}).await.1, None);

        let other = dir.path().join("other.pem");
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        std::fs::write(&other, made.cert.pem()).unwrap();
        let strict = Http::new(Some(&other)).unwrap();
        let error = ask(&strict).await.err().unwrap().to_string();
        assert!(error.contains("certificate") && error.contains(&url), "{error}");
    }

    #[tokio::test]
    async fn an_answer_that_is_no_word_of_acme_is_a_fault_with_its_status() {
        let dir = tempfile::tempdir().unwrap();
        let says = "HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\
                    Connection: close\r\n\r\nnone";
        let (url, ca) = server(dir.path(), says).await;
        let request = Request::get(&url).body(BodyWrapper::default()).unwrap();
        let answer = Http::new(Some(&ca)).unwrap().request(request).await;
        let error = answer.err().unwrap().to_string();
        assert!(error.contains("502 Bad Gateway"), "{error}");
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
