mod engines;
mod l7_section;
mod shared;

use std::collections::BTreeSet;

use super::{l7::L7, *};
use crate::{
    model::{Check, CheckKind, Passive, Protocol, UnhealthyPolicy},
    source::labels,
};

const MINIMAL: &str = "interfaces = [\"eth0\"]\n";

fn parse(text: &str) -> Result<Config, ConfigErrors> {
    Config::parse(Path::new("weir.toml"), text)
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// `line:column key` of every fault.
fn places(text: &str) -> Vec<String> {
    let place = |fault: &ConfigFault| match fault.position {
        Some((line, column)) => format!("{line}:{column} {}", fault.key),
        None => format!("- {}", fault.key),
    };
    parse(text).unwrap_err().faults.iter().map(place).collect()
}

#[test]
fn the_defaults_are_those_of_the_constants() {
    let config = parse(MINIMAL).unwrap();
    assert_eq!(config.interfaces, [Interface::Named("eth0".into())]);
    assert_eq!(config.limits, Limits::default());
    assert_eq!(config.snat.ports, 1_024..=32_767);
    assert_eq!(config.admin.metrics, DEFAULT_METRICS);
    assert_eq!(config.startup_wait, DEFAULT_STARTUP_WAIT);
    let [docker] = config.docker.as_slice() else {
        panic!("one engine: {:?}", config.docker)
    };
    assert_eq!(docker.endpoint, Endpoint::Unix("/var/run/docker.sock".into()));
    assert_eq!(
        (docker.resync, docker.liveness),
        (DEFAULT_RESYNC, DEFAULT_LIVENESS)
    );
    assert_eq!(config.policy.drain, Duration::from_secs(30));
}

#[test]
fn the_document_tells_the_defaults_that_the_code_has() {
    use lb_common::limits as common;
    let docs = fs::read_to_string(repository().join("docs/config.md")).unwrap();
    for (key, default) in [
        ("services", common::DEFAULT_SERVICES),
        ("backends", common::DEFAULT_BACKENDS),
        ("ring-rows", common::DEFAULT_RING_ROWS),
        ("flows4", common::DEFAULT_FLOWS4),
        ("flows6", common::DEFAULT_FLOWS6),
        ("flow-share", common::DEFAULT_FLOW_SHARE),
        ("events", common::EVENTS_BYTES),
    ] {
        let line = format!("| `{key}` | `{default}` |");
        assert!(docs.contains(&line), "docs/config.md does not say: {line}");
    }
    let (check, passive) = (Check::of(Vec::new()), Passive::default());
    let seconds = |time: Duration| format!("{}s", time.as_secs());
    for (key, default) in [
        ("interval", seconds(check.timing.interval)),
        ("fast-interval", seconds(check.timing.fast_interval)),
        ("timeout", seconds(check.timing.timeout)),
        ("rise", check.timing.rise.to_string()),
        ("fall", check.timing.fall.to_string()),
        ("grace", seconds(check.timing.grace)),
        ("slow-start", seconds(check.timing.slow_start)),
        ("path", check.http.path),
        ("method", check.http.method.name().into()),
        ("window", seconds(passive.window)),
        ("failures", passive.failures.to_string()),
        ("ratio", passive.ratio.to_string()),
        ("ttl", seconds(node::DEFAULT_TTL)),
        ("eject", seconds(passive.eject)),
        ("eject-max", format!("{}m", passive.eject_max.as_secs() / 60)),
        ("keep", passive.keep.to_string()),
    ] {
        let row = docs
            .lines()
            .find(|line| line.starts_with(&format!("| `{key}` |")));
        let told = row.is_some_and(|row| row.contains(&format!("| `{default}` |")));
        assert!(told, "docs/config.md does not say: {key} is {default}");
    }
    let (first, last) = (common::DEFAULT_SNAT_PORT_MIN, common::DEFAULT_SNAT_PORT_MAX);
    let line = format!("| `ports` | `first-last` | `{first}-{last}` |");
    assert!(docs.contains(&line), "docs/config.md does not say: {line}");
}

#[test]
fn the_example_shows_the_defaults_and_every_key_is_documented() {
    let path = repository().join("deploy/weir.example.toml");
    let text = fs::read_to_string(&path).unwrap();
    let config = Config::parse(&path, &text).unwrap();
    let plain = parse(MINIMAL).unwrap();
    assert_eq!(config.policy.defaults, plain.policy.defaults);
    assert_eq!(config.policy.drain, plain.policy.drain);
    assert_eq!(
        (
            config.limits,
            &config.snat,
            &config.docker,
            &config.admin,
            &config.bpf
        ),
        (plain.limits, &plain.snat, &plain.docker, &plain.admin, &plain.bpf)
    );
    // The example names certificates, which have no default.
    let l7 = L7 {
        certificates: None,
        default_certificate: None,
        ..config.l7.clone()
    };
    assert_eq!(l7, plain.l7);
    assert_eq!(
        config.services[0].wishes.len(),
        1,
        "the backends are IPv4, so the service is"
    );

    // The keys of the schema are what serde lists when it meets one that it does not know.
    let docs = fs::read_to_string(repository().join("docs/config.md")).unwrap();
    let mut keys = BTreeSet::new();
    for section in [
        "",
        "[vips.v]",
        "[defaults]",
        "[defaults.timeouts]",
        "[defaults.check]",
        "[defaults.passive]",
        "[tls.t]",
        "[limits]",
        "[snat]",
        "[firewall]",
        "[docker]",
        "[swarm]",
        "[etcd]",
        "[node]",
        "[nodes]",
        "[nodes.node.n]",
        "[admin]",
        "[startup]",
        "[events]",
        "[bpf]",
        "[l7]",
        "[l7.acme]",
        "[l7.timeouts]",
        "[[services]]",
        "[[services]]\n[[services.backends]]",
    ] {
        let errors = parse(&format!("{section}\nno-such-key = 1\n")).unwrap_err();
        let fault = errors
            .faults
            .iter()
            .find(|fault| fault.key.ends_with("no-such-key"))
            .unwrap();
        keys.extend(fault.fault.split('`').skip(3).step_by(2).map(str::to_owned));
    }
    assert!(keys.len() > 40, "{keys:?}");
    for key in keys.iter().filter(|key| *key != "ring_rows") {
        assert!(
            docs.contains(key.as_str()),
            "docs/config.md does not mention `{key}`"
        );
        assert!(
            text.contains(key.as_str()),
            "weir.example.toml does not show `{key}`"
        );
    }
    let docs = fs::read_to_string(repository().join("docs/labels.md")).unwrap();
    for setting in labels::SETTINGS {
        assert!(
            docs.contains(&format!("`weir.service.<name>.{setting}`")),
            "docs/labels.md: {setting}"
        );
    }
}

#[test]
fn checks_are_inherited_and_overridden() {
    let text = format!(
        r#"{MINIMAL}
[vips.web]
address = "192.0.2.1"
[tls.ucp]
ca = "/etc/ca.pem"
cert = "/etc/cert.pem"
key = "/etc/key.pem"
[defaults.check]
kind = "http"
interval = "3s"
status = "200"
[defaults.passive]
keep = 70
[[services]]
name = "plain"
listen = ["80", "80/udp"]
[[services.backends]]
address = "10.0.0.1:80"
[[services]]
name = "ucp"
listen = ["443"]
when-unhealthy = "serve-all"
[services.check]
kind = ["tcp", "https"]
path = "/_ping"
tls = "ucp"
rise = 5
[services.passive]
enabled = true
failures = 9
[[services.backends]]
address = "10.0.0.1:443"
[[services]]
name = "none"
listen = ["81"]
[services.check]
kind = "none"
[[services.backends]]
address = "10.0.0.1:81"
"#
    );
    let config = parse(&text).unwrap();
    let wish = |index: usize| &config.services[index].wishes[0];
    let check = |index: usize| wish(index).backends[0].check.as_deref();
    let plain = check(0).unwrap();
    assert_eq!(
        (&plain.kinds[..], plain.timing.interval),
        (&[CheckKind::Http][..], Duration::from_secs(3))
    );
    // Nobody said that its UDP can be checked by TCP.
    assert_eq!(config.services[0].wishes[1].backends[0].check, None);
    let ucp = check(1).unwrap();
    assert_eq!(ucp.kinds, [CheckKind::Tcp, CheckKind::Https]);
    assert_eq!(
        (ucp.http.path.as_str(), &ucp.http.status[..]),
        ("/_ping", &[(200, 200)][..])
    );
    assert_eq!(
        (ucp.timing.interval, ucp.timing.rise, ucp.timing.fall),
        (Duration::from_secs(3), 5, 3)
    );
    let files = ucp.tls.files.as_ref().unwrap();
    assert_eq!(
        files.identity,
        Some(("/etc/cert.pem".into(), "/etc/key.pem".into()))
    );
    assert_eq!(wish(1).settings.when_unhealthy, UnhealthyPolicy::ServeAll);
    let numbers = Passive {
        failures: 9,
        keep: 70,
        ..Passive::default()
    };
    assert_eq!(wish(1).settings.passive, Some(numbers));
    assert_eq!((wish(0).settings.passive.as_ref(), check(2)), (None, None));
}

#[test]
fn faults_of_checks_are_named() {
    let service = |check: &str| {
        format!(
            "{MINIMAL}[vips.web]\naddress = \"192.0.2.1\"\n[[services]]\nname = \"a\"\nlisten = \"80\"\n\
             [services.check]\n{check}\n[[services.backends]]\naddress = \"10.0.0.1:0\"\n"
        )
    };
    for (text, says) in [
        (service("kind = \"tcp\""), "there is no port to check"),
        (service("kind = \"tpc\"\nport = 80"), "did you mean `tcp`?"),
        (service("kind = [\"docker\", \"tcp\"]\nport = 80"), "HEALTHCHECK"),
        (service("interval = \"2s\""), "nothing is checked"),
        (
            service("kind = \"https\"\nport = 80\ntls = \"ucp\""),
            "no section `[tls.ucp]`",
        ),
        (
            service("kind = \"http\"\nport = 80\nstatus = \"2xx\""),
            "status code",
        ),
        (service("kind = \"tcp\"\nport = 80\nfall = 0"), "from 1 to 100"),
        (
            format!("{MINIMAL}[tls.a]\ncert = \"/c.pem\""),
            "tls.a.key: is missing",
        ),
        (
            format!("{MINIMAL}[tls.a]\nca = \"ca.pem\""),
            "not an absolute path",
        ),
        (format!("{MINIMAL}[defaults.passive]\nratio = 0"), "from 1 to 100"),
    ] {
        let errors = parse(&text).unwrap_err();
        assert_eq!(errors.faults.len(), 1, "{errors}");
        assert!(errors.to_string().contains(says), "{says}: {errors}");
    }
}

#[test]
fn all_faults_come_together_and_in_order() {
    let text = r#"interfaces = []
colour = "red"
[vips.Web]
announce = "addres"
[vips.b]
address = ["192.0.2.1", "no"]
[limits]
backends = 0
flows4 = "many"
flow-share = 101
events = 5000
[snat]
ports = "32767-16384"
[docker]
endpoint = "tcp://192.0.2.1:2375"
resync = "10"
[admin]
metrics = "0.0.0.0:9475"
[bpf]
xdp = "fast"
[[services]]
listen = ["80/sctp"]
wieght = 3
[[services.backends]]
address = "10.0.0.5"
weight = 2000
"#;
    assert_eq!(
        places(text),
        [
            "1:14 interfaces",
            "2:1 colour",
            "3:1 vips.Web",
            "3:1 vips.Web.address",
            "4:12 vips.Web.announce",
            "6:11 vips.b.address",
            "8:12 limits.backends",
            "9:10 limits.flows4",
            "10:14 limits.flow-share",
            "11:10 limits.events",
            "13:9 snat.ports",
            "15:12 docker.endpoint",
            "16:10 docker.resync",
            "18:11 admin.metrics",
            "20:7 bpf.xdp",
            "21:1 services[0].name",
            "21:1 services[0].vip",
            "22:10 services[0].listen",
            "23:1 services[0].wieght",
            "25:11 services[0].backends[0].address",
            "26:10 services[0].backends[0].weight",
        ]
    );
    let errors = parse(text).unwrap_err();
    assert!(
        errors
            .faults
            .iter()
            .all(|fault| !fault.fault.is_empty() && !fault.remedy.is_empty())
    );
    let shown = errors.to_string();
    assert!(
        shown.starts_with("weir.toml: 21 faults\n  line 1, column 14: interfaces: the list is empty; "),
        "{shown}"
    );
    assert!(shown.contains("did you mean `address`?"), "{shown}");
}

#[test]
fn one_fault_at_a_time() {
    let vip = "[vips.web]\naddress = [\"192.0.2.1\", \"2001:db8::1\"]\n";
    let rows: &[(&str, &str)] = &[
        ("interfaces = [\"eth0\"", "TOML"),
        ("interfaces = [\"a/b\"]", "ip link"),
        ("interfaces = [\"sixteen-letters-\"]", "ip link"),
        ("docker = 5", "docs/config.md"),
        (
            "[vips.a]\naddress = \"192.0.2.1\"\n[vips.b]\naddress = \"192.0.2.1\"",
            "vips.a already",
        ),
        (
            "[vips.a]\naddress = \"192.0.2.1\"\nannounce = \"address\"\nnode-address = true",
            "already",
        ),
        (
            "[vips.a]\naddress = \"192.0.2.1\"\ninterface = \"eth0\"",
            "announce",
        ),
        ("[vips.a]\naddress = \"224.0.0.1\"", "unicast"),
        (
            "[docker]\nremote = true\nendpoint = \"tcp://127.0.0.1:1\"",
            "published ports",
        ),
        ("[docker]\nendpoint = \"ssh://host\"", "unix:///path"),
        (
            "[docker]\nendpoint = \"tcp://192.0.2.1:2376\"\ntls-ca = \"/ca\"",
            "all of tls-ca",
        ),
        ("[defaults.timeouts]\nudp = \"10ms\"", "at least `1s`"),
        ("[bpf]\npin-path = \"bpf\"", "absolute"),
        ("[bpf]\nmark = 0", "no bit"),
        (
            "[vips.a]\naddress = \"192.0.2.1\"\nnode-address = true\nunused-ports = \"drop\"",
            "its own stack",
        ),
        (
            "[vips.a]\naddress = \"192.0.2.1\"\nunused-ports = \"no\"",
            "refuse",
        ),
        ("[[services]]\nname = \"a\"\nlisten = [\"80\"]", "[vips]"),
    ];
    for (text, want) in rows {
        let text = if text.starts_with("interfaces") {
            (*text).to_owned()
        } else {
            format!("{MINIMAL}{text}")
        };
        let errors = parse(&text).expect_err(&text);
        assert!(errors.to_string().contains(want), "{text}: {errors}");
    }
    let service =
        |rest: &str| format!("{MINIMAL}{vip}[[services]]\nname = \"a\"\nlisten = [\"80/tcp\"]\n{rest}");
    for (rest, want) in [
        (
            "[[services]]\nname = \"a\"\nlisten = [\"81/tcp\"]",
            "another service",
        ),
        (
            "[[services]]\nname = \"b\"\nlisten = [\"80\"]",
            "taken by service `a`",
        ),
        ("vip = \"wep\"", "did you mean `web`?"),
        (
            "vip = \"192.0.2.1\"\nbackends = [{ address = \"[2001:db8::5]:1\" }]",
            "family",
        ),
        (
            "backends = [{ address = \"10.0.0.5:1\" }, { address = \"10.0.0.5:1\" }]",
            "already",
        ),
        ("deny = [\"10.0.0.1/8\"]", "10.0.0.0/8"),
    ] {
        let errors = parse(&service(rest)).expect_err(rest);
        assert!(errors.to_string().contains(want), "{rest}: {errors}");
    }
}

#[test]
fn a_service_of_the_file_has_a_wish_for_each_address() {
    let text = format!(
        "{MINIMAL}[vips.web]\naddress = [\"192.0.2.1\", \"2001:db8::1\"]\n[[services]]\nname = \"a\"\n\
         listen = [\"80/tcp\", \"53/udp\"]\n\
         backends = [{{ address = \"10.0.0.5:0\", weight = 0 }}, {{ address = \"[2001:db8::5]:8080\" }}]\n"
    );
    let wishes = &parse(&text).unwrap().services[0].wishes;
    assert_eq!(wishes.len(), 4);
    assert_eq!(
        (wishes[1].address.port, wishes[1].address.protocol),
        (53, Protocol::Udp)
    );
    for wish in wishes {
        assert_eq!(wish.backends.len(), 1);
        assert_eq!(wish.backends[0].address.is_ipv4(), wish.address.vip.is_ipv4());
    }
    // Without backends every address is claimed: containers will bring them.
    let bare = text.split("backends").next().unwrap();
    assert_eq!(parse(bare).unwrap().services[0].wishes.len(), 4);
}

#[test]
fn the_default_route_is_remembered_while_there_is_none() {
    assert_eq!(super::last_answer(None), None);
    for (now, answer) in [
        (Some("eth0"), "eth0"),
        (None, "eth0"),
        (Some("eth1"), "eth1"),
        (None, "eth1"),
    ] {
        assert_eq!(
            super::last_answer(now.map(str::to_owned)).as_deref(),
            Some(answer)
        );
    }
}

#[test]
fn a_vip_that_floats_is_no_source() {
    let text = |more: &str| {
        format!(
            "{MINIMAL}\n[vips.one]\naddress = \"198.51.100.77\"\n{more}\n[snat]\naddresses = [\"198.51.100.77\"]\n"
        )
    };
    let refused = parse(&text("")).unwrap_err().to_string();
    assert!(
        refused.contains("snat.addresses") && refused.contains("is the VIP `one`"),
        "{refused}"
    );
    parse(&text("node-address = true")).unwrap();
}

#[test]
fn snat_ports_and_ephemeral_ports_must_not_meet() {
    let snat = parse(MINIMAL).unwrap().snat;
    assert_eq!(snat.check_port_overlap(32_768..=60_999), Ok(()));
    assert_eq!(snat.check_port_overlap(1..=1_023), Ok(()));
    for range in [32_767..=60_999, 1_024..=16_384, 20_000..=20_001, 1..=65_535] {
        let error = snat.check_port_overlap(range).unwrap_err();
        assert!(error.to_string().contains("ip_local_port_range"), "{error}");
    }
}

#[test]
fn the_default_route_with_the_least_metric() {
    let routes = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
                  wlan0\t00000000\t0100000A\t0003\t0\t0\t600\t00000000\t0\t0\t0\n\
                  eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
                  eth1\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
    assert_eq!(default_route_device(routes).as_deref(), Some("eth0"));
    assert_eq!(default_route_device("Iface\n"), None);
}

#[test]
fn a_file_that_is_not_there_is_one_fault() {
    let errors = Config::load(Path::new("/nonexistent/weir.toml")).unwrap_err();
    assert_eq!(errors.faults.len(), 1);
    assert!(errors.to_string().contains("cannot be read"), "{errors}");
}
