//! The folder of the account and of the certificates. It may be read by several shims of a node; one of them orders.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use rustls::pki_types::{CertificateDer, pem::PemObject as _};

use super::Validity;
use crate::tls::pair_of_file;

/// Who has this file locked orders.
const LOCK: &str = "lock";
/// The account, as `account` reads it.
const ACCOUNT: &str = "account.json";
/// Before the directory's URL in the files of certificates; what is outside of the blocks of a PEM file means nothing.
const DIRECTORY: &str = "Directory: ";

/// The folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder(PathBuf);

/// The right to order, until it is dropped or the process ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// A certificate of the folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// How long it is good.
    pub validity: Validity,
    /// URL of the directory that it came from.
    pub directory: String,
}

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The system's word.
    #[error("{}: {source}; the folder of ACME must be this user's own, with room", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not what was ordered.
    #[error("what came is no certificate of {host}: {fault}")]
    Unusable {
        /// For whom.
        host: String,
        /// What is wrong.
        fault: String,
    },
}

// === impl Folder ===

impl Folder {
    /// At this path.
    pub fn new(path: &Path) -> Self {
        Self(path.into())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes it, for this user alone, unless it is there.
    pub fn create(&self) -> Result<(), FolderError> {
        if self.0.is_dir() {
            return Ok(());
        }
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.0);
        made.map_err(told(&self.0))
    }

    /// The right to order; `None` while another process has it.
    pub fn lock(&self) -> Result<Option<Lock>, FolderError> {
        let path = self.0.join(LOCK);
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).mode(0o600);
        let file = file.open(&path).map_err(told(&path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Lock { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(FolderError::Io { path, source }),
        }
    }

    /// The file of the account.
    pub fn account(&self) -> PathBuf {
        self.0.join(ACCOUNT)
    }

    /// What the file of the account has; `None`: there is none.
    pub fn read_account(&self) -> Result<Option<Vec<u8>>, FolderError> {
        let path = self.account();
        match fs::read(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(FolderError::Io { path, source }),
        }
    }

    /// Keeps an account.
    pub fn keep_account(&self, text: &[u8]) -> Result<(), FolderError> {
        self.put(ACCOUNT, text, |_| Ok(()))
    }

    /// Puts the account away that this file has, under a name of its own: it is never lost.
    pub fn put_account_away(&self) -> Result<PathBuf, FolderError> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let away = format!("account-until-{}.json", now.map_or(0, |now| now.as_secs()));
        let (from, to) = (self.account(), self.0.join(away));
        fs::rename(&from, &to).map_err(told(&from))?;
        Ok(to)
    }

    /// The file of a host's certificate and key. A host is a name of the DNS: nothing in it leads out of the folder.
    pub fn file(&self, host: &str) -> PathBuf {
        self.0.join(file_name(host))
    }

    /// The certificate of a host; `None`: there is none that can be read.
    pub fn issued(&self, host: &str) -> Option<Issued> {
        let text = fs::read(self.file(host)).ok()?;
        let own = CertificateDer::pem_slice_iter(&text).next()?.ok()?;
        let first = text.split(|byte| *byte == b'\n').next()?;
        let directory = std::str::from_utf8(first).ok()?.strip_prefix(DIRECTORY)?;
        Some(Issued {
            validity: Validity::of(&own)?,
            directory: directory.to_owned(),
        })
    }

    /// Keeps a certificate (PEM, the own one first) and its key, in one step, once they are found to be good. The one before
    /// stays otherwise.
    pub fn keep(&self, host: &str, directory: &str, chain: &str, key: &str) -> Result<Validity, FolderError> {
        let mut validity = None;
        let text = format!("{DIRECTORY}{directory}\n{}\n{key}", chain.trim_end());
        self.put(&file_name(host), text.as_bytes(), |path| {
            let good = usable(path, host).map_err(|fault| FolderError::Unusable {
                host: host.into(),
                fault,
            })?;
            validity = Some(good);
            Ok(())
        })?;
        validity.ok_or_else(|| FolderError::Unusable {
            host: host.into(),
            fault: "nobody looked at it".into(),
        })
    }

    /// Replaces a file in one step, if what was written is found to be good: a crash leaves the one before.
    fn put(
        &self,
        name: &str,
        text: &[u8],
        judge: impl FnOnce(&Path) -> Result<(), FolderError>,
    ) -> Result<(), FolderError> {
        let path = self.0.join(name);
        let next = self.0.join(format!("{name}.{}.next", std::process::id()));
        let write = || -> io::Result<()> {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.open(&next)?;
            file.write_all(text)?;
            file.sync_all()
        };
        let written = write().map_err(told(&next)).and_then(|()| judge(&next));
        let put = written.and_then(|()| fs::rename(&next, &path).map_err(told(&path)));
        if put.is_err() {
            let _it_may_not_be_there = fs::remove_file(&next);
            return put;
        }
        let folder = File::open(&self.0).and_then(|folder| folder.sync_all());
        folder.map_err(told(&self.0))
    }
}

fn file_name(host: &str) -> String {
    format!("{host}.pem")
}

fn told(path: &Path) -> impl Fn(io::Error) -> FolderError {
    move |source| FolderError::Io {
        path: path.into(),
        source,
    }
}

/// Whether a file can be served for a host: the key is that of the certificate, the host is in it, and it is good now.
fn usable(path: &Path, host: &str) -> Result<Validity, String> {
    let pair = pair_of_file(path)?;
    let own = pair.cert.first().ok_or("it is empty")?;
    let parsed = webpki::EndEntityCert::try_from(own).map_err(|error| error.to_string())?;
    let name = rustls::pki_types::ServerName::try_from(host).map_err(|error| error.to_string())?;
    parsed
        .verify_is_valid_for_subject_name(&name)
        .map_err(|_| "it is for another name")?;
    let validity = Validity::of(own).ok_or("it does not tell how long it is good")?;
    if validity.until <= SystemTime::now() {
        return Err("it has expired; is the clock of this machine right?".into());
    }
    Ok(validity)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn made(host: &str) -> (String, String) {
        let made = rcgen::generate_simple_self_signed(vec![host.to_owned()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    fn folder() -> (tempfile::TempDir, Folder) {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(&dir.path().join("acme"));
        folder.create().unwrap();
        folder.create().unwrap();
        (dir, folder)
    }

    fn names(folder: &Folder) -> Vec<String> {
        let entries = fs::read_dir(folder.path()).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn certificates_are_kept_for_this_user_alone() {
        let (_dir, folder) = folder();
        let (chain, key) = made("a.example");
        assert_eq!(folder.issued("a.example"), None);
        let validity = folder.keep("a.example", "https://ca/dir", &chain, &key).unwrap();
        let issued = folder.issued("a.example").unwrap();
        assert_eq!(
            (issued.validity, issued.directory.as_str()),
            (validity, "https://ca/dir")
        );
        pair_of_file(&folder.file("a.example")).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&folder.file("a.example")), 0o600);
        assert_eq!(mode(folder.path()), 0o700);
        folder.keep_account(b"secret").unwrap();
        assert_eq!(mode(&folder.account()), 0o600);
        assert_eq!(folder.read_account().unwrap().unwrap(), b"secret");
        let away = folder.put_account_away().unwrap();
        assert_eq!(fs::read(away).unwrap(), b"secret");
        assert_eq!(folder.read_account().unwrap(), None);
    }

    #[test]
    fn what_cannot_be_served_leaves_the_one_before() {
        let (_dir, folder) = folder();
        let (chain, key) = made("a.example");
        folder.keep("a.example", "https://ca/dir", &chain, &key).unwrap();
        let before = fs::read(folder.file("a.example")).unwrap();
        let (other, other_key) = made("b.example");
        for (chain, key, part) in [
            (&other, &other_key, "another name"),
            (&chain, &other_key, "no certificate of a.example"),
            (&String::new(), &key, "no certificate"),
        ] {
            let error = folder
                .keep("a.example", "https://ca/dir", chain, key)
                .unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
            assert!(!error.to_string().contains("PRIVATE KEY"));
        }
        assert_eq!(fs::read(folder.file("a.example")).unwrap(), before);
        assert_eq!(names(&folder), ["a.example.pem"]);
    }

    #[test]
    fn one_at_a_time_may_order() {
        let (_dir, folder) = folder();
        let first = folder.lock().unwrap();
        assert!(first.is_some());
        assert!(folder.lock().unwrap().is_none());
        drop(first);
        assert!(folder.lock().unwrap().is_some());
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let folder = Folder::new(&dir.path().join("file/acme"));
        let error = folder.create().unwrap_err().to_string();
        assert!(error.contains("file/acme"), "{error}");
        assert!(folder.lock().is_err() && folder.read_account().is_err());
    }
}
