//! Any text as the configuration of Interlock: it is refused, or becomes one that `weir check` accepts.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use weir::{config::Config, import};

fuzz_target!(|text: &str| {
    let Ok(imported) = import::interlock(text, "a fuzzer", &[]) else {
        return;
    };
    let parsed = Config::parse(Path::new("weir.toml"), &imported.config);
    assert!(parsed.is_ok(), "{:?}\n{}", parsed, imported.config);
});
