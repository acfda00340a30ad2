//! Every option of Interlock 1 (its `config.go`), and what it is here.

use super::Fate;

/// Where an option stands, and who of Interlock's parts reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// At the top.
    Top,
    /// `[[Extensions]]`, both proxies.
    Proxy,
    /// `[[Extensions]]`, HAProxy alone.
    Haproxy,
    /// `[[Extensions]]`, nginx alone.
    Nginx,
    /// `[[Extensions]]`, the statistics.
    Beacon,
}

/// What an option is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Here {
    /// A key of Weir's configuration.
    Key(&'static str),
    /// Nothing: the reason.
    Nothing(&'static str),
}

/// One option.
#[derive(Clone, Copy, Debug)]
pub struct Opt {
    /// Where it stands.
    pub scope: Scope,
    /// Its name as Interlock's code has it; any case is read.
    pub name: &'static str,
    /// What it is here.
    pub here: Here,
    /// Its value is a secret and is shown nowhere.
    pub secret: bool,
}

const fn key(scope: Scope, name: &'static str, key: &'static str) -> Opt {
    Opt {
        scope,
        name,
        here: Here::Key(key),
        secret: false,
    }
}

const fn nothing(scope: Scope, name: &'static str, why: &'static str) -> Opt {
    Opt {
        scope,
        name,
        here: Here::Nothing(why),
        secret: false,
    }
}

const fn secret(scope: Scope, name: &'static str, why: &'static str) -> Opt {
    Opt {
        secret: true,
        ..nothing(scope, name, why)
    }
}

const NO_PROXY: &str = "there is no proxy beside Weir whose files it would write";
const PULLED: &str = "metrics are pulled by Prometheus from `admin.metrics`, not pushed";
const STATUS: &str = "the statistics page is `l7.status-page`, a host and path of your choice, without a password: keep them to yourself or use `l7.metrics`";
const TLS_SET: &str = "only TLS 1.2 and 1.3 with ciphers that are held to be safe are spoken";

/// Every option.
pub const OPTIONS: &[Opt] = {
    use Scope::{Beacon, Haproxy, Nginx, Proxy, Top};
    &[
        key(Top, "ListenAddr", "admin.metrics"),
        key(Top, "DockerURL", "docker.endpoint"),
        key(Top, "TLSCACert", "docker.tls-ca"),
        key(Top, "TLSCert", "docker.tls-cert"),
        key(Top, "TLSKey", "docker.tls-key"),
        nothing(
            Top,
            "AllowInsecure",
            "it had no effect in Interlock, and servers are always verified",
        ),
        key(Top, "EnableMetrics", "admin.metrics"),
        key(Top, "PollInterval", "docker.resync"),
        nothing(Top, "Rules", "every balanced container has metrics of its own"),
        nothing(
            Proxy,
            "Name",
            "Weir is the one balancer; it says which of the options below count",
        ),
        nothing(Proxy, "ConfigPath", NO_PROXY),
        nothing(Proxy, "PidPath", NO_PROXY),
        nothing(
            Proxy,
            "TemplatePath",
            "there is no proxy to make files for; what it added to Interlock's own template has to be carried over by hand",
        ),
        key(Proxy, "BackendOverrideAddress", "docker.node-address"),
        key(Proxy, "MaxConn", "l7.max-connections"),
        key(Proxy, "Port", "l7.http-port"),
        key(Proxy, "SSLPort", "l7.https-port"),
        key(Proxy, "SSLCertPath", "l7.certificates"),
        key(Haproxy, "ConnectTimeout", "l7.timeouts.connect"),
        key(Haproxy, "ServerTimeout", "l7.timeouts.server"),
        key(Haproxy, "ClientTimeout", "l7.timeouts.client"),
        nothing(
            Haproxy,
            "SyslogAddr",
            "the log goes to standard error, and so to the journal",
        ),
        nothing(Haproxy, "AdminUser", STATUS),
        secret(Haproxy, "AdminPass", STATUS),
        key(Haproxy, "SSLCert", "l7.default-certificate"),
        key(Haproxy, "SSLOpts", "l7.min-tls"),
        nothing(Haproxy, "SSLDefaultDHParam", TLS_SET),
        nothing(
            Haproxy,
            "SSLServerVerify",
            "`interlock.ssl_backend_tls_verify` says it of each route, as it did in Interlock",
        ),
        nothing(Nginx, "User", "Weir's unit says as whom it runs"),
        nothing(
            Nginx,
            "WorkerProcesses",
            "there are as many threads as processors",
        ),
        nothing(Nginx, "RLimitNoFile", "Weir's unit sets it (`LimitNOFILE`)"),
        key(Nginx, "ProxyConnectTimeout", "l7.timeouts.connect"),
        key(Nginx, "ProxySendTimeout", "l7.timeouts.server"),
        key(Nginx, "ProxyReadTimeout", "l7.timeouts.server"),
        key(Nginx, "SendTimeout", "l7.timeouts.client"),
        nothing(Nginx, "SSLCiphers", TLS_SET),
        key(Nginx, "SSLProtocols", "l7.min-tls"),
        nothing(Nginx, "DHParam", TLS_SET),
        nothing(Nginx, "DHParamPath", TLS_SET),
        nothing(Nginx, "NginxPlusEnabled", "there is no nginx"),
        nothing(Beacon, "StatsInterval", PULLED),
        nothing(Beacon, "StatsBackendType", PULLED),
        nothing(Beacon, "StatsPrometheusPushGatewayURL", PULLED),
        nothing(Beacon, "StatsInfluxDBAddress", PULLED),
        nothing(Beacon, "StatsInfluxDBUser", PULLED),
        secret(Beacon, "StatsInfluxDBPassword", PULLED),
        nothing(Beacon, "StatsInfluxDBDatabase", PULLED),
        nothing(Beacon, "StatsInfluxDBPrecision", PULLED),
    ]
};

impl Scope {
    /// Whether it stands at the top or in an extension.
    pub fn is_top(self) -> bool {
        self == Self::Top
    }

    /// Whether the extension of this name reads it.
    pub fn is_read_by(self, extension: &str) -> bool {
        match self {
            Self::Top => false,
            Self::Proxy => matches!(extension, "haproxy" | "nginx" | "beacon"),
            Self::Haproxy => extension == "haproxy",
            Self::Nginx => extension == "nginx",
            Self::Beacon => extension == "beacon",
        }
    }
}

/// The option of a name in any case.
pub fn find(name: &str, top: bool) -> Option<&'static Opt> {
    OPTIONS
        .iter()
        .find(|option| option.scope.is_top() == top && option.name.eq_ignore_ascii_case(name))
}

/// What becomes of an option that is not applied.
pub(super) fn not_needed(option: &Opt, extension: Option<&str>) -> Fate {
    if let Some(extension) = extension
        && !option.scope.is_read_by(extension)
    {
        return Fate::NotNeeded(format!("Interlock's {extension} does not read it"));
    }
    Fate::NotNeeded(match option.here {
        Here::Nothing(why) => why.into(),
        Here::Key(_) => "it says nothing else than no such option".into(),
    })
}
