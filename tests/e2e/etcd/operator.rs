//! `weir config`: what operators do to all nodes at once.

use std::path::PathBuf;

use anyhow::Result;
use lb_tests::{etcd::Etcd, weir::Weir};

use super::{Lab, service, serving};

/// An operator at a desk: files, and the command line of a node.
struct Desk<'w, 'n> {
    weir: &'w Weir<'n>,
    files: tempfile::TempDir,
}

/// Exit code and everything said.
type Said = (i32, String);

impl Desk<'_, '_> {
    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.files.path().join(name);
        std::fs::write(&path, text)?;
        Ok(path)
    }

    /// `weir config WORDS`; a word `@name` is that file.
    fn config(&self, words: &str) -> Result<Said> {
        let config = self.weir.config_path().display().to_string();
        let word = |word: &str| match word.strip_prefix('@') {
            Some(name) => self.files.path().join(name).display().to_string(),
            None => word.to_owned(),
        };
        let mut all = vec!["config".to_owned(), "--config".into(), config];
        all.extend(words.split(' ').map(word));
        let output = self
            .weir
            .cli(&all.iter().map(String::as_str).collect::<Vec<_>>())?;
        let said = [output.stdout, output.stderr].concat();
        Ok((
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&said).into_owned(),
        ))
    }
}

#[test]
fn changes_are_judged_foretold_and_never_overwrite_unseen() -> Result<()> {
    let lab = Lab::new(1)?;
    let etcd = Etcd::start(&lab.store, super::STORE, 1)?;
    let mut weir = lab.agent(0, &etcd)?;
    let files = tempfile::tempdir()?;
    let desk = Desk { weir: &weir, files };

    // All faults together, and nothing written.
    desk.write(
        "bad.toml",
        "listen = [\"eighty\"]\nvip = \"nobodys\"\n[[backends]]\nweight = 5000\n",
    )?;
    let (code, said) = desk.config("put services/web @bad.toml")?;
    assert_eq!(code, 64, "{said}");
    for word in [
        "listen",
        "vip",
        "backends[0].address",
        "backends[0].weight",
        "4 fault(s)",
        "/weir/services/web:1:10",
    ] {
        assert!(said.contains(word), "{word} is missing in {said}");
    }
    assert_eq!(desk.config("list --json")?, (0, "[]\n".into()));

    // Foretold, and not done.
    desk.write("web.toml", &service("own", 80, 1..=4))?;
    let (code, said) = desk.config("put services/web @web.toml --dry-run")?;
    assert!(
        code == 0 && said.matches("joins").count() == 4 && said.contains("nothing was written"),
        "{said}"
    );
    assert_eq!(desk.config("list --json")?.1, "[]\n");
    let (code, said) = desk.config("put services/web @web.toml")?;
    assert!(code == 0 && said.contains("is written: revision 2"), "{said}");

    // Two operators read; the first one writes, the second one is told.
    let (code, read) = desk.config("get services/web")?;
    assert!(
        code == 0
            && read
                == format!(
                    "# revision 2 of /weir/services/web\n{}",
                    service("own", 80, 1..=4)
                ),
        "{read}"
    );
    desk.write("first.toml", &read.replace("weight = 2\n", "weight = 4\n"))?;
    desk.write(
        "second.toml",
        &format!("{read}[[backends]]\naddress = \"10.77.2.9:80\"\n"),
    )?;
    let (code, said) = desk.config("diff services/web @first.toml")?;
    assert!(code == 1 && said.contains("+weight = 4"), "{said}");
    assert_eq!(desk.config("put services/web @first.toml")?.0, 0);
    let (code, said) = desk.config("put services/web @second.toml")?;
    assert!(
        code == 1 && said.contains("has changed since revision 2: it is at revision 3 now"),
        "{said}"
    );
    let (code, said) = desk.config("put services/web @web.toml")?;
    assert!(
        code == 1 && said.contains("--revision 3"),
        "without a revision: {said}"
    );

    // A text that would break another key is refused.
    desk.write("same.toml", &service("own", 80, [9]))?;
    let (code, said) = desk.config("validate services/other @same.toml")?;
    assert!(
        code == 64 && said.contains("is taken by /weir/services/web"),
        "{said}"
    );
    desk.write("config.toml", "[vips.more]\naddress = \"198.51.100.9\"\n")?;
    assert_eq!(desk.config("put config @config.toml")?.0, 0);
    desk.write("more.toml", &service("more", 80, [9]))?;
    assert_eq!(desk.config("put services/more @more.toml")?.0, 0);
    desk.write("none.toml", "")?;
    let (code, said) = desk.config("put config @none.toml --revision 4")?;
    assert!(code == 64 && said.contains("/weir/services/more"), "{said}");
    let (code, said) = desk.config("rm config --revision 4")?;
    assert!(code == 1 && said.contains("put an empty text"), "{said}");

    // What it foretells of the ring is what the agent then does.
    let before = super::rings(desk.weir)?;
    desk.write(
        "fewer.toml",
        &desk
            .config("get services/web")?
            .1
            .replace("10.77.2.4:80", "10.77.2.5:80"),
    )?;
    let (_, foretold) = desk.config("put services/web @fewer.toml")?;
    for word in [
        "joins  10.77.2.5:80",
        "leaves 10.77.2.4:80, old flows go on for 30s",
    ] {
        assert!(foretold.contains(word), "{word} is missing in {foretold}");
    }
    drop(desk);
    weir.await_status("another backend", |status| {
        status.to_string().contains("10.77.2.5:80") && serving(status, "web") == 4
    })?;
    let after = super::rings(&weir)?;
    let web = before
        .keys()
        .find(|address| address.vip.to_string() == "198.51.100.1")
        .unwrap();
    let moved = before[web]
        .iter()
        .zip(&after[web])
        .filter(|(old, new)| old != new)
        .count();
    assert!(
        foretold.contains(&format!("ring: {moved} of {} slots", after[web].len())),
        "{moved}: {foretold}"
    );

    // Removal names the revision that is meant.
    let desk = Desk {
        weir: &weir,
        files: tempfile::tempdir()?,
    };
    assert_eq!(desk.config("rm services/more")?.0, 2);
    assert_eq!(desk.config("rm services/more --revision 4")?.0, 1);
    let (code, said) = desk.config("rm services/more --revision 5")?;
    assert!(
        code == 0 && said.contains("more 198.51.100.9:80/tcp: goes"),
        "{said}"
    );
    let (code, said) = desk.config("validate")?;
    assert!(code == 0 && said == "2 key(s): good\n", "{said}");
    drop(desk);
    weir.await_status("without it", |status| serving(status, "more") == 0)?;
    Ok(())
}

/// Interlock's whole configuration from its key, as the first of these names has it or as a move from version 2 made it.
#[test]
fn interlocks_key_is_translated() -> Result<()> {
    let lab = Lab::new(1)?;
    let etcd = Etcd::start(&lab.store, super::STORE, 1)?;
    let flags = etcd.flags();
    let import = |more: &[&str]| -> Result<Said> {
        let mut command = lab.nodes[0].command(lb_tests::weir::binary());
        let output = command
            .args(["import", "interlock"])
            .args(&flags)
            .args(more)
            .env_remove("INTERLOCK_CONFIG")
            .output()?;
        let said = [output.stdout, output.stderr].concat();
        Ok((
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&said).into_owned(),
        ))
    };
    let (code, said) = import(&[])?;
    assert!(
        code == 64 && said.contains("there is no key interlock/v1/config"),
        "{said}"
    );
    let text = |maxconn: u32| {
        format!("pollinterval = \"3s\"\n[[Extensions]]\nName = \"haproxy\"\nMaxConn = {maxconn}\n")
    };
    etcd.put("/interlock/v1/config", &text(300))?;
    let (code, said) = import(&[])?;
    assert!(code == 0 && said.contains("max-connections = 300"), "{said}");
    etcd.put("interlock/v1/config", &text(200))?;
    // A neighbour that begins alike is another key.
    etcd.put("interlock/v1/config.old", &text(100))?;
    let (code, said) = import(&[])?;
    assert!(
        code == 0
            && said.contains("max-connections = 200")
            && said.contains("key interlock/v1/config of https://"),
        "{said}"
    );
    let (code, said) = import(&["interlock.toml"])?;
    assert!(code == 64 && said.contains("name one of them"), "{said}");
    Ok(())
}
