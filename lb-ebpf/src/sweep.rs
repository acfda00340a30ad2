//! Removal of expired flows. User space proposes keys, the kernel decides: it alone sees the flow as it is now.
//!
//! Input: `u32` family (4 or 6), `u32` count, then that many flow keys. Result: flows removed; for no keys at all,
//! the flow clock.

use lb_common::{
    addr::{Addr4, Addr16},
    counter::Counter,
    flow::FlowKey,
};

use crate::{
    packet::{Header, MAX_OFFSET, Packet},
    send::Ip,
    tables::{Tables, is_expired, remove_pair},
};

/// Keys in one run.
pub const BATCH: usize = 16;
/// Bytes before the keys.
pub const HEADER: usize = 8;

const _: () = assert!(
    HEADER + (BATCH - 1) * size_of::<FlowKey<Addr16>>() <= MAX_OFFSET,
    "the last key would never be read"
);

/// See the module.
#[inline(always)]
pub fn run<P: Packet, T: Tables>(packet: &P, tables: T) -> u32 {
    let (Some(family), Some(count)) = (packet.get::<u32>(0), packet.get::<u32>(4)) else {
        return 0;
    };
    match (*family, *count) {
        (_, 0) => tables.now(),
        (4, count) => expire::<P, T, Addr4>(packet, tables, count),
        (6, count) => expire::<P, T, Addr16>(packet, tables, count),
        _ => 0,
    }
}

#[inline(never)]
fn expire<P: Packet, T: Tables, A: Ip>(packet: &P, tables: T, count: u32) -> u32
where
    FlowKey<A>: Header,
{
    let now = tables.now();
    let mut removed = 0;
    for index in 0..BATCH {
        if index >= count as usize {
            break;
        }
        let Some(key) = packet.get::<FlowKey<A>>(HEADER + index * size_of::<FlowKey<A>>()) else {
            break;
        };
        let key = *key;
        if let Some(entry) = tables.flow(&key)
            && is_expired(tables, entry.flow(), key.proto, now)
        {
            remove_pair(tables, &key, entry.flow());
            tables.count(Counter::FlowsExpired);
            removed += 1;
        }
    }
    removed
}
