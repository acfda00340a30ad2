//! The TCP state of a flow: what one packet changes.

use lb_common::maps::flow_state as state;

use crate::headers::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};

/// Whether the flags open a connection.
#[inline(always)]
pub const fn is_syn(flags: u8) -> bool {
    flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN) == TCP_SYN
}

/// Bits that a packet sets in the state of both directions.
#[inline(always)]
pub const fn sets(flags: u8, from_backend: bool) -> u32 {
    if flags & TCP_RST != 0 {
        return if from_backend { state::RESET_BACKEND } else { state::RESET_CLIENT };
    }
    let mut bits = 0;
    if flags & TCP_FIN != 0 {
        bits |= if from_backend { state::FIN_BACKEND } else { state::FIN_CLIENT };
    }
    if from_backend && flags & (TCP_SYN | TCP_ACK) == TCP_SYN | TCP_ACK {
        bits |= state::ESTABLISHED;
    }
    bits
}

/// Bits that a packet clears. A side that goes on after its RST did not send it (RFC 5961: somebody guessed); what
/// the other side had under way proves nothing. A SYN-ACK ends the search for a backend.
#[inline(always)]
pub const fn clears(flags: u8, from_backend: bool) -> u32 {
    if flags & TCP_RST != 0 || flags & TCP_ACK == 0 {
        return 0;
    }
    if from_backend { state::RESET_BACKEND | state::REFUSED } else { state::RESET_CLIENT }
}

/// Whether a packet of these flags may change the state at all: all others take the short way.
#[inline(always)]
pub const fn is_transition(flags: u8, current: u32) -> bool {
    flags & (TCP_SYN | TCP_FIN | TCP_RST) != 0 || current & (state::RESET | state::REFUSED) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(steps: &[(u8, bool)]) -> u32 {
        steps.iter().fold(0, |s, &(flags, backend)| (s & !clears(flags, backend)) | sets(flags, backend))
    }
    const SYN_ACK: u8 = TCP_SYN | TCP_ACK;
    const FIN_ACK: u8 = TCP_FIN | TCP_ACK;
    const OPEN: [(u8, bool); 3] = [(TCP_SYN, false), (SYN_ACK, true), (TCP_ACK, false)];

    #[test]
    fn a_handshake_establishes() {
        assert_eq!(run(&OPEN), state::ESTABLISHED);
        assert_eq!(run(&OPEN[..1]), 0);
    }

    #[test]
    fn a_syn_ack_from_the_client_does_not_establish() {
        assert_eq!(run(&[(TCP_SYN, false), (SYN_ACK, false)]), 0);
    }

    #[test]
    fn closing_takes_a_fin_of_each_side_in_any_order() {
        let closed = |steps: &[(u8, bool)]| crate::tables::is_closed(run(steps));
        assert!(!closed(&[(FIN_ACK, false)]));
        assert!(!closed(&[(FIN_ACK, false), (TCP_ACK, true), (TCP_ACK, false)]));
        assert!(closed(&[(FIN_ACK, false), (FIN_ACK, true)]));
        assert!(closed(&[(FIN_ACK, true), (FIN_ACK, false)]));
    }

    #[test]
    fn only_the_sender_of_a_reset_can_prove_it_forged() {
        let mut steps = OPEN.to_vec();
        steps.push((TCP_RST, false));
        assert!(crate::tables::is_closed(run(&steps)));
        steps.push((TCP_ACK, true));
        assert!(crate::tables::is_closed(run(&steps)), "data under way");
        steps.push((TCP_ACK, false));
        assert_eq!(run(&steps), state::ESTABLISHED);
    }

    #[test]
    fn each_side_writes_its_own_byte() {
        for flags in 0..=255u8 {
            assert_eq!((sets(flags, true) | clears(flags, true)) & !state::BY_BACKEND, 0);
            assert_eq!((sets(flags, false) | clears(flags, false)) & !state::BY_CLIENT, 0);
        }
    }

    #[test]
    fn plain_segments_take_the_short_way() {
        assert!(!is_transition(TCP_ACK, state::ESTABLISHED));
        assert!(!is_transition(TCP_ACK | 0x08, state::ESTABLISHED | state::FIN_CLIENT));
        for flags in [TCP_SYN, FIN_ACK, TCP_RST] {
            assert!(is_transition(flags, state::ESTABLISHED));
        }
        assert!(is_transition(TCP_ACK, state::RESET));
    }
}
