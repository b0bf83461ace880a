//! What certificates say of themselves: from when to when they are good, whose they are, and what makes one unusable.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::CertificateDer;
use x509_parser::{
    certificate::X509Certificate, parse_x509_certificate, public_key::PublicKey, x509::X509Version,
};

use crate::limits::TLS_EXPIRY_WARNING;

/// When certificates are good: all of a chain, or the one that is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Validity {
    /// Unix times.
    pub(super) from: i64,
    pub(super) to: i64,
}

/// Reads a certificate. The error is a sentence.
fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, String> {
    match parse_x509_certificate(der) {
        Ok((_, certificate)) => Ok(certificate),
        Err(error) => Err(format!("a certificate of it is damaged: {error}")),
    }
}

/// From when to when every certificate of a chain is good.
pub(super) fn validity(chain: &[CertificateDer<'_>]) -> Result<Validity, String> {
    let mut all = Validity { from: i64::MIN, to: i64::MAX };
    for der in chain {
        let certificate = parse(der)?;
        let one = certificate.validity();
        all.from = all.from.max(one.not_before.timestamp());
        all.to = all.to.min(one.not_after.timestamp());
    }
    Ok(all)
}

/// What keeps the first certificate of a chain from being a server's, if it is told by itself.
pub(super) fn unusable(chain: &[CertificateDer<'_>]) -> Result<Option<String>, String> {
    let Some(own) = chain.first() else { return Ok(None) };
    let own = parse(own)?;
    if own.version() != X509Version::V3 {
        return Ok(Some(V1.into()));
    }
    let small = match own.public_key().parsed() {
        Ok(PublicKey::RSA(key)) if key.key_size() < 2048 => {
            Some(format!("its RSA key has {} bits; TLS needs at least 2048", key.key_size()))
        }
        _ => None,
    };
    Ok(small)
}

const V1: &str = "it is an X.509 certificate of version 1, which TLS libraries do not take; \
                  make one of version 3 (`openssl req -x509` does, and `openssl x509 -req` with \
                  -extfile)";

/// A sentence for a CA that cannot be used.
pub(super) fn unusable_ca(der: &CertificateDer<'_>) -> Option<String> {
    let certificate = parse(der).ok()?;
    (certificate.version() != X509Version::V3).then(|| V1.into())
}

/// The number of the first certificate that the next one of the chain has not signed, by their names, counted from 1.
pub(super) fn first_gap(chain: &[CertificateDer<'_>]) -> Option<usize> {
    let names = |der| {
        let certificate = parse(der).ok()?;
        Some((certificate.issuer().as_raw().to_vec(), certificate.subject().as_raw().to_vec()))
    };
    let gap = chain.windows(2).position(|pair| {
        let [Some((issuer, _)), Some((_, subject))] = [names(&pair[0]), names(&pair[1])] else {
            return false;
        };
        issuer != subject
    });
    gap.map(|index| index + 1)
}

impl Validity {
    /// A sentence for whoever has to act, if anybody has.
    pub(super) fn warning(&self, now: SystemTime) -> Option<String> {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let now = i64::try_from(now).unwrap_or(i64::MAX);
        let soon = i64::try_from(TLS_EXPIRY_WARNING.as_secs()).unwrap_or(i64::MAX);
        if now >= self.to {
            Some(format!("expired on {}; clients refuse it", date(self.to)))
        } else if now < self.from {
            let from = date(self.from);
            Some(format!("is not valid before {from}; clients refuse it (is the clock right?)"))
        } else if self.to - now <= soon {
            Some(format!("expires on {}; replace it before", date(self.to)))
        } else {
            None
        }
    }
}

fn date(seconds: i64) -> String {
    let seconds = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    match UNIX_EPOCH.checked_add(seconds) {
        // What humantime can spell.
        Some(time) if seconds.as_secs() < 253_402_300_800 => {
            humantime::format_rfc3339_seconds(time).to_string()
        }
        _ => "a date after the year 9999".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_expires_is_told_with_its_date_days_before() {
        const DAY: i64 = 86_400;
        let validity = Validity { from: 100 * DAY, to: 200 * DAY };
        let on = |day: u64| validity.warning(UNIX_EPOCH + Duration::from_secs(day * 86_400));
        assert!(on(99).unwrap().starts_with("is not valid before 1970-04-11T00:00:00Z"));
        assert_eq!(on(100), None);
        assert_eq!(on(185), None);
        assert_eq!(on(190).unwrap(), "expires on 1970-07-20T00:00:00Z; replace it before");
        assert!(on(200).unwrap().starts_with("expired on 1970-07-20T00:00:00Z"));
        let ever = Validity { from: -1, to: i64::MAX };
        assert_eq!(ever.warning(UNIX_EPOCH), None);
        assert_eq!(date(i64::MAX), "a date after the year 9999");
    }
}
