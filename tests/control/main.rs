//! Scripts of source updates against expected map contents, each repeated with every single write failing in turn.
//!
//! A script is a text file in `scripts/`; [`script`] describes its words. `WEIR_BLESS=1` rewrites what is expected.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod script;

use std::{fs, path::PathBuf};

use script::{Outcome, run};
use weir::datapath::fake::Fault;

#[test]
fn scripts_end_in_the_expected_maps_whatever_write_fails() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("control/scripts");
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(
        files.len() >= 15,
        "only {} scripts in {}",
        files.len(),
        folder.display()
    );
    let mut faulty_runs = 0;
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).unwrap();
        let clean: Outcome = run(&name, &text, None);
        if std::env::var_os("WEIR_BLESS").is_some() {
            fs::write(&file, &clean.blessed).unwrap();
            continue;
        } else {
            assert!(
                clean.blessed == text,
                "{name}: the maps are not as expected:\n{}",
                clean.blessed
            );
        }
        // A script with hundreds of like writes has every n-th of them fail: all of them take minutes.
        for write in (0..clean.writes)
            .step_by((clean.writes / 100 + 1) as usize * if clean.writes > 100 { 16 } else { 1 })
        {
            for fault in [Fault::Before, Fault::After] {
                let faulty = run(&name, &text, Some((write, fault)));
                assert!(
                    faulty.blessed == clean.blessed,
                    "{name}, write {write} failing ({fault:?}), ends otherwise:\n{}",
                    faulty.blessed
                );
                faulty_runs += 1;
            }
        }
    }
    println!("{faulty_runs} runs with a failing write");
}
