//! `[l7]` and `[l7.acme]`.

use super::{
    super::l7::{self, TlsVersion},
    *,
};

#[test]
fn the_l7_section_is_read_and_checked() {
    let text = format!(
        "{MINIMAL}[l7]\nhttp-port = 8080\nhttps-port = 0\nmax-connections = 256\nmin-tls = \"1.3\"\n\
         certificates = \"/certs\"\nredirect-to-https = [\"UCP.example.com\", \"192.0.2.10\", \"*.a.example\", \"*\"]\n\
         [l7.timeouts]\nserver = \"50s\"\n"
    );
    let l7 = parse(&text).unwrap().l7;
    assert_eq!(
        (l7.http_port, l7.https_port, l7.max_connections),
        (Some(8080), None, 256)
    );
    assert_eq!(
        (l7.min_tls, l7.certificates),
        (TlsVersion::Tls13, Some("/certs".into()))
    );
    assert_eq!(
        l7.redirect_to_https,
        ["ucp.example.com", "192.0.2.10", "*.a.example", "*"]
    );
    assert_eq!(
        (l7.timeouts.server, l7.timeouts.connect),
        (Duration::from_secs(50), Duration::from_secs(5))
    );
    let text = "interfaces = [\"lo\"]
[l7]
http-port = 443
max-connections = 0
certificates = \"certs\"
min-tls = \"1.1\"
redirect-to-https = [\"https://ucp.example.com\"]
[l7.timeouts]
client = \"1ms\"
";
    assert_eq!(
        places(text),
        [
            "3:13 l7.https-port",
            "4:19 l7.max-connections",
            "5:16 l7.certificates",
            "6:11 l7.min-tls",
            "7:21 l7.redirect-to-https",
            "9:10 l7.timeouts.client",
        ]
    );
}

#[test]
fn certificates_are_ordered_for_named_hosts_and_with_agreed_terms_only() {
    let text = format!(
        "{MINIMAL}[l7.acme]\nagree-terms = true\nhosts = [\"Vote.example.com\", \"*.apps.example.com\"]\n\
         contact = \"ops@example.com\"\nrenew-before = \"240h\"\n"
    );
    let acme = parse(&text).unwrap().l7.acme.unwrap();
    assert_eq!(acme.hosts, ["vote.example.com", "*.apps.example.com"]);
    assert_eq!(acme.contact, ["ops@example.com"]);
    assert_eq!(
        (acme.directory.as_str(), acme.retry),
        (l7::DEFAULT_DIRECTORY, l7::DEFAULT_RETRY)
    );
    assert_eq!(acme.renew_before, Some(Duration::from_secs(864_000)));
    assert_eq!(parse(MINIMAL).unwrap().l7.acme, None);
    assert_eq!(
        places("interfaces = [\"lo\"]\n[l7.acme]\n"),
        ["2:1 l7.acme.agree-terms", "2:1 l7.acme.hosts"]
    );
    let text = "interfaces = [\"lo\"]
[l7.acme]
directory = \"http://ca.example/dir\"
contact = [\"ops\"]
agree-terms = false
hosts = [\"*\"]
ca = \"ca.pem\"
renew-before = \"1ms\"
retry = \"0s\"
";
    assert_eq!(
        places(text),
        [
            "3:13 l7.acme.directory",
            "4:11 l7.acme.contact",
            "5:15 l7.acme.agree-terms",
            "6:9 l7.acme.hosts",
            "7:6 l7.acme.ca",
            "8:16 l7.acme.renew-before",
            "9:9 l7.acme.retry",
        ]
    );
    for host in ["a*.example", "*.", "192.0.2.1", "a b", "[::1]", "a/b", ""] {
        let text = format!("interfaces = [\"lo\"]\n[l7.acme]\nagree-terms = true\nhosts = [\"{host}\"]\n");
        assert_eq!(places(&text), ["4:9 l7.acme.hosts"], "{host}");
    }
}
