//! The ring of one service and its value in `SERVICES`, which commits it.

use std::sync::Arc;

use lb_common::{
    limits::RING_ROW,
    maps::{self, NO_RING, backend_state},
};

use super::{
    Planner,
    backends::Candidate,
    ids::{NoRow, Rows},
    programmed::{Entry, Note},
};
use crate::{
    health::WHOLE,
    model::{EmptyPolicy, Service, ServiceAddress},
    ring::{self, Member},
};

/// The ring a service shall have.
pub(super) enum RingChange {
    /// The committed one.
    Keep,
    /// None: no backend takes new flows.
    Clear,
    /// A new one.
    Put { row: u32, ring: Vec<u32> },
}

impl Planner<'_> {
    /// How many backends the service lists, in whatever state: the measure of its ring. While sources are waited for,
    /// those that served before count too.
    pub(super) fn listed(&self, entry: &Entry, service: &Service) -> usize {
        let wished = service.backends.len();
        let unheard = entry.live.iter().filter(|(address, id)| {
            !self.may_go(service.address, **address)
                && self.programmed.slots[id].record.state == backend_state::ACTIVE
                && service
                    .backends
                    .binary_search_by_key(address, |b| &b.address)
                    .is_err()
        });
        wished + unheard.count()
    }

    /// The ring for these members, if it is another than the committed one.
    pub(super) fn ring(
        &mut self,
        address: ServiceAddress,
        entry: &Entry,
        members: &[Member],
        rows: u32,
    ) -> Result<RingChange, NoRow> {
        let current = entry.value.filter(|value| value.ring_row != NO_RING);
        if members.is_empty() {
            return Ok(if current.is_some() {
                RingChange::Clear
            } else {
                RingChange::Keep
            });
        }
        if let (Some((built, digest)), Some(current)) = (&entry.built, current)
            && **built == *members
            && current.ring_mask + 1 == rows
            && *digest == entry.ring.digest
        {
            return Ok(RingChange::Keep);
        }
        let Some(ring) = ring::build(members, rows) else {
            return Ok(RingChange::Keep);
        };
        let digest = ring::digest(&ring);
        let built = Note::Built {
            address,
            members: Arc::from(members),
            digest,
        };
        if current.is_some() && digest == entry.ring.digest {
            self.plan.notes.push(built);
            return Ok(RingChange::Keep);
        }
        let (programmed, inputs) = (self.programmed, self.inputs);
        let free = self
            .rows
            .get_or_insert_with(|| Rows::new(programmed, inputs.capacities.ring_rows, inputs.now));
        let row = free.take(rows, current.is_none())?;
        self.plan.notes.push(built);
        Ok(RingChange::Put { row, ring })
    }
}

/// Who is in the ring: the active ones, or by policy those that drain, never one that is about to be dead.
pub(super) fn members(candidates: &[Candidate], when_empty: EmptyPolicy) -> Vec<Member> {
    // Weights in tenths only while somebody has less than a whole share: they make the same ring as whole ones.
    let slow = candidates.iter().any(|c| c.tenths < WHOLE);
    let member = |c: &Candidate| Member {
        address: std::net::SocketAddr::new(c.record.addr.into(), c.record.port.get()),
        weight: c.about.weight.max(1) * if slow { u32::from(c.tenths) } else { 1 },
        id: c.id,
    };
    let in_state = |state| candidates.iter().filter(move |c| c.record.state == state);
    let mut members: Vec<Member> = in_state(backend_state::ACTIVE).map(member).collect();
    if members.is_empty() && when_empty == EmptyPolicy::DrainersThenRefuse {
        let known = in_state(backend_state::DRAINING).filter(|c| c.drainer);
        members.extend(known.map(member));
    }
    members.sort_unstable();
    members
}

pub(super) fn service_value(entry: &Entry, flags: u32, ring: &RingChange) -> maps::Service {
    let old = entry.value.unwrap_or(maps::Service {
        id: entry.id,
        generation: entry.generation,
        ring_row: NO_RING,
        previous_row: NO_RING,
        ..maps::Service::default()
    });
    let (ring_row, ring_mask, alternates) = match ring {
        RingChange::Keep => return maps::Service { flags, ..old },
        RingChange::Clear => (NO_RING, 0, [0; 2]),
        RingChange::Put { row, ring } => (*row, (ring.len() / RING_ROW) as u32 - 1, ring::leaders(ring)),
    };
    maps::Service {
        flags,
        generation: old.generation.wrapping_add(1),
        ring_row,
        ring_mask,
        previous_row: old.ring_row,
        previous_mask: old.ring_mask,
        alternates,
        ..old
    }
}
