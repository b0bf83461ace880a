//! The two operations that unwrap data keys, single and in batches.

use std::sync::Arc;

use zeroize::Zeroizing;

use super::{Engine, Shared};
use crate::{
    batch::{
        check_item_count,
        open::{self, OpenPlan, Reading},
        result::{Decrypted, DecryptedBatch},
    },
    error::{Error, Result},
    request::DecryptRequest,
    secret::SecretBytes,
};

/// Operations that unwrap.
impl Engine {
    /// Unwraps a raw blob: `key_id` and `iv` are needed, and the key's initial version opens it. Without a `key_id`,
    /// `key_version_id` names the version.
    ///
    /// # Errors
    /// `InternalFailure` if the AAD, the blob or a 12-byte IV is wrong, without saying which; `InvalidParameter` for a
    /// missing or malformed parameter; `Forbidden.KeyNotFound`, `Rejected.Disabled`, `Rejected.PendingDeletion`.
    pub fn decrypt(&self, request: &DecryptRequest<'_>) -> Result<Decrypted> {
        self.decrypt_one(request, Reading::Raw)
    }

    /// Unwraps a blob of either form. A self-describing one needs the AAD alone; a `key_id` that names another key is
    /// refused, and `iv` and `algorithm` are ignored. Any other blob is read as [`Engine::decrypt`] does.
    ///
    /// # Errors
    /// As [`Engine::decrypt`].
    pub fn advance_decrypt(&self, request: &DecryptRequest<'_>) -> Result<Decrypted> {
        self.decrypt_one(request, Reading::Advance)
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
        self.decrypt_many(requests, Reading::Raw)
    }

    /// A batch of [`Engine::advance_decrypt`].
    ///
    /// # Errors
    /// As [`Engine::decrypt_batch`].
    pub fn advance_decrypt_batch(&self, requests: &[DecryptRequest<'_>]) -> Result<DecryptedBatch> {
        self.decrypt_many(requests, Reading::Advance)
    }

    fn decrypt_one(&self, request: &DecryptRequest<'_>, reading: Reading) -> Result<Decrypted> {
        self.in_one_process(|shared| shared.decrypt_one(request, reading))
            .map_err(|error| self.shared().name(error))
    }

    fn decrypt_many(
        &self,
        requests: &[DecryptRequest<'_>],
        reading: Reading,
    ) -> Result<DecryptedBatch> {
        check_item_count(requests.len())?;
        self.in_one_process(|shared| shared.decrypt_many(requests, reading))
    }
}

impl Shared {
    fn decrypt_one(&self, request: &DecryptRequest<'_>, reading: Reading) -> Result<Decrypted> {
        let mut ring = self.ring.load_full();
        if open::wants_newer_ring(request, &ring, reading) {
            self.refresh_if_changed()?;
            ring = self.ring.load_full();
        }
        let item = open::resolve(request, 0, &ring, reading)?;
        let mut plaintext = Zeroizing::new(vec![0; item.dek_len]);
        if !item.open(&mut plaintext) {
            return Err(open::failed());
        }
        Ok(Decrypted {
            key_version_id: item.version.id,
            plaintext: SecretBytes::from_vec(std::mem::take(&mut *plaintext)),
            request_id: self.new_request_id()?,
        })
    }

    fn decrypt_many(
        &self,
        requests: &[DecryptRequest<'_>],
        reading: Reading,
    ) -> Result<DecryptedBatch> {
        let base = self.new_request_id()?;
        let mut ring = self.ring.load_full();
        // A store that cannot be asked refuses the items that need it, not their neighbours.
        let mut unasked = None;
        if requests.iter().any(|request| open::wants_newer_ring(request, &ring, reading)) {
            unasked = self.refresh_if_changed().err();
            ring = self.ring.load_full();
        }
        let resolve = |index, request| match &unasked {
            Some(error) if open::wants_newer_ring(request, &ring, reading) => Err(error.clone()),
            _ => open::resolve(request, index, &ring, reading),
        };
        let mut items = Vec::with_capacity(requests.len());
        let mut refused = Vec::new();
        for (index, request) in requests.iter().enumerate() {
            match resolve(index, request) {
                Ok(item) => items.push(item),
                Err(error) => refused.push(error.with_index(index)),
            }
        }
        let plan = OpenPlan::new(items, requests.len())?;
        let (arena, slots, runs, refused) = plan.run(self.fan_out(), refused)?;
        let name = |error: Error| {
            let id = base.item(error.index().expect("refused items have an index"));
            error.with_request_id(id)
        };
        Ok(DecryptedBatch {
            base,
            len: requests.len(),
            slots,
            runs,
            refused: refused.into_iter().map(name).collect(),
            plaintexts: Arc::new(arena),
        })
    }
}
