//! The key ring: an immutable snapshot of every key, set up for use.
//!
//! A new ring reuses what the old one had set up for versions that are still there, so their leases and wrapping
//! states go on; states of versions that no longer wrap are wiped.

use std::{collections::HashMap, sync::Arc, sync::atomic::AtomicBool};

use foldhash::fast::RandomState;

use super::{
    Alias, KeyRecord, KeyState, StoredKey,
    budget::Lease,
    handle::{Changes, KeyCell},
    id::{KeyId, KeyVersionId},
};
use crate::{cpu::Tier, error::Result, kernel, limits::KEY_VERSION_ID_LEN, wrap::Wrapper};

/// A version set up for use.
pub(crate) struct KeyVersion {
    pub(crate) id: KeyVersionId,
    pub(crate) wrapper: Wrapper,
    /// Of `Direct` versions.
    pub(crate) lease: Lease,
}

/// A key in the ring.
pub(crate) struct Key {
    pub(crate) record: KeyRecord,
    pub(crate) aliases: Vec<Alias>,
    versions: Vec<Arc<KeyVersion>>,
    /// Whether the use of the initial version in spite of rotation was warned about.
    pub(crate) warned: Arc<AtomicBool>,
}

impl Key {
    pub(crate) fn initial(&self) -> &Arc<KeyVersion> {
        self.versions.first().expect("a key has at least one version")
    }

    pub(crate) fn primary(&self) -> &Arc<KeyVersion> {
        self.versions.last().expect("a key has at least one version")
    }

    /// The version that an operation wraps under: the primary one if it follows rotation.
    pub(crate) fn version_for(&self, follows_rotation: bool) -> &Arc<KeyVersion> {
        if follows_rotation { self.primary() } else { self.initial() }
    }

    /// Asks for what the planning of a batch reads to be brought into the caches: a hint.
    pub(crate) fn prefetch(&self) {
        // Beside the count of references to the key.
        kernel::prefetch(self);
        kernel::prefetch(&self.record.state);
        kernel::prefetch(&self.record.scheme);
        kernel::prefetch(&self.versions);
    }

    pub(crate) fn versions(&self) -> &[Arc<KeyVersion>] {
        &self.versions
    }
}

/// A moment in the life of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StoreMoment {
    pub(crate) changes: u64,
    pub(crate) epoch: u64,
}

/// Everything that a batch needs to know of keys.
#[derive(Default)]
pub(crate) struct Ring {
    /// The store's change counter when this was read.
    pub(crate) changes: u64,
    /// The store's epoch then: what an earlier one granted is void.
    pub(crate) epoch: u64,
    keys: HashMap<KeyId, Arc<Key>, RandomState>,
    aliases: HashMap<Alias, KeyId, RandomState>,
    names: HashMap<Box<str>, Arc<Key>, RandomState>,
    versions: HashMap<KeyVersionId, (Arc<Key>, Arc<KeyVersion>), RandomState>,
    /// Where handles find their keys. A key keeps its cell from ring to ring.
    cells: HashMap<KeyId, Arc<KeyCell>, RandomState>,
}

impl Ring {
    /// Sets up what `stored` holds, as of `moment`. Versions that `before` has set up already are taken over, with
    /// their leases and wrapping states, unless `before` is of another past of the store.
    ///
    /// # Errors
    /// As [`Wrapper::new`], which means a store that holds what was never created.
    pub(crate) fn build(
        moment: StoreMoment,
        stored: &[StoredKey],
        before: &Ring,
        tier: Tier,
        engine: u64,
    ) -> Result<Self> {
        let StoreMoment { changes, epoch } = moment;
        let mut ring = Self { changes, epoch, ..Self::default() };
        let known = if ring.continues(before) { before } else { &Self::default() };
        for stored in stored {
            let id = stored.record.id;
            let cell = before.cells.get(&id).cloned();
            ring.cells.insert(id, cell.unwrap_or_else(|| KeyCell::new(id, engine)));
            let key = Arc::new(Key {
                record: stored.record.clone(),
                aliases: stored.aliases.clone(),
                versions: set_up(stored, known, tier)?,
                warned: before
                    .keys
                    .get(&stored.record.id)
                    .map(|key| Arc::clone(&key.warned))
                    .unwrap_or_default(),
            });
            key.settle_states();
            for version in &key.versions {
                ring.versions.insert(version.id, (Arc::clone(&key), Arc::clone(version)));
            }
            for alias in &key.aliases {
                ring.aliases.insert(alias.clone(), key.record.id);
                ring.names.insert(alias.as_str().into(), Arc::clone(&key));
            }
            ring.names.insert(key.record.id.as_str().into(), Arc::clone(&key));
            ring.keys.insert(key.record.id, key);
        }
        for (id, gone) in &before.keys {
            if !ring.keys.contains_key(id) || !ring.continues(before) {
                gone.rest();
            }
        }
        Ok(ring)
    }

    /// Whether this is of the same store as `before`, at the same time or later. The counter of a store never goes
    /// back: if it did, an older copy was put in its place.
    pub(crate) fn continues(&self, before: &Self) -> bool {
        self.epoch == before.epoch && self.changes >= before.changes
    }

    /// Gives up what is leased, for ever: it was granted by a store that is not there any more.
    pub(crate) fn give_up_leases(&self) {
        for version in self.keys.values().flat_map(|key| &key.versions) {
            version.lease.take(u64::MAX);
        }
    }

    /// Tells the holders of handles that what they made ahead of need is out of date.
    pub(crate) fn outdate(&self) {
        self.cells.values().for_each(|cell| cell.changes().count());
    }

    /// Shows the keys of this ring, which has taken the place of `before`, to the holders of handles.
    pub(crate) fn publish(&self, before: &Ring) {
        for (id, cell) in &self.cells {
            let key = self.keys.get(id).cloned();
            let changed = match (&key, before.keys.get(id)) {
                _ if !self.continues(before) => true,
                (Some(now), Some(before)) => !now.wraps_as(before),
                _ => true,
            };
            cell.publish(key, changed);
        }
        for (id, cell) in &before.cells {
            if !self.cells.contains_key(id) {
                cell.publish(None, true);
            }
        }
    }

    /// The place where the key `id` is found from now on.
    pub(crate) fn cell(&self, id: &KeyId) -> Option<&Arc<KeyCell>> {
        self.cells.get(id)
    }

    /// The key with this id or alias.
    pub(crate) fn resolve(&self, name: &str) -> Option<&Arc<Key>> {
        self.names.get(name)
    }

    /// The version with this id, and its key. The bytes may be anything.
    pub(crate) fn version_by_bytes(
        &self,
        id: &[u8; KEY_VERSION_ID_LEN],
    ) -> Option<(&Arc<Key>, &Arc<KeyVersion>)> {
        self.versions.get(id).map(|(key, version)| (key, version))
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &Arc<Key>> {
        self.keys.values()
    }

    pub(crate) fn aliases(&self) -> impl Iterator<Item = (&Alias, KeyId)> {
        self.aliases.iter().map(|(alias, key)| (alias, *key))
    }
}

fn set_up(stored: &StoredKey, before: &Ring, tier: Tier) -> Result<Vec<Arc<KeyVersion>>> {
    let scheme = stored.record.scheme;
    let set_up_one = |version: &super::VersionRecord| {
        let set_up = match before.versions.get(&version.id) {
            Some((_, known)) => Arc::clone(known),
            None => {
                let wrapper = Wrapper::new(tier, scheme, &version.material)?;
                Arc::new(KeyVersion { id: version.id, wrapper, lease: Lease::default() })
            }
        };
        set_up.lease.note_spent(version.spent);
        Ok(set_up)
    };
    stored.versions.iter().map(set_up_one).collect()
}

impl Key {
    /// Whether state and versions are those of `other`.
    fn wraps_as(&self, other: &Self) -> bool {
        self.record.state == other.record.state
            && self
                .versions
                .iter()
                .map(|version| version.id)
                .eq(other.versions.iter().map(|v| v.id))
    }

    /// Wipes the wrapping states of versions that do not wrap now: all of a key that is not enabled, and any but the
    /// initial and the primary one.
    fn settle_states(&self) {
        for version in &self.versions {
            let wraps = version.id == self.initial().id || version.id == self.primary().id;
            if let Wrapper::Derived { states, .. } = &version.wrapper {
                if wraps && self.record.state == KeyState::Enabled {
                    states.wake()
                } else {
                    states.rest()
                }
            }
        }
    }

    fn rest(&self) {
        for version in &self.versions {
            if let Wrapper::Derived { states, .. } = &version.wrapper {
                states.rest();
            }
        }
    }
}
