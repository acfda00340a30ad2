//! `weir.service.<name>.check…`: how a container is checked.

use std::sync::Arc;

use super::{Labels, SETTINGS, refusal::Refusal};
use crate::{
    config::{
        health::{self, CheckError, CheckPolicy, Kinds},
        value::{self, ValueError},
    },
    model::{Check, CheckTiming, HttpCheck, Passive, TlsCheck},
    source::docker::container::Container,
};

/// What the settings that say how to check begin with; the one that says what is `check`.
const HOW: &str = "check-";

/// The check of a container, on the ground of `[defaults.check]`.
pub(super) fn check(
    labels: &Labels<'_>,
    container: &Container,
    policy: &CheckPolicy,
) -> Result<Option<Arc<Check>>, (&'static str, Refusal)> {
    let base = &policy.check;
    let without = Kinds {
        docker: false,
        kinds: base.kinds.clone(),
    };
    let Kinds { docker, kinds } = labels.get("check", without, health::kinds)?;
    if docker && container.health.is_none() {
        return Err(("check", CheckError::NoHealthcheck.into()));
    }
    if kinds.is_empty() {
        let useless = SETTINGS
            .iter()
            .find(|setting| setting.starts_with(HOW) && labels.0.contains_key(*setting));
        return match useless {
            Some(setting) if !labels.0.contains_key("check") => Err((setting, CheckError::NoKind.into())),
            _ => Ok(None),
        };
    }
    let interval = value::duration_from(health::SHORTEST_INTERVAL);
    let timeout = value::duration_from(health::SHORTEST_TIMEOUT);
    let t = &base.timing;
    let files = match labels.0.get("check-tls") {
        Some(name) => Some(
            policy
                .tls(name.trim())
                .map_err(|error| ("check-tls", error.into()))?,
        ),
        None => base.tls.files.clone(),
    };
    let check = Check {
        kinds,
        port: labels.get("check-port", base.port, some(value::port))?,
        on_link: base.on_link,
        timing: CheckTiming {
            interval: labels.get("check-interval", t.interval, &interval)?,
            fast_interval: labels.get("check-fast-interval", t.fast_interval, &interval)?,
            timeout: labels.get("check-timeout", t.timeout, timeout)?,
            rise: labels.get("check-rise", t.rise, health::threshold)?,
            fall: labels.get("check-fall", t.fall, health::threshold)?,
            grace: labels.get("check-grace", t.grace, value::duration)?,
            slow_start: labels.get("check-slow-start", t.slow_start, value::duration)?,
        },
        http: HttpCheck {
            method: labels.get("check-method", base.http.method, health::method)?,
            path: labels.get("check-path", base.http.path.clone(), health::path)?,
            host: labels.get("check-host", base.http.host.clone(), some(health::host))?,
            status: labels.get("check-status", base.http.status.clone(), health::statuses)?,
            body: labels.get("check-body", base.http.body.clone(), some(health::body))?,
        },
        tls: TlsCheck {
            server_name: labels.get(
                "check-server-name",
                base.tls.server_name.clone(),
                some(health::server_name),
            )?,
            files,
        },
    };
    Ok(Some(Arc::new(check)))
}

/// Whether outliers are ejected, by the numbers of `[defaults.passive]`.
pub(super) fn passive(
    labels: &Labels<'_>,
    default: Option<&Passive>,
    policy: &CheckPolicy,
) -> Result<Option<Passive>, (&'static str, Refusal)> {
    let on = labels.get("passive", default.is_some(), value::boolean)?;
    Ok(on.then(|| policy.passive.clone()))
}

fn some<T>(parse: impl Fn(&str) -> Result<T, ValueError>) -> impl Fn(&str) -> Result<Option<T>, ValueError> {
    move |text| parse(text).map(Some)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{
        object,
        tests::{container, local, policy},
    };
    use crate::{
        model::{Check, CheckKind, HttpMethod, Passive, ServiceWish, TlsFiles, UnhealthyPolicy},
        source::docker::container::Health,
    };

    /// The wish of a container with these labels of service `web`, or its refusal.
    fn wish(labels: &[(&str, &str)], health: Option<Health>) -> Result<ServiceWish, String> {
        let mut policy = policy();
        policy.checks.passive.eject = Duration::from_secs(7);
        policy.checks.tls.insert(
            "ucp".into(),
            TlsFiles {
                ca: Some("/etc/weir/ca.pem".into()),
                identity: None,
            },
        );
        let named: Vec<(String, &str)> = [("listen", "80"), ("vip", "web")]
            .iter()
            .chain(labels)
            .map(|(setting, text)| (format!("weir.service.web.{setting}"), *text))
            .collect();
        let named: Vec<(&str, &str)> = named.iter().map(|(key, text)| (key.as_str(), *text)).collect();
        let mut container = container(&named);
        container.health = health;
        let mut object = object(&container, &local(), &policy).unwrap();
        match object.rejections.pop() {
            Some(rejection) => Err(rejection.to_string()),
            None => Ok(object.services.remove(0)),
        }
    }

    fn check(labels: &[(&str, &str)]) -> Option<Check> {
        let wish = wish(labels, None).unwrap();
        wish.backends[0].check.as_deref().cloned()
    }

    #[test]
    fn every_setting_has_its_label() {
        assert_eq!(check(&[]), None);
        assert_eq!(check(&[("check", "none")]), None);
        let on_link = Check {
            on_link: true,
            ..Check::of(vec![CheckKind::Tcp])
        };
        assert_eq!(check(&[("check", "tcp")]), Some(on_link));
        let all = check(&[
            ("check", "tcp, https"),
            ("check-port", "9443"),
            ("check-interval", "3s"),
            ("check-fast-interval", "500ms"),
            ("check-timeout", "1s"),
            ("check-rise", "4"),
            ("check-fall", "5"),
            ("check-grace", "1m"),
            ("check-slow-start", "20s"),
            ("check-method", "GET"),
            ("check-path", "/_ping?x=1"),
            ("check-host", "ucp.example.com"),
            ("check-status", "200, 204-206"),
            ("check-body", "OK"),
            ("check-tls", "ucp"),
            ("check-server-name", "ucp.example.com"),
        ])
        .unwrap();
        assert_eq!(all.kinds, [CheckKind::Tcp, CheckKind::Https]);
        assert_eq!(all.port, Some(9443));
        let t = &all.timing;
        assert_eq!((t.rise, t.fall), (4, 5));
        let times = [t.interval, t.fast_interval, t.timeout, t.grace, t.slow_start];
        assert_eq!(times.map(|t| t.as_millis()), [3000, 500, 1000, 60_000, 20_000]);
        assert_eq!(all.http.method, HttpMethod::Get);
        assert_eq!(
            (all.http.path.as_str(), all.http.host.as_deref()),
            ("/_ping?x=1", Some("ucp.example.com"))
        );
        assert_eq!(all.http.status, [(200, 200), (204, 206)]);
        assert_eq!(all.http.body.as_deref(), Some("OK"));
        assert_eq!(all.tls.server_name.as_deref(), Some("ucp.example.com"));
        assert_eq!(
            all.tls.files.unwrap().ca.unwrap().to_str(),
            Some("/etc/weir/ca.pem")
        );

        let service = wish(&[("passive", "true"), ("when-unhealthy", "serve-all")], None).unwrap();
        let numbers = Passive {
            eject: Duration::from_secs(7),
            ..Passive::default()
        };
        assert_eq!(service.settings.passive, Some(numbers));
        assert_eq!(service.settings.when_unhealthy, UnhealthyPolicy::ServeAll);
    }

    #[test]
    fn docker_can_be_insisted_on() {
        let starting = wish(&[("check", "docker,http")], Some(Health::Starting)).unwrap();
        assert_eq!(starting.backends[0].reason, "health: starting");
        assert_eq!(
            starting.backends[0].check.as_ref().unwrap().kinds,
            [CheckKind::Http]
        );
        let refusal = wish(&[("check", "docker,http")], None).unwrap_err();
        assert!(refusal.contains("no HEALTHCHECK"), "{refusal}");
    }

    #[test]
    fn a_bad_check_refuses_its_service_with_a_remedy() {
        for (labels, says) in [
            (&[("check", "htpp")][..], "did you mean `http`?"),
            (
                &[("check-path", "/x")],
                "set `weir.service.web.check` to tcp, http or https",
            ),
            (&[("check", "http"), ("check-path", "x")], "is not a path"),
            (
                &[("check", "http"), ("check-method", "POST")],
                "get, head, options",
            ),
            (
                &[("check", "http"), ("check-method", "head"), ("check-body", "x")],
                "without a body",
            ),
            (&[("check", "https"), ("check-tls", "upc")], "did you mean `ucp`?"),
            (&[("check", "tcp"), ("check-interval", "1ms")], "shorter"),
            (&[("check", "tcp"), ("check-rise", "0")], "from 1 to 100"),
            (&[("port", "0"), ("check", "tcp")], "port"),
            (&[("passive", "yes")], "true, false"),
        ] {
            let refusal = wish(labels, None).unwrap_err();
            assert!(refusal.contains(says), "{labels:?}: {refusal}");
        }
    }
}
