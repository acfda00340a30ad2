//! The account at the authority: made once, kept in the folder, the same for every shim that has its file.

use std::{fmt, sync::Arc};

use instant_acme::{Account, AccountCredentials, Key, NewAccount};
use lb_route::Acme;
use rustls::pki_types::PrivateKeyDer;
use serde::{Deserialize, Serialize};

use super::{
    Folder, FolderError, chain,
    client::{ClientError, Http},
};

/// The file of the account.
#[derive(Serialize, Deserialize)]
struct Kept {
    /// Where it is an account.
    directory: String,
    /// Of its key: known before the authority is asked for anything, and to shims that never ask it.
    thumbprint: String,
    /// As the authority was told last.
    contact: Vec<String>,
    /// With the key.
    account: AccountCredentials,
}

/// Why there is no account to order with.
#[derive(Debug, thiserror::Error)]
pub enum AccountError {
    /// The operator's word is missing.
    #[error("the authority's terms are not agreed to; read them, and set `agree-terms = true` of [l7.acme]")]
    Terms,
    /// The folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The file of the account.
    #[error("{file}: {source}; put the right file back, or remove it and a new account is made")]
    Text {
        /// Its path.
        file: String,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// The client.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The authority, or the way to it.
    #[error("no account at {directory}: {fault}")]
    Authority {
        /// Its directory.
        directory: String,
        /// What it said.
        fault: String,
    },
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No keys in any log.
        f.debug_struct("Kept")
            .field("directory", &self.directory)
            .field("thumbprint", &self.thumbprint)
            .finish_non_exhaustive()
    }
}

/// The thumbprint of the account in the folder; `None`: there is no account yet.
pub fn thumbprint(folder: &Folder) -> Result<Option<Arc<str>>, AccountError> {
    Ok(read(folder)?.map(|kept| kept.thumbprint.into()))
}

/// The account in the folder, or a new one, which is kept there. Only who has the folder's lock may call it.
pub async fn open(folder: &Folder, settings: &Acme) -> Result<Account, AccountError> {
    let contact: Vec<String> = settings.contact.iter().map(|to| format!("mailto:{to}")).collect();
    let contacts: Vec<&str> = contact.iter().map(String::as_str).collect();
    let told = fault_of(settings);
    if let Some(mut kept) = read(folder)? {
        if kept.directory == settings.directory {
            let credentials = again(&kept.account).map_err(|source| text(folder, source))?;
            let account = builder(settings)?
                .from_credentials(credentials)
                .await
                .map_err(told)?;
            if kept.contact != contact {
                account.update_contacts(&contacts).await.map_err(told)?;
                kept.contact = contact;
                keep(folder, &kept)?;
            }
            return Ok(account);
        }
        let away = folder.put_account_away()?;
        tracing::info!(
            directory = kept.directory,
            file = %away.display(),
            "the account of another directory is put away"
        );
    }
    let new = NewAccount {
        contact: &contacts,
        terms_of_service_agreed: settings.agree_terms,
        only_return_existing: false,
    };
    let made = builder(settings)?.create(&new, settings.directory.clone(), None);
    let (account, credentials) = made.await.map_err(told)?;
    let kept = Kept {
        directory: settings.directory.clone(),
        thumbprint: account.key_thumbprint().into(),
        contact,
        account: credentials,
    };
    keep(folder, &kept)?;
    tracing::info!(directory = settings.directory, "a new account");
    Ok(account)
}

/// Registers the account of the folder again, with the same key: the authority does not know it any more.
pub async fn again_at_authority(folder: &Folder, settings: &Acme) -> Result<Account, AccountError> {
    let Some(mut kept) = read(folder)? else {
        return open(folder, settings).await;
    };
    let told = fault_of(settings);
    let pkcs8 = kept.account.private_key();
    let key = Key::from_pkcs8_der(pkcs8.clone_key()).map_err(told)?;
    let pair = (key, PrivateKeyDer::Pkcs8(pkcs8.clone_key()));
    let made = builder(settings)?.create_from_key(pair, settings.directory.clone());
    let (_, credentials) = made.await.map_err(told)?;
    kept.account = credentials;
    // They are told by what follows.
    kept.contact = Vec::new();
    keep(folder, &kept)?;
    tracing::info!(directory = settings.directory, "the account is registered again");
    open(folder, settings).await
}

fn builder(settings: &Acme) -> Result<instant_acme::AccountBuilder, AccountError> {
    let http = Http::new(settings.ca.as_deref())?;
    Ok(Account::builder_with_http(Box::new(http)))
}

fn fault_of(settings: &Acme) -> impl Fn(instant_acme::Error) -> AccountError + Copy {
    |error| {
        let directory = settings.directory.clone();
        let fault = chain(&error);
        // It may begin with the same URL.
        let fault = match fault.strip_prefix(&format!("{directory}: ")) {
            Some(rest) => rest.to_owned(),
            None => fault,
        };
        AccountError::Authority { directory, fault }
    }
}

fn text(folder: &Folder, source: serde_json::Error) -> AccountError {
    AccountError::Text {
        file: folder.account().display().to_string(),
        source,
    }
}

fn read(folder: &Folder) -> Result<Option<Kept>, AccountError> {
    let Some(bytes) = folder.read_account()? else {
        return Ok(None);
    };
    let kept = serde_json::from_slice(&bytes).map_err(|source| text(folder, source))?;
    Ok(Some(kept))
}

fn keep(folder: &Folder, kept: &Kept) -> Result<(), AccountError> {
    let bytes = serde_json::to_vec_pretty(kept).map_err(|source| text(folder, source))?;
    Ok(folder.keep_account(&bytes)?)
}

/// The library takes what it is given; the file is written anew with it.
fn again(credentials: &AccountCredentials) -> Result<AccountCredentials, serde_json::Error> {
    serde_json::from_value(serde_json::to_value(credentials)?)
}
