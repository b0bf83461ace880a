//! Key states and the changes between them (kms "Impact of CMK status on API operations").

use std::fmt;

use super::{KeyRecord, UnixSeconds, system_time};
use crate::{
    error::{Error, ErrorKind, Result},
    limits::{DELETION_DAYS_MAX, DELETION_DAYS_MIN},
};

/// The state of a KEK.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyState {
    /// Wraps and unwraps.
    Enabled,
    /// Does neither until it is enabled again.
    Disabled,
    /// Does neither, and is deleted with all its material when its time comes, unless the deletion is cancelled.
    PendingDeletion {
        /// When, in seconds since 1970.
        due: u64,
    },
}

impl KeyState {
    /// `Enabled`, `Disabled` or `PendingDeletion`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enabled => "Enabled",
            Self::Disabled => "Disabled",
            Self::PendingDeletion { .. } => "PendingDeletion",
        }
    }

    /// When the key is to be deleted, if it is.
    pub fn deletion_date(self) -> Option<std::time::SystemTime> {
        match self {
            Self::PendingDeletion { due } => Some(system_time(due)),
            _ => None,
        }
    }
}

impl fmt::Display for KeyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl KeyRecord {
    /// Whether the key may wrap and unwrap.
    ///
    /// # Errors
    /// `Rejected.Disabled` or `Rejected.PendingDeletion`.
    pub(crate) fn check_usable(&self) -> Result<()> {
        match self.state {
            KeyState::Enabled => Ok(()),
            KeyState::Disabled => Err(Error::new(
                ErrorKind::Disabled,
                format!("Key {} has to be enabled first.", self.id),
            )),
            KeyState::PendingDeletion { .. } => Err(Error::new(
                ErrorKind::PendingDeletion,
                format!("The deletion of key {} has to be cancelled first.", self.id),
            )),
        }
    }

    pub(crate) fn enable(&mut self) -> Result<()> {
        self.leave_pending("enabled")?;
        self.state = KeyState::Enabled;
        Ok(())
    }

    pub(crate) fn disable(&mut self) -> Result<()> {
        self.leave_pending("disabled")?;
        self.state = KeyState::Disabled;
        Ok(())
    }

    pub(crate) fn schedule_deletion(&mut self, now: UnixSeconds, days: u32) -> Result<()> {
        if !(DELETION_DAYS_MIN..=DELETION_DAYS_MAX).contains(&days) {
            return Err(Error::invalid(format!("PendingWindowInDays {days} is outside 7 to 366.")));
        }
        self.leave_pending("scheduled for deletion again")?;
        self.state =
            KeyState::PendingDeletion { due: now.saturating_add(u64::from(days) * 86_400) };
        Ok(())
    }

    pub(crate) fn cancel_deletion(&mut self) -> Result<()> {
        match self.state {
            KeyState::PendingDeletion { .. } => {
                self.state = KeyState::Enabled;
                Ok(())
            }
            state => Err(Error::new(
                ErrorKind::StateModifiedFailed,
                format!("Key {} is {state}; no deletion is scheduled.", self.id),
            )),
        }
    }

    /// When the key is to be deleted, if it is.
    pub(crate) fn deletion_date(&self) -> Option<UnixSeconds> {
        match self.state {
            KeyState::PendingDeletion { due } => Some(due),
            _ => None,
        }
    }

    /// Whether the key's deletion is due at `now`.
    pub(crate) fn deletion_due(&self, now: UnixSeconds) -> bool {
        matches!(self.state, KeyState::PendingDeletion { due } if due <= now)
    }

    /// Whether the key's rotation is due at `now`.
    pub(crate) fn rotation_due(&self, now: UnixSeconds) -> bool {
        self.next_rotation(now).is_some_and(|due| due <= now)
    }

    fn leave_pending(&self, wish: &str) -> Result<()> {
        match self.state {
            KeyState::PendingDeletion { .. } => Err(Error::new(
                ErrorKind::StateModifiedFailed,
                format!(
                    "Key {} is PendingDeletion and cannot be {wish}; cancel the deletion first.",
                    self.id
                ),
            )),
            _ => Ok(()),
        }
    }
}
