//! Leases of the wraps of `Direct` versions.
//!
//! The store counts before a wrap is made. What a call needs comes from this process's lease and, where that is short,
//! from the store, with a surplus for the calls to come. What is lost (crash, fork, a call that fails later) is spent.

use std::sync::Arc;

use super::{Shared, events::DueEventKind};
use crate::{
    error::{Error, ErrorKind, Result},
    keys::ring::{Key, KeyVersion},
    limits::{WRAPS_BEFORE_ROTATION, WRAPS_PER_VERSION_MAX},
    os,
    store::LeaseRequest,
    wrap::Scheme,
};

impl Shared {
    /// Takes up to `want` wraps of `version` and says how many there were.
    ///
    /// A key with rotation whose primary version has spent 2^31 wraps gets a new one on the way.
    ///
    /// # Errors
    /// The store's; wraps taken before the error are kept for later calls.
    pub(super) fn take_wraps(&self, key: &Key, version: &KeyVersion, want: u64) -> Result<u64> {
        let generation = os::generation();
        let mut got = version.lease.take(want);
        while got < want {
            let need = want - got;
            let surplus = version.lease.next_surplus(self.config.lease_max);
            let grant = match self.store.lease(&version.id, LeaseRequest { need, surplus }) {
                Ok(grant) => grant,
                Err(error) => {
                    version.lease.add(got, generation);
                    self.note_replaced(&error);
                    return Err(error);
                }
            };
            let used = grant.wraps.min(need);
            got += used;
            version.lease.note_spent(grant.spent);
            version.lease.add(grant.wraps - used, generation);
            if grant.spent >= WRAPS_BEFORE_ROTATION {
                self.replace_spent(key, version);
            }
            if used < need {
                // Another thread may have got the last ones as its surplus.
                got += version.lease.take(want - got);
                break;
            }
        }
        Ok(got)
    }

    /// Gives a key that rotates by itself a new primary version, if `version` is still that. A failure is no reason to
    /// refuse the wraps at hand: it is logged, and tried again with the next lease.
    fn replace_spent(&self, key: &Key, version: &KeyVersion) {
        if key.record.rotation.is_none() || key.primary().id != version.id {
            return;
        }
        let replaced = self.rotate_if(&key.record.id, |record| {
            record.rotation.is_some() && record.version_count as usize == key.versions().len()
        });
        match replaced {
            Ok(Some((key_version_id, _))) => {
                self.tell(key.record.id, None, DueEventKind::Rotated { key_version_id });
            }
            Ok(None) => {}
            Err(error) => {
                self.tell(key.record.id, None, DueEventKind::RotationFailed { error });
            }
        }
    }

    /// Gives unused wraps back to the store. What fails is wasted, as in a crash.
    pub(super) fn return_leases(&self) {
        for key in self.ring.load().keys() {
            for version in key.versions().iter().filter(|v| v.wrapper.scheme() == Scheme::Direct) {
                let unused = version.lease.take(u64::MAX);
                if unused > 0 && self.store.give_back(&version.id, unused).is_err() {
                    log::warn!("key version {}: {unused} leased wraps are lost", version.id);
                }
            }
        }
    }
}

/// The refusal of an item that would pass the bound of `version`.
pub(super) fn spent(version: &Arc<KeyVersion>) -> Error {
    Error::new(
        ErrorKind::LimitExceeded,
        format!(
            "Key version {} has spent its {WRAPS_PER_VERSION_MAX} wraps (SP 800-38D section 8.3); \
             rotate the key and use the Advance operations, or use a key of scheme \"derived\".",
            version.id
        ),
    )
}
