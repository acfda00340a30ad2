//! `weir check`: every fault of a configuration file.

use std::{io::Write, path::Path};

use super::Exit;
use crate::config::Config;

/// Reads and checks `path` without touching anything else.
pub(super) fn check(path: &Path, out: &mut impl Write, err: &mut impl Write) -> anyhow::Result<Exit> {
    match Config::load(path) {
        Ok(config) => {
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
