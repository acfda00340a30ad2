//! Why a route is refused, and what to do about it.

use crate::{
    config::value::{self, ValueError},
    route::RouteAddress,
    source::labels::Refusal,
};

/// Why a route is refused. `Display` is the fault, [`Fault::remedy`] what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A value that is read as everywhere in Weir.
    #[error("{0}")]
    Value(#[from] ValueError),
    /// The container cannot be reached.
    #[error("{0}")]
    Place(#[from] Refusal),
    /// No label names the host.
    #[error("no label names the host, so that nothing is routed here")]
    NoHost {
        label: String,
        instead_of: Option<String>,
    },
    /// Not a host name.
    #[error("`{0}` is not a host name")]
    Host(String),
    /// Not a path.
    #[error("`{0}` is not a path")]
    Path(String),
    /// Not a number of milliseconds.
    #[error("`{0}` is not a number of milliseconds")]
    Interval(String),
    /// Not a check that can be made.
    #[error("`{0}` is not a health check")]
    HealthCheck(String),
    /// Not a way to balance.
    #[error("`{0}` is not a balance algorithm")]
    Balance(String),
    /// A file outside the folder of certificates.
    #[error("`{0}` is not a file in the folder of certificates")]
    File(String),
    /// Not the name of a cookie.
    #[error("`{0}` is not the name of a cookie")]
    Cookie(String),
    /// Not a list of redirects.
    #[error("`{0}` is not a redirect")]
    Redirect(String),
    /// Two sets of labels of one container claim the same.
    #[error("{0} is claimed by other labels of the same container")]
    Twice(RouteAddress),
}

impl Fault {
    /// What to do; `prefix` is what the labels of this family begin with.
    pub fn remedy(&self, prefix: &str) -> String {
        match self {
            Self::Value(error) => error.remedy(),
            Self::Place(refusal) => refusal.remedy(prefix),
            Self::NoHost {
                label,
                instead_of: Some(slip),
            } => format!("did you mean `{label}` by `{slip}`?"),
            Self::NoHost { label, .. } => format!("add the label {label}"),
            Self::Host(text) if text.contains("://") => "write the host name alone, without `http://`".into(),
            Self::Host(text) if text.contains(':') => {
                "write the host name without a port: every port of the shim serves it".into()
            }
            Self::Host(_) => "write a name such as `vote.example.com` or `*.apps.example.com`".into(),
            Self::Path(_) => "write a path that begins with `/` and has no query: `/shop`".into(),
            Self::Interval(_) => "write milliseconds, without a unit: `5000`".into(),
            Self::HealthCheck(_) => "write `httpchk GET /ping`, or leave it out: TCP is checked then".into(),
            Self::Balance(text) => match value::nearest(text, super::option::ALGORITHMS) {
                Some(word) => format!("did you mean `{word}`?"),
                None => format!("write one of: {}", super::option::ALGORITHMS.join(", ")),
            },
            Self::File(_) => "write a name such as `vote.pem`: it is looked up in l7.certificates".into(),
            Self::Cookie(_) => "write a name of letters, digits, `-` and `_`".into(),
            Self::Redirect(_) => {
                "write what is asked for and what is answered: `http://old.example.com,http://new.example.com`; several with `;`"
                    .into()
            }
            Self::Twice(_) => "keep one family of labels".into(),
        }
    }
}
