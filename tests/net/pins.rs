//! One agent for each set of pins, whatever its socket and its mount namespace.

use std::{io::Read as _, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lb_tests::guard::Guard;

use crate::{
    lab::{Body, Lab, VIP4, Wiring},
    serve,
    talk::talk_tcp,
    vip,
};

/// How long a command that must refuse may take to do so.
const REFUSAL: Duration = Duration::from_secs(30);

#[test]
fn another_agent_with_the_same_pins_is_refused() -> Result<()> {
    let lab = Lab::new(Wiring::TwoArm, Body::Tc, 1)?;
    let servers = serve(&lab, false, false)?;
    let mut weir = lab.start(&lab.config(VIP4, "80/tcp", &servers))?;
    talk_tcp(&lab.client, vip(false, 80), 100)?;
    for word in ["run", "detach"] {
        let mut other = Guard::spawn(weir.beside(&[word])?.stderr(Stdio::piped()))?;
        let status = other
            .wait(REFUSAL)?
            .with_context(|| format!("weir {word} was not refused"))?;
        let mut said = String::new();
        other.stderr().context("its errors")?.read_to_string(&mut said)?;
        ensure!(!status.success(), "weir {word} ended well: {said}");
        for part in ["an agent already uses the pins under", "stop it first"] {
            ensure!(said.contains(part), "weir {word} said: {said}");
        }
        talk_tcp(&lab.client, vip(false, 80), 100).with_context(|| weir.explain())?;
    }
    // The lock ends with its holder, however that ends.
    weir.kill();
    weir.run()?;
    talk_tcp(&lab.client, vip(false, 80), 100).with_context(|| weir.explain())?;
    Ok(())
}
