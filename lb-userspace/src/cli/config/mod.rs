//! `weir config`: the keys in etcd, judged before they are written and never overwritten unseen.

mod change;
mod judge;

use std::{
    io::{self, Read as _, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};

use super::{
    Exit,
    etcd::{self, EtcdArgs},
    look, print, print_json,
    table::{Cell, Column, Table, Tone},
};
use crate::{
    config::{Config, ConfigErrors, EtcdConfig},
    etcd::{Key, Session, Store},
    source::etcd::mirror::{CONFIG, SERVICES},
};

/// Arguments of `weir config`.
#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    /// The agent's configuration file: where etcd is, and the VIPs and services of this node
    #[arg(
        long,
        default_value = "/etc/weir/weir.toml",
        value_name = "FILE",
        global = true
    )]
    config: PathBuf,
    #[command(flatten)]
    etcd: EtcdArgs,
    /// Where Weir's keys begin [default: /weir]
    #[arg(long, requires = "endpoints", global = true)]
    prefix: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the keys, their revisions and whether they are good
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a key's text, headed by its revision
    Get(KeyArg),
    /// Judge a text and write it, if the key is still as it was when the text was read
    Put(change::PutArgs),
    /// Delete a key, if it is still as it was when it was read
    Rm(change::RmArgs),
    /// Compare a key's text with a file; exit code 1 if they differ
    Diff(FileArgs),
    /// Judge a text as if it were written, or without one all keys that are there
    Validate {
        /// `config` or `services/<name>`
        #[arg(requires = "file")]
        name: Option<String>,
        /// The text; `-` is standard input
        file: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
struct KeyArg {
    /// `config` or `services/<name>`
    name: String,
}

/// A key and a text for it.
#[derive(Debug, Args)]
struct FileArgs {
    /// `config` or `services/<name>`
    name: String,
    /// The text; `-` is standard input
    file: PathBuf,
}

pub(super) const HELP: &str = "A change starts with what is there:
  weir config get services/web > web.toml
  weir config put services/web web.toml --dry-run
  weir config put services/web web.toml
A text that was made from an older revision is refused.";

/// Everything that a command works with.
struct Desk {
    /// This node's configuration; without a file one that says nothing.
    node: Config,
    etcd: EtcdConfig,
    session: Session,
    /// All keys of ours, at the moment of the start.
    keys: Vec<Key>,
}

pub(super) async fn config(args: &ConfigArgs) -> anyhow::Result<Exit> {
    let (node, etcd) = match settings(args) {
        Ok(settings) => settings,
        Err(errors) => {
            writeln!(io::stderr(), "weir: {errors}")?;
            return Ok(Exit::BadConfig);
        }
    };
    let Some(etcd) = etcd else {
        bail!(
            "{} has no section [etcd]: add it, or name --endpoints",
            args.config.display()
        );
    };
    let ours =
        |name: &str| name == CONFIG || name.strip_prefix(SERVICES).is_some_and(|name| !name.is_empty());
    if let Some(name) = args.command.name().filter(|name| !ours(name)) {
        bail!("`{name}` is no key of ours: write `{CONFIG}` or `{SERVICES}<name>`");
    }
    let root = format!("{}/", etcd.prefix);
    let (session, snapshot) = Store::new(etcd.clone()).read(&root).await?;
    let ours = |key: &Key| key.name.strip_prefix(&root).is_some_and(ours);
    let mut desk = Desk {
        node,
        etcd,
        session,
        keys: snapshot.keys.into_iter().filter(ours).collect(),
    };
    match &args.command {
        Command::List { json } => desk.list(*json),
        Command::Get(key) => desk.get(&key.name),
        Command::Put(args) => desk.put(args).await,
        Command::Rm(args) => desk.rm(args).await,
        Command::Diff(args) => desk.diff(args),
        Command::Validate { name, file } => desk.validate(name.as_deref().zip(file.as_deref())),
    }
}

/// The node's configuration, and where etcd is.
fn settings(args: &ConfigArgs) -> Result<(Config, Option<EtcdConfig>), ConfigErrors> {
    let given = args.etcd.given();
    let node = match given && !args.config.exists() {
        true => Config::parse(&args.config, etcd::SILENT)?,
        false => Config::load(&args.config)?,
    };
    let etcd = match given {
        true => args.etcd.config(args.prefix.as_deref())?,
        false => node.etcd.clone(),
    };
    Ok((node, etcd))
}

// === impl Command ===

impl Command {
    fn name(&self) -> Option<&str> {
        match self {
            Self::List { .. } => None,
            Self::Get(key) => Some(&key.name),
            Self::Put(args) => Some(&args.text.name),
            Self::Rm(args) => Some(&args.name),
            Self::Diff(args) => Some(&args.name),
            Self::Validate { name, .. } => name.as_deref(),
        }
    }
}

// === impl Desk ===

impl Desk {
    fn root(&self) -> String {
        format!("{}/", self.etcd.prefix)
    }

    fn key(&self, name: &str) -> Option<&Key> {
        let full = format!("{}{name}", self.root());
        self.keys.iter().find(|key| key.name == full)
    }

    fn list(&self, json: bool) -> anyhow::Result<Exit> {
        const COLUMNS: &[Column] = &[
            Column::words("KEY"),
            Column::numbers("REVISION"),
            Column::words("STATE"),
        ];
        let root = self.root();
        let faults = self.judge(self.keys.clone());
        let count = |key: &Key| {
            faults
                .iter()
                .filter(|fault| judge::is_of(fault, &key.name))
                .count()
        };
        if json {
            let line = |key: &Key| serde_json::json!({ "key": key.name, "revision": key.revision, "created": key.created, "faults": count(key) });
            print_json(&self.keys.iter().map(line).collect::<Vec<_>>())?;
            return Ok(Exit::Ok);
        }
        let mut table = Table::new(COLUMNS, 0);
        table.head();
        for key in &self.keys {
            let state = match count(key) {
                0 => Cell::new("good", Tone::Good),
                faults => Cell::new(
                    format!("{faults} fault(s): see `weir config validate`"),
                    Tone::Bad,
                ),
            };
            let name = key.name.strip_prefix(&root).unwrap_or(&key.name);
            table.row(vec![name.into(), key.revision.to_string().into(), state]);
        }
        print(&table.render(look()))?;
        Ok(Exit::Ok)
    }

    fn get(&self, name: &str) -> anyhow::Result<Exit> {
        let key = self.there(name)?;
        let end = if key.text.ends_with('\n') || key.text.is_empty() {
            ""
        } else {
            "\n"
        };
        print(&format!("{}{}{end}", change::heading(key), key.text))?;
        Ok(Exit::Ok)
    }

    fn there(&self, name: &str) -> anyhow::Result<&Key> {
        self.key(name).with_context(|| {
            format!(
                "{}{name} is not in etcd; `weir config list` shows what is",
                self.root()
            )
        })
    }

    fn diff(&self, args: &FileArgs) -> anyhow::Result<Exit> {
        let key = self.there(&args.name)?;
        let (_, text) = change::split(&read(&args.file)?);
        let difference = similar::TextDiff::from_lines(&key.text, &text);
        if difference.ratio() == 1.0 {
            return Ok(Exit::Ok);
        }
        let mut unified = difference.unified_diff();
        let stored = format!("{} (revision {})", key.name, key.revision);
        print(
            &unified
                .header(&stored, &args.file.display().to_string())
                .to_string(),
        )?;
        Ok(Exit::Failure)
    }

    fn validate(&self, text: Option<(&str, &Path)>) -> anyhow::Result<Exit> {
        let faults = match text {
            Some((name, file)) => self.faults_of_change(name, Some(&change::split(&read(file)?).1)),
            None => self.judge(self.keys.clone()),
        };
        if !faults.is_empty() {
            judge::tell(&faults)?;
            return Ok(Exit::BadConfig);
        }
        let what = text.map_or_else(
            || format!("{} key(s)", self.keys.len()),
            |(name, _)| name.to_owned(),
        );
        print(&format!("{what}: good\n"))?;
        Ok(Exit::Ok)
    }
}

/// The text of a file or of standard input.
fn read(file: &Path) -> anyhow::Result<String> {
    if file == Path::new("-") {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).context("standard input")?;
        return Ok(text);
    }
    std::fs::read_to_string(file).with_context(|| file.display().to_string())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Cli;

    fn args(line: &str) -> ConfigArgs {
        match Cli::try_parse_from(line.split(' ')).unwrap().command {
            crate::cli::Command::Config(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_are_judged_as_the_file_is() {
        let line = "weir config list --config /no/such/file --endpoints https://a:1,https://b:2";
        let good = args(&format!("{line} --ca /ca --prefix /x"));
        let etcd = settings(&good).unwrap().1.unwrap();
        assert_eq!((etcd.endpoints.len(), etcd.prefix.as_str()), (2, "/x"));
        let errors = settings(&args(line)).unwrap_err().to_string();
        assert!(
            errors.contains("command line") && errors.matches("must prove who it is").count() == 2,
            "{errors}"
        );
        // Without flags the file has to be there.
        assert!(settings(&args("weir config list --config /no/such/file")).is_err());
        assert!(Cli::try_parse_from(["weir", "config", "list", "--ca", "/ca"]).is_err());
    }
}
