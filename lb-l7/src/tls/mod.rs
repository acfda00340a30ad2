//! TLS towards clients: which certificate for which name, and which names are passed on as they are.

use std::{path::PathBuf, sync::Arc};

use lb_route::{State, TlsVersion};
use rustls::{
    ServerConfig,
    server::{ClientHello, ProducesTickets},
    version,
};

mod certificates;
mod folders;
pub mod hello;
pub mod passthrough;
mod provider;
mod watch;

pub use certificates::{Certificates, Fault, pair_of_file};
pub use provider::{client, provider};
pub use watch::follow;

use crate::acme::{Folder, Wanted};

/// What TLS listeners serve by.
#[derive(Clone, Debug)]
pub struct Tls {
    /// For clients that do AES as fast as we: our order of ciphers counts.
    config: Arc<ServerConfig>,
    /// For the others: theirs does.
    for_chacha: Arc<ServerConfig>,
    /// What could not be read.
    pub faults: Vec<Fault>,
    /// Whether certificates or faults are others than those before.
    pub is_news: bool,
    /// What ACME has to do beside these certificates.
    pub acme: Arc<Wanted>,
}

/// Makes [`Tls`] of states, and remembers what has to outlive them.
#[derive(Debug)]
pub struct Maker {
    tickets: Option<Arc<dyn ProducesTickets>>,
    last: Certificates,
    /// What was wrong with them; `None` before the first time.
    told: Option<Vec<Fault>>,
    /// Where the certificates of ACME are.
    acme: Option<Folder>,
}

// === impl Maker ===

impl Maker {
    /// Sessions that it lets clients resume are resumed after every change.
    pub fn new() -> Self {
        Self {
            tickets: rustls::crypto::ring::Ticketer::new().ok(),
            last: Certificates::default(),
            told: None,
            acme: None,
        }
    }

    /// The same, with the folder of ACME.
    pub fn with_acme(self, folder: Option<Folder>) -> Self {
        Self { acme: folder, ..self }
    }

    /// Reads the certificates that a state names. What cannot be read now, and could before, stays as it was.
    pub fn make(&mut self, state: &State) -> Result<Tls, rustls::Error> {
        let (certificates, faults) = Certificates::read(state, &self.last, self.acme.as_ref());
        let acme = Arc::new(certificates.wanted(state));
        let is_news = self.told.as_ref() != Some(&faults) || !certificates.is_same(&self.last);
        self.told = Some(faults.clone());
        self.last = certificates.clone();
        let versions: &[_] = match state.settings.min_tls {
            TlsVersion::Tls12 => &[&version::TLS13, &version::TLS12],
            TlsVersion::Tls13 => &[&version::TLS13],
        };
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(certificates));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        if let Some(tickets) = &self.tickets {
            config.ticketer = Arc::clone(tickets);
        }
        // Each resumed session gives another one.
        config.send_tls13_tickets = 1;
        let for_chacha = Arc::new(config.clone());
        config.ignore_client_order = true;
        Ok(Tls {
            config: Arc::new(config),
            for_chacha,
            faults,
            is_news,
            acme,
        })
    }

    /// The files and folders that a state's certificates come from. The folder of ACME is made here if it is to be used:
    /// what is not there cannot be watched.
    fn sources(&self, state: &State) -> Vec<PathBuf> {
        let settings = &state.settings;
        let acme = self.acme.iter().filter(|folder| {
            // Why it cannot be made is told by the orders.
            settings.acme.is_some() && folder.create().is_ok()
        });
        settings
            .certificates
            .iter()
            .chain(&settings.default_certificate)
            .cloned()
            .chain(acme.map(|folder| folder.path().to_owned()))
            .collect()
    }
}

// === impl Tls ===

impl Tls {
    /// What this client is served by.
    pub fn config(&self, hello: &ClientHello<'_>) -> Arc<ServerConfig> {
        Arc::clone(match provider::prefers_chacha(hello.cipher_suites()) {
            true => &self.for_chacha,
            false => &self.config,
        })
    }
}

impl Default for Maker {
    fn default() -> Self {
        Self::new()
    }
}
