//! Batches of the four operations that generate data keys: of request structs, or of one key and one length.

use std::sync::Arc;

use super::{Engine, Shared, single::ATTEMPTS, wraps};
use crate::{
    batch::{
        Aads, check_item_count,
        plan::{Plan, Shortfall},
        result::{DataKeyBatch, RunRecord, Scratch},
        run,
    },
    error::{Error, Result},
    keys::{
        KeyHandle,
        access::{Access, Everything},
    },
    limits::{AAD_LEN_MAX, OS_SEED_ITEMS_MIN},
    memory::Memory,
    os,
    request::{GenerateDataKeyRequest, Operation, aads::AadSource, check_number_of_bytes},
    secret::Seed,
    wrap::{Wrapper, blob::Form},
};

/// Batches of data keys.
impl Engine {
    /// Generates a data key for every request, as [`Engine::generate_data_key`] does for one.
    ///
    /// Results come in request order: `batch.len() == requests.len()`. Every item has its own key, length and AAD; a
    /// bad item gets its own error and the others succeed; no item is ever half made. At most 1,048,576 items and
    /// 1 GiB of output.
    ///
    /// Cost: below 8,192 items the work stays on the caller's thread; from there on rayon's threads help the caller.
    /// [`Engine::generate_data_keys`] costs less where all keys have one KEK and one length.
    ///
    /// # Errors
    /// `Rejected.LimitExceeded` for a batch over its limits, before any work; `ServiceUnavailableTemporary` if there
    /// is no memory for the result or there are no random bytes. Then nothing was made.
    pub fn generate_data_key_batch(
        &self,
        requests: &[GenerateDataKeyRequest<'_>],
    ) -> Result<DataKeyBatch> {
        self.new_batch(requests, Operation::GenerateDataKey)
    }

    /// A batch of [`Engine::generate_data_key_without_plaintext`].
    ///
    /// # Errors
    /// As [`Engine::generate_data_key_batch`].
    pub fn generate_data_key_without_plaintext_batch(
        &self,
        requests: &[GenerateDataKeyRequest<'_>],
    ) -> Result<DataKeyBatch> {
        self.new_batch(requests, Operation::GenerateDataKeyWithoutPlaintext)
    }

    /// A batch of [`Engine::advance_generate_data_key`].
    ///
    /// # Errors
    /// As [`Engine::generate_data_key_batch`].
    pub fn advance_generate_data_key_batch(
        &self,
        requests: &[GenerateDataKeyRequest<'_>],
    ) -> Result<DataKeyBatch> {
        self.new_batch(requests, Operation::AdvanceGenerateDataKey)
    }

    /// A batch of [`Engine::advance_generate_data_key_without_plaintext`].
    ///
    /// # Errors
    /// As [`Engine::generate_data_key_batch`].
    pub fn advance_generate_data_key_without_plaintext_batch(
        &self,
        requests: &[GenerateDataKeyRequest<'_>],
    ) -> Result<DataKeyBatch> {
        self.new_batch(requests, Operation::AdvanceGenerateDataKeyWithoutPlaintext)
    }

    /// Generates a data key for every request, by any of the four operations, in place of what `batch` holds.
    ///
    /// A batch that no view shares is made anew in its own memory, so that a caller who makes many batches of about one
    /// size allocates nothing and maps no page. A batch of another engine is as good as an empty one: its memory goes
    /// back to that engine.
    ///
    /// ```
    /// use keymill::{CreateKey, DataKeyBatch, Engine, GenerateDataKeyRequest, Operation};
    ///
    /// let engine = Engine::in_memory()?;
    /// engine.create_key(&CreateKey { alias: Some("alias/app".into()), ..CreateKey::default() })?;
    /// let mut batch = DataKeyBatch::new();
    /// for page in 0..10 {
    ///     let requests = [GenerateDataKeyRequest::new("alias/app", 32); 1000];
    ///     engine.generate_data_key_batch_into(
    ///         &mut batch,
    ///         Operation::AdvanceGenerateDataKey,
    ///         &requests,
    ///     )?;
    ///     assert_eq!(batch.len(), 1000);
    /// }
    /// # Ok::<(), keymill::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Engine::generate_data_key_batch`]. The batch then has no items, and the keys that it had are wiped.
    pub fn generate_data_key_batch_into(
        &self,
        batch: &mut DataKeyBatch,
        operation: Operation,
        requests: &[GenerateDataKeyRequest<'_>],
    ) -> Result<()> {
        self.generate_batch_as(&Everything, batch, operation, requests)
    }

    /// As [`Engine::generate_data_key_batch_into`], for a caller who has this access. Items of keys that it does not
    /// permit are refused one by one.
    pub(crate) fn generate_batch_as(
        &self,
        access: &dyn Access,
        batch: &mut DataKeyBatch,
        operation: Operation,
        requests: &[GenerateDataKeyRequest<'_>],
    ) -> Result<()> {
        self.make(batch, |shared, batch| {
            check_item_count(requests.len())?;
            shared.generate_many(access, requests, operation, batch)
        })
    }

    /// Generates `count` data keys of one length for one key, as [`Engine::generate_data_key`] does for one. `aads` is
    /// [`NoAad`](crate::NoAad), one for all ([`SameAad`](crate::SameAad)), or anything with an AAD for each index.
    ///
    /// Results come in order, and limits are those of [`Engine::generate_data_key_batch`]. No request structs are made
    /// and nothing is looked up: this is the fastest way to many keys.
    ///
    /// # Errors
    /// As [`Engine::generate_data_key`], for all of them: a length outside its limits, a key in a state that refuses,
    /// an AAD that is too long, `aads` that are fewer than `count` (more are ignored), a handle of another engine.
    /// Nothing was made then. Items beyond the bound of a `Direct` version are refused one by one.
    pub fn generate_data_keys(
        &self,
        key: &KeyHandle,
        number_of_bytes: u32,
        count: usize,
        aads: impl AadSource,
    ) -> Result<DataKeyBatch> {
        let operation = Operation::GenerateDataKey;
        let mut batch = DataKeyBatch::default();
        self.generate_data_keys_into(&mut batch, operation, key, number_of_bytes, count, aads)?;
        Ok(batch)
    }

    /// As [`Engine::generate_data_keys`], by [`Engine::advance_generate_data_key`].
    ///
    /// # Errors
    /// As [`Engine::generate_data_keys`].
    pub fn advance_generate_data_keys(
        &self,
        key: &KeyHandle,
        number_of_bytes: u32,
        count: usize,
        aads: impl AadSource,
    ) -> Result<DataKeyBatch> {
        let operation = Operation::AdvanceGenerateDataKey;
        let mut batch = DataKeyBatch::default();
        self.generate_data_keys_into(&mut batch, operation, key, number_of_bytes, count, aads)?;
        Ok(batch)
    }

    /// As [`Engine::generate_data_keys`], by any of the four operations, in place of what `batch` holds (see
    /// [`Engine::generate_data_key_batch_into`]).
    ///
    /// # Errors
    /// As [`Engine::generate_data_keys`]. The batch then has no items, and the keys that it had are wiped.
    pub fn generate_data_keys_into(
        &self,
        batch: &mut DataKeyBatch,
        operation: Operation,
        key: &KeyHandle,
        number_of_bytes: u32,
        count: usize,
        aads: impl AadSource,
    ) -> Result<()> {
        let wanted = Uniform { key, number_of_bytes, count, aads: &aads };
        self.make(batch, |shared, batch| {
            check_item_count(count)?;
            shared.generate_uniform(&wanted, operation, batch)
        })
    }

    fn new_batch(
        &self,
        requests: &[GenerateDataKeyRequest<'_>],
        operation: Operation,
    ) -> Result<DataKeyBatch> {
        let mut batch = DataKeyBatch::default();
        self.generate_data_key_batch_into(&mut batch, operation, requests)?;
        Ok(batch)
    }

    fn make(
        &self,
        batch: &mut DataKeyBatch,
        work: impl Fn(&Shared, &mut DataKeyBatch) -> Result<()>,
    ) -> Result<()> {
        let done = self.in_one_process(|shared| work(shared, batch));
        if done.is_err() {
            batch.clear();
        }
        done
    }
}

/// A batch of one key and one length.
struct Uniform<'a> {
    key: &'a KeyHandle,
    number_of_bytes: u32,
    count: usize,
    aads: &'a dyn AadSource,
}

impl Uniform<'_> {
    /// Bytes of all AADs.
    ///
    /// # Errors
    /// `InvalidParameter` if there are too few, or one is too long.
    fn aads_len(&self) -> Result<usize> {
        if let Some(given) = self.aads.count().filter(|given| *given < self.count) {
            return Err(Error::invalid(format!(
                "There are AADs for {given} data keys, but {} are asked for.",
                self.count
            )));
        }
        let (longest, total) = self.aads.measure(0..self.count);
        if longest <= AAD_LEN_MAX {
            return Ok(total);
        }
        let long = |index: &usize| self.aads.aad(*index).len() > AAD_LEN_MAX;
        let index = (0..self.count).find(long).unwrap_or_default();
        Err(Error::invalid(format!(
            "The Aad of data key {index} has {} bytes; at most {AAD_LEN_MAX} are allowed.",
            self.aads.aad(index).len()
        )))
    }
}

/// Wrapping states that are brought near together.
const STATES_TOGETHER: usize = 32;

impl Shared {
    fn generate_many(
        &self,
        access: &dyn Access,
        requests: &[GenerateDataKeyRequest<'_>],
        operation: Operation,
        batch: &mut DataKeyBatch,
    ) -> Result<()> {
        let mut scratch = std::mem::take(&mut batch.scratch);
        let (plan, aads) = (&mut scratch.plan, Aads::Requests(requests));
        let mut refreshed = false;
        let mut unasked = None;
        let mut attempts = 1..=ATTEMPTS;
        loop {
            let ring = self.ring.load_full();
            if plan.resolve(requests, &ring, access, operation) && !refreshed {
                refreshed = true;
                unasked = self.refresh_if_changed().err();
                if self.ring.load().changes != ring.changes {
                    continue;
                }
            }
            if let Some(error) = &unasked {
                plan.refuse_unknown(error);
            }
            plan.check_size()?;
            attempts.next();
            if self.lease_all(plan, operation, ring.changes, attempts.is_empty()) {
                break;
            }
        }
        self.make_all(&mut scratch, aads, operation, batch)?;
        batch.scratch = scratch;
        Ok(())
    }

    fn generate_uniform(
        &self,
        wanted: &Uniform<'_>,
        operation: Operation,
        batch: &mut DataKeyBatch,
    ) -> Result<()> {
        let cell = wanted.key.of_engine(self.number)?;
        let dek_len = check_number_of_bytes(wanted.number_of_bytes)?;
        let aads_len = wanted.aads_len()?;
        let mut scratch = std::mem::take(&mut batch.scratch);
        let (plan, aads) = (&mut scratch.plan, Aads::Source(wanted.aads));
        for attempt in 1.. {
            let changes = self.ring.load().changes;
            let key = cell.load()?;
            key.record.check_usable()?;
            plan.resolve_uniform(&key, operation, dek_len, wanted.count, aads_len);
            plan.check_size()?;
            if self.lease_all(plan, operation, changes, attempt == ATTEMPTS) {
                break;
            }
        }
        self.make_all(&mut scratch, aads, operation, batch)?;
        batch.scratch = scratch;
        Ok(())
    }

    /// Leases the wraps of every `Direct` version and refuses the items beyond. `false` if the plan should be made
    /// again, because an Advance operation found a primary version spent that has a successor now: the ring is not that
    /// of `changes` any more.
    fn lease_all(&self, plan: &mut Plan, operation: Operation, changes: u64, last: bool) -> bool {
        let generation = os::generation();
        plan.sum_direct_needs();
        let mut shortfalls = Vec::new();
        let mut succeeded = false;
        for need in &mut plan.direct_needs {
            let why = match self.take_wraps(&need.key, &need.version, need.wraps) {
                Ok(granted) => {
                    need.granted = granted;
                    None
                }
                Err(error) => Some(error),
            };
            let granted = need.granted;
            if granted < need.wraps {
                succeeded |= self.successor(&need.key, &need.version, operation.form()).is_some();
                let why = why.unwrap_or_else(|| wraps::spent(&need.version));
                shortfalls.push(Shortfall { version: Arc::clone(&need.version), granted, why });
            }
        }
        if succeeded && !last && self.ring.load().changes != changes {
            for need in &plan.direct_needs {
                need.version.lease.add(need.granted, generation);
            }
            return false;
        }
        plan.refuse_beyond(shortfalls);
        true
    }

    /// Reserves what can fail, then makes every key of the plan in `batch`.
    fn make_all(
        &self,
        scratch: &mut Scratch,
        aads: Aads<'_>,
        operation: Operation,
        batch: &mut DataKeyBatch,
    ) -> Result<()> {
        let Scratch { plan, reserved, worker } = scratch;
        plan.lay_out();
        if operation.form() == Form::Raw {
            for group in &plan.groups {
                self.note_initial_use(&group.key, group.count());
            }
        }
        let base = self.new_request_id()?;
        reserved.clear();
        let moment = self.rng.moment();
        for needs in plan.state_needs.chunks(STATES_TOGETHER) {
            let states = |group: usize| match &plan.groups[group].version().wrapper {
                Wrapper::Derived { root, states } => (root, states),
                Wrapper::Direct(_) => unreachable!("only Derived versions have short runs"),
            };
            // A reservation waits for all that comes before it; hints do not.
            needs.iter().for_each(|(group, _)| states(*group).1.prefetch(moment));
            needs.iter().for_each(|(group, _)| states(*group).1.prefetch_state(moment));
            for (group, count) in needs {
                let (root, states) = states(*group);
                reserved.push(states.reserve(root, &self.rng, moment, *count)?);
            }
        }
        let slot_count = plan.slot_count();
        // Drawn in place: a seed that is returned and moved leaves copies behind.
        let mut seed = Seed::new([0; 32]);
        if slot_count < OS_SEED_ITEMS_MIN {
            self.rng.fill(&mut *seed)?;
        } else {
            self.rng.fill_from_os(&mut *seed)?;
        }
        let mut lens = plan.lens();
        if !operation.returns_plaintext() {
            lens.deks = 0;
        }
        batch.forget_items();
        let home = self.recycler();
        match Arc::get_mut(&mut batch.memory).filter(|memory| memory.is_of(&home)) {
            Some(memory) => memory.resize(lens)?,
            None => batch.memory = Arc::new(Memory::take(&home, lens)?),
        }
        let memory = Arc::get_mut(&mut batch.memory).expect("not shared yet");

        let job = run::Job { tier: self.tier, seed: &seed, plan, aads, reserved };
        run::run(&job, memory.columns_mut(), worker, self.fan_out());

        (batch.base, batch.len) = (base, plan.item_count());
        batch.plaintext = operation.returns_plaintext();
        RunRecord::of_plan(plan, &mut batch.runs);
        let (slots, refused) = plan.results();
        std::mem::swap(&mut batch.slots, slots);
        batch.refused.extend(refused.drain(..).map(|error| {
            let id = base.item(error.index().expect("refused items have an index"));
            error.with_request_id(id)
        }));
        // Keys are not kept by whoever keeps the batch.
        reserved.clear();
        plan.clear();
        Ok(())
    }
}
