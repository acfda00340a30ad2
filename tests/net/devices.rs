//! What happens to devices, and devices that cannot do everything.

use std::{net::SocketAddr, time::Instant};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{netns::Namespace, weir::Weir};

use crate::{
    lab::{Body, Lab, VIP4, Wiring, container_address, service},
    serve,
    talk::{BULK, PATIENCE, Talk, serve_tcp, talk_tcp},
    vip,
};

/// The attachment of a device in a status.
fn attachment<'s>(status: &'s serde_json::Value, device: &str) -> Option<&'s serde_json::Value> {
    let all = status["attachments"].as_array()?;
    all.iter().find(|attachment| attachment["device"] == device)
}

/// Whether any fault of a status has all of these parts.
fn faulty(status: &serde_json::Value, parts: &[&str]) -> bool {
    let faults = status["faults"].as_array().into_iter().flatten();
    faults
        .filter_map(|fault| fault.as_str())
        .any(|fault| parts.iter().all(|part| fault.contains(part)))
}

/// A connection of the client's, open and used.
fn open(client: &Namespace) -> Result<Talk> {
    client.run(|| {
        let mut talk = Talk::open(vip(false, 80))?;
        talk.say(100)?;
        Ok(talk)
    })
}

/// The configuration of one service on these interfaces.
fn on(interfaces: &str, servers: &[SocketAddr]) -> String {
    format!("interfaces = {interfaces}\n[vips.lab]\naddress = \"{VIP4}\"\n")
        + &service("lab", "80/tcp", "", servers)
}

#[test]
fn tc_serves_beside_a_foreign_xdp_program() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Tc, 1)?;
    let servers = serve(&lab, false, false)?;
    let foreign = lab.node.pass_all("c0")?;
    let config = on("[\"b0\", \"c0\"]", &servers);
    let mut weir = Weir::start(&lab.node, &config)?;
    talk_tcp(&lab.client, vip(false, 80), BULK).with_context(|| weir.explain())?;
    let status = weir.status()?;
    let c0 = attachment(&status, "c0").context("c0 has no program")?;
    ensure!(c0["xdp"] == "-" && c0["tc"] != "-", "{c0:#}");
    ensure!(
        faulty(
            &status,
            &[
                "device c0",
                "another XDP program",
                "TC alone",
                "bpf.xdp = \"off\""
            ]
        ),
        "{:#}",
        status["faults"]
    );
    // What it was told to do is not possible: it serves all the same.
    weir.kill();
    weir.set_xdp("native");
    weir.configure(&config)?;
    weir.run()?;
    talk_tcp(&lab.client, vip(false, 80), 100).with_context(|| weir.explain())?;
    // Its place is taken when it is free and something has happened.
    drop(foreign);
    lab.node.ip("link set c0 alias free")?;
    weir.await_status("native", |status| {
        attachment(status, "c0").is_some_and(|c0| c0["xdp"] == "native")
    })?;
    talk_tcp(&lab.client, vip(false, 80), 100).with_context(|| weir.explain())?;
    Ok(())
}

/// A veth loses what XDP sends back out of it, unless somebody at its other end takes frames from XDP.
#[test]
fn xdp_leaves_to_tc_what_a_veth_would_lose() -> Result<()> {
    let lab = Lab::new(Wiring::OneArm, Body::Tc, 1)?;
    let servers = serve(&lab, false, false)?;
    let weir = Weir::start(&lab.node, &on("[\"b0\"]", &servers))?;
    talk_tcp(&lab.client, vip(false, 80), BULK).with_context(|| weir.explain())?;
    let status = weir.status()?;
    ensure!(
        attachment(&status, "b0").is_some_and(|b0| b0["xdp"] == "native"),
        "{status:#}"
    );
    Ok(())
}

#[test]
fn an_agent_is_not_ready_while_an_interface_has_no_program() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Tc, 1)?;
    let servers = serve(&lab, false, false)?;
    let mut weir = Weir::launch(&lab.node, "off", &on("[\"b0\", \"c0\", \"late0\"]", &servers))?;
    weir.await_status("serving by what is there", |status| {
        faulty(status, &["interface late0", "does not exist"])
            && status["services"][0]["backends"][0]["ring_share"] == 10_000
    })?;
    ensure!(weir.status()?["ready"] == false, "ready without late0");
    talk_tcp(&lab.client, vip(false, 80), 100).with_context(|| weir.explain())?;
    lab.node.veth("late0", &lab.client, "late1")?;
    weir.await_status("ready", |status| status["ready"] == true)?;
    lab.node.ip("link del late0")?;
    weir.await_status("not ready", |status| status["ready"] == false)
}

#[test]
fn the_default_route_may_go_for_a_while() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Tc, 1)?;
    let servers = serve(&lab, false, false)?;
    let route = "route add default via 192.0.2.10 dev c0";
    lab.node.ip(route)?;
    let mut weir = Weir::start_with(&lab.node, "off", &on("[\"b0\", \"auto\"]", &servers))?;
    let mut talk = open(&lab.client)?;
    let mut goes_on = |weir: &mut Weir<'_>, what: &str| -> Result<()> {
        talk.say(100)
            .with_context(|| format!("{what}: {}", weir.explain()))?;
        talk_tcp(&lab.client, vip(false, 80), 100).with_context(|| format!("{what}: {}", weir.explain()))?;
        ensure!(attachment(&weir.status()?, "c0").is_some(), "{what}: c0 was left");
        Ok(())
    };
    lab.node.ip("route del default")?;
    weir.await_status("told that the route is gone", |status| {
        faulty(status, &["auto", "no IPv4 default route", "c0"])
    })?;
    goes_on(&mut weir, "without a default route")?;
    ensure!(weir.status()?["ready"] == true, "{}", weir.explain());
    // An agent that starts then finds no route either.
    weir.kill();
    weir.run()?;
    goes_on(&mut weir, "an agent that starts without a default route")?;
    lab.node.ip(route)?;
    weir.await_status("told that the route is back", |status| {
        !faulty(status, &["no IPv4 default route"])
    })?;
    goes_on(&mut weir, "the route is back")
}

#[test]
fn connections_outlive_what_happens_to_a_device() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Tc, 1)?;
    let servers = serve(&lab, false, false)?;
    let route = "route replace default via 192.0.2.10";
    lab.node.ip(&format!("{route} dev c0"))?;
    let mut weir = Weir::start_with(&lab.node, "off", &on("[\"b0\", \"auto\"]", &servers))?;
    let mut talk = open(&lab.client)?;
    let slot = |weir: &Weir<'_>, device: &str| -> Result<u16> {
        let ifindex = lab.node.ifindex(device)?;
        let devices = weir.dump()?.devices;
        let found = devices.iter().find(|(_, d)| d.ifindex == ifindex);
        Ok(*found.with_context(|| format!("{device} has no slot"))?.0)
    };
    let first = slot(&weir, "c0")?;

    lab.node.ip("link set c0 mtu 1300")?;
    talk.say(100_000)
        .with_context(|| format!("MTU: {}", weir.explain()))?;
    lab.node.ip("link set c0 mtu 1500")?;

    lab.node.ip("link set c0 address 02:00:00:00:77:01")?;
    lab.client.ip("neigh flush dev e0")?;
    talk.say(100)
        .with_context(|| format!("MAC: {}", weir.explain()))?;

    for command in ["link set c0 down", "link set c0 name wan0", "link set wan0 up"] {
        lab.node.ip(command)?;
    }
    lab.node.ip(&format!("{route} dev wan0"))?;
    weir.await_status("told of the new name", |s| attachment(s, "wan0").is_some())?;
    talk.say(100)
        .with_context(|| format!("renamed: {}", weir.explain()))?;
    ensure!(slot(&weir, "wan0")? == first, "the slot went with the name");

    // Made anew, while an agent looks and while none does.
    for agent in [true, false] {
        if !agent {
            weir.kill();
        }
        lab.node.ip("link del wan0")?;
        if agent {
            weir.await_status("told that it is gone", |s| attachment(s, "wan0").is_none())?;
        }
        lab.client.veth("e0", &lab.node, "wan0")?;
        lab.client.address("e0", "192.0.2.10/24")?;
        lab.node.address("wan0", "192.0.2.1/24")?;
        lab.client.ip(&format!("route add {VIP4}/32 via 192.0.2.1"))?;
        lab.node.ip(&format!("{route} dev wan0"))?;
        if !agent {
            weir.run()?;
        }
        talk.say(100)
            .with_context(|| format!("made anew: {}", weir.explain()))?;
        ensure!(slot(&weir, "wan0")? == first, "another slot under its old name");
    }
    Ok(())
}

/// A KVM host's two legs: clients on a NIC with native XDP, backends behind a bridge, which cannot take frames from XDP.
#[test]
fn xdp_leaves_to_tc_what_its_target_cannot_take() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Native, 1)?;
    lab.node.bridge("up0")?;
    lab.node.ip("addr flush dev b0")?;
    lab.node.ip("link set b0 master up0")?;
    lab.node.address("up0", "203.0.113.1/24")?;
    let servers = serve(&lab, false, false)?;
    let weir = Weir::start(&lab.node, &on("[\"up0\", \"c0\"]", &servers))?;
    talk_tcp(&lab.client, vip(false, 80), BULK).with_context(|| weir.explain())?;
    let status = weir.status()?;
    let c0 = attachment(&status, "c0").context("c0 has no program")?;
    ensure!(c0["xdp"] == "native", "{c0:#}");
    let counters = weir.counters()?;
    ensure!(counters["node"]["to_tc"].as_u64() > Some(0), "{counters:#}");
    Ok(())
}

#[test]
fn frames_that_xdp_could_not_redirect_are_counted() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Native, 1)?;
    let servers = serve(&lab, false, false)?;
    let mut weir = lab.start(&lab.config(VIP4, "80/tcp", &servers))?;
    let mut talk = open(&lab.client)?;
    let failed = |weir: &Weir<'_>| -> Result<u64> {
        Ok(weir.counters()?["drops"]["redirect_failed"].as_u64().unwrap_or(0))
    };
    let before = failed(&weir)?;
    // Nobody is there to see the device go down.
    weir.kill();
    lab.node.ip("link set b0 down")?;
    lab.client.run(|| talk.tell(100))?;
    lab.node.ip("link set b0 up")?;
    lab.node.ip("neigh flush dev b0")?;
    talk.hear(100).with_context(|| weir.log())?;
    weir.run()?;
    ensure!(failed(&weir)? > before, "not counted: {}", weir.explain());
    Ok(())
}

#[test]
fn xdp_is_on_where_backends_may_be_remote() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Native, 1)?;
    let containers = lab.containers(1)?;
    let remote = serve(&lab, false, false)?;
    let local = serve_tcp(&containers[0], 1, SocketAddr::new(container_address(0, false), 0))?;
    let interfaces = "[\"b0\", \"c0\"]";
    let own = vip(false, 80);
    let mut weir = Weir::start(&lab.node, &on(interfaces, &[local]))?;
    talk_tcp(&lab.client, own, 100).with_context(|| weir.explain())?;
    let is = |status: &serde_json::Value, xdp: &str, why: &str| {
        ["b0", "c0"].iter().all(|device| {
            attachment(status, device)
                .is_some_and(|a| a["xdp"] == xdp && a["why"].as_str().is_some_and(|text| text.contains(why)))
        })
    };
    let status = weir.status()?;
    ensure!(is(&status, "-", "no backend can be remote"), "{}", weir.explain());
    weir.configure(&on(interfaces, &[local, remote[0]]))?;
    weir.await_status("native for a remote backend", |s| is(s, "native", "203.0.113.11"))?;
    weir.configure(&on(interfaces, &[local]))?;
    weir.await_status("off again", |s| is(s, "-", "no backend can be remote"))?;
    talk_tcp(&lab.client, own, 100).with_context(|| weir.explain())?;
    Ok(())
}

#[test]
fn devices_without_ethernet_headers_are_refused_by_name() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Tc, 1)?;
    let mut servers = serve(&lab, false, false)?;
    lab.node.ip("tuntap add dev tun0 mode tun")?;
    lab.node.ip("link set tun0 up")?;
    lab.node.ip("route add 10.99.0.0/24 dev tun0")?;
    servers.push("10.99.0.2:80".parse()?);
    let mut weir = Weir::launch(&lab.node, "off", &on("[\"b0\", \"c0\", \"tun0\"]", &servers))?;
    let refusal = ["interface tun0", "no Ethernet headers", "name the"];
    weir.await_status("refused", |status| faulty(status, &refusal))?;
    weir.await_status("a backend behind it", |status| {
        faulty(status, &["backend 10.99.0.2", "tun0", "no Ethernet headers"])
    })?;
    weir.await_status("serving by what is there", |status| {
        let backends = status["services"][0]["backends"].as_array();
        backends.is_some_and(|all| all.iter().any(|backend| backend["ring_share"] == 10_000))
    })?;
    let status = weir.status()?;
    ensure!(
        status["ready"] == false && attachment(&status, "tun0").is_none(),
        "{status:#}"
    );
    talk_tcp(&lab.client, vip(false, 80), 100).with_context(|| weir.explain())?;
    let path = weir.config_path().display().to_string();
    let checked = weir.plain(&["check", &path])?;
    let said = String::from_utf8_lossy(&checked.stderr).into_owned();
    ensure!(checked.status.code() == Some(64), "{:?}: {said}", checked.status);
    ensure!(refusal.iter().all(|part| said.contains(part)), "{said}");
    Ok(())
}

#[test]
fn sources_of_translation_are_stable_addresses_of_the_nodes_own() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Tc, 1)?;
    let servers = serve(&lab, false, false)?;
    // As keepalived puts it there, on the node that is master.
    lab.node.address("b0", &format!("{VIP4}/32"))?;
    lab.node.address("b0", "2001:db8:f::1/128")?;
    // A deprecated address, and one that the kernel makes for a while only.
    lab.node
        .ip("addr add 2001:db8:b::dead/64 dev b0 nodad preferred_lft 0 valid_lft 600")?;
    lab.node.sysctl("net.ipv6.conf.b0.use_tempaddr", "2")?;
    lab.node
        .ip("addr add 2001:db8:b::beef/64 dev b0 nodad mngtmpaddr preferred_lft 3600 valid_lft 7200")?;
    let addresses = lab
        .node
        .command("ip")
        .args(["-6", "addr", "show", "dev", "b0"])
        .output()?;
    let addresses = String::from_utf8_lossy(&addresses.stdout).into_owned();
    ensure!(addresses.contains("temporary"), "{addresses}");
    let config =
        format!("interfaces = [\"b0\", \"c0\"]\n[vips.lab]\naddress = [\"{VIP4}\", \"2001:db8:f::1\"]\n")
            + &service("lab", "80/tcp", "", &servers);
    let mut weir = Weir::start_with(&lab.node, "off", &config)?;
    talk_tcp(&lab.client, vip(false, 80), 100).with_context(|| weir.explain())?;
    let mut sources: Vec<String> = weir
        .dump()?
        .snat_addresses
        .values()
        .map(ToString::to_string)
        .collect();
    sources.sort();
    let own = [
        "192.0.2.1",
        "2001:db8:b::1",
        "2001:db8:b::beef",
        "2001:db8:c::1",
        "203.0.113.1",
    ];
    ensure!(sources == own, "{sources:?}");
    // It comes when this node becomes master, too.
    weir.configure(&config.replace(VIP4, "198.51.100.9"))?;
    weir.await_status("changed", |status| {
        status["services"].to_string().contains("198.51.100.9")
    })?;
    lab.node.address("b0", "198.51.100.9/32")?;
    // What is seen with it tells that it has been seen.
    lab.node.ip("link set b0 mtu 1400")?;
    let until = Instant::now() + PATIENCE;
    while !weir.dump()?.devices.values().any(|device| device.mtu == 1400) {
        ensure!(Instant::now() < until, "{}", weir.explain());
        std::thread::yield_now();
    }
    let sources = weir.dump()?.snat_addresses;
    ensure!(
        !sources
            .values()
            .any(|source| source.to_string() == "198.51.100.9"),
        "{sources:?}"
    );
    Ok(())
}
