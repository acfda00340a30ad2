//! How long a certificate is good, and when it is renewed.

use std::time::{Duration, SystemTime};

/// From when to when a certificate is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Not before.
    pub from: SystemTime,
    /// Not after.
    pub until: SystemTime,
}

// === impl Validity ===

impl Validity {
    /// That of a certificate (DER); `None` if it is none.
    pub fn of(certificate: &[u8]) -> Option<Self> {
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
        let time = |time: x509_parser::time::ASN1Time| {
            let seconds = Duration::from_secs(time.timestamp().unsigned_abs());
            if time.timestamp() < 0 {
                SystemTime::UNIX_EPOCH.checked_sub(seconds)
            } else {
                SystemTime::UNIX_EPOCH.checked_add(seconds)
            }
        };
        Some(Self {
            from: time(parsed.validity().not_before)?,
            until: time(parsed.validity().not_after)?,
        })
    }

    /// When it is renewed: so long before its end, or when a third of its time is left. A wish that is longer than its whole
    /// time is none: it would be renewed for ever.
    pub fn renew_at(self, before: Option<Duration>) -> SystemTime {
        let lifetime = self.until.duration_since(self.from).unwrap_or_default();
        let before = before.filter(|before| *before < lifetime).unwrap_or(lifetime / 3);
        self.until - before
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    #[test]
    fn the_times_are_those_in_the_certificate() {
        let mut params = CertificateParams::new(vec!["a".to_owned()]).unwrap();
        params.not_before = date_time_ymd(2026, 1, 1);
        params.not_after = date_time_ymd(2026, 4, 1);
        let made = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let validity = Validity::of(made.der()).unwrap();
        let day = Duration::from_secs(24 * 3600);
        assert_eq!(
            validity.from,
            SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600)
        );
        assert_eq!(validity.until, validity.from + 90 * day);
        assert_eq!(Validity::of(b"no certificate"), None);

        let renewed = |before| validity.renew_at(before).duration_since(validity.from).unwrap() / 86_400;
        let days = |days: u32| Duration::from_secs(days.into());
        assert_eq!(renewed(None), days(60));
        assert_eq!(renewed(Some(10 * day)), days(80));
        assert_eq!(renewed(Some(90 * day)), days(60), "not for ever");
        assert_eq!(renewed(Some(Duration::ZERO)), days(90));
    }

    #[test]
    fn a_certificate_that_ends_before_it_begins_is_due() {
        let now = SystemTime::now();
        let odd = Validity {
            from: now,
            until: now - Duration::from_secs(60),
        };
        assert_eq!(odd.renew_at(None), odd.until);
    }
}
