//! The TCP state of a flow: what one packet changes.
//!
//! A stranger can forge a client's packets, but not their sequence numbers (RFC 5961). So a flow is established by an
//! acknowledgement of the backend's SYN, and closed by acknowledgements of both FINs. A RST proves nothing: whether the
//! receiver took it, only its silence tells.

use lb_common::maps::flow_state as state;

use crate::headers::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};

/// Bits to set and bits to clear.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Bits that the packet sets.
    pub set: u32,
    /// Bits that it clears.
    pub clear: u32,
}

/// Whether the flags open a connection.
#[inline(always)]
pub const fn is_syn(flags: u8) -> bool {
    flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN) == TCP_SYN
}

/// Whether the flags accept a connection.
#[inline(always)]
pub const fn is_syn_ack(flags: u8) -> bool {
    flags & (TCP_SYN | TCP_ACK | TCP_RST) == TCP_SYN | TCP_ACK
}

/// Whether a packet cannot change the state: it takes the short way.
#[inline(always)]
pub const fn is_steady(flags: u8, current: u32) -> bool {
    let waits = state::ESTABLISHED | state::REFUSED | state::PORT_BUSY | state::RESET;
    flags & (TCP_SYN | TCP_FIN | TCP_RST) == 0
        && current & waits == state::ESTABLISHED
        && (current ^ current >> state::ACKED_SHIFT) & state::FINS == 0
}

/// What a packet of the client changes. `acks`: it acknowledges just what the client has to acknowledge.
#[inline(always)]
pub const fn by_client(flags: u8, current: u32, acks: bool) -> Change {
    let mut change = Change { set: 0, clear: 0 };
    if flags & TCP_RST != 0 {
        if current & state::ESTABLISHED != 0 {
            change.set = state::RESET_CLIENT;
        }
        return change;
    }
    if flags & TCP_SYN != 0 || flags & TCP_ACK == 0 {
        return change;
    }
    // A side that goes on after its RST did not send it.
    change.clear = state::RESET_CLIENT;
    let mut current = current;
    if acks && current & (state::ANSWERED | state::ESTABLISHED) == state::ANSWERED {
        change.set |= state::ESTABLISHED;
        current |= state::ESTABLISHED;
    }
    if current & state::ESTABLISHED == 0 {
        return change;
    }
    if acks && current & state::FIN_BACKEND != 0 {
        change.set |= state::FIN_BACKEND_ACKED;
    }
    if flags & TCP_FIN != 0 {
        change.set |= state::FIN_CLIENT;
    }
    change
}

/// What a packet of the backend changes. `acks`: it acknowledges the client's FIN. `again`: a SYN-ACK that came before.
#[inline(always)]
pub const fn by_backend(flags: u8, current: u32, acks: bool, again: bool) -> Change {
    let mut change = Change { set: 0, clear: 0 };
    if flags & TCP_RST != 0 {
        change.set = state::RESET_BACKEND;
        return change;
    }
    if is_syn_ack(flags) {
        if !again {
            // The search for a backend ends. Or the backend has lost the connection that was, and begins a new one on its
            // tuple, which the client has to confirm as it did the first.
            change.set = state::ANSWERED;
            change.clear = state::ESTABLISHED
                | state::REFUSED
                | state::PORT_BUSY
                | state::FINS
                | state::CLOSED
                | state::RESET;
        }
        return change;
    }
    if flags & TCP_ACK == 0 {
        return change;
    }
    change.clear = state::RESET_BACKEND;
    if acks && current & state::FIN_CLIENT != 0 {
        change.set |= state::FIN_CLIENT_ACKED;
    }
    if flags & TCP_FIN != 0 && current & state::ANSWERED != 0 {
        change.set |= state::FIN_BACKEND;
    }
    change
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYN_ACK: u8 = TCP_SYN | TCP_ACK;
    const FIN_ACK: u8 = TCP_FIN | TCP_ACK;

    /// One packet: who sends it, its flags, whether it acknowledges what is expected.
    type Step = (char, u8, bool);

    fn run(steps: &[Step]) -> u32 {
        steps.iter().fold(0, |current, &(side, flags, acks)| {
            let change = if side == '>' {
                by_client(flags, current, acks)
            } else {
                by_backend(flags, current, acks, false)
            };
            current & !change.clear | change.set
        })
    }
    const OPEN: [Step; 3] = [('>', TCP_SYN, false), ('<', SYN_ACK, true), ('>', TCP_ACK, true)];
    const ESTABLISHED: u32 = state::ANSWERED | state::ESTABLISHED;

    fn after(open: &[Step], more: &[Step]) -> u32 {
        run(&[open, more].concat())
    }

    #[test]
    fn the_clients_acknowledgement_establishes_and_nothing_else_does() {
        assert_eq!(run(&OPEN[..1]), 0);
        assert_eq!(run(&OPEN[..2]), state::ANSWERED);
        assert_eq!(run(&OPEN), ESTABLISHED);
        for (flags, acks) in [
            (TCP_ACK, false),
            (TCP_RST, true),
            (SYN_ACK, true),
            (TCP_SYN, false),
            (FIN_ACK, false),
        ] {
            assert_eq!(
                after(&OPEN[..2], &[('>', flags, acks)]),
                state::ANSWERED,
                "{flags:#x}"
            );
            assert_eq!(
                after(&OPEN[..1], &[('>', flags, true)]),
                0,
                "{flags:#x}: nothing to acknowledge"
            );
        }
    }

    #[test]
    fn closing_takes_an_acknowledged_fin_of_each_side_in_any_order() {
        let closed = |steps: &[Step]| state::is_closed(after(&OPEN, steps));
        assert!(!closed(&[('>', FIN_ACK, false), ('<', FIN_ACK, true)]));
        assert!(closed(&[
            ('>', FIN_ACK, false),
            ('<', FIN_ACK, true),
            ('>', TCP_ACK, true)
        ]));
        assert!(closed(&[
            ('<', FIN_ACK, false),
            ('>', FIN_ACK, true),
            ('<', TCP_ACK, true)
        ]));
        assert!(
            !closed(&[('>', FIN_ACK, false), ('<', FIN_ACK, false), ('>', TCP_ACK, true)]),
            "a forged FIN"
        );
    }

    #[test]
    fn a_reset_is_taken_back_by_its_sender_alone() {
        let mut steps = OPEN.to_vec();
        steps.push(('>', TCP_RST, false));
        assert_eq!(run(&steps), ESTABLISHED | state::RESET_CLIENT);
        steps.push(('<', TCP_ACK, false));
        assert_eq!(run(&steps), ESTABLISHED | state::RESET_CLIENT, "data under way");
        steps.push(('>', TCP_ACK, false));
        assert_eq!(run(&steps), ESTABLISHED);
        assert!(!state::is_closed(run(&steps[..4])));
    }

    #[test]
    fn a_new_connection_of_the_backend_has_to_be_confirmed() {
        let restarted = after(
            &OPEN,
            &[
                ('>', TCP_RST, false),
                ('>', TCP_SYN, false),
                ('<', SYN_ACK, false),
            ],
        );
        assert_eq!(restarted, state::ANSWERED);
        assert_eq!(
            by_backend(SYN_ACK, ESTABLISHED, false, true),
            Change::default(),
            "one that came before"
        );
    }

    #[test]
    fn segments_of_an_open_flow_take_the_short_way_and_no_others_do() {
        assert!(is_steady(TCP_ACK, ESTABLISHED));
        assert!(is_steady(
            TCP_ACK | 0x08,
            ESTABLISHED | state::FIN_CLIENT | state::FIN_CLIENT_ACKED
        ));
        assert!(!is_steady(TCP_ACK, ESTABLISHED | state::FIN_CLIENT));
        assert!(!is_steady(TCP_ACK, state::ANSWERED));
        assert!(!is_steady(TCP_ACK, ESTABLISHED | state::RESET_BACKEND));
        for flags in [TCP_SYN, FIN_ACK, TCP_RST] {
            assert!(!is_steady(flags, ESTABLISHED));
        }
    }

    #[test]
    fn what_takes_the_short_way_would_change_nothing() {
        for flags in 0..=255_u8 {
            for low in 0..1 << 9 {
                let current = low << 8;
                // What is expected has been acknowledged, or there is nothing.
                if is_steady(flags, current) {
                    let (client, backend) = (
                        by_client(flags, current, true),
                        by_backend(flags, current, true, false),
                    );
                    for change in [client, backend] {
                        assert_eq!(
                            current & !change.clear | change.set,
                            current,
                            "{flags:#x} {current:#x}"
                        );
                    }
                }
            }
        }
    }
}
