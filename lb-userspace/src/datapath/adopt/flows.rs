//! The flows of layout 2 into the flow table, pass after pass, while the programs go on.

use std::{collections::HashMap, hash::Hash, path::Path};

use aya::Pod;
use lb_common::{
    addr::{Addr4, Addr16},
    flow::{Address, FlowKey},
    maps::Backend,
};

use super::{
    super::{
        MapError,
        batch::{Cursor, Table},
        flow_table::FlowMaps,
    },
    layout2::{self, Flow, Flow4, Flow6},
};

/// Entries that are read at a time.
const CHUNK: usize = 4096;

/// What the earlier maps said of a flow when it was copied.
type Copied<A> = HashMap<FlowKey<A>, (u32, u32)>;

/// What became of the flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Copied.
    pub copied: u64,
    /// State copied that has changed meanwhile.
    pub changed: u64,
    /// There was no room.
    pub lost: u64,
}

/// The copying.
#[derive(Debug)]
pub struct Copying {
    from4: Table<FlowKey<Addr4>, Flow4>,
    from6: Table<FlowKey<Addr16>, Flow6>,
    to: FlowMaps,
    backends: Vec<Backend>,
    copied4: Copied<Addr4>,
    copied6: Copied<Addr16>,
}

impl Copying {
    /// From the maps of layout 2 to these.
    pub fn new(from: &Path, to: &Path) -> Result<Self, MapError> {
        let backends: Table<u32, Backend> = Table::open(to, "BACKENDS")?;
        Ok(Self {
            from4: Table::open(from, "FLOWS4")?,
            from6: Table::open(from, "FLOWS6")?,
            to: FlowMaps::open(to)?,
            backends: backends.range(0, backends.capacity)?,
            copied4: Copied::new(),
            copied6: Copied::new(),
        })
    }

    /// Copies what has come, and what has changed, since the last pass.
    pub fn pass(&mut self) -> Result<Count, MapError> {
        let mut count = Count::default();
        let (to, backends) = (&self.to, &self.backends[..]);
        family(&self.from4, to, backends, &mut self.copied4, &mut count)?;
        family(&self.from6, to, backends, &mut self.copied6, &mut count)?;
        Ok(count)
    }
}

fn family<A, P>(
    from: &Table<FlowKey<A>, Flow<A, P>>,
    to: &FlowMaps,
    backends: &[Backend],
    copied: &mut Copied<A>,
    count: &mut Count,
) -> Result<(), MapError>
where
    A: Address + Hash,
    P: 'static,
    FlowKey<A>: Pod,
    Flow<A, P>: Pod,
{
    let mut cursor = Cursor::new(CHUNK);
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    loop {
        keys.clear();
        values.clear();
        if !from.next_chunk(&mut cursor, &mut keys, &mut values)? {
            return Ok(());
        }
        for (key, forward) in keys.iter().zip(&values) {
            if forward.state & layout2::state::REVERSE != 0 {
                continue;
            }
            let now = (forward.state, forward.created);
            match copied.get(key) {
                Some(before) if *before == now => continue,
                // The same flow: it may have ended here since.
                Some((_, created)) if *created == forward.created => {
                    to.advance(key, layout2::flow_state(forward.state));
                    count.changed += 1;
                }
                _ => {
                    // A flow without its other direction is being made, or removed: the next pass will tell.
                    let Some(reverse) = from.get(&layout2::reverse_key(key, forward))? else {
                        continue;
                    };
                    let backend = backends
                        .get(forward.backend as usize)
                        .copied()
                        .unwrap_or_default();
                    // The later of two stamps of a clock that wraps.
                    let younger = reverse.last_seen.wrapping_sub(forward.last_seen) < 1 << 31;
                    let seen = if younger {
                        reverse.last_seen
                    } else {
                        forward.last_seen
                    };
                    let pair = layout2::pair(key, forward, &reverse, &backend);
                    if to
                        .insert(pair, layout2::flow_state(forward.state), seen)
                        .is_some()
                    {
                        count.copied += 1;
                    } else if !to.find(key).0.is_live() {
                        count.lost += 1;
                    }
                }
            }
            copied.insert(*key, now);
        }
    }
}
