//! Scripts of source updates against expected map contents, each repeated with every single write failing in turn.
//!
//! A script is a text file in `scripts/`; [`script`] describes its words. `WEIR_BLESS=1` rewrites what is expected.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod random;
mod script;

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

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
    let mut jobs = Vec::new();
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).unwrap();
        let clean: Outcome = run(&name, &text, None);
        if std::env::var_os("WEIR_BLESS").is_some() {
            fs::write(&file, &clean.blessed).unwrap();
            continue;
        }
        assert!(
            clean.blessed == text,
            "{name}: the maps are not as expected:\n{}",
            clean.blessed
        );
        for write in 0..clean.writes {
            jobs.extend(
                [Fault::Before, Fault::After].map(|fault| (name.clone(), text.clone(), write, fault)),
            );
        }
    }
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((name, text, write, fault)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let faulty = run(name, text, Some((*write, *fault)));
            assert!(
                faulty.blessed == *text,
                "{name}, write {write} failing ({fault:?}), ends otherwise:\n{}",
                faulty.blessed
            );
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    println!("{} runs with a failing write", jobs.len());
}
