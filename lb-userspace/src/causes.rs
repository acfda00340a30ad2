//! Errors with what they came from: the reason of a failed TLS handshake is the last of several.

use std::error::Error;

/// An error and its causes.
pub fn with_causes(error: &dyn Error) -> String {
    and_causes(error.to_string(), error.source())
}

/// A text, and what it came from. A cause that the text before it ends with is not said again: some libraries repeat theirs.
pub fn and_causes(text: String, cause: Option<&(dyn Error + 'static)>) -> String {
    let mut all = text;
    let mut last = all.clone();
    let mut next = cause;
    while let Some(cause) = next {
        let more = cause.to_string();
        if !last.ends_with(&more) {
            all = format!("{all}: {more}");
        }
        last = more;
        next = cause.source();
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Fault {
        #[error("{0}")]
        Last(&'static str),
        #[error("{0}")]
        Plain(&'static str, #[source] Box<Fault>),
        #[error("{0}: {1}")]
        Repeating(&'static str, #[source] Box<Fault>),
    }

    #[test]
    fn every_cause_is_said_once() {
        let last = || Box::new(Fault::Last("unknown issuer"));
        assert_eq!(with_causes(&*last()), "unknown issuer");
        let connect = || Box::new(Fault::Plain("connect", last()));
        assert_eq!(with_causes(&*connect()), "connect: unknown issuer");
        let repeating = Fault::Repeating("client", connect());
        assert_eq!(with_causes(&repeating), "client: connect: unknown issuer");
        let same = Fault::Plain("connect", connect());
        assert_eq!(with_causes(&same), "connect: unknown issuer");
    }
}
