//! Writing and deleting: only what was read is replaced.

use anyhow::bail;
use clap::Args;

use super::{Desk, FileArgs, judge, read};
use crate::{
    cli::{Exit, print},
    etcd::{EtcdError, Key},
    source::etcd::mirror::{CONFIG, SERVICES},
};

#[derive(Debug, Args)]
pub(super) struct PutArgs {
    #[command(flatten)]
    pub(super) text: FileArgs,
    /// The revision that the text was made from [default: what `weir config get` wrote above it]
    #[arg(long)]
    revision: Option<i64>,
    /// Say what would happen, and write nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
pub(super) struct RmArgs {
    /// `services/<name>`
    pub(super) name: String,
    /// The revision that is to be deleted, as `weir config list` shows it
    #[arg(long, required_unless_present = "dry_run")]
    revision: Option<i64>,
    /// Say what would happen, and delete nothing
    #[arg(long)]
    dry_run: bool,
}

/// What stands between the words of the first line of a text that was read.
const HEADING: (&str, &str) = ("# revision ", " of ");

/// The first line of a text that was read: what it was read from, for the one who writes it back.
pub(super) fn heading(key: &Key) -> String {
    format!("{}{}{}{}\n", HEADING.0, key.revision, HEADING.1, key.name)
}

/// A text without the line above it, and the revision which that names.
pub(super) fn split(text: &str) -> (Option<i64>, String) {
    let first = text.split_inclusive('\n').next().unwrap_or_default();
    let revision = first
        .strip_prefix(HEADING.0)
        .and_then(|rest| rest.split_once(HEADING.1))
        .and_then(|(revision, _)| revision.parse().ok());
    let rest = if revision.is_some() {
        &text[first.len()..]
    } else {
        text
    };
    (revision, rest.to_owned())
}

impl Desk {
    pub(super) async fn put(&mut self, args: &PutArgs) -> anyhow::Result<Exit> {
        let name = &args.text.name;
        let (noted, text) = split(&read(&args.text.file)?);
        let now = self.key(name).map_or(0, |key| key.revision);
        let full = format!("{}{name}", self.root());
        if self.key(name).is_some_and(|key| key.text == text) {
            print(&format!("{full} has this text already, at revision {now}\n"))?;
            return Ok(Exit::Ok);
        }
        let faults = self.faults_of_change(name, Some(&text));
        if !faults.is_empty() {
            judge::tell(&faults)?;
            return Ok(Exit::BadConfig);
        }
        let from = args.revision.or(noted);
        match from {
            Some(from) if from != now => bail!(conflict(&full, from, now)),
            None if now != 0 => bail!(
                "{full} is there already, at revision {now}: read it (`weir config get {name}`), edit and put that, or \
                 add `--revision {now}` to replace it"
            ),
            _ => {}
        }
        print(&self.preview(name, Some(&text)).to_string())?;
        if args.dry_run {
            print("dry run: nothing was written\n")?;
            return Ok(Exit::Ok);
        }
        let written = self.session.put_if(&full, &text, now).await;
        match certain(written, name)? {
            Some(revision) => print(&format!("{full} is written: revision {revision}\n"))?,
            None => bail!(
                "{full} has changed since revision {now}, just now: read it again (`weir config get {name}`)"
            ),
        }
        Ok(Exit::Ok)
    }

    pub(super) async fn rm(&mut self, args: &RmArgs) -> anyhow::Result<Exit> {
        let name = &args.name;
        let key = self.there(name)?;
        let (full, now) = (key.name.clone(), key.revision);
        if name == CONFIG {
            bail!(
                "the nodes would keep {full} in force: they take its absence for a loss. To share nothing put an \
                 empty text: `weir config put {name} /dev/null --revision {now}`"
            );
        }
        let services = self
            .keys
            .iter()
            .filter(|key| key.name.starts_with(&format!("{}{SERVICES}", self.root())));
        if self.key(CONFIG).is_none() && services.count() == 1 {
            bail!(
                "{full} is the last key of all: the nodes would take its absence for a loss and keep it in force. Put \
                 `{CONFIG}` first, it may be empty: `weir config put {CONFIG} /dev/null`"
            );
        }
        if let Some(from) = args.revision.filter(|from| *from != now) {
            bail!(conflict(&full, from, now));
        }
        let faults = self.faults_of_change(name, None);
        if !faults.is_empty() {
            judge::tell(&faults)?;
            return Ok(Exit::BadConfig);
        }
        print(&self.preview(name, None).to_string())?;
        if args.dry_run {
            print("dry run: nothing was deleted\n")?;
            return Ok(Exit::Ok);
        }
        let deleted = self.session.delete_if(&full, now).await;
        match certain(deleted, name)? {
            Some(_) => print(&format!("{full} is deleted\n"))?,
            None => bail!(
                "{full} has changed since revision {now}, just now: look at it (`weir config get {name}`)"
            ),
        }
        Ok(Exit::Ok)
    }
}

fn conflict(full: &str, from: i64, now: i64) -> String {
    let now = match now {
        0 => "it is not there now".to_owned(),
        now => format!("it is at revision {now} now"),
    };
    format!(
        "{full} has changed since revision {from}: {now}. See what others did (`weir config diff`), and make your \
         change again from what is there"
    )
}

/// The answer to a write. Silence says nothing about what was done.
fn certain(answer: Result<Option<i64>, EtcdError>, name: &str) -> anyhow::Result<Option<i64>> {
    answer.map_err(|fault| match fault {
        EtcdError::Silent { .. } => {
            anyhow::anyhow!("{fault}; whether it was done is not known: see `weir config get {name}`")
        }
        fault => fault.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_comes_back_with_the_revision_it_was_read_at() {
        let key = Key {
            name: "/weir/services/web".into(),
            text: "listen = \"80\"\n".into(),
            created: 3,
            revision: 42,
            lease: 0,
        };
        let read = format!("{}{}", heading(&key), key.text);
        assert_eq!(split(&read), (Some(42), key.text.clone()));
        for text in [
            "",
            "# a comment\nlisten = \"80\"\n",
            "# revision of the rules\n",
            "# revision 7\n",
        ] {
            assert_eq!(split(text), (None, text.to_owned()));
        }
    }
}
