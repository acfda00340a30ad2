//! `weir import`: the configuration of another balancer as Weir's.

use std::{
    env, fs,
    io::{self, Read as _, Write},
    net::IpAddr,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};

use super::{Exit, etcd::EtcdArgs};
use crate::{
    causes::with_causes,
    config::EtcdConfig,
    etcd::Store,
    import::{self, Fate, Imported, KV_KEY},
};

/// Interlock's whole configuration, as its container was given it.
const VARIABLE: &str = "INTERLOCK_CONFIG";

/// Whose configuration.
#[derive(Debug, Subcommand)]
pub enum ImportCommand {
    /// Interlock 1: print the equivalent configuration of Weir, and what became of each option on standard error
    #[command(after_help = AFTER)]
    Interlock(ImportArgs),
}

const AFTER: &str = "Without a file the environment variable INTERLOCK_CONFIG is read: the configuration itself, as Interlock \
had it, or the path of a file. With --endpoints the key interlock/v1/config of etcd (API v3) is read. \
docs/migrate-from-interlock.md lists every option.";

/// Arguments of `weir import interlock`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The file; `-` is standard input
    file: Option<PathBuf>,
    /// The same, as Interlock has it
    #[arg(short = 'c', long, value_name = "FILE", conflicts_with = "file")]
    config: Option<PathBuf>,
    #[command(flatten)]
    etcd: EtcdArgs,
    /// Address at which the published ports of a remote engine are reached
    #[arg(long, value_name = "ADDRESS")]
    node_address: Vec<IpAddr>,
}

/// Reads what the arguments name, and prints what it comes to.
pub(super) async fn run(
    command: &ImportCommand,
    out: &mut impl Write,
    err: &mut impl Write,
) -> anyhow::Result<Exit> {
    let ImportCommand::Interlock(args) = command;
    let file = args.file.as_deref().or(args.config.as_deref());
    let read = match (file, args.etcd.config(None)) {
        (_, Err(errors)) => Err(errors.to_string()),
        (Some(_), Ok(Some(_))) => Err("a file and --endpoints: name one of them".into()),
        (None, Ok(Some(etcd))) => key(etcd).await,
        (file, Ok(None)) => text(file, env::var(VARIABLE).ok()),
    };
    match read {
        Ok((text, origin)) => print(&text, &origin, &args.node_address, out, err),
        Err(fault) => {
            writeln!(err, "weir: {fault}")?;
            Ok(Exit::BadConfig)
        }
    }
}

/// The text in etcd. What was brought over from the version 2 API begins with a slash.
async fn key(etcd: EtcdConfig) -> Result<(String, String), String> {
    let endpoints = etcd.endpoints.join(", ");
    let store = Store::new(etcd);
    for name in [KV_KEY.to_owned(), format!("/{KV_KEY}")] {
        let (_, snapshot) = store.read(&name).await.map_err(|error| with_causes(&error))?;
        if let Some(key) = snapshot.keys.into_iter().find(|key| key.name == name) {
            return Ok((key.text, format!("key {name} of {endpoints}")));
        }
    }
    Err(format!(
        "{endpoints}: there is no key {KV_KEY}; Interlock kept it in etcd's version 2 API, which this one does not show: \
         docs/migrate-from-interlock.md says how to read it there"
    ))
}

/// The text of a file or of the environment, and where it is from, for people.
fn text(file: Option<&Path>, variable: Option<String>) -> Result<(String, String), String> {
    match (file, variable.filter(|text| !text.trim().is_empty())) {
        (Some(path), _) if path == Path::new("-") => {
            let mut text = String::new();
            let read = io::stdin().read_to_string(&mut text);
            read.map_err(|error| format!("standard input cannot be read: {error}"))?;
            Ok((text, "standard input".into()))
        }
        (Some(path), _) => read(path),
        (None, Some(text)) if text.contains('=') => Ok((text, VARIABLE.into())),
        (None, Some(path)) => read(Path::new(path.trim())),
        (None, None) => Err(format!(
            "nothing to import: name Interlock's file (`weir import interlock config.toml`), or set {VARIABLE}"
        )),
    }
}

fn read(path: &Path) -> Result<(String, String), String> {
    let shown = path.display();
    match fs::read_to_string(path) {
        Ok(text) => Ok((text, shown.to_string())),
        Err(error) => Err(format!(
            "{shown} cannot be read: {error}; name a file that exists"
        )),
    }
}

/// Imports a text, whatever its origin.
fn print(
    text: &str,
    origin: &str,
    node_addresses: &[IpAddr],
    out: &mut impl Write,
    err: &mut impl Write,
) -> anyhow::Result<Exit> {
    let Imported { config, remarks } = match import::interlock(text, origin, node_addresses) {
        Ok(imported) => imported,
        Err(error) => {
            writeln!(err, "weir: {origin}: {error}")?;
            return Ok(Exit::BadConfig);
        }
    };
    write!(out, "{config}")?;
    for remark in &remarks {
        writeln!(err, "{remark}")?;
    }
    let count = |kind: fn(&Fate) -> bool| remarks.iter().filter(|remark| kind(&remark.fate)).count();
    writeln!(
        err,
        "{} applied, {} not needed here, {} to look at",
        count(|fate| matches!(fate, Fate::Applied(_))),
        count(|fate| matches!(fate, Fate::NotNeeded(_))),
        count(|fate| matches!(fate, Fate::Look(_)))
    )?;
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn import(file: Option<&Path>, variable: Option<&str>) -> (Exit, String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let exit = match text(file, variable.map(Into::into)) {
            Ok((text, origin)) => print(&text, &origin, &[], &mut out, &mut err).unwrap(),
            Err(fault) => {
                err = fault.into_bytes();
                Exit::BadConfig
            }
        };
        (
            exit,
            String::from_utf8(out).unwrap(),
            String::from_utf8(err).unwrap(),
        )
    }

    const TEXT: &str = "PollInterval = \"3s\"\n[[Extensions]]\nName = \"haproxy\"\nMaxConn = 256\n";

    #[test]
    fn a_file_the_variable_and_a_file_that_it_names_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        fs::write(&path, TEXT).unwrap();
        for (file, variable) in [
            (Some(path.as_path()), Some("Port = 1")),
            (None, Some(TEXT)),
            (None, path.to_str()),
        ] {
            let (exit, out, err) = import(file, variable);
            assert_eq!(exit, Exit::Ok);
            let config = Config::parse(Path::new("weir.toml"), &out).unwrap();
            assert_eq!(config.l7.max_connections, 256, "{out}");
            assert!(
                err.ends_with("2 applied, 1 not needed here, 0 to look at\n"),
                "{err}"
            );
        }
    }

    #[test]
    fn what_cannot_be_read_is_64_and_prints_no_configuration() {
        for (file, variable, want) in [
            (None, None, "nothing to import"),
            (None, Some(" "), "nothing to import"),
            (Some(Path::new("/no/such/file")), None, "cannot be read"),
            (None, Some("Port = = 3"), "line 1, column 8"),
        ] {
            let (exit, out, err) = import(file, variable);
            assert_eq!((exit, out.as_str()), (Exit::BadConfig, ""));
            assert!(err.contains(want), "{err}");
        }
    }
}
