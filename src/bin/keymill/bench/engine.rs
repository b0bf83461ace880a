//! The jobs `batch`, `batch-strings`, `batch-mixed`, `batch-tenants` and `batch-large`: many data keys in one call of
//! the engine, beside those who have to make the same keys without it.
//!
//! Nothing about the engine is special here: it opens in memory with the defaults of its kind, its KEKs are of the
//! scheme `derived`, it is called as anyone would, and what it returns is opened by another library before it is timed.
//! Results go into one `DataKeyBatch`, whose memory is used again, or into the arrays of the loops.

use std::{collections::BTreeSet, sync::Arc, time::Instant};

use keymill::{
    DataKeyBatch, Engine, GenerateDataKeyRequest, ImportKey, KeyHandle, Operation, Scheme,
    kernels::KeySet,
    limits::{SALT_LEN, TAG_LEN},
};
use rand_chacha::{
    ChaCha20Rng,
    rand_core::{Rng, SeedableRng},
};

use super::{
    cases::{Case, Contender, Job},
    loops::{IdiomaticLoop, Item, Made, RingLoop, Sealed, all_open},
    must_be_right,
    peers::Xaes,
    sealing::{self, Memory as Arrays},
    timing::{self, Times, Work},
};
use crate::failure::{Failure, Result};

/// Bytes of a data key, where lengths are not mixed, and the same as NumberOfBytes.
pub(super) const DEK_LEN: usize = NUMBER_OF_BYTES as usize;
pub(super) const NUMBER_OF_BYTES: u32 = 32;
/// Bytes of an AAD, where lengths are not mixed.
pub(super) const AAD_LEN: usize = 16;
const OPERATION: Operation = Operation::GenerateDataKey;

/// Checks the contenders of a case, then times them.
pub(super) fn measure(
    case: &Case,
    contenders: &[Contender],
    deadline: Instant,
) -> Result<Vec<Times>> {
    let wanted = Wanted::new(case);
    let engine = engine(case.threads, &wanted.keks)?;
    let names = wanted.names(case);
    let of_loop = contenders.contains(&Contender::RingLoop);
    let of_kernels = contenders.contains(&Contender::Kernels);
    let inputs = Inputs {
        case,
        handle: engine.key(&alias(0))?,
        requests: wanted.requests(&names),
        items: if of_loop { wanted.items().collect() } else { Vec::new() },
        aads: if of_kernels { wanted.items().map(|item| item.aad).collect() } else { Vec::new() },
        bare: KeySet::set_up(engine.tier(), &wanted.keks[..1]),
        engine: &engine,
        wanted: &wanted,
    };
    let works = contenders.iter().map(|contender| work(*contender, &inputs));
    let mut works = works.collect::<Result<Vec<_>>>()?;
    let mut memory = Memory::default();
    // A batch of the engine has its memory from it.
    if of_loop || of_kernels {
        memory.arrays = Arrays::of(wanted.count, wanted.items().map(|item| item.len).sum());
    }
    for (contender, work) in contenders.iter().zip(&mut works) {
        work(&mut memory);
        must_be_right(wanted.is_made(*contender, &memory), case, *contender)?;
    }
    Ok(timing::measure(&mut works, &mut memory, case.keys_a_call(), deadline))
}

/// What contenders write, each in its own place.
#[derive(Default)]
struct Memory {
    batch: DataKeyBatch,
    arrays: Arrays,
    made: Vec<Made>,
}

/// An engine with these keys as `alias(0)`, `alias(1)`, ..., whose calls use so many threads.
pub(super) fn engine(threads: usize, keks: &[[u8; 32]]) -> Result<Engine> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|error| {
        Failure::broke(format!("cannot start {threads} threads: {error}"), "try again later")
    })?;
    let engine = Engine::builder().thread_pool(Arc::new(pool)).in_memory()?;
    for (index, kek) in keks.iter().enumerate() {
        let (alias, scheme) = (Some(alias(index)), Some(Scheme::Derived));
        engine.import_key(&ImportKey { alias, scheme, ..ImportKey::new(kek) })?;
    }
    Ok(engine)
}

pub(super) fn alias(index: usize) -> String {
    format!("alias/bench/{index}")
}

/// AADs of the usual length, all different.
pub(super) fn different_aads(count: usize) -> Vec<u8> {
    let mut aads = vec![0; count * AAD_LEN];
    ChaCha20Rng::from_seed([1; 32]).fill_bytes(&mut aads);
    // Random ones differ, but nobody should have to trust in that.
    for (aad, number) in aads.as_chunks_mut::<AAD_LEN>().0.iter_mut().zip(0_u32..) {
        aad[..4].copy_from_slice(&number.to_be_bytes());
    }
    aads
}

/// Keys to import, from a fixed seed.
pub(super) fn keks(count: usize) -> Vec<[u8; 32]> {
    let mut bytes = vec![0; count * 32];
    ChaCha20Rng::from_seed([8; 32]).fill_bytes(&mut bytes);
    bytes.as_chunks().0.to_vec()
}

// ---- what is wanted ----

/// The data keys that every contender has to make.
struct Wanted {
    count: usize,
    keks: Vec<[u8; 32]>,
    /// The KEK of each item; empty if there is but one.
    kek_of: Vec<usize>,
    /// The length of each item; empty if it is always the same.
    lens: Vec<usize>,
    aads: Vec<u8>,
    /// Where the AADs end; empty if their length is always the same.
    aad_ends: Vec<usize>,
}

impl Wanted {
    fn new(case: &Case) -> Self {
        let number = |number: Option<usize>| number.expect("a batch has KEKs and items");
        let (count, kek_count) = (number(case.batch), number(case.keks));
        let mut rng = ChaCha20Rng::from_seed([9; 32]);
        let mut below = |end: usize| rng.next_u32() as usize % end;
        let mut draws = |end: usize| -> Vec<_> { (0..count).map(|_| below(end)).collect() };
        let kek_of = if kek_count > 1 { draws(kek_count) } else { Vec::new() };
        let (mut lens, mut aad_ends) = (Vec::new(), Vec::new());
        let mut aads_len = count * AAD_LEN;
        if case.job == Job::BatchMixed {
            lens = draws(3).into_iter().map(|draw| 16 << draw).collect();
            aads_len = 0;
            for len in draws(65) {
                aads_len += len;
                aad_ends.push(aads_len);
            }
        }
        let mut aads = different_aads(aads_len.div_ceil(AAD_LEN));
        aads.truncate(aads_len);
        Self { count, keks: keks(kek_count), kek_of, lens, aads, aad_ends }
    }

    fn item(&self, index: usize) -> Item<'_> {
        let end = |count: usize| match (self.aad_ends.is_empty(), count) {
            (true, count) => count * AAD_LEN,
            (_, 0) => 0,
            (_, count) => self.aad_ends[count - 1],
        };
        Item {
            kek: self.kek_of.get(index).copied().unwrap_or(0),
            len: self.lens.get(index).copied().unwrap_or(DEK_LEN),
            aad: &self.aads[end(index)..end(index + 1)],
        }
    }

    fn items(&self) -> impl Iterator<Item = Item<'_>> {
        (0..self.count).map(|index| self.item(index))
    }

    /// The alias in each request, a `String` of its own as if each had come from elsewhere.
    fn names(&self, case: &Case) -> Vec<String> {
        match case.job {
            Job::Batch | Job::BatchLarge => Vec::new(),
            _ => self.items().map(|item| alias(item.kek)).collect(),
        }
    }

    fn requests<'a>(&'a self, names: &'a [String]) -> Vec<GenerateDataKeyRequest<'a>> {
        let request = |(item, name): (Item<'a>, &'a String)| {
            let len = u32::try_from(item.len).expect("a short data key");
            GenerateDataKeyRequest::new(name, len).aad(item.aad)
        };
        self.items().zip(names).map(request).collect()
    }

    /// Whether the results of a contender open as they should, or a sample of very many.
    fn is_made(&self, contender: Contender, memory: &Memory) -> bool {
        let Memory { batch, arrays, made } = memory;
        let count = match contender {
            Contender::Engine => batch.len() - batch.errors().len(),
            Contender::IdiomaticLoop => made.len(),
            _ => arrays.ivs.len(),
        };
        if count != self.count {
            return false;
        }
        let step = self.count.div_ceil(SAMPLES);
        let sample: BTreeSet<_> = (0..count).step_by(step).chain([count - 1]).collect();
        let mut dek_at = 0;
        let mut sealed = Vec::new();
        for (index, item) in self.items().enumerate() {
            let Item { kek, len, aad } = item;
            if sample.contains(&index) {
                let key = self.keks[kek];
                let in_arrays = |blob_at: usize| Sealed {
                    key,
                    iv: arrays.ivs[index],
                    aad,
                    sealed: &arrays.blobs[blob_at..][..len + TAG_LEN],
                    dek: &arrays.deks[dek_at..][..len],
                };
                sealed.push(match contender {
                    Contender::Engine => of_engine(batch, index, &key, aad),
                    Contender::IdiomaticLoop => of_idiomatic_loop(&made[index], &key, aad),
                    Contender::Kernels => in_arrays(index * (SALT_LEN + len + TAG_LEN) + SALT_LEN),
                    _ => in_arrays(dek_at + index * TAG_LEN),
                });
            }
            dek_at += len;
        }
        sealed.iter().zip(&sample).all(|(one, index)| one.dek.len() == self.item(*index).len)
            && all_open(sealed.into_iter())
    }
}

fn of_engine<'a>(
    batch: &'a DataKeyBatch,
    index: usize,
    kek: &[u8; 32],
    aad: &'a [u8],
) -> Sealed<'a> {
    let made = batch.get(index).expect("no item was refused");
    let (salt, sealed) = made.ciphertext_blob().split_first_chunk().expect("a blob has a salt");
    let dek = made.plaintext().expect("asked for");
    Sealed { key: Xaes::new(kek).derive(salt), iv: *made.iv(), aad, sealed, dek }
}

pub(super) fn of_idiomatic_loop<'a>(made: &'a Made, kek: &[u8; 32], aad: &'a [u8]) -> Sealed<'a> {
    let iv = made.iv.as_slice().try_into().expect("IV_LEN");
    Sealed { key: *kek, iv, aad, sealed: &made.blob, dek: &made.plaintext }
}

// ---- who makes it ----

/// What contenders work with, made before they are timed.
struct Inputs<'a> {
    case: &'a Case,
    engine: &'a Engine,
    handle: KeyHandle,
    wanted: &'a Wanted,
    requests: Vec<GenerateDataKeyRequest<'a>>,
    items: Vec<Item<'a>>,
    aads: Vec<&'a [u8]>,
    /// The first KEK for the bare kernels.
    bare: KeySet,
}

fn work<'a>(contender: Contender, inputs: &'a Inputs<'_>) -> Result<Work<'a, Memory>> {
    let Inputs { case, engine, handle, wanted, requests, items, aads, bare } = inputs;
    let one_aad_len = wanted.aads.as_chunks::<AAD_LEN>().0;
    let one_kek = wanted.kek_of.is_empty();
    Ok(match contender {
        Contender::Engine if matches!(case.job, Job::Batch | Job::BatchLarge) => {
            let (count, len) = (wanted.count, NUMBER_OF_BYTES);
            Box::new(move |Memory { batch, .. }| {
                engine
                    .generate_data_keys_into(batch, OPERATION, handle, len, count, one_aad_len)
                    .expect("it can be made");
            })
        }
        Contender::Engine => Box::new(move |Memory { batch, .. }| {
            engine
                .generate_data_key_batch_into(batch, OPERATION, requests)
                .expect("it can be made");
        }),
        Contender::IdiomaticLoop => {
            let mut each = IdiomaticLoop::new(&wanted.keks[0])?;
            Box::new(move |memory| {
                // First, so that its memory serves again: results are dropped within the time.
                memory.made.clear();
                memory.made = each.make(DEK_LEN, one_aad_len);
            })
        }
        Contender::Kernels => {
            let keys_of = |_, _| bare.for_all(0);
            let mut work = sealing::chunked(engine.tier(), aads, DEK_LEN, keys_of);
            Box::new(move |memory| work(&mut memory.arrays))
        }
        _ => {
            let mut each = RingLoop::new(&wanted.keks)?;
            Box::new(move |memory| match one_kek {
                true => each.make(DEK_LEN, one_aad_len, &mut memory.arrays),
                false => each.make_mixed(items, &mut memory.arrays),
            })
        }
    })
}

/// So many results of a contender are opened at least, or all.
const SAMPLES: usize = 4096;
