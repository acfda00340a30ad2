//! WebSockets and other protocols after an upgrade: bytes both ways, until one side ends them or their upstream has to go.

use std::{cell::Cell, rc::Rc};

use hyper::{
    Response,
    body::Incoming,
    header::{self, HeaderValue},
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use tokio_util::io::InspectReader;

use super::{Exchange, Reply};
use crate::{upstream::Link, worker::Worker};

/// Passes the upstream's consent on, and then what both sides say.
pub fn begin(
    worker: &Rc<Worker>,
    mut answer: Response<Incoming>,
    link: Link,
    mut exchange: Exchange,
    on_client: OnUpgrade,
) -> Response<Reply> {
    exchange.answered(answer.status().as_u16());
    let on_upstream = hyper::upgrade::on(&mut answer);
    let worker = Rc::clone(worker);
    tokio::task::spawn_local(async move {
        link.run_out().await;
        let (Ok(client), Ok(upstream)) = (on_client.await, on_upstream.await) else {
            exchange.fail();
            return;
        };
        // Counted as they come: most of these connections end by a reset, or by us.
        let (from_client, to_client) = (Cell::new(0), Cell::new(0));
        let count = |to: &Cell<u64>, part: &[u8]| to.set(to.get() + part.len() as u64);
        let mut client = InspectReader::new(TokioIo::new(client), |part| count(&from_client, part));
        let mut upstream = InspectReader::new(TokioIo::new(upstream), |part| count(&to_client, part));
        tokio::select! {
            // Ends of connections are no news here: either side may go as it likes.
            _ended = tokio::io::copy_bidirectional(&mut client, &mut upstream) => {}
            () = worker.doom(exchange.upstream_id()) => exchange.fail(),
        }
        exchange.carried(from_client.get(), to_client.get());
    });
    let (mut parts, _nothing) = answer.into_parts();
    let protocol = parts.headers.get(header::UPGRADE).cloned();
    super::request::strip_hop_by_hop(&mut parts.headers);
    parts
        .headers
        .insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    if let Some(protocol) = protocol {
        parts.headers.insert(header::UPGRADE, protocol);
    }
    Response::from_parts(parts, Reply::Empty)
}
