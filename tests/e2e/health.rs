//! Checks by labels, of real containers.

use anyhow::{Result, ensure};
use lb_tests::{
    docker::Engine,
    load::Load,
    site::{LABEL, Site, backends, vip},
    weir::Weir,
};

use serde_json::Value;

use super::{await_serving, names, who_answers};

/// Labels of a container that says who it is when it is asked.
fn labels(name: &str) -> Vec<String> {
    let body = format!("weir.service.web.check-body={name}");
    [
        LABEL,
        "weir.service.web.check=http",
        "weir.service.web.check-path=/health",
        "weir.service.web.check-interval=300ms",
        "weir.service.web.check-fast-interval=100ms",
        &body,
    ]
    .iter()
    .flat_map(|label| ["--label".to_owned(), (*label).to_owned()])
    .collect()
}

fn run(engine: &Engine, name: &str, labels: &[String]) -> Result<()> {
    engine.container(name, &labels.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn a_container_that_fails_its_check_is_left_alone() -> Result<()> {
    let site = Site::new()?;
    let engine = Engine::start(&site.node, &[])?;
    for name in ["web-1", "web-2"] {
        run(&engine, name, &labels(name))?;
    }
    // Answers, but not what its label says.
    run(&engine, "web-3", &labels("somebody-else"))?;
    let mut weir = Weir::start(&site.node, &site.config(&engine))?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    let says = |status: &Value, name: &str, words: &str| {
        backends(status).any(|b| b["name"] == name && b["reason"].to_string().contains(words))
    };
    weir.await_status("told of a wrong body", |status| {
        says(status, "web-3", "the body does not contain `somebody-else`")
    })?;

    // Docker sees a running container; the check does not reach it. (Under load, what waits in the listener's queue would
    // be reset with it.)
    engine.tell("web-1", "close")?;
    let load = Load::start(&site.client, vip(80), 2, 2);
    await_serving(&mut weir, &["web-2"])?;
    ensure!(
        says(&weir.status()?, "web-1", "check: http: connection refused"),
        "{}",
        weir.explain()
    );
    load.await_more(100)?;
    engine.tell("web-1", "open")?;
    await_serving(&mut weir, &["web-1", "web-2"])?;
    load.await_more(100)?;
    let report = load.stop();
    assert_eq!(report.failures, [""; 0], "{report:?}");
    assert_eq!(who_answers(&site)?, names(&["web-1", "web-2"]));
    Ok(())
}
