//! What one operator writes, every node does.

use anyhow::Result;
use lb_tests::etcd::Etcd;

use super::{Lab, Rings, rings, service, serving};

#[test]
fn one_update_gives_the_same_rings_on_every_node() -> Result<()> {
    let lab = Lab::new(3)?;
    let etcd = Etcd::start(&lab.store, super::STORE, 1)?;
    let shared = "[vips.shop]\naddress = \"198.51.100.7\"\n[defaults]\ndrain = \"1s\"\n";
    etcd.put("/weir/config", shared)?;
    etcd.put("/weir/services/web", &service("shop", 80, 1..=5))?;
    etcd.put("/weir/services/dns", &service("own", 53, [7, 8]))?;
    // The nodes have different histories: ids are given in the order of hearing.
    let mut one = lab.agent(0, &etcd)?;
    let mut two = lab.agent(1, &etcd)?;
    etcd.put("/weir/services/dns", &service("own", 53, [9]))?;
    for weir in [&mut one, &mut two] {
        weir.await_status("one backend of dns", |status| serving(status, "dns") == 1)?;
    }
    etcd.put("/weir/services/web", &service("shop", 80, 2..=40))?;
    let mut three = lab.agent(2, &etcd)?;
    for weir in [&mut one, &mut two, &mut three] {
        weir.await_status("39 backends of web", |status| serving(status, "web") == 39)?;
    }
    let all: Vec<Rings> = [&one, &two, &three]
        .into_iter()
        .map(rings)
        .collect::<Result<_>>()?;
    assert_eq!(all[0].len(), 2);
    assert!(
        all[0].values().all(|ring| ring.len() >= 1 << 14),
        "rings are there"
    );
    assert!(all[0] == all[1] && all[1] == all[2], "the rings differ");

    // One removal is seen by all of them, and moves only the removed one's share.
    etcd.put("/weir/services/web", &service("shop", 80, 2..=39))?;
    for weir in [&mut one, &mut two, &mut three] {
        weir.await_status("38 backends of web", |status| serving(status, "web") == 38)?;
    }
    let after: Vec<Rings> = [&one, &two, &three]
        .into_iter()
        .map(rings)
        .collect::<Result<_>>()?;
    assert!(after[0] == after[1] && after[1] == after[2], "the rings differ");
    assert!(after[0] != all[0], "nothing has changed");

    // A faulty text, twice, and a node that knows nothing: it finds the last good one in the past.
    for text in ["worse", "worst"] {
        etcd.put("/weir/services/web", text)?;
    }
    drop(three);
    let mut three = lab.agent(2, &etcd)?;
    three.await_status("38 backends of web", |status| serving(status, "web") == 38)?;
    let refused = three.status()?["rejections"].to_string();
    assert!(refused.contains("/weir/services/web"), "{refused}");
    assert!(rings(&three)? == after[0], "the rings differ");
    Ok(())
}

#[test]
fn a_nodes_file_wins_over_etcd_and_is_good_without_it() -> Result<()> {
    let lab = Lab::new(1)?;
    let etcd = Etcd::start(&lab.store, super::STORE6, 1)?;
    let files = "[[services]]\nname = \"of-file\"\nlisten = [\"80/tcp\"]\n[[services.backends]]\naddress = \"10.77.2.200:80\"\n";
    let mut weir = lb_tests::weir::Weir::start(&lab.nodes[0], &format!("{}{files}", super::config(&etcd)))?;
    weir.await_status("the service of the file", |status| {
        serving(status, "of-file") == 1
    })?;
    // The same address with other settings: refused by name.
    etcd.put(
        "/weir/services/web",
        &format!("affinity = \"client-ip\"\n{}", service("own", 80, [1])),
    )?;
    etcd.put("/weir/services/more", &service("own", 81, [1, 2]))?;
    weir.await_status("a service of etcd beside that of the file", |status| {
        let refused = status["rejections"].to_string();
        serving(status, "more") == 2
            && serving(status, "of-file") == 1
            && refused.contains("/weir/services/web")
    })?;
    // With the same settings its backends join.
    etcd.put("/weir/services/web", &service("own", 80, [1]))?;
    weir.await_status("joined", |status| serving(status, "of-file") == 2)
}
