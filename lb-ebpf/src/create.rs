//! New flows: service → ACL → backend → source port → the two entries.

use lb_common::{
    addr::{Addr16, Be16, Hop},
    counter::{Counter, DropReason},
    flow::{FlowKey, hash_attempt, hash_client},
    limits::{RING_ROW_BITS, SNAT_PROBES},
    maps::{
        ACL_ALLOW, ACL_DENY, Affinity, AffinityKey, Backend, EVERY_SERVICE, Event, NO_RING, Service,
        ServiceKey, backend_flags, backend_state, event_kind, flow_state, service_flags, vip_flags,
    },
};

use crate::{
    csum,
    headers::{Ethernet, TCP},
    packet::{Hook, Packet},
    parse::Datagram,
    reply,
    send::{self, Ip, Kind},
    tables::{Choice, InsertError, Tables, Work, is_closed, is_expired, remove_pair},
    tcp,
    verdict::Verdict,
};

/// Ring entries looked at for a backend that takes new flows and has not failed. More than one only for a re-steer, or
/// while the ring lags behind; after them the service's alternates.
const RING_TRIES: u32 = 4;

/// The service of a forward key: its port's own, or the one of every port.
#[inline(always)]
pub fn find_service<'a, T: Tables + 'a, A: Ip>(tables: T, key: &FlowKey<A>) -> Option<&'a Service> {
    let mut service = ServiceKey {
        vip: key.dst.wide(),
        port: key.dport,
        proto: key.proto as u16,
    };
    match tables.service(&service) {
        Some(found) => Some(found),
        None => {
            service.port = Be16(0);
            tables.service(&service)
        }
    }
}

/// Begins the flow that `wish` asks for ([`Verdict::OPEN`] or [`Verdict::replace`]).
#[inline(never)]
pub fn open<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    wish: Verdict,
) -> Verdict {
    let key = &datagram.key;
    let Some(service) = find_service(tables, key) else {
        return Verdict::PASS;
    };
    if datagram.header == 0 {
        // A later fragment of a datagram whose flow is not known any more.
        return Verdict::drop(DropReason::NoFlow, service.id);
    }
    if datagram.proto() == TCP {
        if datagram.header < 20 {
            return Verdict::drop(DropReason::Malformed, service.id);
        }
        if !tcp::is_syn(datagram.flags) {
            return stray(packet, tables, datagram, service);
        }
    }
    let Some(hop) = client_hop(packet, tables) else {
        return Verdict::PASS;
    };
    if service.flags & ACL_FLAGS != 0 && !admits(tables, service, &datagram.key.src.wide()) {
        return Verdict::drop(DropReason::AclDenied, service.id);
    }
    let Some(work) = tables.work::<A>() else {
        return Verdict::drop(DropReason::RewriteFailed, service.id);
    };
    work.choice.attempt = wish.attempt();
    if !choose(tables, service, key, wish.avoid(), &mut work.choice) {
        return no_backend(packet, tables, datagram, service);
    }
    let id = work.choice.backend;
    let Some(backend) = tables.backend(id) else {
        return no_backend(packet, tables, datagram, service);
    };
    let way = send::to_backend(packet, tables, backend);
    if way.kind == Kind::NeedTc {
        return Verdict::TO_TC;
    }
    if way.is_hop() && datagram.ttl <= 1 {
        return Verdict::drop(DropReason::TtlExpired, service.id);
    }
    work.forward.backend = id;
    work.forward.hop = hop;
    work.forward.state = work.choice.attempt.min(flow_state::TRIES_MASK) << flow_state::TRIES_SHIFT;
    prepare(tables, work, key, service, backend);
    if wish.replaces() {
        forget(tables, key);
    }
    let verdict = install(tables, work, service, backend);
    if verdict == Verdict::CREATED {
        record(tables, datagram, service, id, wish.avoid());
    }
    verdict
}

/// The ring hash that a service uses for a flow.
#[inline(always)]
pub fn ring_hash<A: Ip>(service: &Service, key: &FlowKey<A>) -> u32 {
    if service.flags & service_flags::AFFINITY != 0 {
        hash_client(key.src)
    } else {
        key.hash()
    }
}

/// Whether the service has a backend other than `avoid` for a flow.
#[inline(never)]
pub fn has_other<T: Tables, A: Ip>(tables: T, key: &FlowKey<A>, attempt: u32, avoid: u32) -> bool {
    let (Some(service), Some(work)) = (find_service(tables, key), tables.work::<A>()) else {
        return false;
    };
    work.choice.attempt = attempt;
    select(tables, service, ring_hash(service, key), avoid, &mut work.choice)
}

/// Looks in the ring, then among the alternates, for a backend that takes new flows and is not `avoid`.
///
/// The answer is in `choice`, in map memory, where the verifier does not tell one attempt from the next.
#[inline(never)]
fn select<T: Tables>(tables: T, service: &Service, hash: u32, avoid: u32, choice: &mut Choice) -> bool {
    if service.ring_row == NO_RING {
        return false;
    }
    let first = choice.attempt * RING_TRIES;
    for step in 0..RING_TRIES {
        let hash = hash_attempt(hash, first + step);
        let row = service.ring_row + (hash >> RING_ROW_BITS & service.ring_mask);
        if takes(tables, tables.ring(row, hash), avoid, choice) {
            return true;
        }
    }
    // Two backends, one of which fails: every sixteenth flow meets that one alone in the ring.
    takes(tables, service.alternates[0], avoid, choice) || takes(tables, service.alternates[1], avoid, choice)
}

/// Chooses a backend if it takes new flows.
#[inline(always)]
fn takes<T: Tables>(tables: T, id: u32, avoid: u32, choice: &mut Choice) -> bool {
    let alive = |backend: &Backend| backend.state != backend_state::DEAD;
    let takes = id != 0 && id != avoid && tables.backend(id).is_some_and(alive);
    if takes {
        choice.backend = id;
    }
    takes
}

/// Affinity first, then the ring.
#[inline(always)]
fn choose<T: Tables, A: Ip>(
    tables: T,
    service: &Service,
    key: &FlowKey<A>,
    avoid: u32,
    choice: &mut Choice,
) -> bool {
    if service.flags & service_flags::AFFINITY != 0 {
        let known = remembered(tables, service, &key.src.wide());
        if known != 0 && known != avoid {
            tables.count(Counter::AffinityHits);
            choice.backend = known;
            return true;
        }
    }
    select(tables, service, ring_hash(service, key), avoid, choice)
}

/// The backend that the client's earlier flows went to, if it still takes new ones; else 0.
#[inline(never)]
fn remembered<T: Tables>(tables: T, service: &Service, client: &Addr16) -> u32 {
    let key = AffinityKey {
        client: *client,
        service: service.id,
    };
    match tables.affinity(&key) {
        Some(known) => match tables.backend(known.backend) {
            Some(b) if b.epoch == known.epoch && b.state == backend_state::ACTIVE => known.backend,
            _ => 0,
        },
        None => 0,
    }
}

/// Either tells that `ACL` has to be asked about clients of a service.
const ACL_FLAGS: u32 = service_flags::ACL | service_flags::FIREWALL;

/// Whether the deny list for all services and the service's own allow and deny lists admit a client.
#[inline(never)]
fn admits<T: Tables>(tables: T, service: &Service, client: &Addr16) -> bool {
    if service.flags & service_flags::FIREWALL != 0 && tables.acl(EVERY_SERVICE, client) == ACL_DENY {
        return false;
    }
    if service.flags & service_flags::ACL == 0 {
        return true;
    }
    match tables.acl(service.id, client) {
        ACL_ALLOW => true,
        ACL_DENY => false,
        _ => service.flags & service_flags::ACL_DEFAULT_DENY == 0,
    }
}

/// Where replies to the sender of this frame go; `None` at a device we do not know.
#[inline(always)]
fn client_hop<P: Packet, T: Tables>(packet: &P, tables: T) -> Option<Hop> {
    if P::HOOK == Hook::Egress || tables.settings()?.loopback_ifindex == packet.device() {
        return Some(Hop::UNKNOWN);
    }
    let slot = tables.device_slot(packet.device())?;
    let eth = packet.get::<Ethernet>(0)?;
    Some(Hop::from_words(eth.src_high, eth.src_low, slot as u16))
}

/// TCP without a flow and not a SYN: there is no translation for it.
#[inline(never)]
fn stray<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    service: &Service,
) -> Verdict {
    // On the node's own address it may be a connection that is older than the service.
    match tables.vip(&datagram.key.dst.wide()) {
        Some(vip) if vip.flags & vip_flags::ECHO != 0 => {}
        _ => return Verdict::PASS,
    }
    if service.flags & service_flags::RESET_UNKNOWN != 0 && datagram.flags & crate::headers::TCP_RST == 0 {
        return reply::reset(packet, tables, datagram, service.id);
    }
    Verdict::drop(DropReason::NoFlow, service.id)
}

/// No backend takes new flows.
#[inline(never)]
fn no_backend<P: Packet, T: Tables, A: Ip>(
    packet: &mut P,
    tables: T,
    datagram: &Datagram<A>,
    service: &Service,
) -> Verdict {
    if datagram.proto() == TCP && service.flags & service_flags::REFUSE_WHEN_EMPTY != 0 {
        return reply::reset(packet, tables, datagram, service.id);
    }
    Verdict::drop(DropReason::NoBackend, service.id)
}

/// Fills in all of both entries that does not depend on the source port.
#[inline(always)]
fn prepare<T: Tables, A: Ip>(
    tables: T,
    work: &mut Work<A>,
    key: &FlowKey<A>,
    service: &Service,
    backend: &Backend,
) {
    let now = tables.now();
    let port = if backend.port.0 == 0 {
        key.dport
    } else {
        backend.port
    };
    work.forward_key = *key;
    work.forward.dst = A::from_wide(backend.addr);
    work.forward.dport = port;
    work.forward.epoch = backend.epoch;
    work.forward.service = service.id;
    work.forward.last_seen = now;
    work.forward.created = now;
    work.forward._pad = A::Pad::default();
    work.reverse_key.src = work.forward.dst;
    work.reverse_key.sport = port;
    work.reverse_key.proto = key.proto;
    work.reverse = work.forward;
    work.reverse.src = key.dst;
    work.reverse.dst = key.src;
}

/// Claims a source for the flow (the reverse entry arbitrates) and inserts the forward entry.
#[inline(never)]
fn install<T: Tables, A: Ip>(tables: T, work: &mut Work<A>, service: &Service, backend: &Backend) -> Verdict {
    let Some(settings) = tables.settings() else {
        return Verdict::drop(DropReason::RewriteFailed, service.id);
    };
    let local = backend.flags & (backend_flags::LOCAL | backend_flags::NODE) != 0;
    let same_bridge =
        backend.flags & backend_flags::LOCAL != 0 && work.forward.hop.slot() == backend.hop.slot();
    let snat = service.flags & service_flags::SNAT_ALWAYS != 0
        || (service.flags & service_flags::SNAT_NEVER == 0 && (!local || same_bridge));
    let exhausted = Verdict::drop(DropReason::SnatPortsExhausted, service.id);
    if snat && backend.snat_count == 0 {
        return exhausted;
    }
    let (low, high) = (settings.snat_port_min as u32, settings.snat_port_max as u32);
    let range = (high + 1).saturating_sub(low);
    let own = work.forward_key.sport.get() as u32;
    let keep_own = !snat || (own >= low && own <= high);
    let first = if snat { flow_state::SNAT } else { 0 };
    work.forward.state |= first;
    let spread = work.forward_key.hash() >> 8;
    for probe in 0..SNAT_PROBES {
        let port = if probe == 0 && keep_own {
            own
        } else {
            // Ports in use lie side by side, in the trail of another CPU's cursor or of our own from before: two steps,
            // then leaps, or all tries could end in one trail.
            let leap = probe >= 2 && range > SMALL_RANGE;
            let cursor = tables.next_port(work.forward.backend, leap);
            low + cursor.checked_rem(range).unwrap_or(0)
        };
        if snat {
            let turn = spread
                .wrapping_add(probe)
                .checked_rem(backend.snat_count as u32)
                .unwrap_or(0);
            let index = backend.snat_first as u32 + turn;
            let Some(address) = tables.snat_address(index) else {
                return exhausted;
            };
            work.forward.src = A::from_wide(*address);
        } else {
            work.forward.src = work.forward_key.src;
        }
        work.forward.sport = Be16::new(port as u16);
        match claim(tables, work) {
            CLAIMED => return commit(tables, work),
            FULL => return Verdict::drop(DropReason::FlowTableFull, service.id),
            _ if reclaim(tables, work) == CLAIMED => return commit(tables, work),
            _ => {}
        }
    }
    exhausted
}

/// Ports of a range that is searched step by step.
const SMALL_RANGE: u32 = 64;

/// The reverse entry is in.
const CLAIMED: u32 = 0;
/// The source is in use towards this backend.
const TAKEN: u32 = 1;
/// The table is full.
const FULL: u32 = 2;

/// Inserts the reverse entry.
#[inline(never)]
fn claim<T: Tables, A: Ip>(tables: T, work: &mut Work<A>) -> u32 {
    let Work {
        forward_key: key,
        reverse_key,
        forward,
        reverse,
        ..
    } = work;
    forward.addr_delta = csum::addr_delta((key.src, key.dst), (forward.src, forward.dst));
    forward.port_delta = csum::port_delta((key.sport, key.dport), (forward.sport, forward.dport));
    reverse_key.dst = forward.src;
    reverse_key.dport = forward.sport;
    reverse.sport = key.dport;
    reverse.dport = key.sport;
    reverse.addr_delta = !forward.addr_delta;
    reverse.port_delta = !forward.port_delta;
    reverse.state = forward.state | flow_state::REVERSE;
    match tables.insert_flow(&work.reverse_key, &work.reverse) {
        Ok(()) => CLAIMED,
        Err(InsertError::Full) => FULL,
        Err(InsertError::Exists) => TAKEN,
    }
}

/// Removes the flow that a tuple had.
#[inline(never)]
fn forget<T: Tables, A: Ip>(tables: T, key: &FlowKey<A>) -> u32 {
    if let Some(old) = tables.flow(key) {
        remove_pair(tables, key, old.flow());
    }
    0
}

/// Takes the place of the flow that has the reverse key, if that one is over.
#[inline(never)]
fn reclaim<T: Tables, A: Ip>(tables: T, work: &Work<A>) -> u32 {
    let key = &work.reverse_key;
    let Some(old) = tables.flow(key) else { return TAKEN };
    let now = tables.now();
    // A closed flow may go as soon as late segments have had a second; an open one must have expired.
    let closed = is_closed(old.flow().state)
        && key.proto == TCP as u32
        && now.wrapping_sub(old.flow().last_seen) >= tables.ticks_per_second();
    if !closed && !is_expired(tables, old.flow(), key.proto, now) {
        return TAKEN;
    }
    remove_pair(tables, key, old.flow());
    tables.count(Counter::FlowsReclaimed);
    match tables.insert_flow(key, &work.reverse) {
        Ok(()) => CLAIMED,
        Err(_) => TAKEN,
    }
}

/// Inserts the forward entry; without it the reverse one must not stay.
#[inline(never)]
fn commit<T: Tables, A: Ip>(tables: T, work: &Work<A>) -> Verdict {
    match tables.insert_flow(&work.forward_key, &work.forward) {
        Ok(()) => Verdict::CREATED,
        Err(error) => {
            tables.remove_flow(&work.reverse_key);
            let reason = match error {
                InsertError::Exists => DropReason::Raced,
                InsertError::Full => DropReason::FlowTableFull,
            };
            Verdict::drop(reason, work.forward.service)
        }
    }
}

/// Counts a new flow, remembers the client's backend and tells who listens.
#[inline(never)]
fn record<T: Tables, A: Ip>(
    tables: T,
    datagram: &Datagram<A>,
    service: &Service,
    id: u32,
    avoid: u32,
) -> u32 {
    tables.count(Counter::FlowsCreated);
    if let Some(stats) = tables.backend_stats(id) {
        stats.flows += 1;
    }
    if let Some(stats) = tables.service_stats(service.id) {
        stats.flows += 1;
    }
    if avoid != 0 {
        tables.count(Counter::Resteered);
        if let Some(stats) = tables.backend_stats(avoid) {
            stats.resteered += 1;
        }
    }
    if service.flags & service_flags::AFFINITY != 0
        && let Some(backend) = tables.backend(id)
    {
        let key = AffinityKey {
            client: datagram.key.src.wide(),
            service: service.id,
        };
        tables.set_affinity(
            &key,
            &Affinity {
                backend: id,
                epoch: backend.epoch,
            },
        );
    }
    let sample = tables.settings().map_or(0, |s| s.event_sample);
    if sample != 0 && tables.random().checked_rem(sample) == Some(0) {
        tables.event(&Event {
            client: datagram.key.src.wide(),
            vip: datagram.key.dst.wide(),
            client_port: datagram.key.sport,
            vip_port: datagram.key.dport,
            kind: if avoid == 0 {
                event_kind::NEW_FLOW
            } else {
                event_kind::RESTEER
            },
            backend: id,
            proto: datagram.proto() as u32,
            reason: 0,
            service: service.id,
        });
    }
    0
}
