//! Running a generating batch: each chunk fills its DEKs and seals them, in parallel, in the result's memory.
//!
//! Everything that can fail has failed before: leases, salts, seed and memory are at hand, and nothing here returns an
//! error. Whoever works on chunks keeps a [`Worker`] with the memory that they need, so that a chunk allocates nothing;
//! AADs and keys go to the kernel by the [`Block`], from arrays on the stack.

use std::{ops::Range, sync::Arc};

use zeroize::{Zeroize, Zeroizing, zeroize_stack};

use super::{
    Aads,
    fan_out::{FanOut, in_parts},
    plan::{Chunk, Plan, Segment, Source},
};
use crate::{
    cpu::Tier,
    kernel::{self, Iv, KeyRef, Keys},
    keys::{id::KeyVersionId, ring::KeyVersion},
    limits::{BLOCK_ITEMS, CHUNK_ITEMS_MAX, IV_LEN, SALT_LEN, SHORT_RUN},
    memory::Columns,
    rng::{self, ChunkStart},
    secret::Seed,
    wrap::{
        Wrapper,
        blob::Layout,
        derived::{Derivation, DerivedKeys},
        iv_plus,
        state::Reserved,
    },
};

/// What every chunk of a batch needs.
pub(crate) struct Job<'a> {
    pub(crate) tier: Tier,
    pub(crate) seed: &'a Seed,
    pub(crate) plan: &'a Plan,
    pub(crate) aads: Aads<'a>,
    /// For each of the plan's `state_needs`.
    pub(crate) reserved: &'a [Reserved],
}

/// Memory of whoever works on chunks. Between chunks no key is in it.
#[derive(Default)]
pub(crate) struct Worker {
    derived: DerivedKeys,
    /// DEKs that nobody asked for.
    deks: Zeroizing<Vec<u8>>,
}

impl Job<'_> {
    fn layout(&self, segment: &Segment) -> Layout {
        self.plan.groups[segment.group].layout
    }
}

/// One chunk with its own part of every column.
struct ChunkJob<'a> {
    number: u64,
    chunk: &'a Chunk,
    /// `None` for the operations without plaintext.
    deks: Option<&'a mut [u8]>,
    ivs: &'a mut [u8],
    blobs: &'a mut [u8],
}

/// Generates and wraps every data key of the plan, on the caller's thread with `own`.
pub(crate) fn run(job: &Job<'_>, columns: &mut Columns, own: &mut Worker, fan_out: FanOut<'_>) {
    let plan = job.plan;
    let mut deks = (!columns.deks.is_empty()).then_some(&mut columns.deks[..]);
    let (mut ivs, mut blobs) = (&mut columns.ivs[..], &mut columns.blobs[..]);
    let mut number = 0;
    let part = |chunks| {
        let part = Part::split_off(number, chunks, &mut deks, &mut ivs, &mut blobs);
        number += chunks.len() as u64;
        part
    };
    let helpers = fan_out.helpers(plan.slot_count(), plan.chunks.len());
    let parts = in_parts(&plan.chunks, 1 + helpers).map(part);
    fan_out.for_each(parts, own, |worker, chunk| run_chunk(job, worker, chunk));
}

/// Consecutive chunks with their part of every column.
struct Part<'a> {
    /// The number of the first chunk.
    number: u64,
    chunks: std::slice::Iter<'a, Chunk>,
    deks: Option<&'a mut [u8]>,
    ivs: &'a mut [u8],
    blobs: &'a mut [u8],
}

impl<'a> Part<'a> {
    /// Takes the part of `chunks` off the columns.
    fn split_off(
        number: u64,
        chunks: &'a [Chunk],
        deks: &mut Option<&'a mut [u8]>,
        ivs: &mut &'a mut [u8],
        blobs: &mut &'a mut [u8],
    ) -> Self {
        let sum = |of: fn(&Chunk) -> usize| chunks.iter().map(of).sum();
        Self {
            number,
            deks: deks.as_mut().map(|deks| split_off(deks, sum(|chunk| chunk.dek_len))),
            ivs: split_off(ivs, sum(|chunk| chunk.slots.len() * IV_LEN)),
            blobs: split_off(blobs, sum(|chunk| chunk.blob_len)),
            chunks: chunks.iter(),
        }
    }
}

impl<'a> Iterator for Part<'a> {
    type Item = ChunkJob<'a>;

    fn next(&mut self) -> Option<ChunkJob<'a>> {
        let chunk = self.chunks.next()?;
        let number = self.number;
        self.number += 1;
        Some(ChunkJob {
            number,
            chunk,
            deks: self.deks.as_mut().map(|deks| split_off(deks, chunk.dek_len)),
            ivs: split_off(&mut self.ivs, chunk.slots.len() * IV_LEN),
            blobs: split_off(&mut self.blobs, chunk.blob_len),
        })
    }
}

fn split_off<'a>(column: &mut &'a mut [u8], len: usize) -> &'a mut [u8] {
    column.split_off_mut(..len).expect("the chunks' lengths add up to the column's")
}

/// Makes a chunk. What goes to the kernel by the block lies in this frame and holds no secret, so that the frames of
/// the kernels begin right below and can be overwritten from here.
#[inline(never)]
fn run_chunk(job: &Job<'_>, worker: &mut Worker, chunk: ChunkJob<'_>) {
    let ChunkJob { number, chunk, deks, mut ivs, mut blobs } = chunk;
    let Worker { derived, deks: unasked } = worker;
    let deks = match deks {
        Some(deks) => deks,
        None => {
            unasked.resize(chunk.dek_len, 0);
            &mut unasked[..]
        }
    };
    let start = rng::chunk(job.tier, job.seed, number, deks);

    let segments = &job.plan.segments[chunk.segments.clone()];
    let keys = ChunkKeys::derive(job, segments, &start, derived);
    let mut block = Block::new(keys.of(&segments[0], 0).key);
    let mut rest = &*deks;
    let together = |a: &Segment, b: &Segment| {
        let short = |segment: &Segment| segment.slots.len() < ONE_KEY_MIN;
        short(a) && short(b) && job.layout(a) == job.layout(b)
    };
    for segments in segments.chunk_by(together) {
        // Comes while this run is sealed.
        segments.iter().for_each(|segment| job.prefetch_key_after(segment));
        let layout = job.layout(&segments[0]);
        let first_slot = segments[0].slots.start;
        let count = segments[segments.len() - 1].slots.end - first_slot;
        let run = Run {
            segments,
            layout,
            first_slot,
            chunk: chunk.slots.clone(),
            ivs: split_off(&mut ivs, count * IV_LEN).as_chunks_mut::<IV_LEN>().0,
            blobs: split_off(&mut blobs, count * layout.len()),
            deks: rest.split_off(..count * layout.dek_len).expect("as in split_off"),
        };
        run.seal(job, &keys, &mut block);
    }
    zeroize_stack::<{ kernel::STACK_LEN }>();
    derived.clear();
    if !unasked.is_empty() {
        unasked.as_mut_slice().zeroize();
        unasked.clear();
    }
}

/// What goes to the kernel with the messages of one call.
struct Block<'a> {
    aads: AadBlock<'a>,
    keys: [KeyRef<'a>; BLOCK_ITEMS],
}

impl<'a> Block<'a> {
    fn new(key: KeyRef<'a>) -> Self {
        Self { aads: AadBlock { aads: [&[]; BLOCK_ITEMS], slots: 0..0 }, keys: [key; BLOCK_ITEMS] }
    }
}

/// The AADs of consecutive slots. As many as there is room for, also for short runs: what an index scatters over the
/// batch is then waited for together, and was written well before the kernel reads it.
struct AadBlock<'a> {
    aads: [&'a [u8]; BLOCK_ITEMS],
    slots: Range<usize>,
}

impl<'a> AadBlock<'a> {
    /// The AADs of `slots`, [`BLOCK_ITEMS`] at most, in a chunk that ends with slot `end`.
    fn of(&mut self, job: &Job<'a>, slots: Range<usize>, end: usize) -> &[&'a [u8]] {
        if slots.start < self.slots.start || self.slots.end < slots.end {
            self.slots = slots.start..end.min(slots.start + BLOCK_ITEMS);
            let aads = &mut self.aads[..self.slots.len()];
            job.copy_aads(slots.start, aads);
            if job.plan.items().is_some() {
                aads.iter().for_each(|aad| kernel::prefetch_at(aad.as_ptr().addr()));
            }
        }
        &self.aads[slots.start - self.slots.start..][..slots.len()]
    }
}

/// A segment of so many items goes to the kernel by itself: one key for all messages takes less time than a key for
/// each, and less than that of a further call from here on.
const ONE_KEY_MIN: usize = 12;

/// So many short segments before it is needed, a key is asked for: memory answers within that time.
const KEYS_AHEAD: usize = 2;

/// Consecutive segments of one layout, with their parts of the columns.
struct Run<'a> {
    segments: &'a [Segment],
    layout: Layout,
    first_slot: usize,
    /// The slots of the chunk.
    chunk: Range<usize>,
    ivs: &'a mut [Iv],
    blobs: &'a mut [u8],
    deks: &'a [u8],
}

impl Run<'_> {
    fn seal<'a>(self, job: &Job<'a>, keys: &ChunkKeys<'a>, block: &mut Block<'a>) {
        let Run { segments, layout, first_slot, chunk, ivs, blobs, deks } = self;
        let sealing = |segment: &Segment| keys.of(segment, segment.slots.start - chunk.start);
        let Block { aads, keys: each_key } = block;
        let only = match segments {
            [segment] => Some(sealing(segment)),
            _ => None,
        };
        if only.is_none() {
            let (mut rest_ivs, mut rest_blobs) = (&mut ivs[..], &mut blobs[..]);
            for segment in segments {
                let count = segment.slots.len();
                let ivs = rest_ivs.split_off_mut(..count).expect("as in split_off");
                let blobs = split_off(&mut rest_blobs, count * layout.len());
                sealing(segment).write_heads(layout, 0, ivs, blobs);
            }
        }
        let mut each = segments
            .iter()
            .flat_map(|segment| std::iter::repeat_n(sealing(segment).key, segment.slots.len()));
        let blocks = ivs
            .chunks_mut(BLOCK_ITEMS)
            .zip(blobs.chunks_mut(BLOCK_ITEMS * layout.len()))
            .zip(deks.chunks(BLOCK_ITEMS * layout.dek_len));
        for (((ivs, out), plaintexts), slot) in blocks.zip((first_slot..).step_by(BLOCK_ITEMS)) {
            let keys = match &only {
                Some(sealing) => {
                    // By the block, so that its blobs are still near when the kernel writes into them.
                    sealing.write_heads(layout, (slot - first_slot) as u64, ivs, out);
                    Keys::One(sealing.key)
                }
                None => {
                    let keys = &mut each_key[..ivs.len()];
                    // The places first: a zip that ends with them takes no key of the next block.
                    for (place, key) in keys.iter_mut().zip(&mut each) {
                        *place = key;
                    }
                    Keys::Each(keys)
                }
            };
            let aads = aads.of(job, slot..slot + ivs.len(), chunk.end);
            kernel::seal_many(kernel::Seal {
                keys,
                ivs,
                aads,
                len: layout.dek_len,
                plaintexts,
                out,
                stride: layout.len(),
                offset: layout.ciphertext_at(),
            });
        }
    }
}

impl<'a> Job<'a> {
    /// Asks for the key of a later segment, if it was there before the chunk: each lies by itself, cold.
    fn prefetch_key_after(&self, segment: &Segment) {
        if let Source::State { need, .. } = segment.source
            && let Some(reserved) = self.reserved.get(need + KEYS_AHEAD)
        {
            reserved.prefetch();
        }
    }

    /// The AADs of the items in the slots from `first` on.
    fn copy_aads(&self, first: usize, out: &mut [&'a [u8]]) {
        match (self.aads, self.plan.items()) {
            (Aads::Source(source), None) => source.copy_to(first, out),
            (Aads::Source(source), Some(items)) => {
                for (out, item) in out.iter_mut().zip(&items[first..]) {
                    *out = source.aad(*item as usize);
                }
            }
            (Aads::Requests(requests), None) => {
                for (out, request) in out.iter_mut().zip(&requests[first..]) {
                    *out = request.aad;
                }
            }
            (Aads::Requests(requests), Some(items)) => {
                for (out, item) in out.iter_mut().zip(&items[first..]) {
                    *out = requests[*item as usize].aad;
                }
            }
        }
    }
}

/// What a segment is sealed with.
struct Sealing<'a> {
    key: KeyRef<'a>,
    salt: [u8; SALT_LEN],
    first_iv: Iv,
    version_id: &'a KeyVersionId,
}

impl Sealing<'_> {
    /// Writes the IVs of items that begin `place` items into the segment, and the heads of their blobs.
    fn write_heads(&self, layout: Layout, place: u64, ivs: &mut [Iv], blobs: &mut [u8]) {
        count_up(ivs, &iv_plus(&self.first_iv, place));
        layout.write_heads(blobs, self.version_id.as_bytes(), ivs, &self.salt);
    }
}

/// Most long runs in a chunk, and so most keys that it derives.
const LONG_RUNS_MAX: usize = CHUNK_ITEMS_MAX / SHORT_RUN;

/// The keys of a chunk: those that it derives with its salt, one for each `Derived` version that has a long run in it,
/// and those that were there before.
struct ChunkKeys<'a> {
    job: &'a Job<'a>,
    start: ChunkStart,
    versions: [Option<&'a Arc<KeyVersion>>; LONG_RUNS_MAX],
    derived: &'a DerivedKeys,
}

impl<'a> ChunkKeys<'a> {
    fn derive(
        job: &'a Job<'a>,
        segments: &[Segment],
        start: &ChunkStart,
        derived: &'a mut DerivedKeys,
    ) -> Self {
        let mut versions = [None; LONG_RUNS_MAX];
        let mut count = 0;
        for segment in segments.iter().filter(|segment| segment.source == Source::Chunk) {
            let version = job.plan.groups[segment.group].version();
            if place_of(&versions, version).is_none() {
                versions[count] = Some(version);
                count += 1;
            }
        }
        let derivation =
            |version: &Option<&'a Arc<KeyVersion>>| match version.map(|version| &version.wrapper) {
                Some(Wrapper::Derived { root, .. }) => Derivation { root, salt: start.salt },
                _ => unreachable!("only Derived versions have such runs"),
            };
        derived.derive_many(versions[..count].iter().map(derivation));
        Self { job, start: *start, versions, derived }
    }

    /// What seals a segment that begins `place` items into its chunk. Runs of one version under one salt share the key;
    /// their IVs differ by their places.
    fn of(&self, segment: &Segment, place: usize) -> Sealing<'a> {
        let group = &self.job.plan.groups[segment.group];
        let start = &self.start;
        let (key, salt, first_iv) = match segment.source {
            Source::State { need, first } => {
                let reserved = &self.job.reserved[need];
                (reserved.key.key(), reserved.salt, iv_plus(&reserved.first_iv, first))
            }
            Source::Chunk => {
                let at = place_of(&self.versions, group.version());
                let key = self.derived.key(at.expect("every version with a long run was derived"));
                (key, start.salt, iv_plus(&start.iv, place as u64))
            }
            Source::Version => match &group.version().wrapper {
                Wrapper::Direct(key) => {
                    (key.key(), [0; SALT_LEN], iv_plus(&start.iv, place as u64))
                }
                Wrapper::Derived { .. } => unreachable!("only Direct versions wrap themselves"),
            },
        };
        Sealing { key, salt, first_iv, version_id: &group.version_id }
    }
}

fn place_of(versions: &[Option<&Arc<KeyVersion>>], version: &Arc<KeyVersion>) -> Option<usize> {
    versions.iter().position(|known| known.is_some_and(|known| Arc::ptr_eq(known, version)))
}

/// Writes `first`, `first + 1`, ... modulo 2^96.
fn count_up(ivs: &mut [Iv], first: &Iv) {
    let (head, last) = first.split_first_chunk::<8>().expect("IV_LEN");
    let last = u32::from_be_bytes(last.try_into().expect("four bytes are left"));
    // Only in one of 2^22 chunks do more than the last four bytes change.
    let carries = u32::try_from(ivs.len()).ok().and_then(|count| last.checked_add(count)).is_none();
    if carries {
        for (place, iv) in (0..).zip(ivs) {
            *iv = iv_plus(first, place);
        }
        return;
    }
    for (iv, last) in ivs.iter_mut().zip(last..) {
        iv[..8].copy_from_slice(head);
        iv[8..].copy_from_slice(&last.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ivs_count_up_with_and_without_a_carry() {
        for low in [0, 7, u32::MAX - 300, u32::MAX - 8, u32::MAX - 7, u32::MAX] {
            for head in [[0x31; 8], [0xff; 8]] {
                let first = [&head[..], &low.to_be_bytes()].concat().try_into().unwrap();
                for count in [0, 1, 8, 9, 300, 301] {
                    let mut ivs = vec![[0xee; IV_LEN]; count];
                    count_up(&mut ivs, &first);
                    let expected: Vec<_> = (0..count as u64).map(|i| iv_plus(&first, i)).collect();
                    assert_eq!(ivs, expected, "{low:#x} {count}");
                }
            }
        }
    }
}
