//! The columnar results of a batch, and their views.
//!
//! A batch owns one column each of data keys, IVs and blobs, in plan order; slots lead from request order to it.
//! Borrowed views ([`DataKeyRef`]) cost nothing; owned ones ([`DataKey`]) share the batch's memory and keep it alive.
//! Nothing is copied, and nothing is allocated per key but what an owned view needs for itself.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;

use super::{
    NO_SLOT,
    data_key::{About, DataKey},
    plan::Plan,
    run::Worker,
};
use crate::{
    error::Error,
    keys::{KeyId, KeyVersionId},
    limits::IV_LEN,
    memory::Memory,
    request::ALGORITHM,
    request_id::RequestId,
    secret::SecretBytes,
    wrap::state::Reserved,
};

/// Consecutive slots whose records have one key version and one length, and where they begin in the arenas.
#[derive(Clone, Copy)]
pub(crate) struct RunRecord {
    pub(crate) first_slot: usize,
    pub(crate) version: KeyVersionId,
    pub(crate) dek_len: usize,
    pub(crate) blob_len: usize,
    pub(crate) dek_at: usize,
    pub(crate) blob_at: usize,
}

impl RunRecord {
    /// Writes the records of a plan's groups in place of `runs`.
    pub(crate) fn of_plan(plan: &Plan, runs: &mut Vec<Self>) {
        let (mut dek_at, mut blob_at) = (0, 0);
        runs.clear();
        for segment in &plan.segments {
            let group = &plan.groups[segment.group];
            let (dek_len, blob_len) = (group.layout.dek_len, group.layout.len());
            let run = Self {
                first_slot: segment.slots.start,
                version: group.version_id,
                dek_len,
                blob_len,
                dek_at,
                blob_at,
            };
            match runs.last() {
                // Cut by a chunk alone: one run for the reader.
                Some(last) if last.version == run.version && last.dek_len == dek_len => {}
                _ => runs.push(run),
            }
            dek_at += segment.slots.len() * dek_len;
            blob_at += segment.slots.len() * blob_len;
        }
    }
}

/// The run of `slot`, and the slot's position in it.
fn locate(runs: &[RunRecord], slot: usize) -> (&RunRecord, usize) {
    let after = runs.partition_point(|run| run.first_slot <= slot);
    let run = &runs[after - 1];
    (run, slot - run.first_slot)
}

/// The error of item `index` among `refused`, which is sorted by index.
fn refusal(refused: &[Error], index: usize) -> &Error {
    let at = refused
        .binary_search_by_key(&Some(index), Error::index)
        .expect("an item without a slot has an error");
    &refused[at]
}

/// The slot of item `index`, unless it was refused. No slots at all mean that each is the index.
fn slot_of(slots: &[u32], index: usize) -> Option<usize> {
    match slots.get(index) {
        None => Some(index),
        Some(&NO_SLOT) => None,
        Some(slot) => Some(*slot as usize),
    }
}

/// The results of a generating batch, in request order.
///
/// Item *i* answers request *i*: a data key, or the error that refused it. The data keys are wiped when the batch and
/// every view of it are gone. The memory then goes back to the engine, for its next batch;
/// [`Engine::generate_data_key_batch_into`](crate::Engine::generate_data_key_batch_into) makes a batch anew in the
/// same place.
pub struct DataKeyBatch {
    pub(crate) base: RequestId,
    pub(crate) len: usize,
    pub(crate) plaintext: bool,
    /// Empty if every item is in the slot of its index.
    pub(crate) slots: Vec<u32>,
    pub(crate) runs: Vec<RunRecord>,
    pub(crate) refused: Vec<Error>,
    pub(crate) memory: Arc<Memory>,
    /// The blobs in the form that owned views share, made when the first of them is asked for.
    pub(crate) blobs: OnceLock<Bytes>,
    pub(crate) scratch: Scratch,
}

/// What a batch was made with, for the next one. No key is in it.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) plan: Plan,
    pub(crate) reserved: Vec<Reserved>,
    pub(crate) worker: Worker,
}

impl Default for DataKeyBatch {
    /// A batch without items, to be filled by a call that makes one in place.
    fn default() -> Self {
        Self {
            base: RequestId::from_random([0; 16]),
            len: 0,
            plaintext: false,
            slots: Vec::new(),
            runs: Vec::new(),
            refused: Vec::new(),
            memory: Arc::new(Memory::empty()),
            blobs: OnceLock::new(),
            scratch: Scratch::default(),
        }
    }
}

impl DataKeyBatch {
    /// A batch without items. The same as [`DataKeyBatch::default`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the items out and wipes their keys, unless a view still has them. The memory goes back to the engine.
    pub fn clear(&mut self) {
        self.forget_items();
        self.memory = Arc::new(Memory::empty());
    }

    /// Takes the items out and leaves the memory as it is.
    pub(crate) fn forget_items(&mut self) {
        self.len = 0;
        self.slots.clear();
        self.runs.clear();
        self.refused.clear();
        self.blobs.take();
    }

    /// Number of items: that of the requests.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no items.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The result of request `index`.
    ///
    /// # Errors
    /// The error that refused the item, with its KMS code.
    ///
    /// # Panics
    /// If `index >= self.len()`, as indexing a slice does.
    pub fn get(&self, index: usize) -> Result<DataKeyRef<'_>, &Error> {
        assert!(index < self.len, "item {index} of a batch of {}", self.len);
        let Some(slot) = slot_of(&self.slots, index) else {
            return Err(refusal(&self.refused, index));
        };
        let (run, nth) = locate(&self.runs, slot);
        Ok(DataKeyRef { batch: self, run, index, slot, nth })
    }

    /// The results in request order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Result<DataKeyRef<'_>, &Error>> {
        (0..self.len).map(|index| self.get(index))
    }

    /// The errors of refused items in request order, each with its [`Error::index`].
    pub fn errors(&self) -> &[Error] {
        &self.refused
    }

    /// The request id of item `index`, made or refused.
    pub fn request_id(&self, index: usize) -> RequestId {
        self.base.item(index)
    }
}

impl std::fmt::Debug for DataKeyBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataKeyBatch")
            .field("len", &self.len)
            .field("refused", &self.refused.len())
            .finish_non_exhaustive()
    }
}

/// A data key of a batch, borrowed.
#[derive(Clone, Copy)]
pub struct DataKeyRef<'a> {
    batch: &'a DataKeyBatch,
    run: &'a RunRecord,
    index: usize,
    slot: usize,
    nth: usize,
}

impl<'a> DataKeyRef<'a> {
    /// The KEK's id, also if the request named an alias.
    pub fn key_id(&self) -> KeyId {
        self.run.version.key_id()
    }

    /// The key version that wraps.
    pub fn key_version_id(&self) -> KeyVersionId {
        self.run.version
    }

    /// The IV, which `decrypt` needs.
    pub fn iv(&self) -> &'a [u8; IV_LEN] {
        self.batch.memory.columns().ivs[self.iv_range()].try_into().expect("IV_LEN")
    }

    /// The data key; `None` from the operations without plaintext.
    pub fn plaintext(&self) -> Option<&'a [u8]> {
        self.batch.plaintext.then(|| &self.batch.memory.columns().deks[self.dek_range()])
    }

    /// The wrapped data key.
    pub fn ciphertext_blob(&self) -> &'a [u8] {
        &self.batch.memory.columns().blobs[self.blob_range()]
    }

    /// `AES_GCM`.
    pub fn algorithm(&self) -> &'static str {
        ALGORITHM
    }

    /// The id of this item's request.
    pub fn request_id(&self) -> RequestId {
        self.batch.base.item(self.index)
    }

    /// An owned view that shares the batch's memory and keeps it alive, at the cost of one small allocation.
    pub fn to_data_key(&self) -> DataKey {
        let memory = &self.batch.memory;
        let plaintext = || SecretBytes::view(memory, self.dek_range());
        let blobs = self.batch.blobs.get_or_init(|| memory.blobs());
        DataKey::view(
            self.about(),
            self.batch.plaintext.then(plaintext),
            blobs.slice(self.blob_range()),
        )
    }

    /// An owned copy in memory of its own.
    pub fn detach(&self) -> DataKey {
        DataKey::copy(self.about(), self.plaintext(), self.ciphertext_blob())
    }

    fn about(&self) -> About {
        About { key_version_id: self.run.version, iv: *self.iv(), request_id: self.request_id() }
    }

    fn iv_range(&self) -> Range<usize> {
        self.slot * IV_LEN..(self.slot + 1) * IV_LEN
    }

    fn dek_range(&self) -> Range<usize> {
        let at = self.run.dek_at + self.nth * self.run.dek_len;
        at..at + self.run.dek_len
    }

    fn blob_range(&self) -> Range<usize> {
        let at = self.run.blob_at + self.nth * self.run.blob_len;
        at..at + self.run.blob_len
    }
}

impl std::fmt::Debug for DataKeyRef<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataKeyRef")
            .field("key_version_id", &self.run.version)
            .field("request_id", &self.request_id())
            .finish_non_exhaustive()
    }
}

/// The results of a decrypting batch, in request order.
///
/// The plaintexts are wiped when the batch and every view of it are gone.
pub struct DecryptedBatch {
    pub(crate) base: RequestId,
    pub(crate) len: usize,
    /// Empty if every item is in the slot of its index.
    pub(crate) slots: Vec<u32>,
    pub(crate) runs: Vec<RunRecord>,
    pub(crate) refused: Vec<Error>,
    pub(crate) memory: Arc<Memory>,
}

impl DecryptedBatch {
    /// Number of items: that of the requests.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no items.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The result of request `index`.
    ///
    /// # Errors
    /// The error that refused the item, with its KMS code.
    ///
    /// # Panics
    /// If `index >= self.len()`, as indexing a slice does.
    pub fn get(&self, index: usize) -> Result<DecryptedRef<'_>, &Error> {
        assert!(index < self.len, "item {index} of a batch of {}", self.len);
        let Some(slot) = slot_of(&self.slots, index) else {
            return Err(refusal(&self.refused, index));
        };
        let (run, nth) = locate(&self.runs, slot);
        Ok(DecryptedRef { batch: self, run, index, nth })
    }

    /// The results in request order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Result<DecryptedRef<'_>, &Error>> {
        (0..self.len).map(|index| self.get(index))
    }

    /// The errors of refused items in request order, each with its [`Error::index`].
    pub fn errors(&self) -> &[Error] {
        &self.refused
    }

    /// The request id of item `index`, opened or refused.
    pub fn request_id(&self, index: usize) -> RequestId {
        self.base.item(index)
    }
}

impl std::fmt::Debug for DecryptedBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DecryptedBatch")
            .field("len", &self.len)
            .field("refused", &self.refused.len())
            .finish_non_exhaustive()
    }
}

/// An unwrapped data key of a batch, borrowed.
#[derive(Clone, Copy)]
pub struct DecryptedRef<'a> {
    batch: &'a DecryptedBatch,
    run: &'a RunRecord,
    index: usize,
    nth: usize,
}

impl<'a> DecryptedRef<'a> {
    /// The KEK's id.
    pub fn key_id(&self) -> KeyId {
        self.run.version.key_id()
    }

    /// The key version that unwrapped.
    pub fn key_version_id(&self) -> KeyVersionId {
        self.run.version
    }

    /// The data key.
    pub fn plaintext(&self) -> &'a [u8] {
        &self.batch.memory.columns().deks[self.range()]
    }

    /// `AES_GCM`.
    pub fn algorithm(&self) -> &'static str {
        ALGORITHM
    }

    /// The id of this item's request.
    pub fn request_id(&self) -> RequestId {
        self.batch.base.item(self.index)
    }

    /// An owned view that shares the batch's memory and keeps it alive.
    pub fn to_decrypted(&self) -> Decrypted {
        Decrypted {
            key_version_id: self.run.version,
            plaintext: SecretBytes::view(&self.batch.memory, self.range()),
            request_id: self.request_id(),
        }
    }

    fn range(&self) -> Range<usize> {
        let at = self.run.dek_at + self.nth * self.run.dek_len;
        at..at + self.run.dek_len
    }
}

impl std::fmt::Debug for DecryptedRef<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DecryptedRef")
            .field("key_version_id", &self.run.version)
            .field("request_id", &self.request_id())
            .finish_non_exhaustive()
    }
}

/// An unwrapped data key or a decrypted text, owned: the result of a single call, or an owned view of a batch.
#[derive(Clone, Debug)]
pub struct Decrypted {
    pub(crate) key_version_id: KeyVersionId,
    pub(crate) plaintext: SecretBytes,
    pub(crate) request_id: RequestId,
}

impl Decrypted {
    /// The KEK's id.
    pub fn key_id(&self) -> KeyId {
        self.key_version_id.key_id()
    }

    /// The key version that unwrapped.
    pub fn key_version_id(&self) -> KeyVersionId {
        self.key_version_id
    }

    /// The data key or the text.
    pub fn plaintext(&self) -> &SecretBytes {
        &self.plaintext
    }

    /// `AES_GCM`.
    pub fn algorithm(&self) -> &'static str {
        ALGORITHM
    }

    /// The id of the request.
    pub fn request_id(&self) -> RequestId {
        self.request_id
    }
}
