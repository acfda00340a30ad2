//! `[docker]` and `[[docker]]`.

use super::*;

#[test]
fn endpoints() {
    let endpoint =
        |docker: &str| parse(&format!("{MINIMAL}[docker]\n{docker}")).map(|c| c.docker[0].endpoint.clone());
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
        []
    );
}

#[test]
fn several_engines_have_names_and_limits_of_their_own() {
    let vip = "[vips.web]\naddress = \"203.0.113.1\"\n";
    let engines = |text: &str| parse(&format!("{MINIMAL}{vip}{text}")).map(|config| config.docker);
    let two = "[[docker]]\nname = \"one\"\n[[docker]]\nname = \"two\"\nkeep = \"5m\"\nallow-vips = [\"web\"]\n\
               allow-ports = [\"80/tcp\"]\nallow-services = [\"api-*\"]\n[[docker]]\nname = \"off\"\nenabled = false\n";
    let two = engines(two).unwrap();
    assert_eq!(
        two.iter().map(DockerConfig::source).collect::<Vec<_>>(),
        ["docker:one", "docker:two"]
    );
    assert_eq!((two[0].keep, two[1].keep), (None, Some(Duration::from_secs(300))));
    assert_eq!(two[0].allow, Allowed::default());
    assert!(two[1].allow.port(80, Protocol::Tcp) && !two[1].allow.port(81, Protocol::Tcp));
    assert!(two[1].allow.service("api-1") && !two[1].allow.service("web"));
    assert_eq!(
        engines("[docker]\nname = \"only\"").unwrap()[0].source(),
        "docker:only"
    );
    for (text, place, want) in [
        ("[[docker]]\nremote = false", "docker.name", "name of its own"),
        (
            "[[docker]]\nname = \"a\"\n[[docker]]\nname = \"a\"",
            "docker.name",
            "rename one",
        ),
        ("[[docker]]\nname = \"a b\"", "docker.name", "is not a name"),
        (
            "[[docker]]\nname = \"a\"\nresync = \"1\"",
            "docker.a.resync",
            "unit",
        ),
        (
            "[[docker]]\nname = \"a\"\nallow-vips = [\"none\"]",
            "docker.a.allow-vips",
            "web",
        ),
        (
            "[[docker]]\nname = \"a\"\nallow-services = [\"*x\"]",
            "docker.a.allow-services",
            "is not a name",
        ),
        (
            "[[docker]]\nname = \"a\"\nnonsense = 1",
            "docker[0].nonsense",
            "docs/config.md",
        ),
    ] {
        let errors = engines(text).unwrap_err().to_string();
        assert!(
            errors.contains(place) && errors.contains(want),
            "{text}: {errors}"
        );
    }
}
