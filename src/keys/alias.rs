//! Aliases: names of keys that their owners choose.

use std::{fmt, sync::Arc};

use super::{KeyRecord, KeyState, id::KeyId};
use crate::{
    error::{Error, ErrorKind, Result, Shortened},
    limits::ALIAS_LEN_MAX,
};

/// What every alias begins with.
pub(crate) const PREFIX: &str = "alias/";
/// Reserved by the KMS.
const RESERVED: &str = "alias/acs";

/// A name of a key: `alias/` and at least one of `[A-Za-z0-9/_-]`, 255 characters at most, not beginning with
/// `alias/acs`. One alias names one key; a key may have many.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Alias(Arc<str>);

impl Alias {
    /// Reads an alias.
    ///
    /// # Errors
    /// `InvalidParameter` if `text` has not the form of one.
    pub fn parse(text: &str) -> Result<Self> {
        let refused =
            |why: &str| Err(Error::invalid(format!("Alias {:?} {why}.", Shortened(text))));
        let Some(name) = text.strip_prefix(PREFIX) else {
            return refused("does not begin with \"alias/\"");
        };
        if name.is_empty() {
            return refused("has no name after \"alias/\"");
        }
        if text.len() > ALIAS_LEN_MAX {
            return refused("is longer than 255 characters");
        }
        if text.starts_with(RESERVED) {
            return refused("begins with \"alias/acs\", which is reserved");
        }
        if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"/_-".contains(&b)) {
            return refused("may hold letters, digits, '/', '_' and '-' only");
        }
        Ok(Self(text.into()))
    }

    /// The alias as text, `alias/` included.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Alias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Alias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

/// A change of one alias, decided inside the store's transaction by [`AliasChange::check`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum AliasChange {
    /// Makes a new alias of this key.
    Create(KeyId),
    /// Points an alias that exists to this key.
    Update(KeyId),
    /// Removes an alias that exists.
    Delete,
}

impl AliasChange {
    /// The key that the alias names afterwards.
    pub(crate) fn target(&self) -> Option<KeyId> {
        match self {
            Self::Create(key) | Self::Update(key) => Some(*key),
            Self::Delete => None,
        }
    }

    /// Whether the change is allowed, given what the store holds: the key that the alias names now, and the record of
    /// the target.
    ///
    /// # Errors
    /// The KMS's for alias operations: `AliasAlreadyExists`, `Forbidden.AliasNotFound`, `Forbidden.KeyNotFound`,
    /// `Rejected.StateModifiedFailed` (create), `Rejected.PendingDeletion` (update).
    pub(crate) fn check(
        &self,
        alias: &Alias,
        current: Option<KeyId>,
        target: Option<&KeyRecord>,
    ) -> Result<()> {
        match (self, current) {
            (Self::Create(_), Some(key)) => {
                let detail = format!("{alias} names {key}; `alias update` points it elsewhere.");
                return Err(Error::new(ErrorKind::AliasAlreadyExists, detail));
            }
            (Self::Update(_) | Self::Delete, None) => {
                return Err(Error::new(
                    ErrorKind::AliasNotFound,
                    format!("No alias is named {alias}."),
                ));
            }
            _ => {}
        }
        let Some(key) = self.target() else { return Ok(()) };
        let target = target.ok_or_else(|| Error::key_not_found(key.as_str()))?;
        match (self, target.state) {
            (Self::Create(_), KeyState::PendingDeletion { .. }) => Err(Error::new(
                ErrorKind::StateModifiedFailed,
                format!("Key {key} is PendingDeletion."),
            )),
            (_, KeyState::PendingDeletion { .. }) => Err(Error::new(
                ErrorKind::PendingDeletion,
                format!("Key {key} cannot take an alias."),
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_of_an_alias() {
        for good in ["alias/a", "alias/App-1/disk_2", &format!("alias/{}", "x".repeat(249))] {
            assert_eq!(Alias::parse(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            "a",
            "alias/",
            "alias/acs",
            "alias/acs/x",
            "alias/a b",
            "alias/é",
            "Alias/a",
            &format!("alias/{}", "x".repeat(250)),
        ] {
            assert_eq!(Alias::parse(bad).unwrap_err().kind(), ErrorKind::InvalidParameter, "{bad}");
        }
    }
}
