//! etcd (API v3): one endpoint at a time, each question with a deadline of its own.
//!
//! The client library goes on sending requests to an endpoint that is dead, and a request in flight waits for as long as
//! it is let. So every connection here is a [`Session`] with one endpoint, and whoever needs another makes one:
//! [`Store`] for single questions, [`follow`] for whoever wants to know of every change under a prefix.

mod follow;
mod lease;
mod rounds;
mod session;

use std::{fmt, path::PathBuf, time::Duration};

pub use follow::{Heard, follow};
pub use lease::{Lease, Step};
pub use rounds::Rounds;
pub use session::{Change, Key, Session, Snapshot};

use crate::{
    causes::{and_causes, with_causes},
    config::EtcdConfig,
    pem::PemError,
};

/// Why an endpoint did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// A certificate or key.
    #[error(transparent)]
    Tls(#[from] PemError),
    /// A file of the connection.
    #[error("{}: {source}; `[etcd]` of the configuration names it", .path.display())]
    File { path: PathBuf, source: std::io::Error },
    /// No answer.
    #[error("{what}: no answer within {limit:?}: it is down, cut off, or without a quorum")]
    Silent { what: &'static str, limit: Duration },
    /// It said no, or the connection failed.
    #[error("{what}: {}", words(.source))]
    Refused {
        what: &'static str,
        source: etcd_client::Error,
    },
    /// Changes since the last read have been compacted away.
    #[error("what changed since revision {0} has been compacted")]
    Compacted(i64),
    /// No further answer.
    #[error("{0}: the endpoint closed the connection")]
    Closed(&'static str),
    /// The watch has ended.
    #[error("the watch has ended: {0}")]
    Ended(String),
}

/// No endpoint did what it was asked.
#[derive(Debug, thiserror::Error)]
pub struct NoEndpoint(Vec<(String, EtcdError)>);

/// The way to etcd.
#[derive(Clone, Debug)]
pub struct Store {
    config: EtcdConfig,
}

// === impl Store ===

impl Store {
    /// Of these endpoints. Nothing is connected yet.
    pub fn new(config: EtcdConfig) -> Self {
        Self { config }
    }

    /// A key below the prefix.
    pub fn key(&self, rest: &str) -> String {
        format!("{}/{rest}", self.config.prefix)
    }

    /// A session with the first endpoint that answers, and everything under a prefix as it told it.
    ///
    /// # Errors
    /// None answers: what each of them did.
    pub async fn read(&self, prefix: &str) -> Result<(Session, Snapshot), NoEndpoint> {
        let mut faults = Vec::new();
        for endpoint in &self.config.endpoints {
            let asked = async {
                let mut session = Session::open(&self.config, endpoint).await?;
                let snapshot = session.snapshot(prefix).await?;
                Ok((session, snapshot))
            };
            match asked.await {
                Ok(done) => return Ok(done),
                Err(fault) => faults.push((endpoint.clone(), fault)),
            }
        }
        Err(NoEndpoint(faults))
    }

    /// A key as it was at a revision, see [`Session::past`].
    ///
    /// # Errors
    /// No endpoint answers: what each of them did.
    pub async fn past(&self, name: &str, revision: i64) -> Result<Option<Key>, NoEndpoint> {
        let mut faults = Vec::new();
        for endpoint in &self.config.endpoints {
            let asked = async {
                let mut session = Session::open(&self.config, endpoint).await?;
                session.past(name, revision).await
            };
            match asked.await {
                Ok(answer) => return Ok(answer),
                Err(fault) => faults.push((endpoint.clone(), fault)),
            }
        }
        Err(NoEndpoint(faults))
    }
}

// === impl NoEndpoint ===

impl fmt::Display for NoEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no endpoint of etcd answers")?;
        for (at, (endpoint, fault)) in self.0.iter().enumerate() {
            let mark = if at == 0 { ": " } else { "; " };
            write!(f, "{mark}{endpoint}: {fault}")?;
        }
        Ok(())
    }
}

/// An error and its causes, without the number of a status.
fn words(error: &etcd_client::Error) -> String {
    use etcd_client::Error;
    match error {
        Error::GRpcStatus(status) => {
            and_causes(status.message().to_owned(), std::error::Error::source(status))
        }
        Error::TransportError(error) => with_causes(error),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, time::Instant};

    use super::*;
    use crate::config::Config;

    #[tokio::test]
    async fn what_every_endpoint_did_is_told_within_the_deadline_of_each() {
        // One takes connections and says nothing, one takes none.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let silent_at = silent.local_addr().unwrap();
        let text = format!(
            "interfaces = \"lo\"\n[etcd]\nendpoints = [\"http://{silent_at}\", \"http://{closed}\"]\ntimeout = \"200ms\"\n"
        );
        let config = Config::parse(std::path::Path::new("weir.toml"), &text).unwrap();
        let store = Store::new(config.etcd.unwrap());
        assert_eq!(store.key("config"), "/weir/config");
        let start = Instant::now();
        let fault = store.read("/weir/").await.err().unwrap().to_string();
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        let told = format!("http://{silent_at}: reading: no answer within 200ms");
        assert!(fault.contains(&told), "{fault}");
        assert!(
            fault.contains(&format!("http://{closed}: reading: tcp connect error")),
            "{fault}"
        );
    }
}
