//! A real authority of ACME in a namespace: Pebble, and the DNS server that it asks. All gone on drop.

use std::{
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{guard::Guard, netns::Namespace, pki::Authority};

/// How long a server may take to start.
const PATIENCE: Duration = Duration::from_secs(30);
/// A host that it refuses.
pub const BLOCKED: &str = "blocked.example";

/// Ports on loopback: nobody else is in the namespace.
const ACME: u16 = 14_000;
const MANAGEMENT: u16 = 15_000;
const DNS: u16 = 8053;
const DNS_MANAGEMENT: u16 = 8055;

/// The authority. It comes to port 80 of every host; each is `127.0.0.1` unless the test says otherwise.
#[derive(Debug)]
pub struct Pebble<'n> {
    namespace: &'n Namespace,
    folder: tempfile::TempDir,
    server: Option<Guard>,
    _dns: Guard,
}

impl<'n> Pebble<'n> {
    /// Ready to be started; its certificates will be good for so long.
    pub fn new(namespace: &'n Namespace, validity: Duration) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("weir-pebble-").tempdir()?;
        let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
        let authority = Authority::new(&folder.path().join("ca.pem"))?;
        authority.certify("pebble", "localhost", 2099, &cert, &key)?;
        let config = json!({ "pebble": {
            "listenAddress": format!("127.0.0.1:{ACME}"),
            "managementListenAddress": format!("127.0.0.1:{MANAGEMENT}"),
            "certificate": cert,
            "privateKey": key,
            "httpPort": 80,
            "tlsPort": 443,
            "certificateValidityPeriod": validity.as_secs(),
            "domainBlocklist": [BLOCKED],
        }});
        std::fs::write(folder.path().join("config.json"), config.to_string())?;
        let mut command = namespace.command("pebble-challtestsrv");
        command
            .args(["-defaultIPv4", "127.0.0.1", "-defaultIPv6", ""])
            .args(["-http01", "", "-https01", "", "-tlsalpn01", ""])
            .args(["-dns01", &format!("127.0.0.1:{DNS}")])
            .args(["-management", &format!("127.0.0.1:{DNS_MANAGEMENT}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let dns = Guard::spawn(&mut command)?;
        listens(namespace, DNS)?;
        listens(namespace, DNS_MANAGEMENT)?;
        Ok(Self {
            namespace,
            folder,
            server: None,
            _dns: dns,
        })
    }

    /// Starts it, and waits until it serves. It remembers nothing of what was before. One in twenty requests is refused as
    /// authorities may do it (`badNonce`), that is its default.
    pub fn start(&mut self) -> Result<()> {
        self.server = None;
        let mut command = self.namespace.command("pebble");
        command
            .arg("-config")
            .arg(self.folder.path().join("config.json"))
            .args(["-strict", "-dnsserver", &format!("127.0.0.1:{DNS}")])
            .env("PEBBLE_VA_NOSLEEP", "1")
            .stdout(std::fs::File::create(self.folder.path().join("log"))?)
            .stderr(Stdio::null());
        self.server = Some(Guard::spawn(&mut command)?);
        listens(self.namespace, ACME)?;
        listens(self.namespace, MANAGEMENT)
    }

    /// As [`Pebble::new`] and [`Pebble::start`].
    pub fn started(namespace: &'n Namespace, validity: Duration) -> Result<Self> {
        let mut pebble = Self::new(namespace, validity)?;
        pebble.start()?;
        Ok(pebble)
    }

    /// The URL of its directory.
    pub fn directory(&self) -> String {
        format!("https://127.0.0.1:{ACME}/dir")
    }

    /// Another URL of the same directory: to a client, another directory.
    pub fn other_directory(&self) -> String {
        format!("https://localhost:{ACME}/dir")
    }

    /// Who has signed the certificate of its own server.
    pub fn ca(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// Who signs the certificates that it gives, as a file. Another one after every start.
    pub fn root(&self) -> Result<PathBuf> {
        let path = self.folder.path().join("root.pem");
        let url = format!("https://127.0.0.1:{MANAGEMENT}/roots/0");
        let ca = self.ca();
        let words = ["--cacert", text(&ca)?, "-o", text(&path)?, &url];
        curl(self.namespace, &words)?;
        Ok(path)
    }

    /// Has a host at another address, for the authority's eyes.
    pub fn place(&self, host: &str, address: &str) -> Result<()> {
        self.dns(
            "add-a",
            &json!({ "host": format!("{host}."), "addresses": [address] }),
        )
    }

    /// Has a host where the others are.
    pub fn place_back(&self, host: &str) -> Result<()> {
        self.dns("clear-a", &json!({ "host": format!("{host}.") }))
    }

    fn dns(&self, call: &str, what: &Value) -> Result<()> {
        let url = format!("http://127.0.0.1:{DNS_MANAGEMENT}/{call}");
        curl(self.namespace, &["-d", &what.to_string(), &url])
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path of plain text")
}

fn curl(namespace: &Namespace, words: &[&str]) -> Result<()> {
    let mut command = namespace.command("curl");
    command.args(["-sS", "--fail", "--max-time", "10"]).args(words);
    let output = command.output().context("curl")?;
    ensure!(
        output.status.success(),
        "curl {words:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Waits until somebody listens at a port: the servers do not say when they do.
fn listens(namespace: &Namespace, port: u16) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    while namespace.run(|| TcpStream::connect(address)).is_err() {
        if Instant::now() > until {
            bail!("nobody listens at {address}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
