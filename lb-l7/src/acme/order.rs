//! One order: from a host to a certificate in the folder.

use std::time::Duration;

use instant_acme::{
    Account, AuthorizationStatus, ChallengeType, Error, Identifier, NewOrder, Order, OrderStatus, Problem,
    RetryPolicy,
};

use super::{Folder, FolderError, Validity, chain};

/// How long an order may take, the authority's visit included.
const PATIENCE: Duration = Duration::from_secs(120);
/// What RFC 8555 (6.7) puts before its kinds of problems.
const KIND: &str = "urn:ietf:params:acme:error:";

/// Why an order has failed.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// The authority, or the way to it.
    #[error("{}", chain(.0))]
    Authority(#[from] Error),
    /// It did not find what it asked for.
    #[error("{0}")]
    Unproven(Problem),
    /// It proves hosts by other means only.
    #[error("the authority offers no http-01 for it")]
    NoChallenge,
    /// Not a state that an order has at that point.
    #[error("the order is {0:?} and cannot go on")]
    Status(OrderStatus),
    /// It took too long.
    #[error("not done in {PATIENCE:?}")]
    Late,
    /// The certificate cannot be kept or used.
    #[error(transparent)]
    Folder(#[from] FolderError),
}

// === impl OrderError ===

impl OrderError {
    /// Whether the account is not known any more.
    pub fn is_of_account(&self) -> bool {
        self.kind() == Some("accountDoesNotExist")
    }

    /// What the operator does about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Unproven(_) => {
                "plain HTTP to this host at port 80 must reach a shim with this account, from where the authority asks"
            }
            Self::NoChallenge => "name a certificate in `certificates`, or choose another `directory`",
            Self::Folder(_) => "see to it, and it is tried again",
            Self::Authority(_) | Self::Status(_) | Self::Late => match self.kind() {
                Some("rateLimited") => "the authority counts orders; wait, or ask it for more",
                Some("rejectedIdentifier" | "caa" | "unsupportedIdentifier") => {
                    "the authority gives this host none; take it out of `hosts` of [l7.acme], or look at its CAA records"
                }
                Some("externalAccountRequired") => {
                    "this authority takes only accounts that it knows already; choose another `directory`"
                }
                _ => "see whether the authority can be reached and what it says of the host",
            },
        }
    }

    /// The kind of problem that the authority names.
    fn kind(&self) -> Option<&str> {
        match self {
            Self::Authority(Error::Api(problem)) | Self::Unproven(problem) => {
                problem.r#type.as_deref()?.strip_prefix(KIND)
            }
            _ => None,
        }
    }
}

/// Orders a certificate and keeps it.
pub async fn order(
    account: &Account,
    folder: &Folder,
    host: &str,
    directory: &str,
) -> Result<Validity, OrderError> {
    let (chain, key) = tokio::time::timeout(PATIENCE, ordered(account, host))
        .await
        .map_err(|_| OrderError::Late)??;
    Ok(folder.keep(host, directory, &chain, &key)?)
}

/// The chain and the key, PEM.
async fn ordered(account: &Account, host: &str) -> Result<(String, String), OrderError> {
    let names = [Identifier::Dns(host.to_owned())];
    let mut order = account.new_order(&NewOrder::new(&names)).await?;
    let retries = RetryPolicy::new().timeout(PATIENCE);
    if order.state().status == OrderStatus::Pending {
        prove(&mut order).await?;
        let ready = order.poll_ready(&retries).await;
        if !matches!(ready, Ok(OrderStatus::Ready)) {
            // Why is told where it was asked, not by the order.
            if let Some(problem) = unproven(&mut order).await {
                return Err(OrderError::Unproven(problem));
            }
            return Err(OrderError::Status(ready?));
        }
    }
    let key = match order.state().status {
        // Its key is made here and never leaves but for the folder.
        OrderStatus::Ready => order.finalize().await?,
        other => return Err(OrderError::Status(other)),
    };
    Ok((order.poll_certificate(&retries).await?, key))
}

/// Has the authority ask: the answer is there already.
async fn prove(order: &mut Order) -> Result<(), OrderError> {
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        // One from an earlier order may still count.
        if authorization.status == AuthorizationStatus::Pending {
            let challenge = authorization.challenge(ChallengeType::Http01);
            challenge.ok_or(OrderError::NoChallenge)?.set_ready().await?;
        }
    }
    Ok(())
}

/// What the authority found instead of the answer.
async fn unproven(order: &mut Order) -> Option<Problem> {
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        let state = authorization.refresh().await.ok()?;
        let mut problems = state.challenges.iter().filter_map(|c| c.error.clone());
        if let Some(problem) = problems.next() {
            return Some(problem);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(kind: &str) -> Problem {
        serde_json::from_value(serde_json::json!({ "type": format!("{KIND}{kind}"), "detail": "so it is" }))
            .unwrap()
    }

    #[test]
    fn every_fault_says_what_to_do() {
        let of = |kind: &str| OrderError::from(Error::Api(problem(kind)));
        assert!(of("accountDoesNotExist").is_of_account() && !of("rateLimited").is_of_account());
        assert!(of("rateLimited").remedy().contains("wait"));
        assert!(of("rejectedIdentifier").remedy().contains("`hosts`"));
        assert!(of("malformed").remedy().contains("reached"));
        let unproven = OrderError::Unproven(problem("connection"));
        assert!(unproven.remedy().contains("port 80") && unproven.to_string().contains("so it is"));
        assert!(OrderError::Late.to_string().contains("120s"));
    }
}
