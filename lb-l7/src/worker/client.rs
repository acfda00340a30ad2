//! Who is at the other end of a connection.

use std::{cell::RefCell, net::SocketAddr, rc::Rc, sync::Arc};

use hyper::header::HeaderValue;
use tokio::sync::OwnedSemaphorePermit;

use super::Worker;
use crate::client::Stage;

/// Room for an element of `Forwarded`, bytes: most fit.
const USUAL_ELEMENT: usize = 96;

/// A client, for as long as its connection, or what it was upgraded to, lasts.
#[derive(Debug)]
pub struct Client {
    /// Its true address, as a PROXY header tells it where there is one.
    pub address: SocketAddr,
    /// Where it came to.
    pub local: SocketAddr,
    /// The address as `X-Forwarded-For` has it.
    pub address_value: HeaderValue,
    /// It came by TLS.
    pub is_tls: bool,
    /// What it says of its own clients is believed.
    pub is_trusted: bool,
    /// What its connection is at.
    pub stage: Arc<Stage>,
    /// The last `Host` and the element of `Forwarded` made of it: most connections have one host.
    forwarded: RefCell<Option<(HeaderValue, HeaderValue)>>,
    /// Its place among the clients.
    pub(super) seat: Option<Seat>,
}

/// A place among a worker's clients.
#[derive(Debug)]
pub struct Seat {
    worker: Rc<Worker>,
    /// Later clients have greater ones.
    pub id: u64,
    _place: OwnedSemaphorePermit,
}

// === impl Client ===

impl Client {
    /// A client at this address.
    pub fn new(address: SocketAddr, is_tls: bool, is_trusted: bool, stage: Arc<Stage>) -> Self {
        let text = address.ip().to_string();
        Self {
            address,
            local: SocketAddr::new(address.ip(), 0),
            address_value: HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("unknown")),
            is_tls,
            is_trusted,
            stage,
            forwarded: RefCell::default(),
            seat: None,
        }
    }

    /// The same, and where it came to.
    pub fn came_to(self, local: SocketAddr) -> Self {
        Self { local, ..self }
    }

    /// The same, with a place.
    pub fn seated(self, seat: Seat) -> Self {
        Self {
            seat: Some(seat),
            ..self
        }
    }

    /// How it came, as `X-Forwarded-Proto` has it.
    pub fn scheme_value(&self) -> HeaderValue {
        HeaderValue::from_static(if self.is_tls { "https" } else { "http" })
    }

    /// Its element of `Forwarded` (RFC 7239) for a request with this `Host`, which must be a possible one.
    pub fn forwarded(&self, host: Option<&HeaderValue>) -> Option<HeaderValue> {
        if let (Some(host), Some((known, element))) = (host, &*self.forwarded.borrow())
            && host == known
        {
            return Some(element.clone());
        }
        // Pieces, because every connection makes one and the machinery of formatting costs more than the bytes.
        let mut element = String::with_capacity(USUAL_ELEMENT);
        let address = self.address_value.to_str().ok()?;
        let pieces = match self.address {
            SocketAddr::V4(_) => ["for=", address, ""],
            SocketAddr::V6(_) => ["for=\"[", address, "]\""],
        };
        let host_pieces = match host {
            Some(host) => [";host=\"", host.to_str().ok()?, "\""],
            None => [""; 3],
        };
        for piece in pieces.into_iter().chain(host_pieces) {
            element.push_str(piece);
        }
        element.push_str(if self.is_tls {
            ";proto=https"
        } else {
            ";proto=http"
        });
        let element = HeaderValue::try_from(element).ok()?;
        let Some(host) = host else {
            return Some(element);
        };
        // A copy: the one that came is a part of all that was read with it.
        let host = HeaderValue::from_bytes(host.as_bytes()).ok()?;
        *self.forwarded.borrow_mut() = Some((host, element.clone()));
        Some(element)
    }
}

// === impl Seat ===

impl Seat {
    /// Takes a place at a worker.
    pub fn take(worker: &Rc<Worker>, place: OwnedSemaphorePermit, stage: &Arc<Stage>) -> Self {
        let id = worker.next_client.get();
        worker.next_client.set(id + 1);
        worker.clients.borrow_mut().insert(id, Arc::clone(stage));
        worker.shared.clients.of(worker.index).begin();
        worker.shared.clients.of(worker.index).connections.add(1);
        Self {
            worker: Rc::clone(worker),
            id,
            _place: place,
        }
    }

    /// Its connection has no stage.
    pub fn rest(&self) {
        self.worker.clients.borrow_mut().remove(&self.id);
    }

    /// Its connection has a stage again.
    pub fn wake(&self, stage: &Arc<Stage>) {
        self.worker
            .clients
            .borrow_mut()
            .insert(self.id, Arc::clone(stage));
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let worker = &self.worker;
        worker.clients.borrow_mut().remove(&self.id);
        worker.shared.clients.of(worker.index).active.sub(1);
        if worker.is_draining() {
            worker.emptied.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarded_elements_follow_the_host() {
        let client = Client::new("[2001:db8::1]:7".parse().unwrap(), true, false, Stage::new(0));
        for host in ["a", "a", "b:80"] {
            let element = client.forwarded(Some(&HeaderValue::from_static(host))).unwrap();
            assert_eq!(
                element,
                format!("for=\"[2001:db8::1]\";host=\"{host}\";proto=https")
            );
        }
        assert_eq!(
            client.forwarded(None).unwrap(),
            "for=\"[2001:db8::1]\";proto=https"
        );
    }
}
