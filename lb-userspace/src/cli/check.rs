//! `weir check`: every fault of a configuration file.

use std::{io::Write, path::Path};

use super::{Exit, run::translate};
use crate::{
    config::Config,
    datapath::{netlink, uplinks},
};

/// Reads and checks `path`, and looks at the interfaces that it names, as far as this machine has them. Touches nothing.
pub(super) fn check(path: &Path, out: &mut impl Write, err: &mut impl Write) -> anyhow::Result<Exit> {
    match Config::load(path) {
        Ok(config) => {
            let refusals = refused_interfaces(&config);
            if !refusals.is_empty() {
                for refusal in refusals {
                    writeln!(err, "{}: {refusal}", path.display())?;
                }
                return Ok(Exit::BadConfig);
            }
            let (vips, services) = (config.policy.vips.len(), config.services.len());
            writeln!(
                out,
                "{}: good: {vips} VIPs, {services} services of its own",
                path.display()
            )?;
            Ok(Exit::Ok)
        }
        Err(errors) => {
            writeln!(err, "{errors}")?;
            Ok(Exit::BadConfig)
        }
    }
}

/// Interfaces of the configuration that are there and cannot be served. A file may be checked on another machine than its own, and
/// by anybody: what cannot be read is no fault.
fn refused_interfaces(config: &Config) -> Vec<String> {
    let look = async {
        let handle = netlink::connect().ok()?;
        let links = netlink::links(&handle).await.ok()?;
        let default = netlink::default_devices(&handle).await.unwrap_or_default();
        Some(uplinks::refusals(
            &translate::interfaces(config),
            &links,
            &default,
        ))
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let found = runtime.ok().and_then(|runtime| runtime.block_on(look));
    found.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_text(text: &str) -> (Exit, String, String) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weir.toml");
        std::fs::write(&path, text).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let exit = check(&path, &mut out, &mut err).unwrap();
        (
            exit,
            String::from_utf8(out).unwrap(),
            String::from_utf8(err).unwrap(),
        )
    }

    #[test]
    fn a_bad_file_is_64_and_every_fault_is_named() {
        let (exit, out, err) = check_text("colour = \"red\"\nsize = 3\n");
        assert_eq!((exit, out.as_str()), (Exit::BadConfig, ""));
        assert!(err.contains("colour") && err.contains("size"), "{err}");
    }

    #[test]
    fn a_file_that_is_not_there_is_64() {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let exit = check(Path::new("/no/such/weir.toml"), &mut out, &mut err).unwrap();
        assert_eq!(exit, Exit::BadConfig);
        assert!(String::from_utf8(err).unwrap().contains("cannot be read"));
    }
}
