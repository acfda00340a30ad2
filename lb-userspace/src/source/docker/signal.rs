//! Signals as Docker writes them: `15`, `TERM`, `SIGTERM`.

use nix::sys::signal::Signal;

/// What `docker stop` sends to a container that names no signal of its own.
pub const TERM: u8 = Signal::SIGTERM as u8;
/// Ends a container whatever it wishes.
pub const KILL: u8 = Signal::SIGKILL as u8;
/// First real-time signal as Docker counts them (glibc keeps 32 and 33 for itself).
const RTMIN: u8 = 34;
/// Last real-time signal.
const RTMAX: u8 = 64;

/// The number of a signal; `None` when there is no such signal.
pub fn number(text: &str) -> Option<u8> {
    let text = text.trim().to_ascii_uppercase();
    if let Ok(number) = text.parse::<u8>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let name = text.strip_prefix("SIG").unwrap_or(&text);
    if let Some(rest) = name.strip_prefix("RTMIN") {
        let offset: u8 = if rest.is_empty() {
            0
        } else {
            rest.strip_prefix('+')?.parse().ok()?
        };
        return RTMIN.checked_add(offset).filter(|number| *number <= RTMAX);
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        let offset: u8 = if rest.is_empty() {
            0
        } else {
            rest.strip_prefix('-')?.parse().ok()?
        };
        return RTMAX.checked_sub(offset).filter(|number| *number >= RTMIN);
    }
    let signal: Signal = format!("SIG{name}").parse().ok()?;
    u8::try_from(signal as i32).ok()
}

/// Whether this signal means that the container is going.
pub fn stops(signal: u8, stop_signal: u8) -> bool {
    signal == stop_signal || signal == KILL
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_signal() {
        for (text, want) in [
            ("15", Some(15)),
            ("TERM", Some(15)),
            ("SIGTERM", Some(15)),
            ("sigterm", Some(15)),
            ("QUIT", Some(3)),
            ("SIGQUIT", Some(3)),
            ("9", Some(9)),
            ("SIGHUP", Some(1)),
            ("SIGUSR1", Some(10)),
            ("SIGWINCH", Some(28)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMIN", Some(34)),
            ("SIGRTMAX-1", Some(63)),
            ("SIGRTMIN+99", None),
            ("0", None),
            ("65", None),
            ("", None),
            ("SIG", None),
            ("SIGNAL", None),
        ] {
            assert_eq!(number(text), want, "{text}");
        }
    }

    #[test]
    fn only_the_stop_signal_and_kill_stop() {
        let quit = number("SIGQUIT").unwrap();
        assert!(stops(TERM, TERM) && stops(quit, quit) && stops(KILL, quit));
        assert!(!stops(TERM, quit), "nginx images stop by QUIT");
        assert!(!stops(number("HUP").unwrap(), TERM));
    }
}
