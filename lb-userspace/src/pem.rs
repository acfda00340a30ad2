//! Files of certificates and keys, for whoever speaks TLS: what is wrong with one is said by its name, before a library is given it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

/// A file that cannot be used. Never says what is in it.
#[derive(Debug, thiserror::Error)]
pub enum PemError {
    /// It cannot be read.
    #[error("{path}: {source}; check its name in the configuration and its permissions")]
    Read { path: PathBuf, source: io::Error },
    /// It is not what it should be.
    #[error("{path}: {fault}; it must be PEM")]
    Content { path: PathBuf, fault: String },
}

/// The certificates of a file: at least one.
///
/// # Errors
/// See [`PemError`].
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let text = read(path)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let fault = match all {
        Ok(all) if !all.is_empty() => return Ok(all),
        Ok(_) => "no certificate in it".into(),
        Err(error) => error.to_string(),
    };
    Err(PemError::Content {
        path: path.into(),
        fault,
    })
}

/// The private key of a file.
///
/// # Errors
/// See [`PemError`].
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, PemError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| PemError::Content {
        path: path.into(),
        fault: format!("no private key in it ({error})"),
    })
}

/// Whether files can be used, for a library that reads them by itself and says nothing of them: an authority's, and our
/// certificate and its key.
///
/// # Errors
/// See [`PemError`].
pub fn check(ca: &Path, identity: Option<(&Path, &Path)>) -> Result<(), PemError> {
    certificates(ca)?;
    if let Some((cert, key)) = identity {
        certificates(cert)?;
        private_key(key)?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>, PemError> {
    fs::read(path).map_err(|source| PemError::Read {
        path: path.into(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_be_used_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let made = rcgen::generate_simple_self_signed(["weir.test".to_owned()]).unwrap();
        fs::write(path("ca"), made.cert.pem()).unwrap();
        fs::write(path("key"), made.signing_key.serialize_pem()).unwrap();
        fs::write(path("garbage"), "garbage").unwrap();
        let check = |ca, cert, key| {
            let (cert, key) = (path(cert), path(key));
            let fault = check(&path(ca), Some((&cert, &key))).err();
            fault.map_or_else(String::new, |fault| fault.to_string())
        };
        assert_eq!(check("ca", "ca", "key"), "");
        for (fault, named, word) in [
            (check("garbage", "ca", "key"), "garbage", "no certificate in it"),
            (check("ca", "none", "key"), "none", "check its name"),
            (check("ca", "ca", "garbage"), "garbage", "no private key in it"),
            (check("ca", "key", "ca"), "key", "no certificate in it"),
        ] {
            let named = path(named).display().to_string();
            assert!(fault.starts_with(&named) && fault.contains(word), "{fault}");
        }
    }
}
