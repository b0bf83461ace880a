//! Planning a generating batch: pure decisions, no I/O and no cryptography.
//!
//! In two steps, with the leases of wraps between them: [`Plan::resolve`] looks every item's key up in the ring and
//! groups items by key version and length, [`Plan::resolve_uniform`] does the same for a batch that is one group from
//! the start; [`Plan::lay_out`] gives every item that is still in its slot and cuts the slots into chunks. Slots go
//! group by group, groups in the order of their first item, and in a group by the number of AAD blocks, since messages
//! of about one length make the best neighbours for the kernels; items that have as many stay in request order.
//!
//! A name is looked up once a batch where equal names follow each other, and once each time it changes otherwise; the
//! rest is counting. A batch of one group has no index at all. A plan keeps its memory for the next one.
//!
//! Chunk cuts depend on the batch alone, never on CPU, tier or threads: with the same seed, the same batch gives the
//! same bytes everywhere.

use std::{collections::HashMap, ops::Range, sync::Arc};

use foldhash::fast::RandomState;

use super::{NO_SLOT, check_output, lookup::Lookup};
use crate::{
    error::{Error, ErrorKind, Result},
    keys::{
        access::Access,
        id::KeyVersionId,
        ring::{Key, KeyVersion, Ring},
    },
    limits::{AAD_LEN_MAX, CHUNK_BYTES_MAX, CHUNK_ITEMS_MAX, IV_LEN, SHORT_RUN},
    memory::ColumnLens,
    request::{GenerateDataKeyRequest, Operation, aad_too_long},
    wrap::{
        Scheme,
        blob::{Form, Layout},
    },
};

/// Items of one key version and one length.
pub(crate) struct Group {
    pub(crate) key: Arc<Key>,
    /// Of the version that wraps: a copy, since to look into many versions is to wait for as much cold memory.
    pub(crate) version_id: KeyVersionId,
    pub(crate) layout: Layout,
    count: usize,
}

/// Lengths of AADs that are kept apart: none, one to four blocks of sixteen bytes, and more.
const AAD_CLASSES: u32 = 6;

fn class_of(aad_len: usize) -> u32 {
    u32::try_from(aad_len.div_ceil(16))
        .map_or(AAD_CLASSES - 1, |blocks| blocks.min(AAD_CLASSES - 1))
}

impl Group {
    /// A group without items, of the version of `key` that wraps in this form.
    pub(super) fn new(key: Arc<Key>, version_id: KeyVersionId, form: Form, dek_len: usize) -> Self {
        // The record's scheme is that of every version.
        let layout = Layout { form, scheme: key.record.scheme, dek_len };
        Self { key, version_id, layout, count: 0 }
    }

    /// The version that wraps. Found in the key, since a count of references costs more than a look.
    pub(crate) fn version(&self) -> &Arc<KeyVersion> {
        self.key.version_for(self.layout.form == Form::SelfDescribing)
    }

    /// Items of the group that are not refused.
    pub(crate) fn count(&self) -> usize {
        self.count
    }
}

/// Wraps that a `Direct` version is asked for.
pub(crate) struct DirectNeed {
    pub(crate) key: Arc<Key>,
    pub(crate) version: Arc<KeyVersion>,
    pub(crate) wraps: u64,
    pub(crate) granted: u64,
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
    /// are reserved for its group, by `state_needs[need]`.
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
#[derive(Default)]
pub(crate) struct Plan {
    pub(crate) groups: Vec<Group>,
    pub(crate) segments: Vec<Segment>,
    pub(crate) chunks: Vec<Chunk>,
    /// Groups with short runs, and the items of these.
    pub(crate) state_needs: Vec<(usize, u64)>,
    /// What [`Plan::sum_direct_needs`] found.
    pub(crate) direct_needs: Vec<DirectNeed>,
    item_count: usize,
    refused: Vec<Error>,
    /// Until the layout, `group * AAD_CLASSES + class` of each item, [`NO_SLOT`] for a refused one; then its slot.
    /// Empty if all are in group 0, so that each item's slot is its index.
    of_item: Vec<u32>,
    /// The item of each slot; empty as `of_item`.
    item_of_slot: Vec<u32>,
    /// Items of each class of each group, if there is an index; when items are placed, the next slot of each.
    classes: Vec<u32>,
    /// Bytes of an AAD on average.
    aad_mean: usize,
}

impl Plan {
    /// Forgets the batch and its keys, and keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.groups.clear();
        self.segments.clear();
        self.chunks.clear();
        self.state_needs.clear();
        self.direct_needs.clear();
        self.item_count = 0;
        self.refused.clear();
        self.of_item.clear();
        self.item_of_slot.clear();
        self.classes.clear();
    }

    /// Looks every item up. Returns whether a name was unknown, so that a newer ring may know more.
    pub(crate) fn resolve<'a>(
        &mut self,
        requests: &[GenerateDataKeyRequest<'a>],
        ring: &Ring,
        access: &dyn Access,
        operation: Operation,
    ) -> bool {
        self.clear();
        self.item_count = requests.len();
        let mut lookup = Lookup::new(ring, access, operation, requests.len());
        let alike = lookup.ask_first(requests);
        let only_name = alike == requests.len();
        let aads_len = match only_name {
            true => requests.iter().map(|request| request.aad.len()).sum(),
            false => self.index(&mut lookup, requests, alike),
        };
        self.aad_mean = aads_len / requests.len().max(1);
        let found = lookup.find_all(&mut self.groups);
        if self.refused.is_empty() && found.iter().all(|found| matches!(found, Ok(0))) {
            self.of_item.clear();
            self.only_group(requests.len());
            return false;
        }
        if only_name {
            self.of_item.extend(requests.iter().map(|request| class_of(request.aad.len())));
        }
        let unknown = self.put_groups(&found);
        self.count();
        unknown
    }

    /// Makes the index: of each item the number of its name, and the class of its AAD. Those before `alike` have the
    /// first name. Returns the bytes of all AADs.
    #[inline(never)]
    fn index<'a>(
        &mut self,
        lookup: &mut Lookup<'_, 'a>,
        requests: &[GenerateDataKeyRequest<'a>],
        alike: usize,
    ) -> usize {
        let mut aads_len = 0;
        self.of_item.clear();
        self.of_item.extend(requests.iter().enumerate().map(|(index, request)| {
            let aad_len = request.aad.len();
            aads_len += aad_len;
            if index < alike {
                class_of(aad_len)
            } else if aad_len <= AAD_LEN_MAX {
                lookup.ask(request) * AAD_CLASSES + class_of(aad_len)
            } else {
                self.refused.push(aad_too_long(aad_len).with_index(index));
                NO_SLOT
            }
        }));
        aads_len
    }

    /// Puts the group that was `found` for each name in its place, or refuses. Returns whether a name was unknown.
    fn put_groups(&mut self, found: &[Result<u32>]) -> bool {
        let mut unknown = false;
        // As long as each name is a group of its own, they have the same numbers.
        let is_same =
            |(name, found): (u32, &Result<u32>)| matches!(found, Ok(group) if *group == name);
        if (0..).zip(found).all(is_same) {
            return false;
        }
        for (index, of_item) in self.of_item.iter_mut().enumerate() {
            if *of_item == NO_SLOT {
                continue;
            }
            match &found[(*of_item / AAD_CLASSES) as usize] {
                Ok(group) => *of_item = group * AAD_CLASSES + *of_item % AAD_CLASSES,
                Err(error) => {
                    unknown |= error.kind() == ErrorKind::KeyNotFound;
                    *of_item = NO_SLOT;
                    self.refused.push(error.clone().with_index(index));
                }
            }
        }
        unknown
    }

    /// Counts the items of the only group, if there is one.
    fn only_group(&mut self, count: usize) {
        if let Some(group) = self.groups.first_mut() {
            group.count = count;
        }
    }

    /// Counts the items of each class of each group.
    fn count(&mut self) {
        self.classes.clear();
        self.classes.resize(self.groups.len() * AAD_CLASSES as usize, 0);
        for class in &self.of_item {
            if let Some(count) = self.classes.get_mut(*class as usize) {
                *count += 1;
            }
        }
        let of_groups = self.classes.chunks_exact(AAD_CLASSES as usize);
        for (group, classes) in self.groups.iter_mut().zip(of_groups) {
            group.count = classes.iter().map(|count| *count as usize).sum();
        }
    }

    /// Plans `count` items of one key and one length, whose AADs have `aads_len` bytes together.
    pub(crate) fn resolve_uniform(
        &mut self,
        key: &Arc<Key>,
        operation: Operation,
        dek_len: usize,
        count: usize,
        aads_len: usize,
    ) {
        self.clear();
        self.item_count = count;
        if count > 0 {
            let form = operation.form();
            let version_id = key.version_for(form == Form::SelfDescribing).id;
            self.groups.push(Group::new(Arc::clone(key), version_id, form, dek_len));
            self.only_group(count);
            self.aad_mean = aads_len / count;
        }
    }

    /// Items that are not refused, which are as many as slots.
    pub(crate) fn slot_count(&self) -> usize {
        self.item_count - self.refused.len()
    }

    /// All items, refused or not.
    pub(crate) fn item_count(&self) -> usize {
        self.item_count
    }

    /// Sums up the wraps that each `Direct` version of the batch needs, in `direct_needs`.
    pub(crate) fn sum_direct_needs(&mut self) {
        let needs = &mut self.direct_needs;
        needs.clear();
        let mut of_version: HashMap<usize, usize, RandomState> = HashMap::default();
        let mut first = None;
        for group in self.groups.iter().filter(|group| group.layout.scheme == Scheme::Direct) {
            let place = Arc::as_ptr(group.version()) as usize;
            // Most batches have one version at most, and need no map.
            let need = match *first.get_or_insert(place) == place {
                true => 0,
                false => *of_version.entry(place).or_insert(needs.len()),
            };
            if need == needs.len() {
                let (key, version) = (Arc::clone(&group.key), Arc::clone(group.version()));
                needs.push(DirectNeed { key, version, wraps: 0, granted: 0 });
            }
            needs[need].wraps += group.count as u64;
        }
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
            self.of_item.resize(self.item_count, 0);
        }
        for (index, of_item) in self.of_item.iter_mut().enumerate() {
            let group = *of_item / AAD_CLASSES;
            let Some(group) = self.groups.get(group as usize) else { continue };
            match shortfalls.get_mut(&(Arc::as_ptr(group.version()) as usize)) {
                None => {}
                Some((granted, _)) if *granted > 0 => *granted -= 1,
                Some((_, why)) => {
                    *of_item = NO_SLOT;
                    self.refused.push(why.clone().with_index(index));
                }
            }
        }
        self.count();
    }

    /// Bytes of each column.
    pub(crate) fn lens(&self) -> ColumnLens {
        let size = |of: fn(&Layout) -> usize| {
            self.groups.iter().map(|group| group.count * of(&group.layout)).sum::<usize>()
        };
        ColumnLens {
            deks: size(|layout| layout.dek_len),
            ivs: self.slot_count() * IV_LEN,
            blobs: size(|layout| layout.len()),
        }
    }

    /// To be asked before wraps are leased: a batch that is refused must not spend any.
    ///
    /// # Errors
    /// `LimitExceeded` if the results are larger than one call may return.
    pub(crate) fn check_size(&self) -> Result<()> {
        let ColumnLens { deks, ivs, blobs } = self.lens();
        check_output(deks + ivs + blobs)
    }

    /// Gives every accepted item its slot and cuts the slots into chunks.
    pub(crate) fn lay_out(&mut self) {
        if !self.of_item.is_empty() {
            self.place();
        }
        self.refused.sort_unstable_by_key(Error::index);
        self.cut();
        self.choose_sources();
    }

    /// Slots by counting: where each class of each group begins, then one pass over the items.
    fn place(&mut self) {
        let mut next = 0;
        for class in &mut self.classes {
            let count = *class;
            *class = next;
            next += count;
        }
        self.item_of_slot.resize(next as usize, 0);
        for (item, of_item) in (0..).zip(&mut self.of_item) {
            if let Some(slot) = self.classes.get_mut(*of_item as usize) {
                *of_item = *slot;
                self.item_of_slot[*slot as usize] = item;
                *slot += 1;
            }
        }
    }

    /// The items of all slots; `None` if each is in the slot of its index.
    pub(crate) fn items(&self) -> Option<&[u32]> {
        (!self.item_of_slot.is_empty()).then_some(&self.item_of_slot)
    }

    /// The slots of all items, and the refusals in item order, with their memory.
    pub(crate) fn results(&mut self) -> (&mut Vec<u32>, &mut Vec<Error>) {
        (&mut self.of_item, &mut self.refused)
    }

    /// Chunks of as many items as are allowed, or as their bytes allow: those of AADs are the average of the batch.
    fn cut(&mut self) {
        let mut open = Chunk { slots: 0..0, segments: 0..0, dek_len: 0, blob_len: 0 };
        let mut bytes = 0;
        let mut slot = 0;
        for (number, group) in self.groups.iter().enumerate() {
            let layout = group.layout;
            let item_len = layout.dek_len + layout.len() + IV_LEN + self.aad_mean;
            let mut left = group.count;
            while left > 0 {
                let of_bytes = CHUNK_BYTES_MAX.saturating_sub(bytes) / item_len;
                let room = of_bytes.min(CHUNK_ITEMS_MAX - open.slots.len());
                // One item always fits an empty chunk.
                let taken = room.max(usize::from(open.slots.is_empty())).min(left);
                if taken == 0 {
                    close(&mut self.chunks, &mut open, self.segments.len());
                    bytes = 0;
                    continue;
                }
                let slots = slot..slot + taken;
                slot = slots.end;
                open.slots.end = slot;
                open.dek_len += taken * layout.dek_len;
                open.blob_len += taken * layout.len();
                bytes += taken * item_len;
                left -= taken;
                self.segments.push(Segment { group: number, slots, source: Source::Version });
            }
        }
        if !open.slots.is_empty() {
            close(&mut self.chunks, &mut open, self.segments.len());
        }
    }

    /// Decides for each segment of a `Derived` version whether it derives a key of its own.
    fn choose_sources(&mut self) {
        for segment in &mut self.segments {
            let group = &self.groups[segment.group];
            segment.source = match group.layout.scheme {
                Scheme::Direct => Source::Version,
                Scheme::Derived if segment.slots.len() >= SHORT_RUN => Source::Chunk,
                Scheme::Derived => {
                    // Segments come group by group.
                    if self.state_needs.last().is_none_or(|(group, _)| *group != segment.group) {
                        self.state_needs.push((segment.group, 0));
                    }
                    let need = self.state_needs.len() - 1;
                    let (_, count) = &mut self.state_needs[need];
                    let first = *count;
                    *count += segment.slots.len() as u64;
                    Source::State { need, first }
                }
            };
        }
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
