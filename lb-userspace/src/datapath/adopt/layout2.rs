//! Layout 2 (schema 1), as released before the flow table of layout 3: what of it is not the beginning of the value it
//! became.

use lb_common::{
    addr::{Addr4, Addr16, Be16, Hop},
    flow::{Address, FlowKey},
    maps::{Backend, backend_flags, flow_state},
    slot::{Body, mode},
};

/// Schema of these maps: part of their pin path.
pub const SCHEMA: u32 = 1;
/// Version of the layout.
pub const ABI: u32 = 2;

/// Value of `FLOWS4` and `FLOWS6`, hash maps by `FlowKey`: one direction of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow<A, P> {
    /// Source address after translation.
    pub src: A,
    /// Destination address after translation.
    pub dst: A,
    /// Source port after translation.
    pub sport: Be16,
    /// Destination port after translation.
    pub dport: Be16,
    /// Difference that the addresses make.
    pub addr_delta: u16,
    /// Difference that the ports make.
    pub port_delta: u16,
    /// Forward: the client's next hop. Reverse: where replies go.
    pub hop: Hop,
    /// Backend id.
    pub backend: u32,
    /// Its epoch.
    pub epoch: u32,
    /// Service id.
    pub service: u32,
    /// [`state`].
    pub state: u32,
    /// When a packet of this direction was last stamped.
    pub last_seen: u32,
    /// When the flow was created.
    pub created: u32,
    /// To the size of the map's values.
    pub _pad: P,
}

/// Value of `FLOWS4`.
pub type Flow4 = Flow<Addr4, [u32; 4]>;
/// Value of `FLOWS6`.
pub type Flow6 = Flow<Addr16, [u32; 0]>;

const _: () = assert!(size_of::<Flow4>() == 64 && size_of::<Flow6>() == 72);

// SAFETY: `repr(C)` over integers; the sizes above leave no implicit padding.
unsafe impl aya::Pod for Flow4 {}
// SAFETY: as above.
unsafe impl aya::Pod for Flow6 {}

/// Bits of [`Flow::state`].
pub mod state {
    /// This entry translates replies.
    pub const REVERSE: u32 = 1 << 0;
    /// The source address is translated too.
    pub const SNAT: u32 = 1 << 1;
    /// Shift of the number of re-steers.
    pub const TRIES_SHIFT: u32 = 4;
    /// Mask of the number of re-steers, unshifted.
    pub const TRIES_MASK: u32 = 0xf;
    /// The backend has answered.
    pub const ESTABLISHED: u32 = 1 << 8;
    /// The backend refused the SYN.
    pub const REFUSED: u32 = 1 << 9;
    /// The backend has sent FIN.
    pub const FIN_BACKEND: u32 = 1 << 10;
    /// The backend has sent RST.
    pub const RESET_BACKEND: u32 = 1 << 11;
    /// The client has sent FIN.
    pub const FIN_CLIENT: u32 = 1 << 16;
    /// The client has sent RST.
    pub const RESET_CLIENT: u32 = 1 << 17;
}

/// A state as the present programs have it. Half-open flows stay so. A FIN counts as acknowledged: by which number, nobody
/// has noted; the flow is closed by the other side's FIN, as it was.
pub fn flow_state(old: u32) -> u32 {
    let mut new = (old >> state::TRIES_SHIFT & state::TRIES_MASK).min(flow_state::TRIES_MASK)
        << flow_state::TRIES_SHIFT;
    let established = flow_state::ANSWERED | flow_state::ESTABLISHED;
    for (before, bits) in [
        (state::SNAT, flow_state::SNAT),
        (state::ESTABLISHED, established),
        (state::REFUSED, flow_state::REFUSED),
    ] {
        if old & before != 0 {
            new |= bits;
        }
    }
    if old & state::ESTABLISHED == 0 {
        return new;
    }
    let client = flow_state::FIN_CLIENT | flow_state::FIN_CLIENT_ACKED;
    let backend = flow_state::FIN_BACKEND | flow_state::FIN_BACKEND_ACKED;
    for (before, bits) in [
        (state::FIN_CLIENT, client),
        (state::FIN_BACKEND, backend),
        (state::RESET_CLIENT, flow_state::RESET_CLIENT),
        (state::RESET_BACKEND, flow_state::RESET_BACKEND),
    ] {
        if old & before != 0 {
            new |= bits;
        }
    }
    new
}

/// The key of a forward entry's other direction.
pub fn reverse_key<A: Address, P>(key: &FlowKey<A>, forward: &Flow<A, P>) -> FlowKey<A> {
    FlowKey {
        src: forward.dst,
        dst: forward.src,
        sport: forward.dport,
        dport: forward.sport,
        proto: key.proto,
    }
}

/// Both directions as the present table has them: keys and bodies. `backend` is the backend's record.
pub fn pair<A: Address, P>(
    key: &FlowKey<A>,
    forward: &Flow<A, P>,
    reverse: &Flow<A, P>,
    backend: &Backend,
) -> [(FlowKey<A>, Body<A>); 2] {
    let mode = if forward.state & state::SNAT != 0 {
        mode::NAT
    } else if backend.flags & (backend_flags::LOCAL | backend_flags::NODE) != 0 {
        mode::LOCAL
    } else {
        mode::NAT_KEEP_SOURCE
    };
    let body = Body {
        hop: forward.hop,
        to_src: forward.src,
        to_dst: A::from_word(forward.created),
        to_sport: forward.sport,
        to_dport: Be16(0),
        addr_delta: forward.addr_delta,
        port_delta: forward.port_delta,
        backend: Body::<A>::backend_word(forward.backend, forward.epoch),
        service: forward.service as u16,
        backend_ack: 0,
        partner: 0,
        partner_generation: u32::from(mode) << 24,
    };
    let other = Body {
        hop: reverse.hop,
        to_src: key.dst,
        to_dst: key.src,
        to_sport: key.dport,
        to_dport: key.sport,
        addr_delta: reverse.addr_delta,
        port_delta: reverse.port_delta,
        ..body
    };
    [(*key, body), (reverse_key(key, forward), other)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_mean_what_they_meant() {
        use lb_common::maps::flow_state as new;
        assert_eq!(flow_state(0), 0);
        assert_eq!(flow_state(state::SNAT), new::SNAT);
        let open = new::ANSWERED | new::ESTABLISHED;
        assert_eq!(flow_state(state::ESTABLISHED | state::REVERSE), open);
        assert!(new::is_counted(flow_state(
            state::ESTABLISHED | state::FIN_CLIENT
        )));
        let both = state::ESTABLISHED | state::FIN_CLIENT | state::FIN_BACKEND;
        assert!(new::is_closed(flow_state(both)));
        assert_eq!(
            flow_state(state::ESTABLISHED | state::RESET_BACKEND),
            open | new::RESET_BACKEND
        );
        // Nobody has acknowledged anything of a flow that is half-open.
        assert_eq!(flow_state(state::RESET_CLIENT | state::FIN_CLIENT), 0);
        assert_eq!(
            flow_state(state::REFUSED | 9 << state::TRIES_SHIFT),
            new::REFUSED | new::TRIES_MASK << new::TRIES_SHIFT
        );
    }
}
