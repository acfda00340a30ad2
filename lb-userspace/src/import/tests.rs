use std::{path::Path, time::Duration};

use proptest::prelude::*;

use super::{
    options::{Here, OPTIONS, Scope},
    *,
};
use crate::config::{
    Config, Endpoint,
    l7::{L7, L7Timeouts, TlsVersion},
};

/// What the reference architecture writes into the KV store, for nginx (line breaks as its print lost them) and HAProxy.
const HEAD: &str = r#"listenAddr = ":8080" dockerURL = "tcp://$UCP_FQDN:2376"
tlsCaCert = "/certs/ca.pem"
tlsCert = "/certs/cert.pem"
tlsKey = "/certs/key.pem"
"#;
const NGINX: &str = r#"
[[Extensions]]
  Name = "nginx"
  ConfigPath = "/etc/conf/nginx.conf"
  PidPath = "/etc/conf/nginx.pid"
  BackendOverrideAddress = ""
  ConnectTimeout = 5000
  ServerTimeout = 10000
  ClientTimeout = 10000
  MaxConn = 1024
  Port = 80
  SyslogAddr = ""
  NginxPlusEnabled = false
  AdminUser = "admin"
  AdminPass = ""
  SSLCertPath = ""
  SSLCert = ""
  SSLPort = 443
  SSLOpts = ""
  User = "www-data"
  WorkerProcesses = 2
  RLimitNoFile = 65535
  ProxyConnectTimeout = 600
  ProxySendTimeout = 600
  ProxyReadTimeout = 600
  SendTimeout = 600
  SSLCiphers = "HIGH:!aNULL:!MD5"
  SSLProtocols = "SSLv3 TLSv1 TLSv1.1 TLSv1.2"
"#;
const HAPROXY: &str = r#"
[[extensions]]
name = "haproxy"
configPath = "/usr/local/etc/haproxy/haproxy.cfg"
pidPath = "/usr/local/etc/haproxy/haproxy.pid"
sslCert = ""
maxConn = 1024
port = 80
sslPort = 443
adminUser = "admin"
adminPass = "CHANGE ME"
"#;

fn import(text: &str) -> (Config, Imported) {
    let imported = interlock(text, "a test", &[]).unwrap();
    let config = Config::parse(Path::new("weir.toml"), &imported.config);
    (
        config.unwrap_or_else(|errors| panic!("{errors}\n{}", imported.config)),
        imported,
    )
}

/// Remarks of an option, as people read them.
fn remarks<'i>(imported: &'i Imported, option: &str) -> Vec<&'i Fate> {
    imported
        .remarks
        .iter()
        .filter(|remark| remark.option.eq_ignore_ascii_case(option))
        .map(|remark| &remark.fate)
        .collect()
}

#[test]
fn the_seeds_nginx_configuration() {
    let (config, imported) = import(&format!("{HEAD}{NGINX}"));
    let docker = config.docker[0].clone();
    let tls = Endpoint::Tls {
        address: "$UCP_FQDN:2376".into(),
        ca: "/certs/ca.pem".into(),
        cert: "/certs/cert.pem".into(),
        key: "/certs/key.pem".into(),
    };
    assert_eq!(docker.endpoint, tls);
    let six_hundred = Duration::from_secs(600);
    assert_eq!(
        config.l7,
        L7 {
            timeouts: L7Timeouts {
                connect: six_hundred,
                client: six_hundred,
                server: six_hundred,
                ..L7Timeouts::default()
            },
            ..L7::default()
        }
    );
    // The variable that nobody replaced, the line break, and the address that no option says.
    assert!(
        imported
            .remarks
            .iter()
            .any(|r| r.to_string().contains("a shell left a variable"))
    );
    assert!(
        imported
            .remarks
            .iter()
            .any(|r| r.to_string().contains("on the line of another option"))
    );
    assert!(
        imported
            .remarks
            .iter()
            .any(|r| r.to_string().contains("--node-address"))
    );
    assert!(
        imported.config.contains("\n# remote = true\n"),
        "{}",
        imported.config
    );
    let haproxys = remarks(&imported, "ConnectTimeout");
    assert_eq!(
        haproxys,
        [&Fate::NotNeeded("Interlock's nginx does not read it".into())]
    );
}

#[test]
fn the_seeds_haproxy_configuration() {
    let text = format!("{HEAD}{HAPROXY}")
        .replace("\" dockerURL", "\"\ndockerURL")
        .replace("$UCP_FQDN", "10.0.20.65");
    let (config, imported) = import(&text);
    let docker = config.docker[0].clone();
    assert!(docker.remote);
    assert_eq!(docker.node_addresses, ["10.0.20.65".parse::<IpAddr>().unwrap()]);
    let timeouts = config.l7.timeouts;
    assert_eq!(
        (timeouts.connect, timeouts.client, timeouts.server),
        (
            Duration::from_secs(5),
            Duration::from_secs(10),
            Duration::from_secs(10)
        )
    );
    assert_eq!((config.l7.http_port, config.l7.https_port), (Some(80), Some(443)));
    assert!(
        !imported.remarks.iter().any(|r| matches!(r.fate, Fate::Look(_))),
        "{:?}",
        imported.remarks
    );
    // A password is shown nowhere.
    let all: String = imported.remarks.iter().map(ToString::to_string).collect();
    assert!(!all.contains("CHANGE ME") && !imported.config.contains("CHANGE ME"));
}

/// A value of every option that says something.
fn written(option: &options::Opt) -> String {
    let value = match option.name {
        "ListenAddr" => "\":8080\"",
        "DockerURL" => "\"tcp://ucp.example.com:2376\"",
        "PollInterval" => "\"1m30s\"",
        "AllowInsecure" | "EnableMetrics" | "DHParam" | "NginxPlusEnabled" => "true",
        "Rules" => "{ all = { Type = \"image\", Regex = \".*\" } }",
        "BackendOverrideAddress" => "\"192.0.2.7\"",
        "Port" => "8081",
        "SSLPort" => "8443",
        "SSLCertPath" => "\"/certs\"",
        "SSLCert" => "\"/certs/all.pem\"",
        "SSLOpts" => "\"ssl-min-ver TLSv1.3\"",
        "SSLProtocols" => "\"TLSv1.3\"",
        name if name.contains("Timeout") => "7",
        "MaxConn" | "SSLDefaultDHParam" | "WorkerProcesses" | "RLimitNoFile" => "2048",
        "TLSCACert" => "\"/certs/ca.pem\"",
        "TLSCert" => "\"/certs/cert.pem\"",
        "TLSKey" => "\"/certs/key.pem\"",
        _ => "\"something\"",
    };
    format!("{} = {value}\n", option.name)
}

/// A text with every option that an extension of this name reads, and every one at the top.
fn everything(extension: &str) -> String {
    let mut text: String = OPTIONS
        .iter()
        .filter(|o| o.scope == Scope::Top)
        .map(written)
        .collect();
    text += &format!("[[Extensions]]\nName = \"{extension}\"\n");
    text.extend(
        OPTIONS
            .iter()
            .filter(|o| o.scope.is_read_by(extension) && o.name != "Name")
            .map(written),
    );
    text
}

#[test]
fn every_option_is_applied_or_said_not_to_be_needed() {
    for extension in ["haproxy", "nginx"] {
        let (config, imported) = import(&everything(extension));
        for option in OPTIONS
            .iter()
            .filter(|o| o.scope.is_top() || o.scope.is_read_by(extension))
        {
            let fates = remarks(&imported, option.name);
            let [fate] = fates.as_slice() else {
                panic!("{extension} {}: {fates:?}", option.name)
            };
            match option.here {
                Here::Key(_) => assert!(matches!(fate, Fate::Applied(_)), "{}: {fate:?}", option.name),
                Here::Nothing(_) => assert!(matches!(fate, Fate::NotNeeded(_)), "{}: {fate:?}", option.name),
            }
        }
        let docker = &config.docker[0];
        assert!(docker.remote && matches!(docker.endpoint, Endpoint::Tls { .. }));
        assert_eq!(docker.node_addresses, ["192.0.2.7".parse::<IpAddr>().unwrap()]);
        assert_eq!(docker.resync, Duration::from_secs(90));
        assert_eq!(config.admin.metrics, "0.0.0.0:8080".parse().unwrap());
        let seven = match extension {
            "haproxy" => Duration::from_millis(7),
            _ => Duration::from_secs(7),
        };
        let l7 = &config.l7;
        assert_eq!(
            (l7.http_port, l7.https_port, l7.max_connections),
            (Some(8081), Some(8443), 2048)
        );
        assert_eq!(
            (l7.min_tls, l7.certificates.as_deref()),
            (TlsVersion::Tls13, Some(Path::new("/certs")))
        );
        // Too short for anything: the line is commented out, and said.
        let want = if extension == "nginx" {
            seven
        } else {
            Duration::from_secs(60)
        };
        assert_eq!(l7.timeouts.server, want, "{}", imported.config);
        if extension == "haproxy" {
            assert_eq!(
                l7.default_certificate.as_deref(),
                Some(Path::new("/certs/all.pem"))
            );
            let turned_off = remarks(&imported, "l7.timeouts.server = \"7ms\"");
            assert!(
                matches!(turned_off.as_slice(), [Fate::Look(_)]),
                "{:?}",
                imported.remarks
            );
        }
    }
}

#[test]
fn statistics_are_not_needed_and_a_second_proxy_is_told() {
    let beacon = everything("beacon");
    let imported = interlock(&beacon, "a test", &[]).unwrap();
    for option in OPTIONS.iter().filter(|o| o.scope == Scope::Beacon) {
        assert!(
            matches!(remarks(&imported, option.name).as_slice(), [Fate::NotNeeded(_)]),
            "{}",
            option.name
        );
    }
    assert!(matches!(
        remarks(&imported, "Extensions").as_slice(),
        [Fate::Look(_)]
    ));
    assert!(!imported.config.contains("[l7]") && !imported.config.contains("something"));

    let two = "[[Extensions]]\nName = \"haproxy\"\nPort = 80\n[[Extensions]]\nName = \"nginx\"\nPort = 81\n";
    let (config, imported) = import(two);
    assert_eq!(config.l7.http_port, Some(80));
    let fates = remarks(&imported, "Port");
    assert!(
        matches!(fates.as_slice(), [Fate::Applied(_), Fate::Look(_)]),
        "{fates:?}"
    );
}

#[test]
fn what_weir_would_refuse_is_commented_out_and_said() {
    let proxy = "[[Extensions]]\nName = \"haproxy\"\n";
    for (text, turned_off) in [
        // An engine on the network without TLS.
        (
            format!("DockerURL = \"tcp://192.0.2.9:2375\"\n{proxy}"),
            "docker.endpoint",
        ),
        (format!("DockerURL = \"ucp\"\n{proxy}"), "docker.endpoint"),
        (
            format!("EnableMetrics = true\nListenAddr = \"somewhere\"\n{proxy}"),
            "admin.metrics",
        ),
        (format!("{proxy}Port = 443\nSSLPort = 443\n"), "l7.https-port"),
    ] {
        let (_, imported) = import(&text);
        let said = imported
            .remarks
            .iter()
            .any(|r| r.option.starts_with(turned_off) && matches!(r.fate, Fate::Look(_)));
        assert!(said, "{text}: {:?}", imported.remarks);
    }
    for (text, option) in [
        (format!("{proxy}MaxConn = -1\n"), "MaxConn"),
        (format!("{proxy}MaxConn = \"many\"\n"), "MaxConn"),
        (format!("PollInterval = 3\n{proxy}"), "PollInterval"),
        (format!("EnableMetrics = \"yes\"\n{proxy}"), "EnableMetrics"),
        (format!("{proxy}Port = 99999\n"), "Port"),
        (format!("{proxy}SSLCertPath = \"certs\"\n"), "SSLCertPath"),
        (
            format!("{proxy}BackendOverrideAddress = \"node\"\n"),
            "BackendOverrideAddress",
        ),
        (format!("{proxy}MaxCon = 1\n"), "MaxCon"),
        (format!("Port = 80\n{proxy}"), "Port"),
        (format!("PollInterval = \"soon\"\n{proxy}"), "PollInterval"),
        (
            format!("TLSKey = \"/k\"\nDockerURL = \"tcp://192.0.2.9:2376\"\n{proxy}"),
            "TLSKey",
        ),
    ] {
        let (_, imported) = import(&text);
        assert!(
            matches!(remarks(&imported, option).as_slice(), [Fate::Look(_)]),
            "{text}: {:?}",
            imported.remarks
        );
    }
}

#[test]
fn a_local_engine_needs_no_tls_and_keeps_its_override() {
    let text = "dockerurl = \"unix:///run/docker.sock\"\ntlskey = \"/k\"\npollinterval = \"1s\"\n\
                [[Extensions]]\nNAME = \"nginx\"\nBACKENDOVERRIDEADDRESS = \"172.17.0.1\"\n";
    let (config, imported) = import(text);
    let docker = config.docker[0].clone();
    assert_eq!(docker.endpoint, Endpoint::Unix("/run/docker.sock".into()));
    assert!(!docker.remote);
    assert_eq!(docker.node_addresses, ["172.17.0.1".parse::<IpAddr>().unwrap()]);
    // Interlock raises it too.
    assert_eq!(docker.resync, Duration::from_secs(2));
    assert!(matches!(
        remarks(&imported, "TLSKey").as_slice(),
        [Fate::NotNeeded(_)]
    ));
}

#[test]
fn a_text_that_is_no_toml_is_told_with_its_place() {
    for (text, place) in [
        ("Port = = 3", "line 1, column 8"),
        ("[[Extensions]\nName = \"nginx\"", "line 1"),
        ("a = \"1\" b c = 2", "line 1"),
    ] {
        let error = interlock(text, "a test", &[]).unwrap_err().to_string();
        assert!(error.contains(place), "{text}: {error}");
    }
}

#[test]
fn the_option_names_differ_and_are_those_of_the_table() {
    for option in OPTIONS {
        let same = OPTIONS.iter().filter(|other| {
            other.scope.is_top() == option.scope.is_top() && other.name.eq_ignore_ascii_case(option.name)
        });
        assert_eq!(same.count(), 1, "{}", option.name);
    }
}

#[test]
fn the_document_tells_what_becomes_of_every_option() {
    let docs = include_str!("../../../docs/migrate-from-interlock.md");
    for option in OPTIONS {
        let start = format!("| `{}` | ", option.name);
        let rows: Vec<&str> = docs.lines().filter(|line| line.starts_with(&start)).collect();
        let [row] = rows.as_slice() else {
            panic!(
                "docs/migrate-from-interlock.md has not one row for {}",
                option.name
            )
        };
        let here = match option.here {
            Here::Key(key) => format!("| `{key}`"),
            Here::Nothing(why) => format!("| not needed: {why} |"),
        };
        assert!(
            row.contains(&here),
            "docs/migrate-from-interlock.md: {row}: not {here}"
        );
    }
}

fn value() -> impl Strategy<Value = toml::Value> {
    prop_oneof![
        any::<String>().prop_map(toml::Value::from),
        any::<i64>().prop_map(toml::Value::from),
        any::<bool>().prop_map(toml::Value::from),
        prop::sample::select(vec![
            "tcp://h:1",
            "unix:///x",
            "unix://x",
            ":80",
            "3s",
            "/a",
            "192.0.2.1",
            "::1",
            "TLSv1.2"
        ])
        .prop_map(toml::Value::from),
        (0_i64..100_000).prop_map(toml::Value::from),
        Just(toml::Value::Array(Vec::new())),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever the options say, the result is one that `weir check` accepts.
    #[test]
    fn every_import_is_accepted(top in prop::collection::vec((any::<prop::sample::Index>(), value()), 0..8),
                                inner in prop::collection::vec((any::<prop::sample::Index>(), value()), 0..12),
                                nginx: bool, origin: String) {
        let table = |given: Vec<(prop::sample::Index, toml::Value)>, top: bool| -> toml::Table {
            let names: Vec<_> = OPTIONS.iter().filter(|o| o.scope.is_top() == top).map(|o| o.name).collect();
            given.into_iter().map(|(index, value)| ((*index.get(&names)).to_owned(), value)).collect()
        };
        let mut whole = table(top, true);
        let mut extension = table(inner, false);
        extension.insert("Name".into(), if nginx { "nginx" } else { "haproxy" }.into());
        whole.insert("Extensions".into(), toml::Value::Array(vec![extension.into()]));
        let imported = interlock(&whole.to_string(), &origin, &[]).unwrap();
        let parsed = Config::parse(Path::new("weir.toml"), &imported.config);
        prop_assert!(parsed.is_ok(), "{}\n{}", parsed.unwrap_err(), imported.config);
    }

    /// Any text is imported or refused, never more.
    #[test]
    fn no_text_can_harm(text in "\\PC{0,40}(\n[a-zA-Z]{1,12} = [\"a-z0-9 =]{0,20}){0,4}") {
        if let Ok(imported) = interlock(&text, "a test", &[]) {
            prop_assert!(Config::parse(Path::new("weir.toml"), &imported.config).is_ok());
        }
    }
}
