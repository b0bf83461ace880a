//! The jobs `seal`, `open` and `job`: messages of one length, as a batch of the scheme `derived` lays them out.
//!
//! ```text
//! blob, dek_len + 28 bytes:  salt (12) | ciphertext (dek_len) | tag (16)
//! ```
//! IVs are made once and used in every round, and so are all DEKs of `seal` and `open`: the results are thrown away.
//! Elsewhere an IV is used once.

use std::time::Instant;

use aes_gcm::Aes256Gcm;
use keymill::{
    Tier,
    kernels::{self, KeySet, Place, Selection},
    limits::{CHUNK_BYTES_MAX, CHUNK_ITEMS_MAX, IV_LEN, SALT_LEN, TAG_LEN},
};
use rand_chacha::{
    ChaCha20Rng,
    rand_core::{Rng, SeedableRng},
};

use super::{
    cases::{Case, Contender, Job},
    must_be_right,
    peers::{Aead, AwsLcRs, Iv, Ring},
    timing::{self, Times, Work},
};
use crate::failure::Result;

/// Checks the contenders of a case, then times them.
pub(super) fn measure(
    case: &Case,
    contenders: &[Contender],
    deadline: Instant,
) -> Result<Vec<Times>> {
    let batch = Batch::new(case);
    let keys: Vec<_> = contenders.iter().map(|one| Keys::new(*one, &batch.keks)).collect();
    let reference = Keys::new(Contender::AesGcm, &batch.keks);
    // Those who open need something to open.
    let mut right = Memory::new(&batch);
    seal(&batch.views(&[]), &reference)(&mut right);
    let views = batch.views(&right.blobs);

    let works = |keys| match case.job {
        Job::Open => open(&views, keys),
        Job::Whole => whole(&views, keys),
        _ => seal(&views, keys),
    };
    let mut works: Vec<_> = keys.iter().map(works).collect();
    let mut memory = Memory::new(&batch);
    let mut firsts: Vec<(bool, Vec<u8>)> = Vec::new();
    for (contender, work) in contenders.iter().zip(&mut works) {
        memory.forget();
        work(&mut memory);
        let is_right = match case.job {
            Job::Open => memory.deks == batch.deks,
            // Random bytes are drawn in different orders by us and by the peers, but alike among each of them.
            Job::Whole => {
                let ours = matches!(contender, Contender::Ours(_));
                let same = firsts.iter().find(|first| first.0 == ours);
                let is_like_others = same.is_none_or(|(_, blobs)| *blobs == memory.blobs);
                firsts.push((ours, memory.blobs.clone()));
                is_like_others && opens(&batch, &reference, &memory)
            }
            _ => memory.blobs == right.blobs,
        };
        must_be_right(is_right, case, *contender)?;
    }
    Ok(timing::measure(&mut works, &mut memory, case.keys_a_call(), deadline))
}

/// Whether the blobs in `made` open to the DEKs beside them under the IVs beside them, and no two DEKs are equal.
fn opens(batch: &Batch, reference: &Keys, made: &Memory) -> bool {
    let mut opened = Memory::new(batch);
    let views = Views { ivs: &made.ivs, ..batch.views(&made.blobs) };
    open(&views, reference)(&mut opened);
    let mut deks: Vec<_> = opened.deks.chunks_exact(batch.len).collect();
    deks.sort_unstable();
    deks.dedup();
    opened.deks == made.deks && deks.len() == batch.ivs.len()
}

/// What a case is about, made from a fixed seed.
struct Batch {
    /// Bytes of each DEK.
    len: usize,
    aad_len: usize,
    keks: Vec<[u8; 32]>,
    /// The KEK of each message; `None` if there is but one KEK.
    kek_of: Option<Vec<usize>>,
    ivs: Vec<Iv>,
    aads: Vec<u8>,
    deks: Vec<u8>,
}

impl Batch {
    fn new(case: &Case) -> Self {
        let number = |number: Option<usize>| number.expect("a job that seals has every number");
        let (count, kek_count) = (number(case.batch), number(case.keks));
        let (len, aad_len) = (number(case.dek_len), number(case.aad_len));
        let mut rng = ChaCha20Rng::from_seed([1; 32]);
        let mut bytes = |len: usize| {
            let mut bytes = vec![0; len];
            rng.fill_bytes(&mut bytes);
            bytes
        };
        let keks = bytes(kek_count * 32).as_chunks().0.to_vec();
        let kek_of = (kek_count > 1).then(|| {
            let draws = bytes(count * 4);
            let draws = draws.as_chunks().0.iter().map(|draw| u32::from_le_bytes(*draw) as usize);
            draws.map(|draw| draw % kek_count).collect()
        });
        let ivs = bytes(count * IV_LEN).as_chunks().0.to_vec();
        let (aads, deks) = (bytes(count * aad_len), bytes(count * len));
        Self { len, aad_len, keks, kek_of, ivs, aads, deks }
    }

    fn stride(&self) -> usize {
        SALT_LEN + self.len + TAG_LEN
    }

    /// The batch as slices; `blobs` are those to be opened.
    fn views<'a>(&'a self, blobs: &'a [u8]) -> Views<'a> {
        let aad = |i: usize| &self.aads[i * self.aad_len..][..self.aad_len];
        Views {
            batch: self,
            ivs: &self.ivs,
            aads: (0..self.ivs.len()).map(aad).collect(),
            sealed: blobs.chunks_exact(self.stride()).map(|blob| &blob[SALT_LEN..]).collect(),
        }
    }
}

struct Views<'a> {
    batch: &'a Batch,
    ivs: &'a [Iv],
    aads: Vec<&'a [u8]>,
    sealed: Vec<&'a [u8]>,
}

/// What contenders write.
#[derive(Default)]
pub(super) struct Memory {
    pub(super) deks: Vec<u8>,
    pub(super) ivs: Vec<Iv>,
    pub(super) blobs: Vec<u8>,
    verdicts: Vec<bool>,
}

impl Memory {
    fn new(batch: &Batch) -> Self {
        Self::of(batch.ivs.len(), batch.deks.len())
    }

    /// For `count` DEKs of `dek_len` bytes in all.
    pub(super) fn of(count: usize, dek_len: usize) -> Self {
        Self {
            deks: vec![0; dek_len],
            ivs: vec![[0; IV_LEN]; count],
            blobs: vec![0; dek_len + count * (SALT_LEN + TAG_LEN)],
            verdicts: vec![false; count],
        }
    }

    /// Leaves nothing of one contender for the check of the next.
    fn forget(&mut self) {
        self.deks.fill(0);
        self.ivs.fill([0; IV_LEN]);
        self.blobs.fill(0);
        self.verdicts.fill(false);
    }
}

/// A contender's keys, set up.
enum Keys {
    Ours(Tier, KeySet),
    AesGcm(Vec<Aes256Gcm>),
    Ring(Vec<Ring>),
    AwsLcRs(Vec<AwsLcRs>),
}

impl Keys {
    fn new(contender: Contender, keks: &[[u8; 32]]) -> Self {
        fn all<P: Aead>(keks: &[[u8; 32]]) -> Vec<P> {
            keks.iter().map(P::new).collect()
        }
        match contender {
            Contender::Ours(tier) => Self::Ours(tier, KeySet::set_up(tier, keks)),
            Contender::AesGcm => Self::AesGcm(all(keks)),
            Contender::Ring => Self::Ring(all(keks)),
            Contender::AwsLcRs => Self::AwsLcRs(all(keks)),
            _ => unreachable!("no contender of these jobs"),
        }
    }
}

/// The keys of messages `from..from + count`.
fn selection<'a>(batch: &Batch, keys: &'a KeySet, from: usize, count: usize) -> Selection<'a> {
    match &batch.kek_of {
        None => keys.for_all(0),
        Some(kek_of) => keys.each(kek_of[from..][..count].iter().copied()),
    }
}

/// Calls `$each` for every message *i* as `each(i, key)`. One KEK is a loop of its own, as one would write it.
macro_rules! for_each_key {
    ($batch:expr, $keys:expr, $each:expr) => {
        match &$batch.kek_of {
            None => (0..$batch.ivs.len()).for_each(|i| $each(i, &$keys[0])),
            Some(kek_of) => {
                kek_of.iter().enumerate().for_each(|(i, kek)| $each(i, &$keys[*kek]));
            }
        }
    };
}

// ---- seal ----

fn seal<'a>(views: &'a Views<'_>, keys: &'a Keys) -> Work<'a, Memory> {
    match keys {
        Keys::Ours(_, keys) => {
            let Batch { len, deks, ivs, .. } = views.batch;
            let place = Place { stride: views.batch.stride(), offset: SALT_LEN };
            let keys = selection(views.batch, keys, 0, ivs.len());
            Box::new(move |memory| {
                kernels::seal_many(&keys, ivs, &views.aads, *len, deks, &mut memory.blobs, place);
            })
        }
        Keys::AesGcm(keys) => seal_loop(views, keys),
        Keys::Ring(keys) => seal_loop(views, keys),
        Keys::AwsLcRs(keys) => seal_loop(views, keys),
    }
}

fn seal_loop<'a, P: Aead>(views: &'a Views<'_>, keys: &'a [P]) -> Work<'a, Memory> {
    let batch = views.batch;
    Box::new(move |memory| {
        let mut inputs = views.aads.iter().zip(batch.deks.chunks_exact(batch.len));
        let mut blobs = memory.blobs.chunks_exact_mut(batch.stride());
        for_each_key!(batch, keys, |i: usize, key: &P| {
            let (Some((aad, dek)), Some(blob)) = (inputs.next(), blobs.next()) else { return };
            key.seal(&batch.ivs[i], aad, dek, &mut blob[SALT_LEN..]);
        });
    })
}

// ---- open ----

fn open<'a>(views: &'a Views<'_>, keys: &'a Keys) -> Work<'a, Memory> {
    match keys {
        Keys::Ours(_, keys) => {
            let Views { batch, ivs, aads, sealed } = views;
            let keys = selection(batch, keys, 0, ivs.len());
            Box::new(move |memory| {
                let Memory { deks, verdicts, .. } = memory;
                kernels::open_many(&keys, ivs, aads, sealed, batch.len, deks, verdicts);
                assert!(verdicts.iter().all(|right| *right), "a blob did not open");
            })
        }
        Keys::AesGcm(keys) => open_loop(views, keys),
        Keys::Ring(keys) => open_loop(views, keys),
        Keys::AwsLcRs(keys) => open_loop(views, keys),
    }
}

fn open_loop<'a, P: Aead>(views: &'a Views<'_>, keys: &'a [P]) -> Work<'a, Memory> {
    let Views { batch, ivs, aads, sealed } = views;
    Box::new(move |memory| {
        let mut deks = memory.deks.chunks_exact_mut(batch.len);
        for_each_key!(batch, keys, |i: usize, key: &P| {
            let Some(dek) = deks.next() else { return };
            assert!(key.open(&ivs[i], aads[i], sealed[i], dek), "a blob did not open");
        });
    })
}

// ---- job ----

const SEED: [u8; 32] = [2; 32];

fn whole<'a>(views: &'a Views<'_>, keys: &'a Keys) -> Work<'a, Memory> {
    match keys {
        Keys::Ours(tier, keys) => {
            let keys_of = |from, count| selection(views.batch, keys, from, count);
            chunked(*tier, &views.aads, views.batch.len, keys_of)
        }
        Keys::AesGcm(keys) => whole_loop(views, keys),
        Keys::Ring(keys) => whole_loop(views, keys),
        Keys::AwsLcRs(keys) => whole_loop(views, keys),
    }
}

/// As the engine's chunks do it: each has its own ChaCha20 stream, whose first block begins with the first IV and whose
/// others are DEKs of `len` bytes. `keys_of` are those of so many messages from an index on.
pub(super) fn chunked<'a>(
    tier: Tier,
    aads: &'a [&[u8]],
    len: usize,
    keys_of: impl Fn(usize, usize) -> Selection<'a>,
) -> Work<'a, Memory> {
    let stride = SALT_LEN + len + TAG_LEN;
    let chunk_items = CHUNK_ITEMS_MAX.min(CHUNK_BYTES_MAX / stride);
    let keys = aads
        .chunks(chunk_items)
        .enumerate()
        .map(|(number, aads)| keys_of(number * chunk_items, aads.len()));
    let keys: Vec<_> = keys.collect();
    let mut stream = 0;
    Box::new(move |memory| {
        let deks = memory.deks.chunks_mut(chunk_items * len);
        let ivs = memory.ivs.chunks_mut(chunk_items);
        let blobs = memory.blobs.chunks_mut(chunk_items * stride);
        let chunks = keys.iter().zip(aads.chunks(chunk_items)).zip(deks.zip(ivs).zip(blobs));
        for ((keys, aads), ((deks, ivs), blobs)) in chunks {
            let mut first_iv = [0; IV_LEN];
            kernels::chacha_fill(tier, &SEED, stream, 0, &mut first_iv);
            kernels::chacha_fill(tier, &SEED, stream, 1, deks);
            stream += 1;
            count_up(ivs, &first_iv);
            let place = Place { stride, offset: SALT_LEN };
            kernels::seal_many(keys, ivs, aads, len, deks, blobs, place);
        }
    })
}

/// Writes `first`, `first + 1`, ... modulo 2^96.
fn count_up(ivs: &mut [Iv], first: &Iv) {
    let mut wide = [0; 16];
    wide[4..].copy_from_slice(first);
    let first = u128::from_be_bytes(wide);
    for (iv, next) in ivs.iter_mut().zip(first..) {
        iv.copy_from_slice(&next.to_be_bytes()[4..]);
    }
}

/// A random DEK and a random IV for each message, drawn when it is sealed.
fn whole_loop<'a, P: Aead>(views: &'a Views<'_>, keys: &'a [P]) -> Work<'a, Memory> {
    let Views { batch, aads, .. } = views;
    let mut rng = ChaCha20Rng::from_seed(SEED);
    Box::new(move |memory| {
        let deks = memory.deks.chunks_exact_mut(batch.len).zip(&mut memory.ivs);
        let mut places = deks.zip(memory.blobs.chunks_exact_mut(batch.stride()));
        for_each_key!(batch, keys, |i: usize, key: &P| {
            let Some(((dek, iv), blob)) = places.next() else { return };
            rng.fill_bytes(dek);
            rng.fill_bytes(iv);
            key.seal(iv, aads[i], dek, &mut blob[SALT_LEN..]);
        });
    })
}
