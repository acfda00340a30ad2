//! Certificates by name: those that routes name, those that the folder holds, and the one of every host.

use std::{
    collections::{BTreeMap, HashMap},
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use lb_route::State;
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

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
    fallback: Option<Arc<CertifiedKey>>,
    /// What was read last of each pair of files.
    by_file: BTreeMap<(PathBuf, Option<PathBuf>), Arc<CertifiedKey>>,
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No keys in any log.
        f.debug_struct("Certificates")
            .field("names", &self.by_name.keys())
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
    /// Reads what a state names. `before` holds what a file had when it could be read.
    pub fn read(state: &State, before: &Self) -> (Self, Vec<Fault>) {
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
            reader.folder(folder);
        }
        for route in &state.routes {
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
        (reader.now, reader.faults)
    }

    /// The certificate for a name; `None`: the one of every host, if there is one.
    pub fn find(&self, name: Option<&str>) -> Option<Arc<CertifiedKey>> {
        let by_name = name.and_then(|name| {
            let name = name.to_ascii_lowercase();
            let name = name.strip_suffix('.').unwrap_or(&name);
            let exact = self.by_name.get(name);
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
        self.now.by_file.insert(place, Arc::clone(&read));
        Some(read)
    }

    /// Every certificate of the folder serves the names that are in it: `NAME.pem` with its key inside, or in `NAME.key`.
    fn folder(&mut self, folder: &Path) {
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) => {
                self.fault(
                    folder,
                    "the folder",
                    format!("{error}; make it readable for this user"),
                );
                // What was known before is better than nothing.
                self.now.by_name = self.before.by_name.clone();
                return;
            }
        };
        let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.sort();
        let is_certificate = |file: &&PathBuf| {
            let kind = file.extension().and_then(|kind| kind.to_str());
            matches!(kind, Some("pem" | "crt" | "cert"))
        };
        for file in files.iter().filter(is_certificate) {
            let key = Some(file.with_extension("key")).filter(|key| files.contains(key));
            let Some(pair) = self.pair(file, key.as_deref(), "the folder") else {
                continue;
            };
            for name in names(&pair) {
                self.now.by_name.entry(name).or_insert_with(|| Arc::clone(&pair));
            }
        }
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

fn read_pair(file: &Path, key: Option<&Path>) -> Result<CertifiedKey, String> {
    let text = read(file)?;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("is no PEM: {error}"))?;
    if chain.is_empty() {
        return Err("has no certificate in it; write the chain as PEM, the own one first".into());
    }
    let key_text = key.map_or(Ok(text), read)?;
    let key = PrivateKeyDer::from_pem_slice(&key_text).map_err(|error| format!("no private key: {error}"))?;
    let provider = rustls::crypto::ring::default_provider();
    // It compares the key with the certificate.
    CertifiedKey::from_der(chain, key, &provider).map_err(|error| error.to_string())
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
        let (certificates, faults) = Certificates::read(&state, &Certificates::default());
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
        let (again, faults) = Certificates::read(&state, &certificates);
        assert_eq!(shown(&again, Some("a.example")), ["a.example"]);
        assert!(faults[0].text.contains("used on"), "{faults:?}");
        let (cert, key) = pem(&["a.example", "new.test"]);
        write(dir.path(), "a.key", &key);
        write(dir.path(), "a.pem", &cert);
        let (again, _) = Certificates::read(&state, &again);
        assert_eq!(shown(&again, Some("new.test")).len(), 2);
    }

    #[test]
    fn a_key_of_another_certificate_is_a_fault() {
        let dir = tempfile::tempdir().unwrap();
        let ((cert, _), (_, key)) = (pem(&["a"]), pem(&["b"]));
        write(dir.path(), "a.pem", &cert);
        write(dir.path(), "a.key", &key);
        let state = serde_json::from_value(json!({ "settings": { "certificates": dir.path() } })).unwrap();
        let (certificates, faults) = Certificates::read(&state, &Certificates::default());
        assert!(certificates.find(Some("a")).is_none());
        assert_eq!(faults.len(), 1, "{faults:?}");
    }
}
