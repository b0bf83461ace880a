//! The two operations that unwrap data keys and callers' texts, single and in batches.

use std::sync::Arc;

use super::{Engine, Shared};
use crate::{
    batch::{
        check_item_count,
        open::{OpenPlan, Opened, open_one},
        resolve::{Item, Reading, Resolver, Summary, failed},
        result::{Decrypted, DecryptedBatch},
    },
    error::{Error, Result},
    keys::access::{Access, Everything},
    memory::{ColumnLens, Memory},
    request::DecryptRequest,
    secret::SecretBytes,
};

/// Operations that unwrap.
impl Engine {
    /// Unwraps a raw blob, of a data key or of a text: `key_id` and `iv` are needed, and the key's initial version
    /// opens it. Without a `key_id`, `key_version_id` names the version.
    ///
    /// # Errors
    /// `InternalFailure` if the AAD, the blob or a 12-byte IV is wrong, without saying which; `InvalidParameter` for a
    /// missing or malformed parameter; `Forbidden.KeyNotFound`, `Rejected.Disabled`, `Rejected.PendingDeletion`.
    pub fn decrypt(&self, request: &DecryptRequest<'_>) -> Result<Decrypted> {
        self.decrypt_one_as(&Everything, request, Reading::Raw)
    }

    /// Unwraps a blob of either form. A self-describing one needs the AAD alone; a `key_id` that names another key is
    /// refused, and `iv` and `algorithm` are ignored. Any other blob is read as [`Engine::decrypt`] does.
    ///
    /// # Errors
    /// As [`Engine::decrypt`].
    pub fn advance_decrypt(&self, request: &DecryptRequest<'_>) -> Result<Decrypted> {
        self.decrypt_one_as(&Everything, request, Reading::Advance)
    }

    /// Unwraps every blob, as [`Engine::decrypt`] does for one.
    ///
    /// Results come in request order: `batch.len() == requests.len()`. An item that fails gets its own error and its
    /// output is zeroed; the others succeed. At most 1,048,576 items and 1 GiB of output.
    ///
    /// # Errors
    /// `Rejected.LimitExceeded` for a batch over its limits, before any work; `ServiceUnavailableTemporary` if there
    /// is no memory for the result.
    pub fn decrypt_batch(&self, requests: &[DecryptRequest<'_>]) -> Result<DecryptedBatch> {
        self.decrypt_batch_as(&Everything, requests, Reading::Raw)
    }

    /// A batch of [`Engine::advance_decrypt`].
    ///
    /// # Errors
    /// As [`Engine::decrypt_batch`].
    pub fn advance_decrypt_batch(&self, requests: &[DecryptRequest<'_>]) -> Result<DecryptedBatch> {
        self.decrypt_batch_as(&Everything, requests, Reading::Advance)
    }

    /// Unwraps a blob for a caller who has this access.
    pub(crate) fn decrypt_one_as(
        &self,
        access: &dyn Access,
        request: &DecryptRequest<'_>,
        reading: Reading,
    ) -> Result<Decrypted> {
        self.in_one_process(|shared| shared.decrypt_one(access, request, reading))
            .map_err(|error| self.shared().name(error))
    }

    /// Unwraps every blob for a caller who has this access. Items of keys that it does not permit are refused one by
    /// one.
    pub(crate) fn decrypt_batch_as(
        &self,
        access: &dyn Access,
        requests: &[DecryptRequest<'_>],
        reading: Reading,
    ) -> Result<DecryptedBatch> {
        check_item_count(requests.len())?;
        self.in_one_process(|shared| shared.decrypt_many(access, requests, reading))
    }
}

impl Shared {
    fn decrypt_one(
        &self,
        access: &dyn Access,
        request: &DecryptRequest<'_>,
        reading: Reading,
    ) -> Result<Decrypted> {
        let ring = self.ring.load();
        let mut resolver = Resolver::new(&ring, access, reading);
        let mut items = Vec::with_capacity(1);
        let found = resolver.resolve(request, 0, &mut items);
        if resolver.take_missed() {
            self.refresh_if_changed()?;
            let ring = self.ring.load();
            let mut items = Vec::with_capacity(1);
            Resolver::new(&ring, access, reading).resolve(request, 0, &mut items)?;
            return self.open_one(request, &items[0]);
        }
        found?;
        self.open_one(request, &items[0])
    }

    fn open_one(&self, request: &DecryptRequest<'_>, item: &Item<'_>) -> Result<Decrypted> {
        let mut plaintext = SecretBytes::from_vec(vec![0; item.dek_len()]);
        if !open_one(request, item, plaintext.expose_mut().expect("in memory of its own")) {
            return Err(failed());
        }
        let (key_version_id, request_id) = (item.version.id, self.new_request_id()?);
        Ok(Decrypted { key_version_id, plaintext, request_id })
    }

    fn decrypt_many(
        &self,
        access: &dyn Access,
        requests: &[DecryptRequest<'_>],
        reading: Reading,
    ) -> Result<DecryptedBatch> {
        let ring = self.ring.load_full();
        let resolver = Resolver::new(&ring, access, reading);
        let resolved = resolve_all(requests, resolver, None);
        if !resolved.missed {
            return self.open_all(requests, resolved);
        }
        // A store that cannot be asked refuses the items that need it, not their neighbours.
        let unasked = self.refresh_if_changed().err();
        let newer = self.ring.load_full();
        if unasked.is_none() && newer.changes == ring.changes {
            return self.open_all(requests, resolved);
        }
        let resolver = Resolver::new(&newer, access, reading);
        let resolved = resolve_all(requests, resolver, unasked.as_ref());
        self.open_all(requests, resolved)
    }

    fn open_all<'a>(
        &self,
        requests: &'a [DecryptRequest<'a>],
        resolved: Resolved<'a>,
    ) -> Result<DecryptedBatch> {
        let base = self.new_request_id()?;
        let plan = OpenPlan::new(requests, resolved.items, resolved.summary)?;
        let lens = ColumnLens { deks: plan.dek_len(), ..ColumnLens::default() };
        let mut memory = Memory::take(&self.recycler(), lens)?;
        let deks = &mut memory.columns_mut().deks;
        let Opened { slots, runs, refused } = plan.run(self.fan_out(), deks, resolved.refused);
        let name = |error: Error| {
            let id = base.item(error.index().expect("refused items have an index"));
            error.with_request_id(id)
        };
        let refused = refused.into_iter().map(name).collect();
        let memory = Arc::new(memory);
        Ok(DecryptedBatch { base, len: requests.len(), slots, runs, refused, memory })
    }
}

/// A batch whose keys are found.
struct Resolved<'a> {
    items: Vec<Item<'a>>,
    refused: Vec<Error>,
    summary: Summary,
    /// Whether a newer ring may know more.
    missed: bool,
}

/// Finds the key of every request by `resolver`, which is new. `unasked` refuses those that ask for what the ring does
/// not have.
fn resolve_all<'a>(
    requests: &[DecryptRequest<'a>],
    mut resolver: Resolver<'a>,
    unasked: Option<&Error>,
) -> Resolved<'a> {
    let mut resolved = Resolved {
        items: Vec::with_capacity(requests.len()),
        refused: Vec::new(),
        summary: Summary::default(),
        missed: false,
    };
    for (index, request) in requests.iter().enumerate() {
        let before = resolved.items.len();
        let mut found = resolver.resolve(request, index, &mut resolved.items);
        if resolver.take_missed() {
            resolved.missed = true;
            if let Some(error) = unasked {
                // Its part in the summary stays: more memory than needed, and a pass that is not.
                resolved.items.truncate(before);
                found = Err(error.clone());
            }
        }
        if let Err(error) = found {
            resolved.refused.push(error.with_index(index));
        }
    }
    resolved.summary = resolver.summary();
    resolved
}
