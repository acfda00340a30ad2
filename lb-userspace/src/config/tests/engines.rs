//! `[docker]` and `[[docker]]`, `[swarm]` and `[[swarm]]`.

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

#[test]
fn swarms_and_their_managers() {
    let vip = "[vips.web]\naddress = \"203.0.113.1\"\n";
    let swarms = |text: &str| parse(&format!("{MINIMAL}{vip}{text}")).map(|config| config.swarm);
    assert_eq!(swarms("").unwrap(), []);
    let tls = "tls-ca = \"/a\"\ntls-cert = \"/b\"\ntls-key = \"/c\"\n";
    let one = swarms(&format!(
        "[swarm]\nendpoints = [\"tcp://m1:2376\", \"https://m2:2376\", \"tcp://m1:2376\"]\n{tls}"
    ))
    .unwrap();
    let [one] = one.as_slice() else { panic!("{one:?}") };
    assert_eq!(one.source(), "swarm");
    let endpoints: Vec<String> = one.endpoints.iter().map(ToString::to_string).collect();
    assert_eq!(endpoints, ["tcp://m1:2376", "tcp://m2:2376"]);
    assert_eq!(
        (one.poll, one.liveness, one.keep),
        (Duration::from_secs(1), Duration::from_secs(10), None)
    );
    let two = swarms(
        "[[swarm]]\nname = \"a\"\nendpoints = \"unix:///run/docker.sock\"\npoll = \"250ms\"\nkeep = \"5m\"\n\
         allow-ports = [\"80/tcp\"]\n[[swarm]]\nname = \"off\"\nenabled = false\nendpoints = \"tcp://[::1]:2375\"",
    )
    .unwrap();
    let [two] = two.as_slice() else { panic!("{two:?}") };
    assert_eq!(
        (two.source().as_str(), two.poll, two.keep),
        (
            "swarm:a",
            Duration::from_millis(250),
            Some(Duration::from_secs(300))
        )
    );
    assert!(!two.allow.port(81, Protocol::Tcp));
    for (text, place, want) in [
        ("[swarm]", "swarm.endpoints", "name the managers"),
        ("[swarm]\nendpoints = []", "swarm.endpoints", "name the managers"),
        (
            "[swarm]\nendpoints = [\"tcp://m1:2376\"]",
            "swarm.endpoints",
            "tls-ca",
        ),
        (
            "[swarm]\nendpoints = \"unix:///s\"\npoll = \"1ms\"",
            "swarm.poll",
            "100ms",
        ),
        (
            "[[swarm]]\nendpoints = \"unix:///s\"",
            "swarm.name",
            "name of its own",
        ),
        (
            "[[swarm]]\nname = \"a\"\nendpoints = \"unix:///s\"\nallow-vips = \"none\"",
            "swarm.a.allow-vips",
            "web",
        ),
        ("swarm = 5", "swarm", "docs/config.md"),
    ] {
        let errors = swarms(text).unwrap_err().to_string();
        assert!(
            errors.contains(place) && errors.contains(want),
            "{text}: {errors}"
        );
    }
}
