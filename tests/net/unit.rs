//! The L7 shim as deploy/weir-l7.service runs it: an unprivileged user, one capability, directories and files of its own.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt as _, chown},
    path::Path,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{
    netns::Namespace,
    weir::{SHIM_GROUP, SHIM_USER, Weir},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    lab::{Body, Lab, VIP4, Wiring, service},
    talk::PATIENCE,
};

const NAME: &str = "status.example.com";
/// CAP_NET_BIND_SERVICE as /proc shows it.
const BIND_ONLY: &str = "0000000000000400";

/// Writes a certificate for [`NAME`] and its key in one file, which the shim's group may read or not.
fn certificate(path: &Path, is_readable: bool) -> Result<()> {
    let key = rcgen::KeyPair::generate()?;
    let certificate = rcgen::CertificateParams::new(vec![NAME.to_owned()])?.self_signed(&key)?;
    fs::write(path, certificate.pem() + &key.serialize_pem())?;
    chown(path, None, Some(SHIM_GROUP))?;
    let mode = if is_readable { 0o640 } else { 0o600 };
    Ok(fs::set_permissions(path, Permissions::from_mode(mode))?)
}

/// The page with the shim's numbers by HTTPS, through the VIP.
fn page(client: &Namespace, certificate: &Path) -> Result<String> {
    let output = client
        .command("curl")
        .args(["-sS", "--fail", "--max-time", &PATIENCE.as_secs().to_string()])
        .arg("--cacert")
        .arg(certificate)
        .args(["--resolve", &format!("{NAME}:443:{VIP4}")])
        .arg(format!("https://{NAME}/weir/json"))
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{text}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Waits until it is well.
fn await_ok<T>(what: &str, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let until = Instant::now() + PATIENCE;
    loop {
        match look() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > until => return Err(error.context(what.to_owned())),
            Err(_) => std::thread::yield_now(),
        }
    }
}

/// What a process may do, as the kernel has it.
fn is_confined(pid: u32) -> Result<()> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let of = |key: &str| {
        let mut lines = status.lines();
        let value = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        value.map(|value| value.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    };
    for key in ["CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let value = of(key).context(key)?;
        ensure!(value == [BIND_ONLY], "{key} of {pid} is {value:?}");
    }
    ensure!(of("NoNewPrivs").context("NoNewPrivs")? == ["1"]);
    let user = SHIM_USER.to_string();
    ensure!(of("Uid").context("Uid")?.iter().all(|uid| *uid == user));
    Ok(())
}

/// A process that is nobody's child here, killed on drop.
struct Orphan(u32);

impl Drop for Orphan {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0 as i32), Signal::SIGKILL);
    }
}

/// The number of the process that has taken over, by the log.
fn successor(weir: &Weir<'_>) -> Result<u32> {
    let log = weir.log();
    let line = log.lines().find(|line| line.contains("taking over"));
    let (_, pid) = line.context("no successor")?.split_once("pid=").context("pid")?;
    Ok(pid.trim().parse()?)
}

#[test]
fn the_unit_file_gives_the_shim_what_it_needs() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Native, 1)?;
    let folder = tempfile::tempdir()?;
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
    let certificates = folder.path().join("certs");
    fs::create_dir(&certificates)?;
    chown(&certificates, None, Some(SHIM_GROUP))?;
    fs::set_permissions(&certificates, Permissions::from_mode(0o750))?;
    let readable = certificates.join("all.pem");
    certificate(&readable, true)?;
    let secret = certificates.join("secret.example.com.pem");
    certificate(&secret, false)?;

    let config = lab.head(&format!("[vips.lab]\naddress = \"{VIP4}\"\n"))
        + &format!(
            "[l7]\nstatus-page = \"{NAME}/weir\"\ncertificates = {certificates:?}\ndefault-certificate = {readable:?}\n"
        )
        + &service("http", "443/tcp", "", &["192.0.2.1:0".parse()?]);
    let weir = lab.start(&config)?;
    let mut shim = weir.start_shim()?;
    let first = await_ok("the page", || page(&lab.client, &readable)).with_context(|| weir.log())?;
    ensure!(first.contains("\"routes\""), "{first}");
    is_confined(shim.pid())?;
    // Files of the state directory are its own, and a certificate that it may not read is named.
    let state = weir.config_path().with_file_name("shim-state/state.json");
    ensure!(state.exists(), "no state is kept");
    let log = weir.log();
    ensure!(
        log.lines()
            .any(|line| line.contains("secret.example.com.pem") && line.contains("ermission denied")),
        "{log}"
    );

    // `systemctl reload`: the next process has the same rights and the same ports.
    shim.signal(Signal::SIGUSR2)?;
    let next = Orphan(await_ok("a successor", || successor(&weir)).with_context(|| weir.log())?);
    ensure!(
        shim.wait(PATIENCE)?.is_some_and(|status| status.success()),
        "the old one stays"
    );
    is_confined(next.0)?;
    page(&lab.client, &readable).with_context(|| weir.log())?;
    Ok(())
}
