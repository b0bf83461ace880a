//! Key handles: a key found once, followed from then on.
//!
//! A [`KeyCell`] is the place where a key's present record and versions can be found, for as long as the engine lives.
//! Every new ring publishes into the cells, so that whoever holds one sees rotation, state and deletion without looking
//! a name up. A cell also counts changes: whoever made something of a key's versions (a pool of data keys) notes the
//! number beforehand, and knows that it is out of date when the number has moved.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use arc_swap::{ArcSwapOption, Guard};

use super::{KeyId, ring::Key};
use crate::error::{Error, Result};

/// The number of changes of a key's state and versions.
pub(crate) trait Changes {
    /// The number as it is.
    fn now(&self) -> u64;

    /// Counts one more.
    fn count(&self);

    /// Stores a key by `store`, and counts the change if it is one.
    fn publish(&self, store: impl FnOnce(), changed: bool) {
        // In this order: who reads the number first and the key then may get a newer key than the number says, which
        // is harmless, and never an older one.
        store();
        if changed {
            self.count();
        }
    }

    /// Reads the number, and then the key by `read`.
    fn then_read<T>(&self, read: impl FnOnce() -> T) -> (u64, T) {
        let number = self.now();
        (number, read())
    }
}

impl Changes for AtomicU64 {
    fn now(&self) -> u64 {
        self.load(Ordering::Acquire)
    }

    fn count(&self) {
        self.fetch_add(1, Ordering::Release);
    }
}

/// Where a key is found, whatever happens to it.
pub(crate) struct KeyCell {
    id: KeyId,
    /// The number of the engine.
    engine: u64,
    /// `None` when the key is deleted or the engine has ended.
    key: ArcSwapOption<Key>,
    changes: AtomicU64,
}

impl KeyCell {
    pub(super) fn new(id: KeyId, engine: u64) -> Arc<Self> {
        Arc::new(Self { id, engine, key: ArcSwapOption::empty(), changes: AtomicU64::new(0) })
    }

    /// Makes `key` the present one. `changed` tells whether its state or its versions differ from those before.
    pub(super) fn publish(&self, key: Option<Arc<Key>>, changed: bool) {
        self.changes.publish(|| self.key.store(key), changed);
    }

    /// The number of changes of state and versions.
    pub(crate) fn changes(&self) -> &impl Changes {
        &self.changes
    }

    /// The key as it is.
    ///
    /// # Errors
    /// `Forbidden.KeyNotFound` once it is deleted.
    pub(crate) fn load(&self) -> Result<CurrentKey> {
        let guard = self.key.load();
        if guard.is_none() {
            return Err(Error::key_not_found(self.id.as_str()));
        }
        Ok(CurrentKey(guard))
    }
}

/// A key that was just looked at.
pub(crate) struct CurrentKey(Guard<Option<Arc<Key>>>);

impl std::ops::Deref for CurrentKey {
    type Target = Arc<Key>;

    fn deref(&self) -> &Arc<Key> {
        self.0.as_ref().expect("checked when it was loaded")
    }
}

/// A key of an engine, found once by [`Engine::key`](crate::Engine::key). Cheap to clone.
///
/// It names the key, not a version or a state: what is done with it follows rotation, and is refused while the key is
/// disabled and once it is deleted. An alias is resolved when the handle is made; one that is pointed elsewhere later
/// does not take its handles along.
#[derive(Clone)]
pub struct KeyHandle(Arc<KeyCell>);

impl KeyHandle {
    pub(crate) fn new(cell: Arc<KeyCell>) -> Self {
        Self(cell)
    }

    /// The key's id.
    pub fn key_id(&self) -> KeyId {
        self.0.id
    }

    /// The cell, if the handle is of engine `number`.
    ///
    /// # Errors
    /// `InvalidParameter` for a handle of another engine.
    pub(crate) fn of_engine(&self, number: u64) -> Result<&Arc<KeyCell>> {
        if self.0.engine == number {
            return Ok(&self.0);
        }
        Err(Error::invalid(format!("The handle of key {} belongs to another engine.", self.0.id)))
    }
}

impl std::fmt::Debug for KeyHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("KeyHandle").field(&self.0.id).finish()
    }
}
