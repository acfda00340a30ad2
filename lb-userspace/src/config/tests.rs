use std::collections::BTreeSet;

use super::*;
use crate::{model::Protocol, source::labels};

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
    let docker = config.docker.unwrap();
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
        ("events", common::EVENTS_BYTES),
    ] {
        let line = format!("| `{key}` | `{default}` |");
        assert!(docs.contains(&line), "docs/config.md does not say: {line}");
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
        "[limits]",
        "[snat]",
        "[docker]",
        "[etcd]",
        "[admin]",
        "[startup]",
        "[events]",
        "[bpf]",
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
            "10:10 limits.events",
            "12:9 snat.ports",
            "14:12 docker.endpoint",
            "15:10 docker.resync",
            "17:11 admin.metrics",
            "19:7 bpf.xdp",
            "20:1 services[0].name",
            "20:1 services[0].vip",
            "21:10 services[0].listen",
            "22:1 services[0].wieght",
            "24:11 services[0].backends[0].address",
            "25:10 services[0].backends[0].weight",
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
        shown.starts_with("weir.toml: 20 faults\n  line 1, column 14: interfaces: the list is empty; "),
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
fn endpoints() {
    let endpoint =
        |docker: &str| parse(&format!("{MINIMAL}[docker]\n{docker}")).map(|c| c.docker.unwrap().endpoint);
    assert_eq!(
        endpoint("endpoint = \"tcp://localhost:2375\""),
        Ok(Endpoint::Http("localhost:2375".into()))
    );
    assert_eq!(
        endpoint("endpoint = \"http://[::1]:2375/\""),
        Ok(Endpoint::Http("[::1]:2375".into()))
    );
    let tls = "endpoint = \"tcp://node2:2376\"\ntls-ca = \"/a\"\ntls-cert = \"/b\"\ntls-key = \"/c\"";
    assert!(matches!(endpoint(tls), Ok(Endpoint::Tls { address, .. }) if address == "node2:2376"));
    assert_eq!(
        parse(&format!("{MINIMAL}[docker]\nenabled = false"))
            .unwrap()
            .docker,
        None
    );
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

const NODE: &str = "interfaces = [\"eth0\"]\n[vips.own]\naddress = \"192.0.2.1\"\n";

#[test]
fn etcd_is_reached_by_tls_or_on_loopback() {
    let config = parse(&format!(
        "{NODE}[etcd]\nendpoints = [\"https://10.0.0.1:2379/\", \"https://[fd00::1]:2379\"]\nca = \"/ca\"\ncert = \"/cert\"\nkey = \"/key\"\n"
    ))
    .unwrap();
    let etcd = config.etcd.unwrap();
    assert_eq!(
        etcd.endpoints,
        ["https://10.0.0.1:2379", "https://[fd00::1]:2379"]
    );
    assert_eq!((etcd.prefix.as_str(), etcd.login), ("/weir", None));
    let identity = etcd.tls.unwrap().identity.unwrap();
    assert_eq!(identity, ("/cert".into(), "/key".into()));
    assert!(parse(&format!("{NODE}[etcd]\nendpoints = \"http://127.0.0.1:2379\"\n")).is_ok());

    for (etcd, fault) in [
        ("endpoints = \"http://10.0.0.1:2379\"", "in the open"),
        ("endpoints = \"https://10.0.0.1:2379\"", "must prove who it is"),
        ("endpoints = \"10.0.0.1:2379\"", "is not an endpoint"),
        ("endpoints = \"http://localhost\"", "is not an endpoint"),
        ("", "etcd.endpoints: is missing"),
        (
            "endpoints = \"http://[::1]:1\"\nuser = \"weir\"",
            "etcd.password-file: is missing",
        ),
        (
            "endpoints = \"https://a:1\"\nca = \"/ca\"\nkey = \"/key\"",
            "etcd.cert: is missing",
        ),
        (
            "endpoints = \"http://[::1]:1\"\nprefix = \"weir/\"",
            "`weir/` is not a prefix",
        ),
        (
            "endpoints = \"http://[::1]:1\"\ncache = \"x\"",
            "etcd.cache: `x` is not an absolute path",
        ),
    ] {
        let errors = parse(&format!("{NODE}[etcd]\n{etcd}\n")).unwrap_err().to_string();
        assert!(errors.contains(fault), "{etcd}: {errors}");
        assert!(errors.contains(": 1 fault\n"), "{etcd}: {errors}");
    }
}

#[test]
fn what_nodes_share_fills_in_where_their_files_are_silent() {
    let node = parse(&format!("{NODE}[defaults]\nsnat = \"always\"\n")).unwrap();
    let text = "[vips.own]\naddress = \"192.0.2.9\"\n[vips.web]\naddress = \"192.0.2.7\"\nannounce = \"address\"\n\
                [vips.twice]\naddress = \"192.0.2.1\"\n[defaults]\nsnat = \"never\"\ndrain = \"7s\"\n[events]\nsample = 5\n";
    let shared = std::sync::Arc::new(Shared::parse("/weir/config", text, &node).unwrap());
    let both = node.with_shared(&shared).unwrap();
    let vips: Vec<_> = both
        .policy
        .vips
        .iter()
        .map(|v| (v.name.as_str(), v.addresses[0].to_string()))
        .collect();
    assert_eq!(vips, [("own", "192.0.2.1".into()), ("web", "192.0.2.7".into())]);
    assert_eq!(
        both.policy.vips[1].announce,
        Announce::Address {
            interface: "eth0".into()
        }
    );
    assert_eq!(both.policy.defaults.snat, SnatMode::Always);
    assert_eq!(
        (both.policy.drain, both.event_sample),
        (Duration::from_secs(7), 5)
    );
    // What is said to a node alone is no matter of all nodes.
    let errors = Shared::parse("/weir/config", "[limits]\nservices = 5\n[vips.a]\n", &node).unwrap_err();
    let text = errors.to_string();
    assert!(
        errors.faults.len() == 2 && text.contains("limits") && text.contains("vips.a.address"),
        "{text}"
    );
}

#[test]
fn a_service_of_its_own_text_is_judged_as_one_of_the_file() {
    let node = parse(NODE).unwrap();
    let service = |text: &str| StaticService::parse("/weir/services/web", "web", text, &node.policy);
    let good = "listen = [\"80/tcp\"]\n[[backends]]\naddress = \"10.0.0.1:80\"\n";
    let of_file = parse(&format!(
        "{NODE}[[services]]\nname = \"web\"\n{}",
        good.replace("[[b", "[[services.b")
    ))
    .unwrap();
    assert_eq!(service(good).unwrap(), of_file.services[0]);
    assert_eq!(
        service(&format!("name = \"web\"\n{good}")).unwrap(),
        of_file.services[0]
    );

    let errors =
        service("name = \"shop\"\nvip = \"other\"\n[[backends]]\nweight = 5000\nwieght = 1\n").unwrap_err();
    let keys: Vec<_> = errors.faults.iter().map(|fault| fault.key.as_str()).collect();
    for key in [
        "name",
        "vip",
        "listen",
        "backends[0].address",
        "backends[0].weight",
        "backends[0].wieght",
    ] {
        assert!(keys.contains(&key), "{key} is missing in {keys:?}");
    }
    assert_eq!(keys.len(), 6, "{errors}");
}
