//! What is counted of a request while it is under way. Dropping it is the end of the request, however it ends.

use std::{rc::Rc, task::Context, time::Instant};

use crate::{
    log::Line,
    served::UpstreamEntry,
    stats::Shard,
    upstream::Link,
    worker::{Client, LocalRoute, Worker},
};

/// One request, from its header to the end of its answer.
pub struct Exchange {
    worker: Rc<Worker>,
    client: Rc<Client>,
    start: Instant,
    route: Option<LocalRoute>,
    /// The place of its upstream in the route.
    place: Option<usize>,
    /// Where idle connections of this upstream are kept.
    pool: u64,
    status: u16,
    bytes_out: u64,
    /// Bytes from the client of an upgraded connection.
    carried_in: u64,
    upload: Option<Rc<super::body::Upload>>,
    /// A part of the answer is there that its client has to take.
    waits_for_client: bool,
    line: Option<Box<Line>>,
}

impl std::fmt::Debug for Exchange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exchange")
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

impl Exchange {
    /// A request begins.
    pub fn begin(worker: &Rc<Worker>, client: &Rc<Client>, line: Option<Box<Line>>) -> Self {
        client.stage.begin();
        Self {
            worker: Rc::clone(worker),
            client: Rc::clone(client),
            start: Instant::now(),
            route: None,
            place: None,
            pool: 0,
            status: 0,
            bytes_out: 0,
            carried_in: 0,
            upload: None,
            waits_for_client: false,
            line,
        }
    }

    /// When it began.
    pub fn start(&self) -> Instant {
        self.start
    }

    /// It is for this route.
    pub fn routed(&mut self, route: &LocalRoute) {
        self.route = Some(Rc::clone(route));
    }

    /// It has a body.
    pub fn uploads(&mut self, upload: &Rc<super::body::Upload>) {
        self.upload = Some(Rc::clone(upload));
    }

    /// It goes to the upstream at this place of its route; what it was at before has failed.
    pub fn goes_to(&mut self, place: usize, pool: u64) {
        if let Some(before) = self.upstream() {
            let stats = before.stats.of(self.worker.index);
            stats.active.sub(1);
            stats.retries.add(1);
        }
        self.pool = pool;
        self.place = Some(place);
        if let Some(upstream) = self.upstream() {
            upstream.stats.of(self.worker.index).begin();
        }
    }

    /// Where it is now.
    fn upstream(&self) -> Option<&UpstreamEntry> {
        let (route, place) = (self.route.as_ref()?, self.place?);
        Some(&route.targets[place].upstream)
    }

    /// Numbers of where it is now.
    pub fn shard(&self) -> Option<&Shard> {
        let index = self.worker.index;
        let upstream = self.upstream().map(|u| u.stats.of(index));
        upstream.or_else(|| self.route.as_ref().map(|r| r.stats.of(index)))
    }

    /// The answer is of the route itself, not of the upstream that it was at.
    pub fn leaves_upstream(&mut self) {
        if let Some(before) = self.upstream() {
            before.stats.of(self.worker.index).active.sub(1);
        }
        self.place = None;
    }

    /// The header of the answer is there.
    pub fn answered(&mut self, status: u16) {
        self.status = status;
        match self.shard() {
            Some(shard) => shard.answered(status),
            None => self.worker.stats().answered(status),
        }
    }

    /// The answer broke off.
    pub fn fail(&mut self) {
        if let Some(shard) = self.shard() {
            shard.errors.add(1);
        }
        if let Some(line) = &mut self.line {
            line.broken = true;
        }
    }

    /// Whose turn it is: the client's, which has a part to take, or the upstream's. Told for HTTP/2 alone, where a client can
    /// leave an answer while its connection goes on.
    pub fn waits_for_client(&mut self, waits: bool) {
        let stage = &self.client.stage;
        if waits != self.waits_for_client && stage.speaks_h2() {
            self.waits_for_client = waits;
            stage.waits_for_client(waits, self.worker.shared.clock.coarse_ms());
        }
    }

    /// Bytes of the answer's body.
    pub fn sent(&mut self, bytes: u64) {
        self.bytes_out += bytes;
    }

    /// Bytes that an upgraded connection carried.
    pub fn carried(&mut self, from_client: u64, to_client: u64) {
        self.bytes_out += to_client;
        self.carried_in += from_client;
    }

    /// Whether all of the answer's body has come. One that its client did not wait for has broken off too.
    pub fn is_whole(&mut self, is_whole: bool) {
        if let Some(line) = &mut self.line {
            line.broken = !is_whole;
        }
    }

    /// The whole answer has come by this connection.
    pub fn give_back(&self, mut link: Link, cx: &mut Context<'_>) {
        // What told of a client is that client's; HTTP/2 is shared as soon as it is there.
        let is_ours = !self.worker.serving().settings.send_proxy_protocol && !link.is_h2() && !link.is_over;
        if is_ours && link.is_idle(cx) {
            link.is_used = true;
            self.worker
                .pool
                .put(self.pool, link, self.worker.shared.clock.coarse_ms());
        }
    }

    /// The id of its upstream.
    pub fn upstream_id(&self) -> Option<u64> {
        self.upstream().map(|upstream| upstream.id)
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.waits_for_client(false);
        let worker = &self.worker;
        if self.upload.as_ref().is_some_and(|upload| !upload.is_whole.get()) {
            self.client.stage.leave_unread();
        }
        self.client.stage.end(worker.shared.clock.coarse_ms());
        let took = self.start.elapsed();
        let bytes_in = self
            .upload
            .as_ref()
            .map_or(self.carried_in, |upload| upload.bytes.get());
        if let Some(shard) = self.shard() {
            if bytes_in > 0 {
                shard.bytes_in.add(bytes_in);
            }
            shard.bytes_out.add(self.bytes_out);
            // Of an upgraded connection it would be the time that it was open.
            if self.status != 101 {
                shard.took(took.as_micros() as u64);
            }
        }
        if let Some(upstream) = self.upstream() {
            upstream.stats.of(worker.index).active.sub(1);
        }
        if let Some(mut line) = self.line.take() {
            line.status = self.status;
            line.bytes_in = bytes_in;
            line.bytes_out = self.bytes_out;
            line.took = took;
            line.route = self.route.as_ref().map(|route| route.name.clone());
            line.upstream = self.upstream().map(|u| (u.name.clone(), u.address));
            worker.shared.log.write(&line);
        }
    }
}
