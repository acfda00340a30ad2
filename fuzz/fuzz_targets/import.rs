//! Any text as the configuration of Interlock: it is refused, or becomes one that `weir check` accepts, and something is said of every
//! option.

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
    // A text with missing line breaks is no TOML as it stands.
    let Ok(written) = text.parse::<toml::Table>() else {
        return;
    };
    // Of an extension that is none, and of a second proxy, the whole is told.
    let whole = imported.remarks.iter().any(|remark| remark.option.starts_with("Extensions"));
    let told = |option: &str| imported.remarks.iter().any(|remark| remark.option == option);
    for (option, value) in &written {
        let extensions = match value {
            _ if !option.eq_ignore_ascii_case("extensions") => {
                assert!(
                    told(option),
                    "nothing is said of {option}: {:?}",
                    imported.remarks
                );
                continue;
            }
            toml::Value::Array(tables) => &tables[..],
            one => std::slice::from_ref(one),
        };
        for option in extensions
            .iter()
            .filter_map(toml::Value::as_table)
            .flat_map(toml::Table::keys)
        {
            let names = option.eq_ignore_ascii_case("name");
            assert!(
                names || whole || told(option),
                "nothing is said of {option}: {:?}",
                imported.remarks
            );
        }
    }
});
