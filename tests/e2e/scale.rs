//! The headline: scaling under load fails nothing.

use anyhow::Result;
use lb_tests::{
    docker::Engine,
    load::Load,
    site::{self, LABEL, Site, vip},
};

use super::{await_serving, names, start, who_answers};

#[test]
fn to_ten_and_back_to_two_under_load_fails_nothing() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    let mut weir = start(&site, &engine, 2)?;
    let all: Vec<String> = (1..=10).map(|i| format!("web-{i}")).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let load = Load::start(&site.client, vip(80), 6, 0);
    load.await_more(100)?;
    for name in &all[2..] {
        engine.container(name, &["--label", LABEL])?;
    }
    await_serving(&mut weir, &all)?;
    load.await_more(500)?;
    let mut words = vec!["stop"];
    words.extend(&all[2..]);
    engine.docker(&words)?;
    await_serving(&mut weir, &all[..2])?;
    load.await_more(200)?;
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{report:?}");
    assert_eq!(report.served.keys().cloned().collect::<Vec<_>>(), {
        let mut sorted: Vec<String> = all.iter().map(|&name| name.into()).collect();
        sorted.sort();
        sorted
    });
    assert_eq!(
        report.seen_as.keys().copied().collect::<Vec<_>>(),
        [site::client()]
    );
    assert_eq!(who_answers(&site)?, names(&["web-1", "web-2"]));
    Ok(())
}
