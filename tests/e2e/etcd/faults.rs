//! etcd fails in every way it can; the traffic goes on, and what comes after is heard.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lb_tests::{etcd::Etcd, load::Load, weir::Weir};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{Lab, connected, service, serving, source};

/// One etcd, one node, two servers behind `web`.
const WEB: &str = "/weir/services/web";

/// Limit for noticing that etcd is silent: 0.5 s of silence, 1 s for an answer, and what a busy machine takes. With the
/// default deadlines it would be 13 s.
const NOTICED: Duration = Duration::from_secs(9);

fn fault(status: &Value) -> &str {
    source(status)["fault"].as_str().unwrap_or_default()
}

fn await_serving(weir: &mut Weir<'_>, name: &str, count: usize) -> Result<()> {
    weir.await_status(&format!("{count} backends of {name}"), |status| {
        serving(status, name) == count
    })
}

/// Everything asked so far was answered, and more is.
fn goes_on(load: &Load) -> Result<()> {
    load.await_more(100)?;
    let failures = load.report().failures;
    ensure!(failures.is_empty(), "{failures:?}");
    Ok(())
}

#[test]
fn each_of_three_servers_may_be_killed() -> Result<()> {
    let lab = Lab::new(1)?;
    let traffic = lab.traffic(2)?;
    let mut etcd = Etcd::start(&lab.store, super::STORE, 3)?;
    etcd.put(WEB, &service("own", 80, [1, 2]))?;
    let mut weir = lab.agent(0, &etcd)?;
    await_serving(&mut weir, "web", 2)?;
    let load = traffic.load();
    // The leader first. Sooner or later it is the one that the agent is connected to.
    let first = etcd.leader()?;
    for (round, member) in (first..first + 3).map(|member| member % 3).enumerate() {
        etcd.kill(member);
        etcd.put("/weir/services/more", &service("own", 81, 1..=(round as u8 + 3)))?;
        await_serving(&mut weir, "more", round + 3)?;
        weir.await_status("in touch with etcd", connected)?;
        goes_on(&load)?;
        etcd.run_all()?;
    }
    assert_eq!(load.stop().failures, [""; 0]);
    Ok(())
}

#[test]
fn a_server_that_stands_still_is_noticed_in_time() -> Result<()> {
    let lab = Lab::new(1)?;
    let traffic = lab.traffic(2)?;
    let etcd = Etcd::start(&lab.store, super::STORE, 1)?;
    etcd.put(WEB, &service("own", 80, [1, 2]))?;
    let mut weir = lab.agent(0, &etcd)?;
    await_serving(&mut weir, "web", 2)?;
    let load = traffic.load();
    etcd.signal(0, Signal::SIGSTOP)?;
    let stopped = Instant::now();
    weir.await_status("without etcd", |status| !connected(status))?;
    assert!(stopped.elapsed() < NOTICED, "{:?}", stopped.elapsed());
    weir.await_status("silent", |status| fault(status).contains("no answer within 1s"))?;
    goes_on(&load)?;
    assert_eq!(serving(&weir.status()?, "web"), 2);
    let before = weir.status()?;
    etcd.signal(0, Signal::SIGCONT)?;
    weir.await_status("with etcd again", connected)?;
    assert!(
        source(&before)["last_heard"].is_object(),
        "its age is told: {before:#}"
    );
    etcd.put("/weir/services/more", &service("own", 81, [1]))?;
    await_serving(&mut weir, "more", 1)?;
    assert_eq!(load.stop().failures, [""; 0]);
    Ok(())
}

#[test]
fn a_path_that_swallows_everything_is_noticed_in_time() -> Result<()> {
    let lab = Lab::new(1)?;
    let etcd = Etcd::start(&lab.store, super::STORE, 1)?;
    etcd.put(WEB, &service("own", 80, [1, 2]))?;
    let mut weir = lab.agent(0, &etcd)?;
    await_serving(&mut weir, "web", 2)?;
    // No RST and no FIN: the connection is half open.
    lab.store.ip("link set to-0 nomaster")?;
    let cut = Instant::now();
    weir.await_status("without etcd", |status| !connected(status))?;
    assert!(cut.elapsed() < NOTICED, "{:?}", cut.elapsed());
    assert_eq!(serving(&weir.status()?, "web"), 2);
    etcd.put(WEB, &service("own", 80, [1, 2, 3]))?;
    lab.store.ip("link set to-0 master br0")?;
    await_serving(&mut weir, "web", 3)
}

#[test]
fn without_a_quorum_agents_serve_and_start_and_serve() -> Result<()> {
    let lab = Lab::new(1)?;
    let traffic = lab.traffic(2)?;
    let mut etcd = Etcd::start(&lab.store, super::STORE, 3)?;
    etcd.put("/weir/config", "[vips.more]\naddress = \"198.51.100.2\"\n")?;
    etcd.put(WEB, &service("own", 80, [1, 2]))?;
    etcd.put("/weir/services/more", &service("more", 80, [1, 2]))?;
    let mut weir = lab.agent(0, &etcd)?;
    await_serving(&mut weir, "web", 2)?;
    await_serving(&mut weir, "more", 2)?;
    let load = traffic.load();
    etcd.kill(0);
    etcd.kill(1);
    weir.await_status("without a quorum", |status| !connected(status))?;
    goes_on(&load)?;
    // An agent that starts now knows what the last one knew, VIPs too.
    weir.kill();
    weir.run()?;
    let status = weir.status()?;
    assert_eq!(
        (serving(&status, "web"), serving(&status, "more")),
        (2, 2),
        "{status:#}"
    );
    assert!(
        !connected(&status) && source(&status)["last_heard"].is_object(),
        "{status:#}"
    );
    goes_on(&load)?;
    etcd.run_all()?;
    weir.await_status("with a quorum again", connected)?;
    etcd.put("/weir/services/more", &service("more", 80, [1]))?;
    await_serving(&mut weir, "more", 1)?;
    assert_eq!(load.stop().failures, [""; 0]);
    Ok(())
}

#[test]
fn a_malformed_key_harms_only_itself() -> Result<()> {
    let lab = Lab::new(1)?;
    let etcd = Etcd::start(&lab.store, super::STORE, 1)?;
    etcd.put(WEB, &service("own", 80, [1, 2]))?;
    let mut weir = lab.agent(0, &etcd)?;
    await_serving(&mut weir, "web", 2)?;
    etcd.put(WEB, "listen = [\"80/tcp\"\n[[backends]]\naddress = \"nowhere\"")?;
    etcd.put("/weir/services/more", &service("own", 81, [1, 2, 3]))?;
    await_serving(&mut weir, "more", 3)?;
    let status = weir.status()?;
    assert_eq!(serving(&status, "web"), 2, "{status:#}");
    let refused = status["rejections"].to_string();
    for word in [WEB, "TOML", "stays in force"] {
        assert!(refused.contains(word), "{word} is missing in {refused}");
    }
    // An agent that starts now has the last good text, too.
    weir.kill();
    weir.run()?;
    await_serving(&mut weir, "web", 2)?;
    etcd.put(WEB, &service("own", 80, [3]))?;
    weir.await_status("put right", |status| {
        serving(status, "web") == 1 && status["rejections"].as_array().is_some_and(Vec::is_empty)
    })
}

#[test]
fn a_wiped_store_takes_nothing_away() -> Result<()> {
    let lab = Lab::new(1)?;
    let traffic = lab.traffic(2)?;
    let mut etcd = Etcd::start(&lab.store, super::STORE, 1)?;
    etcd.put("/weir/config", "\n")?;
    etcd.put(WEB, &service("own", 80, [1, 2]))?;
    etcd.put("/weir/services/more", &service("own", 81, [1, 2]))?;
    let mut weir = lab.agent(0, &etcd)?;
    await_serving(&mut weir, "web", 2)?;
    await_serving(&mut weir, "more", 2)?;
    let load = traffic.load();
    etcd.wipe()?;
    weir.await_status("told of it", |status| {
        connected(status) && fault(status).contains("3 deleted key(s) stay in force")
    })?;
    weir.kill();
    weir.run()?;
    weir.await_status("told of it again", |status| {
        connected(status) && fault(status).contains("stay in force")
    })?;
    let status = weir.status()?;
    assert_eq!(
        (serving(&status, "web"), serving(&status, "more")),
        (2, 2),
        "{status:#}"
    );
    goes_on(&load)?;
    // Put back what shall be, and `config` last.
    etcd.put(WEB, &service("own", 80, [1, 2]))?;
    etcd.put("/weir/config", "\n")?;
    weir.await_status("without what was not put back", |status| {
        serving(status, "more") == 0 && serving(status, "web") == 2 && fault(status).is_empty()
    })?;
    assert_eq!(load.stop().failures, [""; 0]);
    Ok(())
}

#[test]
fn an_expired_certificate_is_named_and_a_renewed_one_taken() -> Result<()> {
    let lab = Lab::new(1)?;
    let traffic = lab.traffic(2)?;
    let mut etcd = Etcd::start(&lab.store, super::STORE, 1)?;
    etcd.put(WEB, &service("own", 80, [1, 2]))?;
    let mut weir = lab.agent(0, &etcd)?;
    await_serving(&mut weir, "web", 2)?;
    let load = traffic.load();
    etcd.certify("server", 2001)?;
    etcd.kill(0);
    etcd.run_all()?;
    weir.await_status("told that it has expired", |status| {
        !connected(status) && fault(status).to_lowercase().contains("expired")
    })?;
    goes_on(&load)?;
    etcd.certify("server", 2099)?;
    weir.await_status("with etcd again", connected)?;
    // Ours: the server refuses it.
    etcd.certify("client", 2001)?;
    etcd.kill(0);
    etcd.run_all()?;
    weir.await_status("refused", |status| {
        !connected(status) && fault(status).contains("https://")
    })?;
    goes_on(&load)?;
    etcd.certify("client", 2099)?;
    weir.await_status("let in again", connected)?;
    assert_eq!(load.stop().failures, [""; 0]);
    Ok(())
}

#[test]
fn a_user_has_a_password() -> Result<()> {
    let lab = Lab::new(1)?;
    let etcd = Etcd::start(&lab.store, super::STORE, 1)?;
    etcd.put(WEB, &service("own", 80, [1, 2]))?;
    for words in [
        "user add root:of-the-tests",
        "user grant-role root root",
        "user add weir:open-sesame",
        "role add weir",
        "role grant-permission --prefix=true weir read /weir/",
        "user grant-role weir weir",
        "auth enable",
    ] {
        etcd.ctl(&words.split(' ').collect::<Vec<_>>(), "")?;
    }
    let files = tempfile::tempdir()?;
    let password = files.path().join("password");
    std::fs::write(&password, "wrong\n")?;
    let login = format!("user = \"weir\"\npassword-file = {password:?}\n");
    let config = format!("{}{login}", super::config(&etcd));
    // The wrong one is named, as far as etcd says; it is nowhere else.
    let mut weir = Weir::start_with(&lab.nodes[0], "off", &config)?;
    weir.await_status("refused", |status| {
        fault(status).contains("authentication failed")
    })?;
    std::fs::write(&password, "open-sesame\n")?;
    await_serving(&mut weir, "web", 2)?;
    let said = format!("{}{}", weir.log(), weir.status()?);
    assert!(!said.contains("sesame"), "{said}");
    Ok(())
}

#[test]
fn a_reader_that_fell_behind_a_compaction_reads_anew_all_pages() -> Result<()> {
    use weir::{
        config::Config,
        etcd::{Change, Heard, Store, follow},
    };
    let lab = Lab::new(0)?;
    let etcd = Etcd::start(&lab.store, super::STORE, 1)?;
    let config = Config::parse(std::path::Path::new("test"), &super::config(&etcd))?
        .etcd
        .expect("a section");
    let told = lab.store.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let mut heard = follow(config.clone(), "/weir/".into());
            let Some(Heard::Snapshot(first)) = heard.recv().await else {
                anyhow::bail!("a full read comes first");
            };
            ensure!(first.keys.is_empty());
            // Nobody takes what is heard: it fills every buffer down to the server's.
            let (mut session, _) = Store::new(config).read("/weir/").await?;
            let (mut revision, text) = (0, "x".repeat(10_000));
            for _ in 0..4000 {
                let written = session.put_if("/weir/services/web", &text, revision).await?;
                revision = written.expect("nobody else writes");
            }
            // More than one page.
            for at in 0..1500 {
                let name = format!("/weir/services/web-{at:04}");
                revision = session.put_if(&name, "", 0).await?.expect("it is new");
            }
            etcd.ctl(&["compact", &revision.to_string()], "")?;
            let (mut lost, mut last) = (String::new(), 0);
            loop {
                match heard.recv().await {
                    Some(Heard::Changes(changes)) => {
                        last = changes.iter().map(Change::revision).max().unwrap_or(last);
                    }
                    Some(Heard::Lost(fault)) => lost = fault,
                    Some(Heard::Snapshot(anew)) => return Ok((lost, last, anew, revision)),
                    Some(Heard::Alive) => {}
                    None => anyhow::bail!("it has ended"),
                }
            }
        })
    })?;
    let (lost, last, anew, revision) = told;
    assert!(lost.contains("compacted"), "{lost}");
    assert!(
        last < revision && anew.revision == revision,
        "{last} {} {revision}",
        anew.revision
    );
    assert_eq!(
        (anew.keys.len(), anew.keys[1500].name.as_str()),
        (1501, "/weir/services/web-1499")
    );
    Ok(())
}
