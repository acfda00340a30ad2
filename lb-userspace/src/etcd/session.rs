//! One connection with one endpoint.

use std::{fs, io, path::Path, time::Duration};

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, GetOptions, Identity, KvClient, SortOrder,
    SortTarget, TlsOptions, Txn, TxnOp, WatchOptions, WatchStream,
};

use super::EtcdError;
use crate::{config::EtcdConfig, pem};

/// Keys read at once.
const PAGE: i64 = 1000;
/// Largest answer: etcd's own limit of a value, 1.5 MiB, for a few keys of a page, or a page of ordinary ones.
const LARGEST_ANSWER: usize = 64 << 20;

/// gRPC's status of a revision that is compacted.
const OUT_OF_RANGE: i32 = 11;

/// One key, its text, and its age.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Name.
    pub name: String,
    /// Value; what is no UTF-8 is replaced by U+FFFD.
    pub text: String,
    /// Revision of the store when the key was made: the same on every node.
    pub created: i64,
    /// Revision of the store when it last changed.
    pub revision: i64,
    /// The lease that it lives under; 0: none.
    pub lease: i64,
}

/// Everything under a prefix at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Of which cluster.
    pub cluster: u64,
    /// At which revision.
    pub revision: i64,
    /// In the order of their names.
    pub keys: Vec<Key>,
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// New, or another text.
    Put(Key),
    /// Gone.
    Delete { name: String, revision: i64 },
}

/// A connection with one endpoint.
pub struct Session {
    pub(super) client: Client,
    pub(super) kv: KvClient,
    pub(super) timeout: Duration,
}

// === impl Session ===

impl Session {
    /// Connects. Files are read anew, so that renewed certificates are used.
    ///
    /// # Errors
    /// A file cannot be read, or the endpoint does not let us in. An endpoint that is not there is noticed by the first
    /// question unless there is a user.
    pub async fn open(config: &EtcdConfig, endpoint: &str) -> Result<Self, EtcdError> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(config.timeout)
            .with_require_leader(true);
        if let Some(tls) = &config.tls
            && endpoint.starts_with("https://")
        {
            let identity = tls.identity.as_ref();
            pem::check(&tls.ca, identity.map(|(cert, key)| (&**cert, &**key)))?;
            let mut files = TlsOptions::new().ca_certificate(Certificate::from_pem(read(&tls.ca)?));
            if let Some((cert, key)) = &tls.identity {
                files = files.identity(Identity::from_pem(read(cert)?, read(key)?));
            }
            options = options.with_tls(files);
        }
        if let Some((user, file)) = &config.login {
            let password = String::from_utf8(read(file)?).map_err(|_| EtcdError::File {
                path: file.clone(),
                source: io::Error::new(io::ErrorKind::InvalidData, "is not UTF-8"),
            })?;
            options = options
                .with_user(user, password.trim_end_matches(['\r', '\n']))
                .with_auto_token_refresh(true);
        }
        let client = within(
            config.timeout,
            "connecting",
            Client::connect([endpoint], Some(options)),
        )
        .await?;
        let kv = client.kv_client().max_decoding_message_size(LARGEST_ANSWER);
        Ok(Self {
            client,
            kv,
            timeout: config.timeout,
        })
    }

    /// Everything under a prefix, at one revision. A quorum has agreed that this is the present.
    ///
    /// # Errors
    /// See [`EtcdError`]; each page has its own deadline.
    pub async fn snapshot(&mut self, prefix: &str) -> Result<Snapshot, EtcdError> {
        let end = after_prefix(prefix);
        let mut from = prefix.as_bytes().to_vec();
        let mut found: Option<Snapshot> = None;
        loop {
            let mut options = GetOptions::new()
                .with_range(end.clone())
                .with_limit(PAGE)
                .with_sort(SortTarget::Key, SortOrder::Ascend);
            if let Some(first) = &found {
                options = options.with_revision(first.revision);
            }
            let asked = self.kv.get(from, Some(options));
            let answer = within(self.timeout, "reading", asked).await?;
            let header = answer.header();
            let snapshot = found.get_or_insert_with(|| Snapshot {
                cluster: header.map_or(0, |h| h.cluster_id()),
                revision: header.map_or(0, |h| h.revision()),
                keys: Vec::new(),
            });
            snapshot.keys.extend(answer.kvs().iter().map(key));
            match answer.kvs().last().filter(|_| answer.more()) {
                Some(last) => from = [last.key(), &[0]].concat(),
                None => break,
            }
        }
        // The loop ends after an answer, which made one.
        Ok(found.unwrap_or(Snapshot {
            cluster: 0,
            revision: 0,
            keys: Vec::new(),
        }))
    }

    /// A key as it was at a revision; `None`: it was not there, or that has been compacted.
    ///
    /// # Errors
    /// See [`EtcdError`].
    pub async fn past(&mut self, name: &str, revision: i64) -> Result<Option<Key>, EtcdError> {
        let options = GetOptions::new().with_revision(revision);
        match within(self.timeout, "reading the past", self.kv.get(name, Some(options))).await {
            Ok(answer) => Ok(answer.kvs().first().map(key)),
            Err(fault) if status_of(&fault) == Some(OUT_OF_RANGE) => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// Asks for one key, which needs a quorum: proof that what was heard is the present. The store's revision.
    ///
    /// # Errors
    /// See [`EtcdError`].
    pub(super) async fn prove(mut kv: KvClient, timeout: Duration, name: String) -> Result<i64, EtcdError> {
        let options = GetOptions::new().with_keys_only();
        let answer = within(timeout, "asking for a sign of life", kv.get(name, Some(options))).await?;
        Ok(answer.header().map_or(0, |header| header.revision()))
    }

    /// What [`Session::prove`] asks with.
    pub(super) fn kv(&self) -> KvClient {
        self.kv.clone()
    }

    /// Writes a text if the key is at this revision (0: is not there). The new revision, or `None`: it is at another one.
    ///
    /// # Errors
    /// See [`EtcdError`]. After [`EtcdError::Silent`] it may have been written.
    pub async fn put_if(&mut self, name: &str, text: &str, revision: i64) -> Result<Option<i64>, EtcdError> {
        self.change_if(name, TxnOp::put(name, text, None), revision).await
    }

    /// Deletes a key if it is at this revision. As [`Session::put_if`].
    ///
    /// # Errors
    /// As [`Session::put_if`].
    pub async fn delete_if(&mut self, name: &str, revision: i64) -> Result<Option<i64>, EtcdError> {
        self.change_if(name, TxnOp::delete(name, None), revision).await
    }

    async fn change_if(&mut self, name: &str, op: TxnOp, revision: i64) -> Result<Option<i64>, EtcdError> {
        let unchanged = Compare::mod_revision(name, CompareOp::Equal, revision);
        let txn = Txn::new().when([unchanged]).and_then([op]);
        let answer = within(self.timeout, "writing", self.kv.txn(txn)).await?;
        let revision = answer.header().map_or(0, |header| header.revision());
        Ok(answer.succeeded().then_some(revision))
    }

    /// Watches everything under a prefix from a revision on.
    ///
    /// # Errors
    /// See [`EtcdError`].
    pub async fn watch(&mut self, prefix: &str, from: i64) -> Result<WatchStream, EtcdError> {
        let options = WatchOptions::new()
            .with_range(after_prefix(prefix))
            .with_start_revision(from);
        let mut watch = self
            .client
            .watch_client()
            .max_decoding_message_size(LARGEST_ANSWER);
        within(self.timeout, "watching", watch.watch(prefix, Some(options))).await
    }
}

/// A key as the library has it.
pub(super) fn key(kv: &etcd_client::KeyValue) -> Key {
    Key {
        name: String::from_utf8_lossy(kv.key()).into_owned(),
        text: String::from_utf8_lossy(kv.value()).into_owned(),
        created: kv.create_revision(),
        revision: kv.mod_revision(),
        lease: kv.lease(),
    }
}

/// The end of the range of all keys with a prefix. Prefixes are ASCII: the last byte can be one more.
fn after_prefix(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// gRPC's status, if that is what the endpoint answered.
pub(super) fn status_of(fault: &EtcdError) -> Option<i32> {
    match fault {
        EtcdError::Refused {
            source: etcd_client::Error::GRpcStatus(status),
            ..
        } => Some(status.code().into()),
        _ => None,
    }
}

/// An answer within the deadline.
pub(super) async fn within<T>(
    limit: Duration,
    what: &'static str,
    work: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, EtcdError> {
    match tokio::time::timeout(limit, work).await {
        Ok(answer) => answer.map_err(|source| EtcdError::Refused { what, source }),
        Err(_) => Err(EtcdError::Silent { what, limit }),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, EtcdError> {
    fs::read(path).map_err(|source| EtcdError::File {
        path: path.to_owned(),
        source,
    })
}
