//! Cryptography of TLS: ring's, but for the one operation in which another library is twice as fast.

use std::sync::{Arc, LazyLock};

use aws_lc_rs::{
    agreement::{self, EphemeralPrivateKey, UnparsedPublicKey},
    rand::SystemRandom,
};
use rustls::{
    CipherSuite, ClientConfig, ConfigBuilder, Error, NamedGroup, PeerMisbehaved, WantsVerifier,
    crypto::{ActiveKeyExchange, CryptoProvider, GetRandomFailed, SharedSecret, SupportedKxGroup, ring},
};

/// What TLS is spoken by, towards clients and upstreams.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let mut provider = ring::default_provider();
    for group in &mut provider.kx_groups {
        if group.name() == NamedGroup::X25519 {
            *group = &X25519;
        }
    }
    // AES with keys of 128 bits before those of 256: as safe for TLS, and its SHA-256 is done by the processor.
    provider.cipher_suites.sort_by_key(|suite| rank(suite.suite()));
    Arc::new(provider)
});

/// See [`PROVIDER`].
pub fn provider() -> Arc<CryptoProvider> {
    Arc::clone(&PROVIDER)
}

/// A client of TLS 1.2 and later.
///
/// # Errors
/// None with these ciphers.
pub fn client() -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, Error> {
    ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()
}

/// Where a cipher suite stands within its version of TLS.
fn rank(suite: CipherSuite) -> (bool, u8) {
    use CipherSuite as C;
    let is_old = suite.as_str().is_some_and(|name| name.contains("ECDHE"));
    let place = match suite {
        C::TLS13_AES_128_GCM_SHA256
        | C::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
        | C::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => 0,
        C::TLS13_AES_256_GCM_SHA384
        | C::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384
        | C::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 => 1,
        _ => 2,
    };
    (is_old, place)
}

/// Whether a client would rather have ChaCha20, as those do whose processor has nothing for AES.
pub fn prefers_chacha(offered: &[CipherSuite]) -> bool {
    let place = |is: fn(&str) -> bool| {
        let mut names = offered.iter().map(|suite| suite.as_str().unwrap_or_default());
        names.position(is)
    };
    match (
        place(|name| name.contains("CHACHA20")),
        place(|name| name.contains("AES_")),
    ) {
        (Some(chacha), Some(aes)) => chacha < aes,
        (chacha, _) => chacha.is_some(),
    }
}

/// X25519 (RFC 7748).
#[derive(Debug)]
struct X25519;

impl SupportedKxGroup for X25519 {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        let key = EphemeralPrivateKey::generate(&agreement::X25519, &SystemRandom::new());
        let key = key.map_err(|_| GetRandomFailed)?;
        let public = key.compute_public_key().map_err(|_| GetRandomFailed)?;
        Ok(Box::new(Exchange { key, public }))
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::X25519
    }
}

/// One agreement under way.
struct Exchange {
    key: EphemeralPrivateKey,
    public: agreement::PublicKey,
}

impl ActiveKeyExchange for Exchange {
    fn complete(self: Box<Self>, peer: &[u8]) -> Result<SharedSecret, Error> {
        let wrong = PeerMisbehaved::InvalidKeyShare;
        // Refuses what is not 32 bytes, and a result of zeros (RFC 8446, 7.4.2).
        let peer = UnparsedPublicKey::new(&agreement::X25519, peer);
        agreement::agree_ephemeral(self.key, peer, wrong.into(), |secret| {
            Ok(SharedSecret::from(secret))
        })
    }

    fn pub_key(&self) -> &[u8] {
        self.public.as_ref()
    }

    fn group(&self) -> NamedGroup {
        NamedGroup::X25519
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_libraries_agree() {
        let other = ring::kx_group::X25519;
        let (ours, theirs) = (X25519.start().unwrap(), other.start().unwrap());
        let (public, peer) = (ours.pub_key().to_vec(), theirs.pub_key().to_vec());
        let ours = ours.complete(&peer).unwrap();
        let theirs = theirs.complete(&public).unwrap();
        assert_eq!(ours.secret_bytes(), theirs.secret_bytes());
    }

    #[test]
    fn keys_that_are_none_are_refused() {
        for wrong in [&[0; 32][..], &[9; 31], &[9; 33], &[]] {
            let refused = X25519.start().unwrap().complete(wrong).map(|_| ());
            assert_eq!(
                refused,
                Err(PeerMisbehaved::InvalidKeyShare.into()),
                "{} bytes",
                wrong.len()
            );
        }
    }

    #[test]
    fn the_cheap_cipher_comes_first_and_none_is_lost() {
        let suites: Vec<_> = provider().cipher_suites.iter().map(|s| s.suite()).collect();
        assert_eq!(suites.len(), ring::default_provider().cipher_suites.len());
        assert_eq!(
            suites[..3],
            [
                CipherSuite::TLS13_AES_128_GCM_SHA256,
                CipherSuite::TLS13_AES_256_GCM_SHA384,
                CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
            ]
        );
        assert!(
            provider()
                .kx_groups
                .iter()
                .any(|g| g.name() == NamedGroup::X25519)
        );
    }

    #[test]
    fn clients_without_aes_are_known_by_their_order() {
        use CipherSuite as C;
        let (aes, chacha) = (C::TLS13_AES_128_GCM_SHA256, C::TLS13_CHACHA20_POLY1305_SHA256);
        assert!(prefers_chacha(&[C::Unknown(0x2a2a), chacha, aes]));
        assert!(prefers_chacha(&[chacha]));
        assert!(!prefers_chacha(&[aes, chacha]));
        assert!(!prefers_chacha(&[]));
    }
}
