//! Tells the compiler where the BPF object is, so that the agent carries its programs with it: in `WEIR_BPF_OBJECT`, or where
//! `cargo xtask build-ebpf` puts it. Without one the agent still compiles, with an empty object that its loader refuses:
//! unit tests and lints need no BPF toolchain.

use std::{env, fs, path::PathBuf};

const VARIABLE: &str = "WEIR_BPF_OBJECT";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-env-changed={VARIABLE}");
    println!("cargo:rerun-if-changed=build.rs");
    let object = match env::var_os(VARIABLE) {
        Some(path) => PathBuf::from(path),
        None => {
            let manifest_dir =
                PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("cargo sets CARGO_MANIFEST_DIR")?);
            let dir = manifest_dir
                .parent()
                .ok_or("the crate is in the workspace's folder")?
                .join("target/bpf");
            // The folder is watched rather than the file: cargo takes a missing file for a changed one, always.
            fs::create_dir_all(&dir)?;
            println!("cargo:rerun-if-changed={}", dir.display());
            dir.join("weir-ebpf.o")
        }
    };
    let object = if object.exists() {
        println!("cargo:rerun-if-changed={}", object.display());
        object
    } else {
        println!(
            "cargo:warning={} is missing: this agent has no BPF programs; run `cargo xtask build-ebpf`",
            object.display()
        );
        let empty = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?).join("no-programs.o");
        fs::write(&empty, [])?;
        empty
    };
    println!("cargo:rustc-env={VARIABLE}={}", object.display());
    Ok(())
}
