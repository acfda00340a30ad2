//! UCP controllers: TLS of clients is passed through untouched, and each controller is checked by mutual TLS of the
//! balancer's own.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{listen::hang_up, netns::Namespace};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
    server::WebPkiClientVerifier,
};
use serde_json::Value;

use crate::{
    lab::{Body, Lab, VIP4, Wiring, address_of, service},
    talk::{PATIENCE, listen_tcp},
    vip,
};

/// The name that every controller has in its certificate.
const NAME: &str = "ucp.example.com";
const CONTROLLERS: usize = 4;

/// A certificate authority.
struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key.
struct Identity {
    cert: CertificateDer<'static>,
    key: KeyPair,
    pem: String,
}

impl Authority {
    fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        Ok(Self(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?))
    }

    fn sign(&self, name: &str) -> Result<Identity> {
        let key = KeyPair::generate()?;
        let cert = CertificateParams::new(vec![name.to_owned()])?.signed_by(&key, &self.0)?;
        Ok(Identity {
            cert: cert.der().clone(),
            pem: cert.pem(),
            key,
        })
    }

    fn roots(&self) -> Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone())?;
        Ok(roots)
    }
}

impl Identity {
    fn key(&self) -> Result<PrivateKeyDer<'static>> {
        PrivateKeyDer::try_from(self.key.serialize_der()).map_err(anyhow::Error::msg)
    }
}

/// A controller: wants the client's certificate, answers `/_ping` as it is told, and everything else by its index.
struct Controller {
    well: Arc<AtomicBool>,
    listener: Arc<TcpListener>,
    address: SocketAddr,
}

impl Controller {
    fn start(
        namespace: &Namespace,
        index: usize,
        address: SocketAddr,
        identity: &Identity,
        clients: &Authority,
    ) -> Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let roots = Arc::new(clients.roots()?);
        let config = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(WebPkiClientVerifier::builder_with_provider(roots, provider).build()?)
            .with_single_cert(vec![identity.cert.clone()], identity.key()?)?;
        let listener = Arc::new(listen_tcp(namespace, address)?);
        let well = Arc::new(AtomicBool::new(true));
        let address = listener.local_addr()?;
        std::thread::spawn({
            let (listener, well) = (listener.clone(), well.clone());
            move || accept(&listener, index, &Arc::new(config), &well)
        });
        Ok(Self {
            well,
            listener,
            address,
        })
    }

    /// Ends listening, as the end of its process would.
    fn end(&self) -> Result<()> {
        Ok(hang_up(&self.listener)?)
    }
}

/// Serves until nobody listens any more.
fn accept(listener: &TcpListener, index: usize, config: &Arc<ServerConfig>, well: &Arc<AtomicBool>) {
    while let Ok((stream, _)) = listener.accept() {
        let (config, well) = (config.clone(), well.clone());
        // A client without a good certificate gets no answer.
        std::thread::spawn(move || drop(answer(stream, index, config, &well)));
    }
}

fn answer(stream: TcpStream, index: usize, config: Arc<ServerConfig>, well: &AtomicBool) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut stream = BufReader::new(StreamOwned::new(ServerConnection::new(config)?, stream));
    let (mut first, mut line) = (String::new(), String::from("more"));
    stream.read_line(&mut first)?;
    while line.len() > 2 {
        line.clear();
        stream.read_line(&mut line)?;
    }
    let ping = first.starts_with("GET /_ping ");
    let status = if ping && !well.load(Ordering::Relaxed) {
        500
    } else {
        200
    };
    let stream = stream.get_mut();
    write!(
        stream,
        "HTTP/1.1 {status} Told\r\nContent-Length: 1\r\nConnection: close\r\n\r\n{index}"
    )?;
    stream.conn.send_close_notify();
    Ok(stream.flush()?)
}

/// One exchange by mutual TLS through the balancer: which controller answered.
fn exchange(client: &Namespace, config: &Arc<ClientConfig>, to: SocketAddr) -> Result<usize> {
    client.run(|| {
        let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let connection = ClientConnection::new(config.clone(), ServerName::try_from(NAME)?)?;
        let mut stream = StreamOwned::new(connection, stream);
        write!(
            stream,
            "GET / HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n"
        )?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        ensure!(text.starts_with("HTTP/1.1 200"), "{text}");
        text.chars()
            .last()
            .and_then(|c| c.to_digit(10))
            .map(|n| n as usize)
            .context("no index")
    })
}

/// The answer to one request by plain HTTP at the VIP; waits until somebody listens there.
fn plain_http(client: &Namespace, host: &str, path: &str) -> Result<String> {
    let until = Instant::now() + PATIENCE;
    let mut stream = client.run(|| {
        loop {
            match TcpStream::connect_timeout(&vip(false, 80), PATIENCE) {
                Err(error) if Instant::now() > until => return Err(error),
                Err(_) => std::thread::yield_now(),
                Ok(stream) => return Ok(stream),
            }
        }
    })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Writes the files of the check, `ca.pem`, `cert.pem` and `key.pem`; the section that names them.
fn tls(folder: &Path, authority: &Authority, identity: &Identity) -> Result<String> {
    let file = |name: &str, text: &str| -> Result<PathBuf> {
        let path = folder.join(name);
        std::fs::write(&path, text)?;
        Ok(path)
    };
    Ok(format!(
        "[tls.ucp]\nca = {:?}\ncert = {:?}\nkey = {:?}\n",
        file("ca.pem", &authority.0.pem())?,
        file("cert.pem", &identity.pem)?,
        file("key.pem", &identity.key.serialize_pem())?,
    ))
}

#[test]
fn controllers_are_checked_by_mutual_tls_and_clients_pass_untouched() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Native, CONTROLLERS)?;
    let (ours, foreign) = (Authority::new("ours")?, Authority::new("foreign")?);
    let mut port = 0;
    let mut controllers = Vec::new();
    for (i, namespace) in lab.backends.iter().enumerate() {
        // The last one is not who it should be.
        let signer = if i + 1 == CONTROLLERS { &foreign } else { &ours };
        let address = SocketAddr::new(address_of(i, false), port);
        let controller = Controller::start(namespace, i, address, &signer.sign(NAME)?, &ours)?;
        port = controller.address.port();
        controllers.push(controller);
    }
    let folder = tempfile::tempdir()?;
    let head = lab.head(&format!("[vips.ucp]\naddress = \"{VIP4}\"\n"))
        + &tls(folder.path(), &ours, &ours.sign("weir")?)?
        + "[defaults.check]\nkind = \"https\"\npath = \"/_ping\"\nstatus = \"200\"\ntls = \"ucp\"\ninterval = \"300ms\"\n\
           fast-interval = \"100ms\"\nrise = 1\nfall = 2\ngrace = \"0s\"\n"
        + &format!("server-name = \"{NAME}\"\n");
    let mut weir = lab.start(&(head + &service("ucp", "443/tcp", "", &lab.servers(false, port))))?;

    let shares = |status: &Value| -> Vec<bool> {
        let backends = status["services"][0]["backends"].as_array();
        let serves = |backend: &Value| backend["ring_share"].as_u64().unwrap_or(0) > 0;
        backends.into_iter().flatten().map(serves).collect()
    };
    weir.await_status("serving by the three good ones", |status| {
        shares(status) == [true, true, true, false]
            && status["services"][0]["backends"][3]["reason"]
                .to_string()
                .contains("UnknownIssuer")
    })?;

    let client = ours.sign("operator")?;
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(ours.roots()?)
        .with_client_auth_cert(vec![client.cert.clone()], client.key()?)?;
    let (config, to) = (Arc::new(config), vip(false, 443));
    let answering = |count: usize| -> Result<BTreeSet<usize>> {
        (0..count).map(|_| exchange(&lab.client, &config, to)).collect()
    };
    // 3 × (2/3)^48 < 1e-7
    ensure!(answering(48)? == [0, 1, 2].into(), "not all controllers answer");

    // One of them is killed: every new connection still succeeds, before and after its check has failed.
    controllers[0].end()?;
    answering(8)?;
    weir.await_status("without the killed one", |status| {
        shares(status) == [false, true, true, false]
    })?;
    ensure!(answering(48)? == [1, 2].into(), "others than the two left answer");
    // One says that it is not well, though it answers.
    controllers[1].well.store(false, Ordering::Relaxed);
    weir.await_status("without the ill one", |status| {
        shares(status) == [false, false, true, false]
    })?;
    ensure!(answering(8)? == [2].into(), "the ill one answers");
    controllers[1].well.store(true, Ordering::Relaxed);
    weir.await_status("with it again", |status| {
        shares(status) == [false, true, true, false]
    })?;

    // The balancer has not seen inside: a client that shows nothing is turned away by the controller itself.
    let bare = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(ours.roots()?)
        .with_no_client_auth();
    let refused = exchange(&lab.client, &Arc::new(bare), to);
    ensure!(refused.is_err(), "a client without a certificate was served");
    Ok(())
}

/// Blocks of TOML in a document, in order.
fn blocks(document: &str) -> Vec<&str> {
    let after_heads = document.split("```toml\n").skip(1);
    after_heads.filter_map(|text| text.split("```").next()).collect()
}

/// The recipe of docs/ucp.md as it is printed, with the addresses and files of the lab: all three ports, a controller that
/// is killed while clients come all the time, and port 80, which the shim redirects.
#[test]
fn the_documented_recipe_serves_three_ports() -> Result<()> {
    const PORTS: [u16; 3] = [443, 2376, 12379];
    let lab = Lab::new(Wiring::TwoArm, Body::Native, 3)?;
    let ours = Authority::new("ours")?;
    let mut controllers = Vec::new();
    for (i, namespace) in lab.backends.iter().enumerate() {
        let identity = ours.sign(NAME)?;
        for port in PORTS {
            let address = SocketAddr::new(address_of(i, false), port);
            controllers.push(Controller::start(namespace, i, address, &identity, &ours)?);
        }
    }
    let document = include_str!("../../docs/ucp.md");
    let [file, _etcd, key, http] = blocks(document)[..] else {
        anyhow::bail!("docs/ucp.md has other blocks");
    };
    let folder = tempfile::tempdir()?;
    tls(folder.path(), &ours, &ours.sign("weir")?)?;
    let own = |text: &str| {
        let mut text = text.replace("192.0.2.10", VIP4);
        for i in 0..3 {
            text = text.replace(
                &format!("10.0.0.{}:0", 5 + i),
                &format!("{}:0", address_of(i, false)),
            );
        }
        text.replace("/etc/weir/ucp", &folder.path().display().to_string())
    };
    let head = lab.head("");
    let text = own(file).replace("interfaces = [\"eth0\"]\n", &head);
    ensure!(text.contains(VIP4) && !text.contains("10.0.0."), "{text}");
    // The key in etcd says the same of the service as the file does.
    let services = text.split("[[services]]").nth(1).context("no service")?;
    let same = format!("[[services]]{}", services.replace("name = \"ucp\"\n", ""))
        .replace("[services.", "[")
        .replace("[[services.", "[[");
    let plain = |text: &str| -> Result<toml::Table> { Ok(text.replace("[[services]]", "").parse()?) };
    ensure!(plain(&same)? == plain(&own(key))?, "the two recipes differ");

    let mut weir = lab.start(&(text + "\n" + http))?;
    let serving = |status: &Value| -> usize {
        let services = status["services"].as_array().into_iter().flatten();
        let services = services.filter(|service| service["name"] == "ucp");
        let backends = services.flat_map(|s| s["backends"].as_array().into_iter().flatten());
        backends.filter(|b| b["ring_share"].as_u64() > Some(0)).count()
    };
    weir.await_status("three controllers on three ports", |status| serving(status) == 9)?;
    let client = ours.sign("operator")?;
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(ours.roots()?)
        .with_client_auth_cert(vec![client.cert.clone()], client.key()?)?;
    let config = Arc::new(config);
    let answering = |port: u16, count: usize| -> Result<BTreeSet<usize>> {
        (0..count)
            .map(|_| exchange(&lab.client, &config, vip(false, port)))
            .collect()
    };
    for port in PORTS {
        ensure!(
            answering(port, 48)? == [0, 1, 2].into(),
            "not all answer on port {port}"
        );
    }
    let _shim = weir.start_shim()?;
    for path in ["/", "/manage/resources?all=1", "/_ping"] {
        let answer = plain_http(&lab.client, NAME, path)?;
        let location = format!("\r\nlocation: https://{NAME}{path}\r\n");
        ensure!(
            answer.starts_with("HTTP/1.1 301 ") && answer.to_lowercase().contains(&location),
            "{path}: {answer}"
        );
    }
    let other = plain_http(&lab.client, "other.example.com", "/")?;
    ensure!(other.starts_with("HTTP/1.1 503 "), "{other}");
    // The second one dies on all its ports. What it had accepted dies with it; nobody who comes later fails.
    let dead = OnceLock::new();
    std::thread::scope(|scope| -> Result<()> {
        let (dead, client, config) = (&dead, &lab.client, &config);
        let clients: Vec<_> = PORTS
            .iter()
            .map(|port| {
                scope.spawn(move || -> Result<()> {
                    let mut later = 0;
                    while later < 50 {
                        let began = Instant::now();
                        let answer = exchange(client, config, vip(false, *port));
                        if dead.get().is_some_and(|dead| began > *dead) {
                            answer?;
                            later += 1;
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        for controller in &controllers[3..6] {
            controller.end()?;
        }
        dead.get_or_init(Instant::now);
        for client in clients {
            client
                .join()
                .map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(())
    })
    .context("after a controller was killed")?;
    weir.await_status("without the killed one", |status| serving(status) == 6)?;
    for port in PORTS {
        ensure!(
            answering(port, 48)? == [0, 2].into(),
            "others than the two left answer on port {port}"
        );
    }
    Ok(())
}
