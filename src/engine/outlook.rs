//! What a server asks of an engine beside its operations: whether a call would wait for the store, how far `Direct`
//! versions are from their bound, and ids for requests that never become an operation.

use std::time::Duration;

use super::Engine;
use crate::{
    error::Result,
    keys::KeyVersionId,
    limits::WRAPS_PER_VERSION_MAX,
    request_id::RequestId,
    wrap::{Scheme, blob},
};

impl Engine {
    /// Whether an operation that wraps once under the key of this name has all it needs in memory: the key is known,
    /// and it is of scheme `Derived` or its version has a wrap in the lease. `follows_rotation` asks for the primary
    /// version, that of the Advance operations, and the initial one otherwise.
    ///
    /// A hint, which holds for the moment: other threads take wraps, too.
    pub(crate) fn is_at_hand(&self, name: &str, follows_rotation: bool) -> bool {
        self.shared().ring.load().resolve(name).is_some_and(|key| {
            key.record.scheme == Scheme::Derived
                || key.version_for(follows_rotation).lease.left() > 0
        })
    }

    /// Whether what a decrypting operation asks for is in memory: the key of `name`, if there is one, and the version
    /// that `blob` names, if it does. What is not is looked for in the store.
    pub(crate) fn knows(&self, name: Option<&str>, blob: &[u8]) -> bool {
        let ring = self.shared().ring.load();
        name.is_none_or(|name| ring.resolve(name).is_some())
            && blob::head(blob).is_none_or(|id| ring.version_by_bytes(id).is_some())
    }

    /// How long this engine goes on without its store.
    pub(crate) fn stale_max(&self) -> Duration {
        self.shared().config.stale_max
    }

    /// The wraps left to the initial and to the primary version of each `Direct` key, as far as this engine knows, in
    /// the order of their ids.
    ///
    /// That is 2^32 less what the store had granted when it was last heard (when the ring was read, or by this
    /// engine's last lease), and what is left of this engine's lease. Leases of other engines since then are not
    /// counted, and what they gave back is counted as spent until the ring is read again.
    pub(crate) fn wraps_left(&self) -> Vec<(KeyVersionId, u64)> {
        let ring = self.shared().ring.load();
        let direct = ring.keys().filter(|key| key.record.scheme == Scheme::Direct);
        let mut left: Vec<_> = direct
            .flat_map(|key| [key.initial(), key.primary()])
            .map(|version| {
                let unleased = WRAPS_PER_VERSION_MAX.saturating_sub(version.lease.spent());
                (version.id, unleased + version.lease.left())
            })
            .collect();
        left.sort_unstable_by_key(|(version, _)| *version);
        // Of a key with one version, that is both.
        left.dedup_by_key(|(version, _)| *version);
        left
    }

    /// A fresh id, for a request that is refused before it becomes an operation.
    ///
    /// # Errors
    /// `ServiceUnavailableTemporary` if the system gives no random bytes.
    pub(crate) fn request_id(&self) -> Result<RequestId> {
        self.in_this_process(|shared| shared.new_request_id())
    }
}
