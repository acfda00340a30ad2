//! Who may say what: a node in etcd, and two machines of one name.

use lb_tests::fleet::Fleet;

use super::*;

#[test]
fn a_node_writes_its_own_keys_and_no_others() -> Result<()> {
    let site = site()?;
    let etcd = Etcd::start(&site.node, STORE, 1)?;
    let one = Machine::new(&site, 1)?;
    for words in [
        "user add root:of-the-tests",
        "user grant-role root root",
        "role add weir-reader",
        "role grant-permission weir-reader --prefix=true read /weir/",
        "user add weir:open-sesame",
        "user grant-role weir weir-reader",
        "role add weir-node-n1",
        "role grant-permission weir-node-n1 --prefix=true readwrite /weir/nodes/n1/",
        "user add n1:of-n1",
        "user grant-role n1 weir-node-n1",
        "auth enable",
    ] {
        etcd.ctl(&words.split(' ').collect::<Vec<_>>(), "")?;
    }
    let files = tempfile::tempdir()?;
    std::os::unix::fs::chown(files.path(), None, Some(GROUP))?;
    std::fs::set_permissions(files.path(), std::os::unix::fs::PermissionsExt::from_mode(0o750))?;
    let login = |user: &str, password: &str| -> Result<String> {
        let path = files.path().join(user);
        std::fs::write(&path, password)?;
        Ok(format!("user = \"{user}\"\npassword-file = {path:?}\n"))
    };
    let (of_node, of_weir) = (login("n1", "of-n1")?, login("weir", "open-sesame")?);
    let section = format!("name = \"n1\"\n{TTL}");
    let publishing = Node::start(&one.namespace, &one.engine, &etcd, &section, &of_node)?;
    let mut weir = Weir::start_with(&site.node, "off", &format!("{}{of_weir}", config(&etcd, 1, "")))?;
    await_serving(&mut weir, &["web-1"])?;
    one.engine
        .container("web-2", &["--label", LABEL, "-p", "18082:8080"])?;
    await_serving(&mut weir, &["web-1", "web-2"])?;

    let as_node = |words: &[&str]| etcd.ctl(&[&["--user", "n1:of-n1"], words].concat(), "x");
    as_node(&["put", "/weir/nodes/n1/containers/x"])?;
    for words in [
        &["put", "/weir/nodes/n2/node"][..],
        &["put", "/weir/config"],
        &["del", "--prefix", "/weir/nodes/"],
        &["get", "/weir/services/web"],
    ] {
        let refused = as_node(words).unwrap_err().to_string();
        assert!(refused.contains("permission denied"), "{words:?}: {refused}");
    }
    let said = format!("{}{}{}", publishing.log(), weir.log(), weir.status()?);
    assert!(!said.contains("of-n1") && !said.contains("sesame"), "{said}");
    Ok(())
}

#[test]
fn of_two_machines_of_one_name_the_first_publishes() -> Result<()> {
    let site = site()?;
    let etcd = Etcd::start(&site.node, STORE, 1)?;
    let one = Machine::new(&site, 1)?;
    // A publisher of another boot.
    let fleet = Fleet::start(&site.node, &etcd, 1, 2, 1)?;
    let mut weir = Weir::start_with(&site.node, "off", &config(&etcd, 1, ""))?;
    weir.await_status("hearing the first", |status| {
        source(status, "node:node-000").is_some_and(|source| source["objects"] == 2)
    })?;
    let section = format!("name = \"node-000\"\n{TTL}");
    let mut second = Node::new(&one.namespace, &one.engine, &etcd, &section, "")?;
    second.spawn()?;
    second.await_line("another machine publishes as `node-000` (boot a boot, addresses [10.80.0.1])")?;
    assert_eq!(
        source(&weir.status()?, "node:node-000").context("it")?["objects"],
        2
    );
    // When the first one's lease is over, the name is free.
    drop(fleet);
    second.await_line("etcd is connected")?;
    await_serving(&mut weir, &["web-1"])
}
