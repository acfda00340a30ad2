//! Keys that live no longer than whoever wrote them.

use std::time::Duration;

use etcd_client::{LeaseKeepAliveStream, LeaseKeeper, PutOptions, Txn, TxnOp};

use super::{
    EtcdError, Session,
    session::{status_of, within},
};

/// gRPC's status of a lease that the store does not have (any more).
const NOT_FOUND: i32 = 5;

/// A lease, and the way to keep it alive.
pub struct Lease {
    id: i64,
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
    timeout: Duration,
}

/// Keys to write and keys to delete, in one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Key and text.
    pub put: Vec<(String, String)>,
    /// Keys; none of `put`.
    pub delete: Vec<String>,
}

// === impl Lease ===

impl Lease {
    /// Its id in the store.
    pub fn id(&self) -> i64 {
        self.id
    }

    /// Has it live for its whole time again. `false`: the store does not have it any more, nor the keys under it.
    ///
    /// # Errors
    /// See [`EtcdError`].
    pub async fn renew(&mut self) -> Result<bool, EtcdError> {
        let what = "renewing the lease";
        let answer = within(self.timeout, what, async {
            self.keeper.keep_alive().await?;
            self.answers.message().await
        });
        match answer.await? {
            Some(answer) => Ok(answer.ttl() > 0),
            None => Err(EtcdError::Closed(what)),
        }
    }
}

// === impl Session ===

impl Session {
    /// A new lease that lives for at least `ttl` (whole seconds) after each renewal.
    ///
    /// # Errors
    /// See [`EtcdError`].
    pub async fn grant(&mut self, ttl: Duration) -> Result<Lease, EtcdError> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        let mut client = self.client.lease_client();
        let granted = within(self.timeout, "asking for a lease", client.grant(seconds, None)).await?;
        self.keep(granted.id()).await
    }

    /// The lease of this id; `None`: the store does not have it.
    ///
    /// # Errors
    /// See [`EtcdError`].
    pub async fn lease(&mut self, id: i64) -> Result<Option<Lease>, EtcdError> {
        let mut client = self.client.lease_client();
        let asked = within(
            self.timeout,
            "asking for the lease",
            client.time_to_live(id, None),
        )
        .await?;
        if asked.ttl() <= 0 {
            return Ok(None);
        }
        self.keep(id).await.map(Some)
    }

    async fn keep(&mut self, id: i64) -> Result<Lease, EtcdError> {
        let mut client = self.client.lease_client();
        let (keeper, answers) = within(self.timeout, "renewing the lease", client.keep_alive(id)).await?;
        Ok(Lease {
            id,
            keeper,
            answers,
            timeout: self.timeout,
        })
    }

    /// Ends a lease, and with it the keys under it.
    ///
    /// # Errors
    /// See [`EtcdError`].
    pub async fn revoke(&mut self, lease: &Lease) -> Result<(), EtcdError> {
        let mut client = self.client.lease_client();
        within(self.timeout, "ending the lease", client.revoke(lease.id)).await?;
        Ok(())
    }

    /// Writes keys under a lease, and deletes keys, all or nothing. `false`: nothing, since the lease is gone.
    ///
    /// # Errors
    /// See [`EtcdError`]. After [`EtcdError::Silent`] it may have been done.
    pub async fn write(&mut self, lease: &Lease, step: &Step) -> Result<bool, EtcdError> {
        let puts = step.put.iter().map(|(key, text)| {
            let options = PutOptions::new().with_lease(lease.id);
            TxnOp::put(key.as_str(), text.as_str(), Some(options))
        });
        let deletes = step.delete.iter().map(|key| TxnOp::delete(key.as_str(), None));
        let txn = Txn::new().and_then(puts.chain(deletes).collect::<Vec<_>>());
        match within(self.timeout, "writing", self.kv.txn(txn)).await {
            Ok(_) => Ok(true),
            Err(fault) if status_of(&fault) == Some(NOT_FOUND) => Ok(false),
            Err(fault) => Err(fault),
        }
    }
}
