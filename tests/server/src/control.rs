//! Orders from inside the container: `docker exec web-1 /server tell close`.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::Arc,
};

use anyhow::{Context as _, Result};

use crate::serve::Server;

/// Where orders are taken: loopback, so nobody outside the container gives any.
const PORT: u16 = 8999;
/// The answer to an order that was carried out, and of a server that is well.
pub const OK: &str = "ok";

/// Takes orders from now on.
pub fn listen(server: Arc<Server>) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)).context("the control port")?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A caller that goes away loses its answer and nobody else's.
            let _ = obey(&server, stream);
        }
    });
    Ok(())
}

fn obey(server: &Server, mut stream: TcpStream) -> Result<()> {
    let mut order = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut order)?;
    let answer = match order.trim() {
        "close" => {
            server.close();
            OK
        }
        "open" => {
            server.open()?;
            OK
        }
        "sick" => {
            server.set_well(false);
            OK
        }
        "well" => {
            server.set_well(true);
            OK
        }
        "health" if server.is_well() => OK,
        "health" => "sick",
        _ => "unknown order",
    };
    Ok(writeln!(stream, "{answer}")?)
}

/// Gives an order and returns the answer.
pub fn tell(order: &str) -> Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).context("no server here")?;
    writeln!(stream, "{order}")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(answer.trim().to_owned())
}
