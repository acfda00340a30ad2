//! The chapter about HTTP: two hosts at the VIP, by the labels that Interlock read.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use lb_tests::{
    docker::{Engine, IMAGE},
    load::Load,
    site::{NODE, Site, VIP, backends, http_service, vip},
    weir::Weir,
};

use crate::{
    go_on,
    show::{bars, chapter, command, live, live_head, output, say},
    story::{A_WHILE, WORKERS, a_while, judge},
};

const VOTE: &str = "vote.example.com";
const RESULT: &str = "result.example.com";
/// How long the shim may take to hear of its routes.
const PATIENCE: Duration = Duration::from_secs(20);

/// Starts a container for a host, showing the command.
fn run(engine: &Engine, name: &str, host: &str) -> Result<()> {
    go_on()?;
    let (hostname, domain) = host.split_once('.').unwrap_or((host, ""));
    let labels = [
        format!("interlock.hostname={hostname}"),
        format!("interlock.domain={domain}"),
    ];
    engine.container(name, &["--label", &labels[0], "--label", &labels[1]])
}

/// Waits until exactly these containers are upstreams of a host, and a shim serves it.
fn await_upstreams(weir: &mut Weir<'_>, host: &str, containers: &[&str]) -> Result<()> {
    go_on()?;
    let wanted: BTreeSet<&str> = containers.iter().copied().collect();
    weir.await_status(&format!("{host} at {wanted:?}"), |status| {
        let routes = status["routes"].as_array().into_iter().flatten();
        let mut ours = routes.filter(|route| route["host"] == host);
        ours.next().is_some_and(|route| {
            let upstreams = route["upstreams"].as_array().into_iter().flatten();
            let active = upstreams.filter(|upstream| upstream["state"] == "active");
            active
                .filter_map(|upstream| upstream["name"].as_str())
                .collect::<BTreeSet<_>>()
                == wanted
        })
    })
}

/// Waits until both hosts are answered: the shim has heard of them.
fn await_answers(site: &Site) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        go_on()?;
        let tried = [VOTE, RESULT].map(|host| site.client.fetch(vip(80), host));
        match tried.into_iter().find_map(Result::err) {
            None => return Ok(()),
            Some(error) if Instant::now() > until => bail!("no answer through the shim: {error:#}"),
            Some(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Two hosts by labels, and their containers replaced while they are asked.
pub fn routes(site: &Site, engine: &Engine, weir: &mut Weir<'_>) -> Result<()> {
    chapter(5, "HTTP: two hosts at one address, by Interlock's labels");
    say(
        "The containers of before make room. Others say by labels which host they serve, as they did to Interlock:\n",
    );
    command("docker rm -f web-1 web-2");
    engine.docker(&["rm", "-f", "web-1", "web-2"])?;
    for (name, host) in [("vote-1", VOTE), ("vote-2", VOTE), ("result-1", RESULT)] {
        let (hostname, domain) = host.split_once('.').unwrap_or((host, ""));
        command(&format!(
            "docker run -d --name {name} --label interlock.hostname={hostname} --label interlock.domain={domain} {IMAGE}"
        ));
        run(engine, name, host)?;
    }
    // The service of before is remembered without backends; the file's takes its place.
    weir.await_status("without the containers of before", |status| {
        backends(status).next().is_none()
    })?;
    say(&format!(
        "\nA kernel that sees packets knows no hosts: a process without privileges does, the L7 shim. For the kernel it is a\n\
         backend as any other, here one on the node itself ({NODE}). The agent follows its file and tells the shim the routes:\n"
    ));
    command("cat >> weir.toml");
    output(http_service().trim_start());
    command("weir l7 &");
    weir.configure(&(site.config(engine) + &http_service()))?;
    let _shim = weir.start_shim()?;
    await_upstreams(weir, VOTE, &["vote-1", "vote-2"])?;
    await_upstreams(weir, RESULT, &["result-1"])?;
    await_answers(site)?;

    say("\nThe client asks for one and for the other:\n");
    for host in [VOTE, VOTE, RESULT] {
        curl(site, host)?;
    }

    say("\nThe containers of the vote are replaced by new ones while the same clients ask for both hosts:\n");
    let load = Load::start_http(&site.client, vip(80), &[VOTE, RESULT], WORKERS);
    let start = Instant::now();
    live_head();
    let line = |count: usize, what: &str| live(start, count, &load.report(), what);
    a_while(&load, A_WHILE)?;
    line(3, "");
    for (old, new, now) in [
        ("vote-1", "vote-3", ["vote-2", "vote-3"]),
        ("vote-2", "vote-4", ["vote-3", "vote-4"]),
    ] {
        run(engine, new, VOTE)?;
        line(4, &format!("docker run {new}"));
        engine.docker(&["stop", old])?;
        line(3, &format!("docker stop {old}"));
        await_upstreams(weir, VOTE, &now)?;
        a_while(&load, A_WHILE)?;
    }
    let before = load.report();
    a_while(&load, 2 * A_WHILE)?;
    line(3, "");
    say("\nWho answered after that:\n");
    bars(
        &load
            .report()
            .since(&before)
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .collect(),
    );
    judge(load)
}

fn curl(site: &Site, host: &str) -> Result<()> {
    go_on()?;
    let (header, url) = (format!("Host: {host}"), format!("http://{VIP}/"));
    command(&format!("curl -H '{header}' {url}"));
    let answer = site
        .client
        .command("curl")
        .args(["-sS", "--fail", "--max-time", "20", "-H", &header, &url])
        .output()?;
    ensure!(
        answer.status.success(),
        "curl failed: {}",
        String::from_utf8_lossy(&answer.stderr)
    );
    let text = String::from_utf8_lossy(&answer.stdout).into_owned();
    let of = host.split('.').next().unwrap_or_default();
    ensure!(text.starts_with(of), "another host's container answered: {text}");
    output(&text);
    Ok(())
}
