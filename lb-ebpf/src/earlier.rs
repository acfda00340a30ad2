//! While the agent adopts maps of an earlier layout, flows that are not in these maps yet are those of the earlier programs,
//! which go on over their own maps.

use lb_common::{flow::Address, maps::adopting};

use crate::{headers::TCP, parse::Datagram, pipeline::serves, tables::Tables, tcp};

/// Whether earlier programs still have flows.
#[inline(always)]
pub fn has_flows<T: Tables>(tables: T) -> bool {
    tables
        .settings()
        .is_some_and(|settings| settings.adopting != adopting::NONE)
}

/// Whether a packet that has no flow here is for the earlier programs. Towards the end those keep what they know, and new
/// flows are made here.
#[inline(never)]
pub fn decides<T: Tables, A: Address>(tables: T, datagram: &Datagram<A>) -> bool {
    let stage = tables
        .settings()
        .map_or(adopting::NONE, |settings| settings.adopting);
    if stage != adopting::KNOWN {
        return stage == adopting::ALL;
    }
    let opens = datagram.header != 0 && (datagram.proto() != TCP || tcp::is_syn(datagram.flags));
    !opens || !serves(tables, &datagram.key)
}
