//! Engines of several machines, by TLS, each with its own life.

use std::path::Path;

use anyhow::{Context as _, Result};
use lb_tests::{
    docker::Engine,
    load::Load,
    netns::Namespace,
    pki::Authority,
    site::{LABEL, Site, VIP, serving, vip},
    weir::Weir,
};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{await_serving, names, who_answers};

/// Where Docker listens by TLS.
pub(super) const DOCKER_PORT: u16 = 2376;
/// The port of the machine that a container is published at.
pub(super) const PUBLISHED: &str = "18080:8080";

/// Options of an engine that listens at an address by TLS, with a certificate of its own.
pub(super) fn tls(address: &str, authority: &Authority, files: &Path) -> Result<Vec<String>> {
    let (cert, key) = (
        files.join(format!("{address}.pem")),
        files.join(format!("{address}.key")),
    );
    authority.certify("engine", address, 4096, &cert, &key)?;
    Ok(vec![
        format!("--host=tcp://{address}:{DOCKER_PORT}"),
        "--tlsverify".into(),
        format!("--tlscacert={}", files.join("ca.pem").display()),
        format!("--tlscert={}", cert.display()),
        format!("--tlskey={}", key.display()),
    ])
}

/// An authority with its certificate, and a certificate and key for the agent, in `files`.
pub(super) fn authority(files: &Path) -> Result<Authority> {
    let authority = Authority::new(&files.join("ca.pem"))?;
    let (cert, key) = (files.join("client.pem"), files.join("client.key"));
    authority.certify("weir", "127.0.0.1", 4096, &cert, &key)?;
    Ok(authority)
}

/// A machine with an engine of its own, one cable away from the node.
pub(super) struct Machine {
    // Before its namespace.
    pub(super) engine: Engine,
    pub(super) namespace: Namespace,
    address: String,
}

impl Machine {
    pub(super) fn new(site: &Site, number: u8, authority: &Authority, files: &Path) -> Result<Self> {
        let namespace = Namespace::new("machine")?;
        let (address, node) = (
            format!("203.0.113.{}", 4 * number + 2),
            format!("203.0.113.{}", 4 * number + 1),
        );
        namespace.veth("eth0", &site.node, &format!("m{number}"))?;
        namespace.address("eth0", &format!("{address}/30"))?;
        site.node.address(&format!("m{number}"), &format!("{node}/30"))?;
        let tls = tls(&address, authority, files)?;
        let options: Vec<&str> = tls.iter().map(String::as_str).chain(["--live-restore"]).collect();
        let engine = Engine::start(&namespace, &options)?;
        Ok(Self {
            engine,
            namespace,
            address,
        })
    }

    /// Its section; `ca` is whom to trust.
    pub(super) fn section(&self, name: &str, files: &Path, ca: &str, more: &str) -> String {
        let (files, address) = (files.display(), &self.address);
        format!(
            "[[docker]]\nname = \"{name}\"\nendpoint = \"tcp://{address}:{DOCKER_PORT}\"\n\
             tls-ca = \"{files}/{ca}\"\ntls-cert = \"{files}/client.pem\"\ntls-key = \"{files}/client.key\"\n\
             remote = true\nnode-address = \"{address}\"\n{more}\n"
        )
    }
}

/// What the status says of the source that hears an engine.
pub(super) fn source<'s>(status: &'s Value, engine: &str) -> Option<&'s Value> {
    let name = format!("docker:{engine}");
    let mut sources = status["sources"].as_array().into_iter().flatten();
    sources.find(|source| source["name"] == name.as_str())
}

#[test]
fn engines_of_three_machines_live_and_die_by_themselves() -> Result<()> {
    let files = tempfile::tempdir()?;
    let files = files.path();
    let site = Site::new()?;
    let authority = authority(files)?;
    let _stranger = Authority::new(&files.join("stranger.pem"))?;
    let local = Engine::start(&site.node, &[])?;
    let two = Machine::new(&site, 2, &authority, files)?;
    let mut three = Machine::new(&site, 3, &authority, files)?;
    local.container("web-1", &["--label", LABEL])?;
    two.engine
        .container("web-2", &["--label", LABEL, "-p", PUBLISHED])?;
    two.engine.container(
        "admin",
        &["--label", "weir.service.admin.listen=81/tcp", "-p", "18081:8080"],
    )?;
    three
        .engine
        .container("web-3", &["--label", LABEL, "-p", PUBLISHED])?;

    let config = format!(
        "interfaces = [\"uplink\", \"m2\", \"m3\"]\n[vips.web]\naddress = \"{VIP}\"\n\
         [[docker]]\nname = \"here\"\nendpoint = \"{}\"\n{}{}{}",
        local.endpoint(),
        two.section("two", files, "ca.pem", "allow-services = [\"web*\"]"),
        three.section("three", files, "ca.pem", "keep = \"2s\""),
        // The same machine, but whoever answers there cannot prove to be it.
        two.section("impostor", files, "stranger.pem", ""),
    );
    let mut weir = Weir::start_with(&site.node, "off", &config)?;
    await_serving(&mut weir, &["web-1", "web-2", "web-3"])?;
    assert_eq!(who_answers(&site)?, names(&["web-1", "web-2", "web-3"]));

    let status = weir.status()?;
    let rejections = status["rejections"].as_array().context("rejections")?;
    assert_eq!(rejections.len(), 1, "{rejections:#?}");
    let refusal = rejections[0].to_string();
    for word in ["container admin", "engine `docker:two`", "allow-services"] {
        assert!(refusal.contains(word), "{word}: {refusal}");
    }
    weir.await_status("distrusting the impostor", |status| {
        source(status, "impostor").is_some_and(|source| {
            let fault = source["fault"].as_str().unwrap_or_default();
            source["connected"] == false && fault.to_lowercase().contains("certificate")
        })
    })?;

    // One engine dies. Its containers are kept for two seconds, then drain; the others' do not notice.
    let load = Load::start(&site.client, vip(80), 4, 4);
    load.await_more(200)?;
    three.engine.stop(Signal::SIGKILL)?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    load.await_more(200)?;
    let status = weir.status()?;
    assert_eq!(source(&status, "two").context("two")?["connected"], true);
    assert_eq!(source(&status, "three").context("three")?["connected"], false);
    assert_eq!(who_answers(&site)?, names(&["web-1", "web-2"]));
    // And comes back.
    three.engine.run()?;
    await_serving(&mut weir, &["web-1", "web-2", "web-3"])?;
    load.await_more(200)?;
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{report:?}");
    assert_eq!(serving(&weir.status()?), names(&["web-1", "web-2", "web-3"]));
    Ok(())
}
