//! Connections whose TLS is not ours to end: passed on by server name, byte for byte.

use std::{rc::Rc, sync::Arc};

use bytes::BytesMut;
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

use crate::{
    balance::{self, Asked, TRIES, Tried},
    proxy_protocol,
    served::{Served, Serving},
    table::{Found, host},
    worker::{Client, Worker},
};

/// The route that takes a server name's TLS as it is.
pub fn route<'s>(serving: &'s Serving, name: Option<&str>) -> Option<&'s Arc<Served>> {
    if serving.passthrough.is_empty() {
        return None;
    }
    let name = host::normal(name?)?;
    match serving.passthrough.find(&name, lb_route::WHOLE_HOST) {
        Found::This(route) => Some(route),
        Found::NoPath | Found::NoHost => None,
    }
}

/// Passes a connection on, of which `first` has been read.
pub async fn pass(
    worker: &Rc<Worker>,
    client: &Client,
    route: &Served,
    mut stream: TcpStream,
    first: BytesMut,
) {
    let asked = Asked {
        client: client.address.ip(),
        cookie: None,
        worker: worker.index,
        now_ms: worker.shared.clock.coarse_ms(),
    };
    let serving = worker.serving();
    let (patience, introduced) = (
        serving.settings.timeouts.connect,
        serving.settings.send_proxy_protocol,
    );
    drop(serving);
    client.stage.begin();
    let mut tried = Tried::default();
    while tried.count() < TRIES
        && let Some(place) = balance::pick(route, asked, &tried)
    {
        tried.add(place);
        let upstream = &route.targets[place].upstream;
        let stats = upstream.stats.of(worker.index);
        let Ok(Ok(mut server)) = tokio::time::timeout(patience, TcpStream::connect(upstream.address)).await
        else {
            stats.connect_errors.add(1);
            upstream.shun(worker.shared.clock.coarse_ms());
            continue;
        };
        upstream.welcome();
        stats.connections.add(1);
        stats.begin();
        let _small_records_go_out_at_once = server.set_nodelay(true);
        let carry = async {
            if introduced {
                server
                    .write_all(&proxy_protocol::header(client.address, client.local))
                    .await?;
            }
            server.write_all(&first).await?;
            tokio::io::copy_bidirectional(&mut stream, &mut server).await
        };
        tokio::select! {
            carried = carry => match carried {
                Ok((from_client, to_client)) => {
                    stats.bytes_in.add(from_client + first.len() as u64);
                    stats.bytes_out.add(to_client);
                }
                Err(_) => stats.errors.add(1),
            },
            () = worker.doom(Some(upstream.id)) => {}
        }
        stats.active.sub(1);
        break;
    }
    client.stage.end(worker.shared.clock.coarse_ms());
}
