//! New flows: service → ACL → backend → source port → the two entries.

use lb_common::{
    addr::{Addr16, Be16, Hop},
    counter::{Counter, DropReason},
    flow::{FlowKey, hash_attempt, hash_client},
    limits::RING_ROW_BITS,
    maps::{
        ACL_ALLOW, ACL_DENY, Affinity, AffinityKey, Backend, EVERY_SERVICE, Event, NO_RING, Service,
        ServiceKey, backend_flags, backend_state, event_kind, service_flags, vip_flags,
    },
    slot::{Body, mode},
};

use crate::{
    error, flows,
    headers::{Ethernet, TCP},
    ingress,
    packet::{Hook, Packet},
    parse::Datagram,
    reply,
    send::{self, Ip, Kind},
    tables::{Choice, Tables, Work},
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
    // The tuple's old flow has been judged already.
    if !wish.replaces()
        && let Some(verdict) = ingress::refuse_foreign(packet, tables)
    {
        return verdict;
    }
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
    let way = send::to_backend::<P, T, A>(packet, tables, backend);
    if way.kind == Kind::NeedTc {
        return Verdict::TO_TC;
    }
    if way.is_hop() && datagram.ttl <= 1 {
        return if P::HOOK == Hook::Xdp {
            Verdict::TO_TC
        } else {
            error::time_exceeded(packet, tables, datagram, service.id)
        };
    }
    let share = tables
        .settings()
        .map_or(0, |settings| settings.flow_share[A::V6 as usize]);
    if share != 0 && tables.counted_flows::<A>(service.id) >= share as u64 {
        return Verdict::drop(DropReason::ServiceShare, service.id);
    }
    work.forward.hop = hop;
    prepare(tables, work, key, service, backend);
    if wish.replaces() && !forget::<T, A>(tables) {
        return Verdict::drop(DropReason::Raced, service.id);
    }
    let mode = forwarding_mode(service, backend, hop);
    let verdict = Verdict::from_raw(tables.install::<A>(service.id, id, mode));
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
    // A RST may end one of its own processes' on any address that it has.
    let reset = datagram.flags & crate::headers::TCP_RST != 0;
    match tables.vip(&datagram.key.dst.wide()) {
        Some(vip) if vip.flags & vip_flags::ROUTED != 0 => {}
        Some(vip) if vip.flags & vip_flags::ECHO != 0 && !reset => {}
        _ => return Verdict::PASS,
    }
    if service.flags & service_flags::RESET_UNKNOWN != 0 && !reset {
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

/// Fills in all of both slots that does not depend on the source port.
#[inline(always)]
fn prepare<T: Tables, A: Ip>(
    tables: T,
    work: &mut Work<A>,
    key: &FlowKey<A>,
    service: &Service,
    backend: &Backend,
) {
    let port = if backend.port.0 == 0 {
        key.dport
    } else {
        backend.port
    };
    work.forward_key = *key;
    work.forward.to_dst = A::from_word(tables.now());
    work.forward.to_dport = Be16(0);
    work.forward.backend = Body::<A>::backend_word(work.choice.backend, backend.epoch);
    work.forward.service = service.id as u16;
    work.forward.backend_ack = 0;
    work.reverse_key.src = A::from_wide(backend.addr);
    work.reverse_key.sport = port;
    work.reverse_key.proto = key.proto;
    work.reverse = work.forward;
    work.reverse.to_src = key.dst;
    work.reverse.to_dst = key.src;
    work.reverse.to_sport = key.dport;
    work.reverse.to_dport = key.sport;
}

/// How the packets of a new flow are forwarded.
#[inline(always)]
fn forwarding_mode(service: &Service, backend: &Backend, hop: Hop) -> u32 {
    let local = backend.flags & (backend_flags::LOCAL | backend_flags::NODE) != 0;
    let same_bridge = backend.flags & backend_flags::LOCAL != 0 && hop.slot() == backend.hop.slot();
    if service.flags & service_flags::SNAT_ALWAYS != 0
        || (service.flags & service_flags::SNAT_NEVER == 0 && (!local || same_bridge))
    {
        mode::NAT as u32
    } else if local {
        mode::LOCAL as u32
    } else {
        mode::NAT_KEEP_SOURCE as u32
    }
}

/// Ends the flow that a tuple had: the one that was found. False if it would not end.
#[inline(never)]
fn forget<T: Tables, A: Ip>(tables: T) -> bool {
    tables.found::<A>().is_some_and(|found| flows::end(tables, found))
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
