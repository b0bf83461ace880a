//! Planning a generating batch: pure decisions, no I/O and no cryptography.
//!
//! In two steps, with the leases of wraps between them: [`Groups::resolve`] looks every item's key up in the ring and
//! groups items by key version and length; [`Groups::lay_out`] gives every item that is still in its slot and cuts the
//! slots into chunks. Slots go group by group, groups in the order of their first item, items in request order.
//!
//! Chunk cuts depend on the batch alone, never on CPU, tier or threads: with the same seed, the same batch gives the
//! same bytes everywhere.

use std::{collections::HashMap, ops::Range, sync::Arc};

use foldhash::fast::RandomState;

use super::{NO_SLOT, Operation, Slots, check_output};
use crate::{
    error::{Error, ErrorKind, Result},
    keys::ring::{Key, KeyVersion, Ring},
    limits::{CHUNK_BYTES_MAX, CHUNK_ITEMS_MAX, IV_LEN, SHORT_RUN},
    request::GenerateDataKeyRequest,
    wrap::{
        Scheme,
        blob::{Form, Layout},
    },
};

/// Items of one key version and one length.
pub(crate) struct Group {
    pub(crate) key: Arc<Key>,
    pub(crate) version: Arc<KeyVersion>,
    pub(crate) layout: Layout,
    count: usize,
}

impl Group {
    /// Items of the group that are not refused.
    pub(crate) fn count(&self) -> usize {
        self.count
    }
}

/// A batch whose items know their groups.
pub(crate) struct Groups {
    groups: Vec<Group>,
    /// The group of each item; [`NO_SLOT`] for a refused one. Empty if all are in group 0.
    of_item: Vec<u32>,
    item_count: usize,
    refused: Vec<Error>,
}

/// Wraps that a `Direct` version is asked for.
pub(crate) struct DirectNeed {
    pub(crate) key: Arc<Key>,
    pub(crate) version: Arc<KeyVersion>,
    pub(crate) wraps: u64,
}

/// A `Direct` version that got fewer wraps than the batch needs.
pub(crate) struct Shortfall {
    pub(crate) version: Arc<KeyVersion>,
    pub(crate) granted: u64,
    pub(crate) why: Error,
}

/// Consecutive slots of one group within one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) group: usize,
    pub(crate) slots: Range<usize>,
    pub(crate) source: Source,
}

/// Where a segment's wrapping key, salt and IVs come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// `Direct`: the version itself, with IVs of the chunk.
    Version,
    /// A long run of `Derived`: a key derived with the chunk's salt, with IVs of the chunk.
    Chunk,
    /// A short run of `Derived`: the version's wrapping state. The run has the places from `first` on of those that
    /// are reserved for the version in this batch, by `state_needs[need]`.
    State { need: usize, first: u64 },
}

/// One unit of parallel work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) slots: Range<usize>,
    pub(crate) segments: Range<usize>,
    /// Bytes of DEKs.
    pub(crate) dek_len: usize,
    /// Bytes of blobs.
    pub(crate) blob_len: usize,
}

/// What the batch does, decided in full.
pub(crate) struct Plan {
    pub(crate) groups: Vec<Group>,
    pub(crate) segments: Vec<Segment>,
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) slots: Slots,
    /// The item of each slot; empty if [`Slots::Same`].
    item_of_slot: Vec<u32>,
    pub(crate) slot_count: usize,
    pub(crate) dek_len: usize,
    pub(crate) blob_len: usize,
    /// Short-run items of each group's version: index of its first group, and how many.
    pub(crate) state_needs: Vec<(usize, u64)>,
    /// In item order.
    pub(crate) refused: Vec<Error>,
}

impl Groups {
    /// Looks every item up. The second value tells whether a name was unknown, so that a newer ring may know more.
    pub(crate) fn resolve(
        requests: &[GenerateDataKeyRequest<'_>],
        ring: &Ring,
        operation: Operation,
    ) -> (Self, bool) {
        let mut found = Self {
            groups: Vec::new(),
            of_item: Vec::new(),
            item_count: requests.len(),
            refused: Vec::new(),
        };
        let mut by_version: HashMap<(usize, usize), u32, RandomState> = HashMap::default();
        let mut unknown = false;
        // The last name that was looked up: equal names mostly come one after the other.
        let mut last: Option<(&str, Result<&Arc<Key>>)> = None;
        for (index, request) in requests.iter().enumerate() {
            if last.as_ref().is_none_or(|(name, _)| *name != request.key_id) {
                let key = ring
                    .resolve(request.key_id)
                    .ok_or_else(|| Error::key_not_found(request.key_id))
                    .and_then(|key| key.record.check_usable().map(|()| key));
                last = Some((request.key_id, key));
            }
            let (_, key) = last.as_ref().expect("just set");
            // Parameters are checked before the key, as the KMS seems to do.
            let item = request.check().and_then(|len| Ok((len, key.clone()?)));
            match item {
                Ok((dek_len, key)) => {
                    let version = match operation.form {
                        Form::Raw => key.initial(),
                        Form::SelfDescribing => key.primary(),
                    };
                    let group = *by_version
                        .entry((Arc::as_ptr(version) as usize, dek_len))
                        .or_insert_with(|| found.add_group(key, version, operation, dek_len));
                    found.put(index, group);
                    found.groups[group as usize].count += 1;
                }
                Err(error) => {
                    unknown |= error.kind() == ErrorKind::KeyNotFound;
                    found.put(index, NO_SLOT);
                    found.refused.push(error.with_index(index));
                }
            }
        }
        (found, unknown)
    }

    fn add_group(
        &mut self,
        key: &Arc<Key>,
        version: &Arc<KeyVersion>,
        operation: Operation,
        dek_len: usize,
    ) -> u32 {
        let scheme = version.wrapper.scheme();
        self.groups.push(Group {
            key: Arc::clone(key),
            version: Arc::clone(version),
            layout: Layout { form: operation.form, scheme, dek_len },
            count: 0,
        });
        u32::try_from(self.groups.len() - 1).expect("no more groups than items")
    }

    /// Notes the group of item `index`; the notes begin with the first item that is not of group 0.
    fn put(&mut self, index: usize, group: u32) {
        if self.of_item.is_empty() && group != 0 {
            self.of_item.reserve_exact(self.item_count);
            self.of_item.resize(index, 0);
        }
        if !self.of_item.is_empty() || group != 0 {
            self.of_item.push(group);
        }
    }

    /// Items that are not refused.
    pub(crate) fn accepted(&self) -> usize {
        self.item_count - self.refused.len()
    }

    /// The wraps that each `Direct` version of the batch needs.
    pub(crate) fn direct_needs(&self) -> Vec<DirectNeed> {
        let mut needs: Vec<DirectNeed> = Vec::new();
        let mut of_version: HashMap<usize, usize, RandomState> = HashMap::default();
        for group in self.groups.iter().filter(|group| group.layout.scheme == Scheme::Direct) {
            let need =
                *of_version.entry(Arc::as_ptr(&group.version) as usize).or_insert_with(|| {
                    needs.push(DirectNeed {
                        key: Arc::clone(&group.key),
                        version: Arc::clone(&group.version),
                        wraps: 0,
                    });
                    needs.len() - 1
                });
            needs[need].wraps += group.count as u64;
        }
        needs
    }

    /// Refuses the items of unknown names with `error`: the store that may know them could not be asked. Their
    /// neighbours go on.
    pub(crate) fn refuse_unknown(&mut self, error: &Error) {
        for refused in &mut self.refused {
            if refused.kind() == ErrorKind::KeyNotFound {
                let index = refused.index().expect("refused items have an index");
                *refused = error.clone().with_index(index);
            }
        }
    }

    /// Refuses, of each version in `shortfalls`, every item after the granted ones, in request order.
    pub(crate) fn refuse_beyond(&mut self, shortfalls: Vec<Shortfall>) {
        if shortfalls.is_empty() {
            return;
        }
        let mut shortfalls: HashMap<usize, (u64, Error), RandomState> = shortfalls
            .into_iter()
            .map(|short| (Arc::as_ptr(&short.version) as usize, (short.granted, short.why)))
            .collect();
        if self.of_item.is_empty() {
            self.of_item = vec![0; self.item_count];
        }
        for (index, of_item) in self.of_item.iter_mut().enumerate() {
            let Some(group) = self.groups.get_mut(*of_item as usize) else { continue };
            match shortfalls.get_mut(&(Arc::as_ptr(&group.version) as usize)) {
                None => {}
                Some((granted, _)) if *granted > 0 => *granted -= 1,
                Some((_, why)) => {
                    *of_item = NO_SLOT;
                    group.count -= 1;
                    self.refused.push(why.clone().with_index(index));
                }
            }
        }
    }

    /// Bytes of all data keys, and of all blobs.
    fn lens(&self) -> (usize, usize) {
        let size = |of: fn(&Layout) -> usize| {
            self.groups.iter().map(|group| group.count * of(&group.layout)).sum::<usize>()
        };
        (size(|layout| layout.dek_len), size(|layout| layout.len()))
    }

    /// To be asked before wraps are leased: a batch that is refused must not spend any.
    ///
    /// # Errors
    /// `LimitExceeded` if the results are larger than one call may return.
    pub(crate) fn check_size(&self) -> Result<()> {
        let (dek_len, blob_len) = self.lens();
        check_output(dek_len + blob_len + self.accepted() * IV_LEN)
    }

    /// Gives every accepted item its slot and cuts the slots into chunks.
    pub(crate) fn lay_out(mut self, requests: &[GenerateDataKeyRequest<'_>]) -> Plan {
        let (dek_len, blob_len) = self.lens();
        let slot_count = self.accepted();

        let (slots, item_of_slot) = self.place();
        self.refused.sort_unstable_by_key(Error::index);
        let mut plan = Plan {
            groups: self.groups,
            segments: Vec::new(),
            chunks: Vec::new(),
            slots,
            item_of_slot,
            slot_count,
            dek_len,
            blob_len,
            state_needs: Vec::new(),
            refused: self.refused,
        };
        plan.cut(requests);
        plan.choose_sources();
        plan
    }

    /// Slots by counting: where each group begins, then one pass over the items.
    fn place(&self) -> (Slots, Vec<u32>) {
        if self.of_item.is_empty() {
            return (Slots::Same, Vec::new());
        }
        let mut next = 0;
        let mut starts: Vec<u32> = Vec::with_capacity(self.groups.len());
        for group in &self.groups {
            starts.push(next);
            next += u32::try_from(group.count).expect("a batch has fewer than 2^32 items");
        }
        let mut slots = vec![NO_SLOT; self.item_count];
        let mut item_of_slot = vec![0; next as usize];
        for ((item, slot), group) in (0..).zip(&mut slots).zip(&self.of_item) {
            if let Some(start) = starts.get_mut(*group as usize) {
                *slot = *start;
                item_of_slot[*start as usize] = item;
                *start += 1;
            }
        }
        (Slots::Map(slots), item_of_slot)
    }
}

impl Plan {
    /// The item in `slot`.
    pub(crate) fn item(&self, slot: usize) -> usize {
        if self.item_of_slot.is_empty() { slot } else { self.item_of_slot[slot] as usize }
    }

    fn cut(&mut self, requests: &[GenerateDataKeyRequest<'_>]) {
        let mut open = Chunk { slots: 0..0, segments: 0..0, dek_len: 0, blob_len: 0 };
        let mut bytes = 0;
        let mut slot = 0;
        for (group, Group { layout, count, .. }) in self.groups.iter().enumerate() {
            let mut segment_start = slot;
            for _ in 0..*count {
                let aad_len = requests[self.item(slot)].aad.len();
                let item_bytes = layout.dek_len + layout.len() + IV_LEN + aad_len;
                let full = open.slots.len() == CHUNK_ITEMS_MAX
                    || (bytes + item_bytes > CHUNK_BYTES_MAX && !open.slots.is_empty());
                if full {
                    push_segment(&mut self.segments, group, segment_start..slot);
                    segment_start = slot;
                    close(&mut self.chunks, &mut open, self.segments.len());
                    bytes = 0;
                }
                bytes += item_bytes;
                slot += 1;
                open.slots.end = slot;
                open.dek_len += layout.dek_len;
                open.blob_len += layout.len();
            }
            push_segment(&mut self.segments, group, segment_start..slot);
        }
        if !open.slots.is_empty() {
            close(&mut self.chunks, &mut open, self.segments.len());
        }
    }

    /// Decides for each segment of a `Derived` version whether it derives a key of its own.
    fn choose_sources(&mut self) {
        let mut of_version: HashMap<usize, usize, RandomState> = HashMap::default();
        for segment in &mut self.segments {
            let group = &self.groups[segment.group];
            segment.source = match group.layout.scheme {
                Scheme::Direct => Source::Version,
                Scheme::Derived if segment.slots.len() >= SHORT_RUN => Source::Chunk,
                Scheme::Derived => {
                    let need = *of_version
                        .entry(Arc::as_ptr(&group.version) as usize)
                        .or_insert_with(|| {
                            self.state_needs.push((segment.group, 0));
                            self.state_needs.len() - 1
                        });
                    let (_, count) = &mut self.state_needs[need];
                    let first = *count;
                    *count += segment.slots.len() as u64;
                    Source::State { need, first }
                }
            };
        }
    }
}

fn push_segment(segments: &mut Vec<Segment>, group: usize, slots: Range<usize>) {
    if !slots.is_empty() {
        segments.push(Segment { group, slots, source: Source::Version });
    }
}

/// Ends the open chunk and opens the next one behind it.
fn close(chunks: &mut Vec<Chunk>, open: &mut Chunk, segment_count: usize) {
    open.segments.end = segment_count;
    let next = Chunk {
        slots: open.slots.end..open.slots.end,
        segments: segment_count..segment_count,
        dek_len: 0,
        blob_len: 0,
    };
    chunks.push(std::mem::replace(open, next));
}
