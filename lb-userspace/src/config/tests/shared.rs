//! `[etcd]`, and the texts of its keys.

use super::*;

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

#[test]
fn nodes_publish_and_balancers_read() {
    let etcd = "[etcd]\nendpoints = \"http://127.0.0.1:1\"\n";
    // A node has no interfaces to balance on.
    let config = parse(&format!(
        "[node]\nname = \"docker-7.example.com\"\naddresses = \"192.0.2.7\"\n{etcd}"
    ))
    .unwrap();
    let node = config.node.unwrap();
    assert_eq!(
        (node.name.as_str(), node.ttl),
        ("docker-7.example.com", Duration::from_secs(15))
    );
    assert!(!node.withdraw && config.nodes.is_none() && config.interfaces.is_empty());
    let rules = "[nodes]\nallow-ports = \"80\"\nallow-services = \"a\"\n[nodes.node.n1]\nallow-services = \"b\"\n\
                 [nodes.node.n2]\nenabled = false\n";
    let nodes = parse(&format!("{NODE}{etcd}{rules}")).unwrap().nodes.unwrap();
    assert_eq!(nodes.keep, Duration::from_secs(60));
    assert!(nodes.reads("n1") && !nodes.reads("n2") && nodes.reads("n3"));
    let (one, other) = (nodes.allowed("n1"), nodes.allowed("n3"));
    assert!(one.service("b") && !one.service("a") && other.service("a"));
    assert!(!one.port(81, crate::model::Protocol::Tcp), "the list for all");

    for (text, fault) in [
        ("[node]\n".to_owned(), "etcd: is missing"),
        (format!("{NODE}[nodes]\n"), "etcd: is missing"),
        (
            format!("[node]\nname = \"a/b\"\n{etcd}"),
            "not the name of a node",
        ),
        (
            format!("[node]\nname = \"a\"\nttl = \"5s\"\n{etcd}"),
            "three times `etcd.timeout`",
        ),
        (
            format!("[node]\nname = \"a\"\nttl = \"1s\"\n{etcd}timeout = \"300ms\"\n"),
            "at least",
        ),
        (
            format!("[node]\nname = \"a\"\n{etcd}[docker]\nenabled = false\n"),
            "publishes one engine",
        ),
        (
            format!("{NODE}{etcd}[nodes.node.\"a/b\"]\n"),
            "not the name of a node",
        ),
        (
            format!("{NODE}{etcd}[nodes]\nallow-vips = \"none\"\n"),
            "nodes.allow-vips",
        ),
        (
            format!("{NODE}{etcd}[nodes]\nallow-addresses = \"10.0.0.1/8\"\n"),
            "bits set",
        ),
    ] {
        let errors = parse(&text).unwrap_err().to_string();
        assert!(errors.contains(fault), "{text}: {errors}");
        assert!(errors.contains(": 1 fault\n"), "{text}: {errors}");
    }
}

#[test]
fn the_firewall_denies_what_the_file_and_etcd_name() {
    let file = "interfaces = [\"eth0\"]\n[firewall]\ndeny = [\"192.0.2.0/24\", \"2001:db8::7\"]\n";
    let config = Config::parse(Path::new("weir.toml"), file).unwrap();
    let key = "[firewall]\ndeny = [\"198.51.100.0/24\", \"192.0.2.0/24\"]\n";
    let shared = Shared::parse("/weir/config", key, &config).unwrap();
    let both = config.with_shared(&Arc::new(shared)).unwrap();
    let all: Vec<String> = both.firewall.iter().map(ToString::to_string).collect();
    assert_eq!(all, ["192.0.2.0/24", "198.51.100.0/24", "2001:db8::7/128"]);
    let bad = file.replace("192.0.2.0/24", "192.0.2.1/24");
    let errors = Config::parse(Path::new("weir.toml"), &bad).unwrap_err();
    assert!(errors.to_string().contains("write `192.0.2.0/24`"), "{errors}");
}

#[test]
fn default_timeouts_outlive_what_the_standards_ask_for() {
    let t = parse(NODE).unwrap().policy.defaults.timeouts;
    let (minutes, hours) = (
        |n: u64| Duration::from_secs(60 * n),
        |n: u64| Duration::from_secs(3600 * n),
    );
    // RFC 5382, REQ-5.
    assert!(t.tcp_established >= hours(2) + minutes(4), "{t:?}");
    // Linux keeps TIME-WAIT for 60 s: before that a source port must not come back.
    assert!(t.tcp_closing >= minutes(1), "{t:?}");
    // RFC 4787, REQ-5.
    assert!(t.udp >= minutes(5), "{t:?}");
}
