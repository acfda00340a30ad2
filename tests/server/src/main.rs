//! The program in the containers of tests and demo. It says who it is and whom it sees, takes orders on its loopback,
//! and leaves as a well-behaved server does.
//!
//! `server PORT` serves TCP and UDP. TCP: each line is answered by `<name> <client> <line>`, an HTTP request by the same
//! as its body. `server tell ORDER` gives an order to the server of the same container; `server ask ADDRESS` asks another.

mod control;
mod serve;

use std::{process::ExitCode, sync::Arc};

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigSet, Signal};

use serve::Server;

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(fault) => {
            eprintln!("server: {fault:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["tell", order] => {
            let answer = control::tell(order)?;
            println!("{answer}");
            Ok(if answer == control::OK {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        ["ask", address] => {
            print!("{}", serve::ask(address)?);
            Ok(ExitCode::SUCCESS)
        }
        [port] => serve(port.parse().context("the port")?),
        _ => {
            anyhow::bail!("usage: server PORT | server tell close|open|sick|well|health | server ask ADDRESS")
        }
    }
}

fn serve(port: u16) -> Result<ExitCode> {
    // Blocked before the first thread exists, so that only the wait below sees it.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    let server = Arc::new(Server::start(port)?);
    control::listen(Arc::clone(&server))?;
    signals.wait()?;
    server.leave();
    Ok(ExitCode::SUCCESS)
}
