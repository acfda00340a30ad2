//! Flags that say where etcd is, instead of a configuration file.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::config::{Config, ConfigErrors, EtcdConfig};

/// Where etcd is.
#[derive(Debug, Args)]
pub(super) struct EtcdArgs {
    /// Endpoints of etcd, with commas between them, instead of `[etcd]` of the file
    #[arg(long, value_name = "URLS", value_delimiter = ',', global = true)]
    endpoints: Vec<String>,
    /// Authority that signed the servers' certificates
    #[arg(long, value_name = "FILE", requires = "endpoints", global = true)]
    ca: Option<PathBuf>,
    /// Our certificate
    #[arg(long, value_name = "FILE", requires = "endpoints", global = true)]
    cert: Option<PathBuf>,
    /// The key of our certificate
    #[arg(long, value_name = "FILE", requires = "endpoints", global = true)]
    key: Option<PathBuf>,
    /// User of etcd's own authentication
    #[arg(long, value_name = "NAME", requires = "endpoints", global = true)]
    user: Option<String>,
    /// File of that user's password
    #[arg(long, value_name = "FILE", requires = "endpoints", global = true)]
    password_file: Option<PathBuf>,
}

/// A configuration that says nothing.
pub(super) const SILENT: &str = "interfaces = \"auto\"\n";

// === impl EtcdArgs ===

impl EtcdArgs {
    /// Whether there are any.
    pub(super) fn given(&self) -> bool {
        !self.endpoints.is_empty()
    }

    /// What they come to, judged as a file is that says the same. `None`: none are given.
    ///
    /// # Errors
    /// All faults together.
    pub(super) fn config(&self, prefix: Option<&str>) -> Result<Option<EtcdConfig>, ConfigErrors> {
        if !self.given() {
            return Ok(None);
        }
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let mut etcd = toml::Table::new();
        etcd.insert("endpoints".into(), self.endpoints.clone().into());
        for (key, value) in [
            ("ca", path(&self.ca)),
            ("cert", path(&self.cert)),
            ("key", path(&self.key)),
            ("user", self.user.clone()),
            ("password-file", path(&self.password_file)),
            ("prefix", prefix.map(str::to_owned)),
        ] {
            etcd.extend(value.map(|value| (key.to_owned(), value.into())));
        }
        let text = format!("{SILENT}[etcd]\n{etcd}");
        Ok(Config::parse(Path::new("command line"), &text)?.etcd)
    }
}
