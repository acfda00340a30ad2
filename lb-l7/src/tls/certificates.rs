//! Certificates by name: those that routes name, those that the folder holds, those that came by ACME, and the one of every
//! host.

use std::{
    collections::{BTreeMap, HashMap},
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use lb_route::State;
use rustls::{
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject as _},
    },
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

use crate::acme::{Folder, Validity, Wanted};

/// Largest file that is read as a certificate or key.
const LARGEST: u64 = 1 << 20;

/// A certificate that cannot be used; the others can.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The file.
    pub file: PathBuf,
    /// Who wants it: a route, the default, or the folder.
    pub of: String,
    /// What is wrong, and what to do.
    pub text: String,
}

/// Certificates by the names that clients ask for.
#[derive(Clone, Default)]
pub struct Certificates {
    /// Lower case; `*.` in front is one label.
    by_name: HashMap<String, Arc<CertifiedKey>>,
    /// Those of ACME, each for one host.
    issued: HashMap<String, Arc<CertifiedKey>>,
    fallback: Option<Arc<CertifiedKey>>,
    /// What was read last of each pair of files.
    by_file: BTreeMap<(PathBuf, Option<PathBuf>), Arc<CertifiedKey>>,
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No keys in any log.
        f.debug_struct("Certificates")
            .field("names", &self.by_name.keys())
            .field("issued", &self.issued.keys())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "certificate {} of {}: {}",
            self.file.display(),
            self.of,
            self.text
        )
    }
}

/// Reads certificates, and notes what is wrong with them.
struct Reader<'r> {
    before: &'r Certificates,
    now: Certificates,
    faults: Vec<Fault>,
}

// === impl Certificates ===

impl Certificates {
    /// Reads what a state names, and what came by ACME. `before` holds what a file had when it could be read.
    pub fn read(state: &State, before: &Self, acme: Option<&Folder>) -> (Self, Vec<Fault>) {
        let mut reader = Reader {
            before,
            now: Self::default(),
            faults: Vec::new(),
        };
        let settings = &state.settings;
        if let Some(file) = &settings.default_certificate {
            reader.now.fallback = reader.pair(file, None, "every host");
        }
        if let Some(folder) = &settings.certificates {
            let names = reader.names(folder, "the folder");
            reader.now.by_name = names.unwrap_or_else(|| reader.before.by_name.clone());
        }
        for route in state.served() {
            let tls = &route.settings.tls;
            let Some(name) = &tls.certificate else { continue };
            let of = format!("route {}", route.address());
            let Some(folder) = &settings.certificates else {
                let text = "there is no folder of certificates; set `certificates` of [l7]";
                reader.fault(Path::new(name), &of, text);
                continue;
            };
            let key = tls.key.as_ref().map(|key| inside(folder, key));
            let (Some(file), Some(key)) = (inside(folder, name), key.map_or(Some(None), |k| k.map(Some)))
            else {
                reader.fault(
                    Path::new(name),
                    &of,
                    "is outside of the folder of certificates; name a file in it",
                );
                continue;
            };
            if let Some(pair) = reader.pair(&file, key.as_deref(), &of) {
                for host in std::iter::once(&route.host).chain(&route.aliases) {
                    reader.now.by_name.insert(host.to_lowercase(), Arc::clone(&pair));
                }
            }
        }
        if let Some(folder) = acme.filter(|folder| settings.acme.is_some() && folder.path().is_dir()) {
            let names = reader.names(folder.path(), "ACME");
            reader.now.issued = names.unwrap_or_else(|| reader.before.issued.clone());
        }
        (reader.now, reader.faults)
    }

    /// Whether these are the same certificates, of the same files.
    pub fn is_same(&self, other: &Self) -> bool {
        let mut pairs = self.by_file.iter().zip(&other.by_file);
        self.by_file.len() == other.by_file.len() && pairs.all(|((a, x), (b, y))| a == b && x.cert == y.cert)
    }

    /// What ACME has to do for a state of which these are the certificates.
    pub fn wanted(&self, state: &State) -> Wanted {
        let issued = self.issued.iter();
        let issued: BTreeMap<String, SystemTime> = issued
            .filter_map(|(name, pair)| Some((name.clone(), end(pair)?)))
            .collect();
        Wanted {
            issued,
            ..Wanted::new(state, |host| self.own(host).is_some())
        }
    }

    /// The certificate that somebody has put here for a name: for it alone, or a wildcard's.
    fn own(&self, name: &str) -> Option<&Arc<CertifiedKey>> {
        let parent = || name.split_once('.').map(|(_, parent)| format!("*.{parent}"));
        let exact = self.by_name.get(name);
        exact.or_else(|| self.by_name.get(&parent()?))
    }

    /// The certificate for a name; `None`: the one of every host, if there is one.
    pub fn find(&self, name: Option<&str>) -> Option<Arc<CertifiedKey>> {
        let by_name = name.and_then(|name| {
            let name = name.to_ascii_lowercase();
            let name = name.strip_suffix('.').unwrap_or(&name);
            let exact = self.own(name).or_else(|| self.issued.get(name));
            let wildcard = || {
                // Certificates cover one label, routes any number of them.
                let mut rest = name;
                while let Some((_, parent)) = rest.split_once('.') {
                    if let Some(found) = self.by_name.get(&format!("*.{parent}")) {
                        return Some(found);
                    }
                    rest = parent;
                }
                None
            };
            exact.or_else(wildcard)
        });
        by_name.or(self.fallback.as_ref()).cloned()
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.find(hello.server_name())
    }
}

// === impl Reader ===

impl Reader<'_> {
    fn fault(&mut self, file: &Path, of: &str, text: impl Into<String>) {
        self.faults.push(Fault {
            file: file.into(),
            of: of.into(),
            text: text.into(),
        });
    }

    /// A chain and its key, which may be in the same file.
    fn pair(&mut self, file: &Path, key: Option<&Path>, of: &str) -> Option<Arc<CertifiedKey>> {
        let place = (file.to_owned(), key.map(Path::to_owned));
        if let Some(known) = self.now.by_file.get(&place) {
            return Some(Arc::clone(known));
        }
        let read = match read_pair(file, key) {
            Ok(pair) => Arc::new(pair),
            Err(text) => {
                let before = self.before.by_file.get(&place).cloned();
                let kept = if before.is_some() {
                    "; what was read before is used on"
                } else {
                    ""
                };
                self.fault(file, of, format!("{text}{kept}"));
                before?
            }
        };
        if end(&read).is_some_and(|end| end < SystemTime::now()) {
            let text = "its time is over, and clients refuse it; put a new one in its place";
            self.fault(file, of, text);
        }
        self.now.by_file.insert(place, Arc::clone(&read));
        Some(read)
    }

    /// Every certificate of a folder serves the names that are in it: `NAME.pem` with its key inside, or in `NAME.key`. Of two
    /// for a name the first counts. `None` if the folder cannot be read: what was known before is better than nothing.
    fn names(&mut self, folder: &Path, of: &str) -> Option<HashMap<String, Arc<CertifiedKey>>> {
        let mut found = HashMap::new();
        for pair in self.pairs(folder, of)? {
            for name in names(&pair) {
                found.entry(name).or_insert_with(|| Arc::clone(&pair));
            }
        }
        Some(found)
    }

    /// The certificates of a folder, by the names of their files; `None` if it cannot be read.
    fn pairs(&mut self, folder: &Path, of: &str) -> Option<Vec<Arc<CertifiedKey>>> {
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) => {
                self.fault(folder, of, format!("{error}; make it readable for this user"));
                return None;
            }
        };
        let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.sort();
        let is_certificate = |file: &&PathBuf| {
            let kind = file.extension().and_then(|kind| kind.to_str());
            matches!(kind, Some("pem" | "crt" | "cert"))
        };
        let pair = |file: &PathBuf| {
            let key = Some(file.with_extension("key")).filter(|key| files.contains(key));
            self.pair(file, key.as_deref(), of)
        };
        Some(files.iter().filter(is_certificate).filter_map(pair).collect())
    }
}

/// A file of the folder; `None` if the name leads out of it.
fn inside(folder: &Path, name: &str) -> Option<PathBuf> {
    let is_plain = |part| matches!(part, std::path::Component::Normal(_));
    Path::new(name)
        .components()
        .all(is_plain)
        .then(|| folder.join(name))
}

fn read(file: &Path) -> Result<Vec<u8>, String> {
    let told = |error: std::io::Error| format!("{}: {error}", file.display());
    let size = fs::metadata(file).map_err(told)?.len();
    if size > LARGEST {
        return Err(format!("{}: {size} bytes are no certificate", file.display()));
    }
    fs::read(file).map_err(told)
}

/// The chain and the key in one file.
///
/// # Errors
/// What is wrong with it.
pub fn pair_of_file(file: &Path) -> Result<CertifiedKey, String> {
    read_pair(file, None)
}

fn read_pair(file: &Path, key: Option<&Path>) -> Result<CertifiedKey, String> {
    let text = read(file)?;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("is no PEM: {}", pem_fault(&error)))?;
    if chain.is_empty() {
        return Err("has no certificate in it; write the chain as PEM, the own one first".into());
    }
    let key_text = key.map_or(Ok(text), read)?;
    let key = PrivateKeyDer::from_pem_slice(&key_text).map_err(|error| format!("no private key: {error}"))?;
    let provider = rustls::crypto::ring::default_provider();
    // It compares the key with the certificate.
    CertifiedKey::from_der(chain, key, &provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => {
            "the key is not that of the certificate; put the one there that it was made with".into()
        }
        error => error.to_string(),
    })
}

/// Until when a certificate holds, if that can be read.
fn end(pair: &CertifiedKey) -> Option<SystemTime> {
    Some(Validity::of(pair.cert.first()?)?.until)
}

/// What is wrong with a text of PEM, in words: the library shows bytes as numbers.
fn pem_fault(error: &pem::Error) -> String {
    match error {
        pem::Error::IllegalSectionStart { .. } | pem::Error::MissingSectionEnd { .. } => {
            "a section does not begin or end as it should; was all of it written?".into()
        }
        error => error.to_string(),
    }
}

/// The DNS names that a certificate is for.
fn names(pair: &CertifiedKey) -> Vec<String> {
    let Some(own) = pair.cert.first() else {
        return Vec::new();
    };
    webpki::EndEntityCert::try_from(own).map_or_else(
        |_| Vec::new(),
        |cert| cert.valid_dns_names().map(str::to_lowercase).collect(),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A certificate for these names, and its key, as PEM.
    fn pem(names: &[&str]) -> (String, String) {
        let names: Vec<String> = names.iter().map(|name| (*name).into()).collect();
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    fn write(folder: &Path, name: &str, text: &str) {
        fs::write(folder.join(name), text).unwrap();
    }

    #[test]
    fn one_whose_time_is_over_and_one_with_another_key_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut old = rcgen::CertificateParams::new(vec!["old.example".into()]).unwrap();
        old.not_after = rcgen::date_time_ymd(2020, 2, 1);
        write(dir.path(), "old.pem", &old.self_signed(&key).unwrap().pem());
        write(dir.path(), "old.key", &key.serialize_pem());
        let (cert, _) = pem(&["other.example"]);
        write(dir.path(), "other.pem", &(cert + &key.serialize_pem()));
        let state = serde_json::from_value(json!({ "settings": { "certificates": dir.path() } })).unwrap();
        let (first, faults) = Certificates::read(&state, &Certificates::default(), None);
        let texts: Vec<&str> = faults.iter().map(|fault| &*fault.text).collect();
        assert!(
            texts.len() == 2 && texts[0].contains("time is over") && texts[1].contains("the key is not"),
            "{texts:?}"
        );
        assert_eq!(
            shown(&first, Some("old.example")),
            ["old.example"],
            "better than none"
        );
        let (again, _) = Certificates::read(&state, &first, None);
        assert!(first.is_same(&again) && !first.is_same(&Certificates::default()));
        let (cert, key) = pem(&["old.example"]);
        write(dir.path(), "old.pem", &cert);
        write(dir.path(), "old.key", &key);
        assert!(!first.is_same(&Certificates::read(&state, &first, None).0));
    }

    fn shown(certificates: &Certificates, name: Option<&str>) -> Vec<String> {
        certificates.find(name).map_or_else(Vec::new, |pair| names(&pair))
    }

    #[test]
    fn routes_folder_and_default_give_certificates_in_this_order() {
        let dir = tempfile::tempdir().unwrap();
        for (file, name) in [
            ("a", "a.example"),
            ("wild", "*.wild.example"),
            ("other", "other.test"),
        ] {
            let (cert, key) = pem(&[name]);
            write(dir.path(), &format!("{file}.pem"), &cert);
            write(dir.path(), &format!("{file}.key"), &key);
        }
        let (cert, key) = pem(&["default.test"]);
        write(dir.path(), "default", &(cert + &key));
        write(dir.path(), "broken.pem", "-----BEGIN CERTIFICATE-----\nnonsense");
        let state: State = serde_json::from_value(json!({
            "settings": { "certificates": dir.path(), "default_certificate": dir.path().join("default") },
            "routes": [
                { "host": "b.example", "aliases": ["c.test"], "upstreams": [],
                  "settings": { "tls": { "certificate": "other.pem", "key": "other.key" } } },
                { "host": "bad.example", "upstreams": [], "settings": { "tls": { "certificate": "../etc/passwd" } } },
                { "host": "gone.example", "upstreams": [], "settings": { "tls": { "certificate": "gone.pem" } } },
            ],
        }))
        .unwrap();
        let (certificates, faults) = Certificates::read(&state, &Certificates::default(), None);
        for (name, want) in [
            (Some("A.example."), "a.example"),
            (Some("x.wild.example"), "*.wild.example"),
            (Some("b.example"), "other.test"),
            (Some("c.test"), "other.test"),
            (Some("unknown.test"), "default.test"),
            (None, "default.test"),
        ] {
            assert_eq!(shown(&certificates, name), [want], "{name:?}");
        }
        let texts: Vec<String> = faults.iter().map(Fault::to_string).collect();
        assert_eq!(texts.len(), 3, "{texts:#?}");
        assert!(texts[0].contains("broken.pem") && texts[1].contains("outside of the folder"));
        assert!(texts[2].contains("gone.pem of route gone.example/"));

        // A file that is being written is what it was before.
        write(dir.path(), "a.pem", "");
        let (again, faults) = Certificates::read(&state, &certificates, None);
        assert_eq!(shown(&again, Some("a.example")), ["a.example"]);
        assert!(faults[0].text.contains("used on"), "{faults:?}");
        let (cert, key) = pem(&["a.example", "new.test"]);
        write(dir.path(), "a.key", &key);
        write(dir.path(), "a.pem", &cert);
        let (again, _) = Certificates::read(&state, &again, None);
        assert_eq!(shown(&again, Some("new.test")).len(), 2);
    }

    #[test]
    fn a_key_of_another_certificate_is_a_fault() {
        let dir = tempfile::tempdir().unwrap();
        let ((cert, _), (_, key)) = (pem(&["a"]), pem(&["b"]));
        write(dir.path(), "a.pem", &cert);
        write(dir.path(), "a.key", &key);
        let state = serde_json::from_value(json!({ "settings": { "certificates": dir.path() } })).unwrap();
        let (certificates, faults) = Certificates::read(&state, &Certificates::default(), None);
        assert!(certificates.find(Some("a")).is_none());
        assert_eq!(faults.len(), 1, "{faults:?}");
    }

    #[test]
    fn those_of_acme_come_after_those_that_somebody_has_put_here() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(&dir.path().join("acme"));
        folder.create().unwrap();
        let keep = |host: &str| {
            let (cert, key) = pem(&[host]);
            folder.keep(host, "https://ca/dir", &cert, &key).unwrap()
        };
        let validity = keep("a.example");
        keep("x.wild.example");
        keep("y.x.wild.example");
        let own = dir.path().join("own");
        fs::create_dir(&own).unwrap();
        let state = |own: Option<&Path>| -> State {
            let route = |host: &str| json!({ "host": host, "upstreams": [] });
            serde_json::from_value(json!({
                "settings": { "certificates": own, "acme": { "hosts": ["*.example"] } },
                "routes": [route("a.example"), route("x.wild.example"), route("y.x.wild.example"), route("other.test")],
            }))
            .unwrap()
        };
        let (certificates, faults) =
            Certificates::read(&state(None), &Certificates::default(), Some(&folder));
        assert_eq!(faults, []);
        assert_eq!(shown(&certificates, Some("a.example")), ["a.example"]);
        let wanted = certificates.wanted(&state(None));
        assert_eq!(wanted.hosts.len(), 3);
        assert_eq!(wanted.issued["a.example"], validity.until);

        for (file, names) in [("a", "a.example"), ("wild", "*.wild.example")] {
            let (cert, key) = pem(&[names, "mark.test"]);
            write(&own, &format!("{file}.pem"), &(cert + &key));
        }
        let (certificates, _) = Certificates::read(&state(Some(&own)), &certificates, Some(&folder));
        for name in ["a.example", "x.wild.example"] {
            assert_eq!(shown(&certificates, Some(name)).len(), 2, "{name} is not its own");
        }
        // A certificate's wildcard is one label.
        assert_eq!(
            shown(&certificates, Some("y.x.wild.example")),
            ["y.x.wild.example"]
        );
        let hosts = certificates.wanted(&state(Some(&own))).hosts;
        assert_eq!(hosts.into_iter().collect::<Vec<_>>(), ["y.x.wild.example"]);

        let without = State::default();
        let (certificates, _) = Certificates::read(&without, &certificates, Some(&folder));
        assert!(
            certificates.find(Some("a.example")).is_none(),
            "ACME is not spoken of"
        );
    }
}
