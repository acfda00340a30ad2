//! Flows of the rows as the flow tables hold them, and back.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use lb_common::{
    addr::{Addr4, Addr16, Be16},
    flow::{Address, FlowKey},
    maps::flow_state,
    slot::{Body, EPOCH_MASK, Flow, SLOTS, Slot, TableSettings, head, mode},
};
use lb_ebpf::{
    csum,
    table::{Memory as _, mapped::Mapped, mapped::insert_pair, mapped::read_slot},
    tables::FlowTables,
};

use crate::world::{Conn, FlowEntry};

/// Of the flow tables of the tests. The SNAT sources are dealt out from the first on.
pub const SETTINGS: TableSettings = TableSettings {
    secret: [
        0x0123_4567_89ab_cdef,
        0x1111_2222_3333_4445,
        0x9e37_79b9_7f4a_7c15,
        0xc2b2_ae3d_27d4_eb4f,
        0x1656_67b1_9e37_79f9,
        0x27d4_eb2f_1656_67c5,
        0,
        0,
    ],
    buckets4: 0,
    buckets6: 0,
};

/// Bits of the state that a flow's name and direction make, not its history.
const IDENTITY: u32 = flow_state::UDP;

/// Key and body of one direction; `created` is for a forward one.
fn half<A: Address>(entry: &FlowEntry, created: u32) -> (FlowKey<A>, Body<A>) {
    let addr = |ip: IpAddr| A::from_wide(Addr16::from(ip));
    let key = FlowKey {
        src: addr(entry.src.0),
        dst: addr(entry.dst.0),
        sport: Be16::new(entry.src.1),
        dport: Be16::new(entry.dst.1),
        proto: entry.proto.into(),
    };
    let to_dst = addr(entry.to_dst.0);
    let (to_sport, to_dport) = (Be16::new(entry.to_src.1), Be16::new(entry.to_dst.1));
    let reverse = entry.state & flow_state::REVERSE != 0;
    let mode = if entry.state & flow_state::SNAT != 0 {
        mode::NAT
    } else {
        mode::LOCAL
    };
    let body = Body {
        hop: entry.hop,
        to_src: addr(entry.to_src.0),
        to_dst: if reverse { to_dst } else { A::from_word(created) },
        to_sport,
        to_dport: if reverse { to_dport } else { Be16(0) },
        addr_delta: csum::addr_delta((key.src, key.dst), (addr(entry.to_src.0), to_dst)),
        port_delta: csum::port_delta((key.sport, key.dport), (to_sport, to_dport)),
        backend: Body::<A>::backend_word(entry.backend, entry.epoch),
        service: entry.service as u16,
        backend_ack: 0,
        partner: 0,
        partner_generation: u32::from(mode) << 24,
    };
    (key, body)
}

/// Puts a connection into its table; the slots of both directions.
pub fn insert<T: FlowTables>(tables: T, conn: &Conn, seen: u32) -> Result<[u32; 2]> {
    let [forward, reverse] = conn.entries();
    let state = forward.state & !IDENTITY;
    let slots = if conn.client.0.is_ipv4() {
        insert_pair::<Addr4, T>(tables, [half(&forward, seen), half(&reverse, seen)], state, seen)
    } else {
        insert_pair::<Addr16, T>(tables, [half(&forward, seen), half(&reverse, seen)], state, seen)
    };
    slots.with_context(|| format!("no room for {conn:?}"))
}

/// Occupies every slot of a table by an established flow that belongs to nobody in the rows.
pub fn fill<A: Address, T: FlowTables>(tables: T, seen: u32) -> Result<()> {
    let settings = tables.table_settings().context("no settings")?;
    for id in 0..settings.buckets::<A>() * SLOTS as u32 {
        let cell = Mapped::<A, T>::new(tables)
            .slot(id)
            .context("a slot of the table")?;
        let state = (flow_state::ANSWERED | flow_state::ESTABLISHED) as u64;
        let slot = Slot::<A> {
            head: state | head::LIVE,
            src: A::from_word(id),
            seen,
            body: Body {
                service: 1,
                ..Body::default()
            },
            ..Slot::default()
        };
        // SAFETY: a slot of the table, which no program uses now.
        unsafe {
            if Mapped::<A, T>::head(cell) & head::KIND != head::LIVE {
                cell.as_ptr().write_volatile(slot);
            }
        }
    }
    Ok(())
}

/// Empties a table.
pub fn clear<A: Address, T: FlowTables>(tables: T) {
    let buckets = tables
        .table_settings()
        .map_or(0, |settings| settings.buckets::<A>());
    for id in 0..buckets * SLOTS as u32 {
        if let Some(cell) = Mapped::<A, T>::new(tables).slot(id) {
            // SAFETY: as in `fill`.
            unsafe { cell.as_ptr().write_volatile(Slot::default()) }
        }
    }
}

/// Every live slot of a table.
pub fn live<A: Address, T: FlowTables>(tables: T) -> Result<Vec<FlowEntry>> {
    let buckets = tables
        .table_settings()
        .map_or(0, |settings| settings.buckets::<A>());
    let mut found = Vec::new();
    for id in 0..buckets * SLOTS as u32 {
        if let Some(slot) = read_slot::<A, T>(tables, id).filter(|slot| head::is_live(slot.head)) {
            found.push(entry_of(tables, &slot)?);
        }
    }
    Ok(found)
}

/// A slot in the form that rows compare. Both directions have to say the same, and to name each other.
fn entry_of<A: Address, T: FlowTables>(tables: T, slot: &Slot<A>) -> Result<FlowEntry> {
    let end = |addr: A, port: Be16| (IpAddr::from(addr.wide()), port.get());
    let key = slot.key();
    let state = head::flow_state(slot.head);
    let reverse = state & flow_state::REVERSE != 0;
    let mut to_dst = end(slot.body.to_dst, slot.body.to_dport);
    if !reverse && slot.body.backend != 0 {
        let partner =
            read_slot::<A, T>(tables, slot.body.partner).context("a flow without its reverse slot")?;
        ensure!(
            head::generation(partner.head) == slot.body.partner_generation(),
            "a reverse slot of another flow"
        );
        let copied = head::flow_state(partner.head) & !flow_state::REVERSE;
        ensure!(
            copied == state,
            "the reverse slot says {copied:#x}, the forward slot {state:#x}"
        );
        to_dst = end(partner.src, partner.sport);
    }
    Ok(FlowEntry {
        proto: key.proto as u8,
        src: end(key.src, key.sport),
        dst: end(key.dst, key.dport),
        to_src: end(slot.body.to_src, slot.body.to_sport),
        to_dst,
        backend: slot.body.backend_id(),
        epoch: slot.body.epoch() & EPOCH_MASK,
        service: slot.body.service.into(),
        state: state & !IDENTITY,
        hop: slot.body.hop,
    })
}

/// Takes a connection out of its table, as if it had never been there; whether it was.
pub fn remove<T: FlowTables>(tables: T, conn: &Conn) -> bool {
    if conn.client.0.is_ipv4() {
        remove_pair::<Addr4, T>(tables, conn)
    } else {
        remove_pair::<Addr16, T>(tables, conn)
    }
}

fn remove_pair<A: Address, T: FlowTables>(tables: T, conn: &Conn) -> bool {
    let (key, _) = half::<A>(&conn.entries()[0], 0);
    let Some(home) = tables.table_settings().map(|settings| settings.home(&key)) else {
        return false;
    };
    let memory = Mapped::<A, T>::new(tables);
    let mut flow = Flow::default();
    let udp = u64::from(lb_ebpf::flows::udp_bit(key.proto));
    let found = lb_ebpf::table::find(memory, &home, udp, &key, &mut flow);
    let slots = [found.slot(), flow.body.partner];
    for cell in slots.into_iter().filter_map(|slot| memory.slot(slot)) {
        if found.is_live() {
            let seen = Mapped::<A, T>::head(cell);
            Mapped::<A, T>::compare_exchange(cell, seen, seen & !head::KIND);
        }
    }
    found.is_live()
}
