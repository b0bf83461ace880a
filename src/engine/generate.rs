//! The four operations that generate data keys, single and in batches.

use std::sync::{Arc, atomic::Ordering};

use bytes::Bytes;
use zeroize::zeroize_stack;

use super::{Engine, Shared, wraps};
use crate::{
    batch::{
        Operation, check_item_count,
        plan::{Groups, Plan, Shortfall},
        result::{DataKey, DataKeyBatch, RunRecord},
        run::{self, Columns},
    },
    error::{Error, Result},
    kernel::{self, Keys},
    keys::ring::{Key, KeyVersion, Ring},
    limits::{IV_LEN, OS_SEED_ITEMS_MIN, SALT_LEN},
    os,
    request::GenerateDataKeyRequest,
    request_id::RequestId,
    secret::{SecretArena, SecretBytes, zeroed},
    wrap::{
        Wrapper,
        blob::{Form, Layout},
    },
};

const GENERATE: Operation = Operation { form: Form::Raw, plaintext: true };
const GENERATE_WITHOUT: Operation = Operation { form: Form::Raw, plaintext: false };
const ADVANCE: Operation = Operation { form: Form::SelfDescribing, plaintext: true };
const ADVANCE_WITHOUT: Operation = Operation { form: Form::SelfDescribing, plaintext: false };

/// How often an operation starts over because a key rotated under it.
const ATTEMPTS: usize = 3;

/// Operations on data keys.
impl Engine {
    /// Generates a data key and wraps it under the key's **initial** version. Store the blob, the IV, the AAD and the
    /// key id. To follow a key's rotation, use [`Engine::advance_generate_data_key`].
    ///
    /// # Errors
    /// `InvalidParameter`, `Forbidden.KeyNotFound`, `Rejected.Disabled`, `Rejected.PendingDeletion`;
    /// `Rejected.LimitExceeded` when a `Direct` version has spent its 2^32 wraps. The store or the machine may fail.
    pub fn generate_data_key(&self, request: &GenerateDataKeyRequest<'_>) -> Result<DataKey> {
        self.generate_one(request, GENERATE)
    }

    /// As [`Engine::generate_data_key`], for a data key that someone else will ask for by `decrypt`: it is wiped as
    /// soon as it is wrapped.
    ///
    /// # Errors
    /// As [`Engine::generate_data_key`].
    pub fn generate_data_key_without_plaintext(
        &self,
        request: &GenerateDataKeyRequest<'_>,
    ) -> Result<DataKey> {
        self.generate_one(request, GENERATE_WITHOUT)
    }

    /// Generates a data key and wraps it under the key's **primary** version, in a blob that describes itself: store
    /// the blob and the AAD.
    ///
    /// # Errors
    /// As [`Engine::generate_data_key`].
    pub fn advance_generate_data_key(
        &self,
        request: &GenerateDataKeyRequest<'_>,
    ) -> Result<DataKey> {
        self.generate_one(request, ADVANCE)
    }

    /// As [`Engine::advance_generate_data_key`], with the data key wiped as soon as it is wrapped.
    ///
    /// # Errors
    /// As [`Engine::generate_data_key`].
    pub fn advance_generate_data_key_without_plaintext(
        &self,
        request: &GenerateDataKeyRequest<'_>,
    ) -> Result<DataKey> {
        self.generate_one(request, ADVANCE_WITHOUT)
    }

    /// Generates a data key for every request, as [`Engine::generate_data_key`] does for one.
    ///
    /// Results come in request order: `batch.len() == requests.len()`. Every item has its own key, length and AAD; a
    /// bad item gets its own error and the others succeed; no item is ever half made. At most 1,048,576 items and
    /// 1 GiB of output.
    ///
    /// Cost: below 2,048 items the work stays on the caller's thread; from there on rayon's threads help the caller.
    ///
    /// # Errors
    /// `Rejected.LimitExceeded` for a batch over its limits, before any work; `ServiceUnavailableTemporary` if there
    /// is no memory for the result or there are no random bytes. Then nothing was made.
    pub fn generate_data_key_batch(
        &self,
        requests: &[GenerateDataKeyRequest<'_>],
    ) -> Result<DataKeyBatch> {
        self.generate_many(requests, GENERATE)
    }

    /// A batch of [`Engine::generate_data_key_without_plaintext`].
    ///
    /// # Errors
    /// As [`Engine::generate_data_key_batch`].
    pub fn generate_data_key_without_plaintext_batch(
        &self,
        requests: &[GenerateDataKeyRequest<'_>],
    ) -> Result<DataKeyBatch> {
        self.generate_many(requests, GENERATE_WITHOUT)
    }

    /// A batch of [`Engine::advance_generate_data_key`].
    ///
    /// # Errors
    /// As [`Engine::generate_data_key_batch`].
    pub fn advance_generate_data_key_batch(
        &self,
        requests: &[GenerateDataKeyRequest<'_>],
    ) -> Result<DataKeyBatch> {
        self.generate_many(requests, ADVANCE)
    }

    /// A batch of [`Engine::advance_generate_data_key_without_plaintext`].
    ///
    /// # Errors
    /// As [`Engine::generate_data_key_batch`].
    pub fn advance_generate_data_key_without_plaintext_batch(
        &self,
        requests: &[GenerateDataKeyRequest<'_>],
    ) -> Result<DataKeyBatch> {
        self.generate_many(requests, ADVANCE_WITHOUT)
    }

    fn generate_one(
        &self,
        request: &GenerateDataKeyRequest<'_>,
        operation: Operation,
    ) -> Result<DataKey> {
        self.in_one_process(|shared| shared.generate_one(request, operation))
            .map_err(|error| self.shared().name(error))
    }

    fn generate_many(
        &self,
        requests: &[GenerateDataKeyRequest<'_>],
        operation: Operation,
    ) -> Result<DataKeyBatch> {
        check_item_count(requests.len())?;
        self.in_one_process(|shared| shared.generate_many(requests, operation))
    }
}

fn version_of(key: &Key, operation: Operation) -> &Arc<KeyVersion> {
    match operation.form {
        Form::Raw => key.initial(),
        Form::SelfDescribing => key.primary(),
    }
}

impl Shared {
    fn generate_one(
        &self,
        request: &GenerateDataKeyRequest<'_>,
        operation: Operation,
    ) -> Result<DataKey> {
        let dek_len = request.check()?;
        let key = self.find(request.key_id)?;
        key.record.check_usable()?;
        let mut version = Arc::clone(version_of(&key, operation));
        if let Wrapper::Direct(_) = version.wrapper {
            version = self.take_one_wrap(key.clone(), version, operation)?;
        }
        if operation.form == Form::Raw {
            self.note_initial_use(&key, 1);
        }

        let mut dek = SecretArena::zeroed(dek_len)?;
        let (mut id, mut iv) = ([0; 16], [0; IV_LEN]);
        let state;
        let (gcm, salt) = match &version.wrapper {
            Wrapper::Direct(key) => {
                self.rng.fill_each(&mut [&mut id, &mut iv, dek.as_mut_slice()])?;
                (key.key(), [0; SALT_LEN])
            }
            Wrapper::Derived { root, states } => {
                state = states.reserve(root, &self.rng, 1)?;
                self.rng.fill_each(&mut [&mut id, dek.as_mut_slice()])?;
                iv = state.first_iv;
                (state.key.key(), state.salt)
            }
        };
        let layout = Layout { form: operation.form, scheme: version.wrapper.scheme(), dek_len };
        let mut blob = vec![0; layout.len()];
        layout.write_head(&mut blob, version.id.as_bytes(), &iv, &salt);
        kernel::seal_many(kernel::Seal {
            keys: Keys::One(gcm),
            ivs: &[iv],
            aads: &[request.aad],
            len: dek_len,
            plaintexts: dek.as_slice(),
            out: &mut blob,
            stride: layout.len(),
            offset: layout.ciphertext_at(),
        });
        zeroize_stack::<{ kernel::STACK_LEN }>();
        Ok(DataKey {
            key_version_id: version.id,
            iv: Bytes::copy_from_slice(&iv),
            plaintext: operation.plaintext.then(|| SecretBytes::view(&Arc::new(dek), 0..dek_len)),
            ciphertext_blob: blob.into(),
            request_id: RequestId::from_random(id),
        })
    }

    /// Takes one wrap, of the new primary version if an Advance operation found the old one spent and the key rotates.
    fn take_one_wrap(
        &self,
        mut key: Arc<Key>,
        mut version: Arc<KeyVersion>,
        operation: Operation,
    ) -> Result<Arc<KeyVersion>> {
        for _ in 0..ATTEMPTS {
            if self.take_wraps(&key, &version, 1)? == 1 {
                return Ok(version);
            }
            match self.successor(&key, &version, operation) {
                Some((new_key, new_version)) => (key, version) = (new_key, new_version),
                None => break,
            }
        }
        Err(wraps::spent(&version))
    }

    /// The key's version for `operation` in the present ring, if it is not `version`.
    fn successor(
        &self,
        key: &Key,
        version: &Arc<KeyVersion>,
        operation: Operation,
    ) -> Option<(Arc<Key>, Arc<KeyVersion>)> {
        let ring = self.ring.load();
        let key = ring.resolve(key.record.id.as_str())?;
        let now = version_of(key, operation);
        (now.id != version.id).then(|| (Arc::clone(key), Arc::clone(now)))
    }

    /// The key with this name; a name that is missing is looked up in the store once.
    pub(super) fn find(&self, name: &str) -> Result<Arc<Key>> {
        if let Some(key) = self.ring.load().resolve(name) {
            return Ok(Arc::clone(key));
        }
        self.refresh_if_changed()?;
        self.ring.load().resolve(name).cloned().ok_or_else(|| Error::key_not_found(name))
    }

    /// Counts, and warns once a key, that the initial version of a rotating key is used.
    fn note_initial_use(&self, key: &Key, count: usize) {
        if key.record.rotation.is_none() || count == 0 {
            return;
        }
        self.initial_version_uses.fetch_add(count as u64, Ordering::Relaxed);
        if !key.warned.swap(true, Ordering::Relaxed) {
            log::warn!(
                "key {} rotates by itself, but GenerateDataKey goes on with its initial version; \
                 AdvanceGenerateDataKey follows the rotation",
                key.record.id
            );
        }
    }

    fn generate_many(
        &self,
        requests: &[GenerateDataKeyRequest<'_>],
        operation: Operation,
    ) -> Result<DataKeyBatch> {
        let mut refreshed = false;
        let mut unasked = None;
        let mut attempts = 1..=ATTEMPTS;
        let plan = loop {
            let ring = self.ring.load_full();
            let (mut groups, unknown) = Groups::resolve(requests, &ring, operation);
            if unknown && !refreshed {
                refreshed = true;
                unasked = self.refresh_if_changed().err();
                if self.ring.load().changes != ring.changes {
                    continue;
                }
            }
            if let Some(error) = &unasked {
                groups.refuse_unknown(error);
            }
            groups.check_size()?;
            attempts.next();
            let last = attempts.is_empty();
            if let Some(groups) = self.lease_all(groups, operation, &ring, last) {
                break groups.lay_out(requests);
            }
        };
        if operation.form == Form::Raw {
            for group in &plan.groups {
                self.note_initial_use(&group.key, group.count());
            }
        }
        self.make(plan, requests, operation)
    }

    /// Leases the wraps of every `Direct` version and refuses the items beyond. `None` if the plan should be made
    /// again, because an Advance operation found a primary version spent that has a successor now.
    fn lease_all(
        &self,
        mut groups: Groups,
        operation: Operation,
        ring: &Ring,
        last: bool,
    ) -> Option<Groups> {
        let generation = os::generation();
        let needs = groups.direct_needs();
        let mut taken = Vec::with_capacity(needs.len());
        let mut shortfalls = Vec::new();
        let mut succeeded = false;
        for need in &needs {
            let (granted, why) = match self.take_wraps(&need.key, &need.version, need.wraps) {
                Ok(granted) => (granted, None),
                Err(error) => (0, Some(error)),
            };
            taken.push(granted);
            if granted < need.wraps {
                succeeded |= self.successor(&need.key, &need.version, operation).is_some();
                let why = why.unwrap_or_else(|| wraps::spent(&need.version));
                shortfalls.push(Shortfall { version: Arc::clone(&need.version), granted, why });
            }
        }
        if succeeded && !last && self.ring.load().changes != ring.changes {
            for (need, granted) in needs.iter().zip(taken) {
                need.version.lease.add(granted, generation);
            }
            return None;
        }
        groups.refuse_beyond(shortfalls);
        Some(groups)
    }

    /// Reserves what can fail, then makes every key of the plan.
    fn make(
        &self,
        plan: Plan,
        requests: &[GenerateDataKeyRequest<'_>],
        operation: Operation,
    ) -> Result<DataKeyBatch> {
        let base = self.new_request_id()?;
        let reserve = |(group, count): &(usize, u64)| match &plan.groups[*group].version.wrapper {
            Wrapper::Derived { root, states } => states.reserve(root, &self.rng, *count),
            Wrapper::Direct(_) => unreachable!("only Derived versions have short runs"),
        };
        let reserved = plan.state_needs.iter().map(reserve).collect::<Result<Vec<_>>>()?;
        let seed = if plan.slot_count < OS_SEED_ITEMS_MIN {
            self.rng.pool_seed()?
        } else {
            self.rng.os_seed()?
        };
        let mut plaintexts =
            operation.plaintext.then(|| SecretArena::zeroed(plan.dek_len)).transpose()?;
        let mut ivs = zeroed(plan.slot_count * IV_LEN)?;
        let mut blobs = zeroed(plan.blob_len)?;

        let job =
            run::Job { tier: self.tier, seed: &seed, plan: &plan, requests, reserved: &reserved };
        let columns = Columns {
            deks: plaintexts.as_mut().map(SecretArena::as_mut_slice),
            ivs: &mut ivs,
            blobs: &mut blobs,
        };
        run::run(&job, columns, self.fan_out());

        let name = |error: Error| {
            let id = base.item(error.index().expect("refused items have an index"));
            error.with_request_id(id)
        };
        Ok(DataKeyBatch {
            base,
            len: requests.len(),
            runs: RunRecord::of_plan(&plan),
            slots: plan.slots,
            refused: plan.refused.into_iter().map(name).collect(),
            ivs: ivs.into(),
            blobs: blobs.into(),
            plaintexts: plaintexts.map(Arc::new),
        })
    }
}
