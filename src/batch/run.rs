//! Running a generating batch: each chunk fills its DEKs and seals them, in parallel, in the result's memory.
//!
//! Everything that can fail has failed before: leases, salts, seed and memory are at hand, and nothing here returns an
//! error.

use std::sync::{Arc, Mutex, PoisonError};

use zeroize::{Zeroizing, zeroize_stack};

use super::plan::{Chunk, Plan, Segment, Source};
use crate::{
    cpu::Tier,
    kernel::{self, Iv, KeyRef, Keys},
    keys::ring::KeyVersion,
    limits::{FAN_OUT_ITEMS_MIN, IV_LEN, SALT_LEN},
    request::GenerateDataKeyRequest,
    rng,
    secret::Seed,
    wrap::{
        Wrapper,
        blob::Layout,
        derived::{Derivation, DerivedKeys},
        iv_plus,
        state::Reserved,
    },
};

/// Where a batch's chunks run.
#[derive(Clone, Copy)]
pub(crate) enum FanOut<'a> {
    /// On the caller's thread.
    Caller,
    /// On rayon's global pool.
    Global,
    /// On this pool.
    Own(&'a rayon::ThreadPool),
}

impl FanOut<'_> {
    /// Does `work` for each of `jobs`, which stand for `item_count` items, in parallel where that pays.
    ///
    /// The caller works too, and takes jobs from the front while the pool's threads wake up, which may last longer
    /// than a small batch: one that nobody comes to help with is made as if there were no pool.
    pub(crate) fn for_each<J: Send>(
        self,
        item_count: usize,
        jobs: Vec<J>,
        work: impl Fn(J) + Send + Sync,
    ) {
        let threads = match self {
            Self::Caller => 1,
            Self::Global => rayon::current_num_threads(),
            Self::Own(pool) => pool.current_num_threads(),
        };
        let helpers = if item_count >= FAN_OUT_ITEMS_MIN { threads.min(jobs.len()) } else { 1 } - 1;
        let jobs = Mutex::new(jobs.into_iter());
        let next = || jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
        let drain = || {
            while let Some(job) = next() {
                work(job);
            }
        };
        match self {
            _ if helpers == 0 => drain(),
            Self::Own(pool) => pool.in_place_scope(|scope| with_help(scope, helpers, &drain)),
            Self::Global | Self::Caller => {
                rayon::in_place_scope(|scope| with_help(scope, helpers, &drain));
            }
        }
    }
}

/// Does `work` here and on `helpers` threads of the scope's pool.
fn with_help<'s>(scope: &rayon::Scope<'s>, helpers: usize, work: &'s (dyn Fn() + Sync)) {
    for _ in 0..helpers {
        scope.spawn(move |_| work());
    }
    work();
}

/// What every chunk of a batch needs.
pub(crate) struct Job<'a> {
    pub(crate) tier: Tier,
    pub(crate) seed: &'a Seed,
    pub(crate) plan: &'a Plan,
    pub(crate) requests: &'a [GenerateDataKeyRequest<'a>],
    /// For each of the plan's `state_needs`.
    pub(crate) reserved: &'a [Reserved],
}

impl Job<'_> {
    fn layout(&self, segment: &Segment) -> Layout {
        self.plan.groups[segment.group].layout
    }
}

/// The memory that a batch writes.
pub(crate) struct Columns<'a> {
    /// `None` for the operations without plaintext.
    pub(crate) deks: Option<&'a mut [u8]>,
    pub(crate) ivs: &'a mut [u8],
    pub(crate) blobs: &'a mut [u8],
}

/// Generates and wraps every data key of the plan.
pub(crate) fn run(job: &Job<'_>, columns: Columns<'_>, fan_out: FanOut<'_>) {
    let work = cut(job.plan, columns);
    fan_out.for_each(job.plan.slot_count, work, |(number, chunk, columns)| {
        run_chunk(job, number, chunk, columns);
        zeroize_stack::<{ kernel::STACK_LEN }>();
    });
}

/// Each chunk with its own part of every column.
fn cut<'a>(plan: &'a Plan, columns: Columns<'a>) -> Vec<(u64, &'a Chunk, Columns<'a>)> {
    let Columns { mut deks, mut ivs, mut blobs } = columns;
    let cut_one = |(number, chunk): (u64, &'a Chunk)| {
        let columns = Columns {
            deks: deks.as_mut().map(|deks| split_off(deks, chunk.dek_len)),
            ivs: split_off(&mut ivs, chunk.slots.len() * IV_LEN),
            blobs: split_off(&mut blobs, chunk.blob_len),
        };
        (number, chunk, columns)
    };
    (0..).zip(&plan.chunks).map(cut_one).collect()
}

fn split_off<'a>(column: &mut &'a mut [u8], len: usize) -> &'a mut [u8] {
    column.split_off_mut(..len).expect("the chunks' lengths add up to the column's")
}

/// In a frame of its own, so that the whole of it can be overwritten afterwards.
#[inline(never)]
fn run_chunk(job: &Job<'_>, number: u64, chunk: &Chunk, columns: Columns<'_>) {
    let start = rng::chunk_start(job.tier, job.seed, number);
    let mut scratch = Zeroizing::new(Vec::new());
    let deks = match columns.deks {
        Some(deks) => deks,
        None => {
            scratch.resize(chunk.dek_len, 0);
            &mut scratch[..]
        }
    };
    rng::chunk_deks(job.tier, job.seed, number, deks);

    let segments = &job.plan.segments[chunk.segments.clone()];
    let derived = Derived::new(job, segments, &start);
    let same_layout = |a: &Segment, b: &Segment| job.layout(a) == job.layout(b);
    let (mut deks, mut ivs, mut blobs) = (&*deks, columns.ivs, columns.blobs);
    for run in segments.chunk_by(same_layout) {
        let layout = job.layout(&run[0]);
        let slots = run[0].slots.start..run[run.len() - 1].slots.end;
        let count = slots.len();
        let run_ivs = split_off(&mut ivs, count * IV_LEN).as_chunks_mut::<IV_LEN>().0;
        let run_blobs = split_off(&mut blobs, count * layout.len());
        let run_deks = deks.split_off(..count * layout.dek_len).expect("as in split_off");
        let mut keys = Vec::new();

        let (mut ivs, mut heads) = (&mut run_ivs[..], run_blobs.chunks_exact_mut(layout.len()));
        for segment in run {
            let count = segment.slots.len();
            let place = (segment.slots.start - chunk.slots.start) as u64;
            let (key, salt, first_iv) = source(job, segment, &start, place, &derived);
            let version = &job.plan.groups[segment.group].version.id;
            let segment_ivs = ivs.split_off_mut(..count).expect("as in split_off");
            count_up(segment_ivs, &first_iv);
            // The IVs first: a zip that ends with them takes no blob of the next segment.
            for (iv, blob) in segment_ivs.iter().zip(&mut heads) {
                layout.write_head(blob, version.as_bytes(), iv, &salt);
            }
            keys.resize(keys.len() + if run.len() == 1 { 1 } else { count }, key);
        }
        let aads: Vec<_> = slots.map(|slot| job.requests[job.plan.item(slot)].aad).collect();
        kernel::seal_many(kernel::Seal {
            keys: if run.len() == 1 { Keys::One(keys[0]) } else { Keys::Each(&keys) },
            ivs: run_ivs,
            aads: &aads,
            len: layout.dek_len,
            plaintexts: run_deks,
            out: run_blobs,
            stride: layout.len(),
            offset: layout.ciphertext_at(),
        });
    }
}

/// The keys that a chunk derives with its salt, one for each `Derived` version that has a long run in it.
struct Derived<'a> {
    versions: Vec<&'a Arc<KeyVersion>>,
    keys: DerivedKeys,
}

impl<'a> Derived<'a> {
    fn new(job: &'a Job<'_>, segments: &[Segment], start: &rng::ChunkStart) -> Self {
        let mut versions: Vec<&Arc<KeyVersion>> = Vec::new();
        let mut derivations = Vec::new();
        for segment in segments.iter().filter(|segment| segment.source == Source::Chunk) {
            let version = &job.plan.groups[segment.group].version;
            if let Wrapper::Derived { root, .. } = &version.wrapper
                && !versions.iter().any(|known| Arc::ptr_eq(known, version))
            {
                versions.push(version);
                derivations.push(Derivation { root, salt: start.salt });
            }
        }
        let mut keys = DerivedKeys::new();
        keys.derive_many(&derivations);
        Self { versions, keys }
    }

    /// The key of `version`. Runs of one version under one salt share it; their IVs differ by their places.
    fn of(&self, version: &Arc<KeyVersion>) -> KeyRef<'_> {
        let at = self.versions.iter().position(|known| Arc::ptr_eq(known, version));
        self.keys.key(at.expect("every version with a long run was derived"))
    }
}

/// The wrapping key, salt and first IV of a segment that begins `place` items into its chunk.
fn source<'a>(
    job: &'a Job<'_>,
    segment: &Segment,
    start: &rng::ChunkStart,
    place: u64,
    derived: &'a Derived<'_>,
) -> (KeyRef<'a>, [u8; SALT_LEN], Iv) {
    let version = &job.plan.groups[segment.group].version;
    match (&version.wrapper, segment.source) {
        (Wrapper::Direct(key), _) => (key.key(), [0; SALT_LEN], iv_plus(&start.iv, place)),
        (Wrapper::Derived { .. }, Source::State { need, first }) => {
            let reserved = &job.reserved[need];
            (reserved.key.key(), reserved.salt, iv_plus(&reserved.first_iv, first))
        }
        (Wrapper::Derived { .. }, Source::Chunk | Source::Version) => {
            (derived.of(version), start.salt, iv_plus(&start.iv, place))
        }
    }
}

/// Writes `first`, `first + 1`, ... modulo 2^96.
fn count_up(ivs: &mut [Iv], first: &Iv) {
    let mut next = *first;
    for iv in ivs {
        *iv = next;
        next = iv_plus(&next, 1);
    }
}
