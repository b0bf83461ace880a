//! Who may use a key. Asked of the key that was found, after names, blobs and version ids have led to it, and before
//! its state: whoever may not use a key learns nothing about it.

use super::ring::Key;
use crate::error::{Error, Result};

/// Decides whether a caller may use a key.
pub(crate) trait Access: Sync {
    /// Whether the caller may use `key`.
    fn permits(&self, key: &Key) -> bool;

    /// Whether it permits every key, so that nobody need ask for each.
    fn is_unlimited(&self) -> bool {
        false
    }
}

/// The access of whoever holds the engine.
pub(crate) struct Everything;

impl Access for Everything {
    fn permits(&self, _: &Key) -> bool {
        true
    }

    fn is_unlimited(&self) -> bool {
        true
    }
}

/// What every key that an operation finds has to pass: an access, unless that is unlimited. A call for each of many
/// keys need not be made then.
#[derive(Clone, Copy)]
pub(crate) struct Gate<'a>(Option<&'a dyn Access>);

impl<'a> Gate<'a> {
    pub(crate) fn new(access: &'a dyn Access) -> Self {
        Self((!access.is_unlimited()).then_some(access))
    }

    /// Checks that the caller may use `key`, to which a request led that names this key, or none.
    ///
    /// # Errors
    /// `Forbidden.NoPermission`, with the name that was given, or the id of the key.
    #[inline]
    pub(crate) fn check(self, key: &Key, named: Option<&str>) -> Result<()> {
        match self.0 {
            Some(access) if !access.permits(key) => {
                Err(Error::no_permission(named.unwrap_or(key.record.id.as_str())))
            }
            _ => Ok(()),
        }
    }
}
