//! WebSockets and other protocols after an upgrade: bytes both ways, until one side ends them or their upstream has to go.

use std::rc::Rc;

use hyper::{
    Response,
    body::Incoming,
    header::{self, HeaderValue},
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;

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
        let (mut client, mut upstream) = (TokioIo::new(client), TokioIo::new(upstream));
        tokio::select! {
            // Ends of connections are no news here: either side may go as it likes.
            carried = tokio::io::copy_bidirectional(&mut client, &mut upstream) => {
                if let Ok((from_client, to_client)) = carried {
                    exchange.carried(from_client, to_client);
                }
            }
            () = worker.doom(exchange.upstream_id()) => exchange.fail(),
        }
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
