//! The L7 shim.

use std::process::ExitCode;

fn main() -> ExitCode {
    weir_l7::cli::main()
}
