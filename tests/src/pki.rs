//! Certificates for servers and clients of the tests, by an authority of their own.

use std::path::Path;

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};

/// Signs certificates.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes one; its certificate is written to `path`.
    pub fn new(path: &Path) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "authority of the tests");
        let key = KeyPair::generate()?;
        std::fs::write(path, params.self_signed(&key)?.pem())?;
        let issuer = Issuer::new(params, key);
        Ok(Self { issuer })
    }

    /// Writes a certificate for `address` and loopback, good until the beginning of a year, and its key.
    pub fn certify(&self, name: &str, address: &str, until: i32, cert: &Path, key: &Path) -> Result<()> {
        let mut params = CertificateParams::new(vec![address.to_owned(), "127.0.0.1".into()])?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(until, 1, 1);
        let own = KeyPair::generate()?;
        std::fs::write(key, own.serialize_pem())?;
        Ok(std::fs::write(cert, params.signed_by(&own, &self.issuer)?.pem())?)
    }
}
