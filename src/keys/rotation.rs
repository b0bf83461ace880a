//! Automatic rotation: the period, its text form, and when it is due.

use std::{fmt, time::Duration};

use super::{KeyRecord, KeyState, Origin, UnixSeconds};
use crate::{
    error::{Error, ErrorKind, Result},
    limits::{ROTATION_PERIOD_MAX, ROTATION_PERIOD_MIN},
};

/// How often a key rotates by itself: 7 to 365 days, in whole seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RotationPeriod(u64);

impl RotationPeriod {
    /// A period of whole seconds.
    ///
    /// # Errors
    /// `InvalidParameter` outside 7 to 365 days, or with a fraction of a second.
    pub fn new(period: Duration) -> Result<Self> {
        if !(ROTATION_PERIOD_MIN..=ROTATION_PERIOD_MAX).contains(&period)
            || period.subsec_nanos() != 0
        {
            return Err(Error::invalid(format!(
                "RotationInterval {}s is outside 7 to 365 days.",
                period.as_secs_f64()
            )));
        }
        Ok(Self(period.as_secs()))
    }

    /// Reads the KMS's form: an integer and one of `d`, `h`, `m`, `s`, such as `90d` or `604800s`.
    ///
    /// # Errors
    /// `InvalidParameter` for another form or a period outside 7 to 365 days.
    pub fn parse(text: &str) -> Result<Self> {
        let malformed = || {
            Error::invalid(format!(
                "RotationInterval {text:?} is not an integer followed by d, h, m or s, such as 90d."
            ))
        };
        let unit = match text.chars().next_back().ok_or_else(malformed)? {
            'd' => 86_400,
            'h' => 3_600,
            'm' => 60,
            's' => 1,
            _ => return Err(malformed()),
        };
        let digits = &text[..text.len() - 1];
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(malformed());
        }
        let seconds = digits
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(unit))
            .unwrap_or(u64::MAX);
        Self::new(Duration::from_secs(seconds)).map_err(|_| {
            Error::invalid(format!("RotationInterval {text:?} is outside 7 to 365 days."))
        })
    }

    /// Seconds of the period.
    pub fn as_secs(self) -> u64 {
        self.0
    }
}

impl fmt::Display for RotationPeriod {
    /// Whole days as `90d`, anything else in seconds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(86_400) {
            write!(f, "{}d", self.0 / 86_400)
        } else {
            write!(f, "{}s", self.0)
        }
    }
}

impl KeyRecord {
    /// When the key rotates next, as of `now`. `None` without a period, or while the key's state suspends rotation. A
    /// last rotation in the future was dated by a wrong clock, and would put the next one off for as long: it is due
    /// now.
    pub(crate) fn next_rotation(&self, now: UnixSeconds) -> Option<UnixSeconds> {
        let period = self.rotation?;
        (self.state == KeyState::Enabled).then(|| match self.is_of_the_future(now) {
            true => now,
            false => self.last_rotation.saturating_add(period.0),
        })
    }

    /// Whether the key may get a new version.
    ///
    /// # Errors
    /// `UnsupportedOperation` for imported keys; `Rejected.Disabled` or `Rejected.PendingDeletion` by state.
    pub(crate) fn check_rotatable(&self) -> Result<()> {
        self.check_rotates()?;
        self.check_usable()
    }

    /// Sets or clears the rotation period.
    ///
    /// # Errors
    /// `UnsupportedOperation` for imported keys; `Rejected.PendingDeletion`.
    pub(crate) fn set_rotation(&mut self, period: Option<RotationPeriod>) -> Result<()> {
        if period.is_some() {
            self.check_rotates()?;
        }
        if let KeyState::PendingDeletion { .. } = self.state {
            self.check_usable()?;
        }
        self.rotation = period;
        Ok(())
    }

    fn check_rotates(&self) -> Result<()> {
        match self.origin {
            Origin::Generated => Ok(()),
            Origin::Imported => Err(Error::new(
                ErrorKind::UnsupportedOperation,
                format!("Key {} was imported; imported keys do not rotate.", self.id),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_are_read_in_every_unit() {
        for (text, days) in [("7d", 7), ("168h", 7), ("10080m", 7), ("604800s", 7), ("365d", 365)] {
            assert_eq!(RotationPeriod::parse(text).unwrap().as_secs(), days * 86_400, "{text}");
        }
        assert_eq!(RotationPeriod::parse("2160h").unwrap().to_string(), "90d");
        assert_eq!(RotationPeriod::parse("604801s").unwrap().to_string(), "604801s");
    }

    #[test]
    fn other_periods_are_refused() {
        for text in [
            "",
            "d",
            "90",
            "90 d",
            "-9d",
            "+9d",
            "9.5d",
            "6d",
            "366d",
            "1y",
            "99999999999999999999d",
            "9é",
        ] {
            assert!(RotationPeriod::parse(text).is_err(), "{text}");
        }
    }
}
