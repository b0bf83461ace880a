//! The key store: a trait of few, transactional operations, and its two implementations.
//!
//! Every write is one transaction, and every rule about keys is a pure function of `keys/` that the store calls
//! **inside** that transaction with what it holds at that moment. So two engines on one store never act on different
//! pasts, and never are granted the same wraps.

mod checks;
mod client_rows;
mod identity;
mod image;
mod memory;
mod mend;
mod meta;
mod permissions;
mod place;
mod root_key;
mod rows;
mod schema;
mod seal;
mod sqlite;
mod tables;

use crate::{
    clients::{Client, ClientId},
    error::{Error, ErrorKind, Result},
    keys::{Alias, KeyId, KeyRecord, KeyVersionId, StoredKey, VersionRecord, alias::AliasChange},
};
pub use checks::check_store_path;
pub(crate) use memory::MemoryStore;
pub use mend::{MovedFile, mend_store};
pub use root_key::RootKey;
pub(crate) use sqlite::SqliteStore;

/// A consistent image of the whole store.
pub(crate) struct StoreImage {
    /// How often the place of the store was taken by another file, or by an older state of it, and that was accepted.
    pub(crate) epoch: u64,
    /// The change counter at the time.
    pub(crate) changes: u64,
    /// Sorted by creation date, then id.
    pub(crate) keys: Vec<StoredKey>,
    /// Sorted by creation date, then id.
    pub(crate) clients: Vec<Client>,
}

/// A key to create, with its initial version.
pub(crate) struct NewKey {
    pub(crate) record: KeyRecord,
    pub(crate) version: VersionRecord,
    pub(crate) alias: Option<Alias>,
}

/// What a transaction does to a key.
pub(crate) enum KeyChange {
    /// Nothing.
    Keep,
    /// Writes this record, and adds this version as the primary one if there is one.
    Save(KeyRecord, Option<VersionRecord>),
    /// Removes the key, its versions, their material and its aliases. The fingerprint of imported material stays.
    Delete,
}

/// What a transaction does to a client.
pub(crate) enum ClientChange {
    /// Nothing.
    Keep,
    /// Writes this client in its place.
    Save(Client),
    /// Removes the client.
    Delete,
}

/// Wraps to lease from a `Direct` version.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeaseRequest {
    /// What the call needs now.
    pub(crate) need: u64,
    /// What it would like beyond that.
    pub(crate) surplus: u64,
}

/// What the store grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    /// Wraps granted: `need + surplus` if the version has them, else all that are left, which may be none.
    pub(crate) wraps: u64,
    /// Wraps granted over the version's life, these included.
    pub(crate) spent: u64,
}

/// A place that keeps keys. Every call is one transaction; after an error nothing has changed.
pub(crate) trait KeyStore: Send + Sync {
    /// Everything, as of one moment. Where the place of the store was taken by another file, this is the one call that
    /// goes on with it, once it has passed every check that an opening makes.
    ///
    /// # Errors
    /// `StoreCorrupt` if any record was edited, swapped or damaged; `StoreUnavailable`.
    fn load(&self) -> Result<StoreImage>;

    /// A number that is different whenever a key, version, state, rotation, alias or client is. Leases do not move it.
    fn changes(&self) -> Result<u64>;

    /// Whether anybody but this engine can change the store, so that what was read of it grows old.
    fn is_shared(&self) -> bool {
        false
    }

    /// Whether the place of the store is known to have been taken by another file that is not accepted yet. Every call
    /// but [`KeyStore::load`] is refused meanwhile.
    fn is_replaced(&self) -> bool {
        false
    }

    /// As [`StoreImage::epoch`], now.
    fn epoch(&self) -> u64 {
        0
    }

    /// Creates a key.
    ///
    /// # Errors
    /// `AliasAlreadyExists`; `InvalidKeyMaterial` if the same material was ever imported into this store.
    fn create(&self, key: &NewKey) -> Result<()>;

    /// Reads a key and does what `decide` says, in one transaction.
    ///
    /// # Errors
    /// `KeyNotFound`; whatever `decide` returns.
    fn change(
        &self,
        key: &KeyId,
        decide: &mut dyn FnMut(&KeyRecord) -> Result<KeyChange>,
    ) -> Result<()>;

    /// Changes one alias, if [`AliasChange::check`] allows it.
    ///
    /// # Errors
    /// Those of the check.
    fn change_alias(&self, alias: &Alias, change: AliasChange) -> Result<()>;

    /// Creates a client.
    ///
    /// # Errors
    /// `InvalidParameter` if its id is in use.
    fn create_client(&self, client: &Client) -> Result<()>;

    /// Reads a client and does what `decide` says, in one transaction. The id never changes.
    ///
    /// # Errors
    /// `ClientNotFound`; whatever `decide` returns.
    fn change_client(
        &self,
        client: &ClientId,
        decide: &mut dyn FnMut(&Client) -> Result<ClientChange>,
    ) -> Result<()>;

    /// Grants wraps of a `Direct` version, durably counted before this returns.
    ///
    /// # Errors
    /// `KeyNotFound` if the version is gone.
    fn lease(&self, version: &KeyVersionId, request: LeaseRequest) -> Result<Grant>;

    /// Takes back wraps that were granted to this process and not used.
    fn give_back(&self, version: &KeyVersionId, unused: u64) -> Result<()>;

    /// Lets go of the file. Nothing is asked of the store afterwards.
    fn close(&self) {}

    /// What and where the store is, for people.
    fn describe(&self) -> String;

    /// The files that it is in, which nothing else may write.
    #[cfg(feature = "server")]
    fn files(&self) -> Vec<std::path::PathBuf> {
        Vec::new()
    }
}

/// What the store grants of a version that has granted `spent` wraps before.
pub(crate) fn grant(spent: u64, request: LeaseRequest) -> Grant {
    let left = crate::limits::WRAPS_PER_VERSION_MAX.saturating_sub(spent);
    let wraps = left.min(request.need.saturating_add(request.surplus));
    Grant { wraps, spent: spent + wraps }
}

/// The refusal of a client whose id is in the store already.
fn client_known(id: &ClientId) -> Error {
    Error::new(ErrorKind::InvalidParameter, format!("Client {id} exists already."))
}

/// The refusal of material that was imported before: the budget of a `Direct` version holds only for material that is
/// used nowhere else.
fn imported_before() -> Error {
    let detail =
        "The same material was imported into this store before, perhaps as a key deleted since.";
    Error::new(ErrorKind::InvalidKeyMaterial, detail)
}

#[cfg(test)]
mod tests {
    mod failures;
    mod foreign;
    mod forks;
    mod helpers;
    mod mending;
    mod semantics;
    mod tampering;

    use super::*;
    use crate::limits::WRAPS_PER_VERSION_MAX;

    #[test]
    fn a_grant_never_passes_the_bound() {
        for (spent, need, surplus, wraps) in [
            (0, 5, 10, 15),
            (WRAPS_PER_VERSION_MAX - 3, 8, 0, 3),
            (WRAPS_PER_VERSION_MAX - 3, 1, 1 << 20, 3),
            (WRAPS_PER_VERSION_MAX, 1, 1, 0),
            (WRAPS_PER_VERSION_MAX + 9, 1, 1, 0),
            (1, u64::MAX, u64::MAX, WRAPS_PER_VERSION_MAX - 1),
        ] {
            assert_eq!(
                grant(spent, LeaseRequest { need, surplus }),
                Grant { wraps, spent: spent + wraps }
            );
        }
    }
}
