//! Criterion: sealing, opening and filling by the kernels of every tier beside a loop over `ring`, at three batch
//! sizes.
//!
//! ```text
//! cargo bench --bench kernels
//! ```
//! 32-byte data keys, 16 bytes of AAD, one KEK, one thread, memory reused. For ratios that a noisy machine does not
//! spoil, `keymill bench` interleaves the contenders, and has more of them.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use keymill::{
    Tier,
    kernels::{self, Key, Place},
};
use rand_chacha::{
    ChaCha20Rng,
    rand_core::{Rng, SeedableRng},
};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, Tag, UnboundKey};

const KEK: [u8; 32] = [1; 32];
const DEK_LEN: usize = 32;
const SEALED_LEN: usize = DEK_LEN + 16;
const SIZES: [usize; 3] = [16, 256, 4096];

/// A batch and the memory for its results. IVs stay the same in every round: the results are thrown away.
struct Batch {
    ivs: Vec<[u8; 12]>,
    aads: Vec<[u8; 16]>,
    deks: Vec<u8>,
    sealed: Vec<u8>,
}

impl Batch {
    fn new(size: usize) -> Self {
        let mut deks = vec![0; size * DEK_LEN];
        ChaCha20Rng::from_seed([2; 32]).fill_bytes(&mut deks);
        let mut batch = Self {
            ivs: (0..size as u128).map(|i| i.to_be_bytes()[4..].try_into().unwrap()).collect(),
            aads: (0..size as u128).map(u128::to_be_bytes).collect(),
            deks,
            sealed: vec![0; size * SEALED_LEN],
        };
        seal_by_ring(&ring_key(), &mut batch);
        batch
    }

    fn aads(&self) -> Vec<&[u8]> {
        self.aads.iter().map(|aad| &aad[..]).collect()
    }
}

fn ring_key() -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &KEK).unwrap())
}

fn seal_by_ring(key: &LessSafeKey, batch: &mut Batch) {
    let deks = batch.deks.chunks_exact(DEK_LEN).zip(batch.sealed.chunks_exact_mut(SEALED_LEN));
    for ((iv, aad), (dek, sealed)) in batch.ivs.iter().zip(&batch.aads).zip(deks) {
        let (ciphertext, tag) = sealed.split_at_mut(DEK_LEN);
        ciphertext.copy_from_slice(dek);
        let nonce = Nonce::assume_unique_for_key(*iv);
        let made = key.seal_in_place_separate_tag(nonce, Aad::from(aad), ciphertext).unwrap();
        tag.copy_from_slice(made.as_ref());
    }
}

fn open_by_ring(key: &LessSafeKey, batch: &mut Batch) {
    let deks = batch.deks.chunks_exact_mut(DEK_LEN).zip(batch.sealed.chunks_exact(SEALED_LEN));
    for ((iv, aad), (dek, sealed)) in batch.ivs.iter().zip(&batch.aads).zip(deks) {
        let (ciphertext, tag) = sealed.split_at(DEK_LEN);
        dek.copy_from_slice(ciphertext);
        let nonce = Nonce::assume_unique_for_key(*iv);
        let tag = Tag::try_from(tag).unwrap();
        key.open_in_place_separate_tag(nonce, Aad::from(aad), tag, dek, 0..).unwrap();
    }
}

fn seal(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("seal_32B_aad16");
    for size in SIZES {
        let mut batch = Batch::new(size);
        group.throughput(Throughput::Elements(size as u64));
        for tier in Tier::available() {
            let key = Key::new(*tier, &KEK).unwrap();
            let (keys, mut out) = (key.for_all(), vec![0; batch.sealed.len()]);
            let (aads, place) = (batch.aads(), Place { stride: SEALED_LEN, offset: 0 });
            group.bench_function(BenchmarkId::new(format!("keymill/{tier}"), size), |b| {
                b.iter(|| {
                    let Batch { ivs, deks, .. } = &batch;
                    kernels::seal_many(&keys, ivs, &aads, DEK_LEN, deks, &mut out, place);
                });
            });
            assert_eq!(out, batch.sealed, "{tier}");
        }
        let key = ring_key();
        group.bench_function(BenchmarkId::new("ring", size), |b| {
            b.iter(|| seal_by_ring(&key, &mut batch));
        });
    }
    group.finish();
}

fn open(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("open_32B_aad16");
    for size in SIZES {
        let mut batch = Batch::new(size);
        group.throughput(Throughput::Elements(size as u64));
        for tier in Tier::available() {
            let key = Key::new(*tier, &KEK).unwrap();
            let (keys, aads) = (key.for_all(), batch.aads());
            let sealed: Vec<_> = batch.sealed.chunks_exact(SEALED_LEN).collect();
            let (mut out, mut right) = (vec![0; batch.deks.len()], vec![false; size]);
            group.bench_function(BenchmarkId::new(format!("keymill/{tier}"), size), |b| {
                b.iter(|| {
                    let ivs = &batch.ivs;
                    kernels::open_many(&keys, ivs, &aads, &sealed, DEK_LEN, &mut out, &mut right);
                });
            });
            assert_eq!(out, batch.deks, "{tier}");
        }
        let key = ring_key();
        group.bench_function(BenchmarkId::new("ring", size), |b| {
            b.iter(|| open_by_ring(&key, &mut batch));
        });
    }
    group.finish();
}

fn fill(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("fill_32B");
    for size in SIZES {
        let mut out = vec![0; size * DEK_LEN];
        group.throughput(Throughput::Elements(size as u64));
        for tier in Tier::available() {
            group.bench_function(BenchmarkId::new(format!("keymill/{tier}"), size), |b| {
                b.iter(|| kernels::chacha_fill(*tier, &KEK, 0, 0, &mut out));
            });
        }
        let mut rng = ChaCha20Rng::from_seed(KEK);
        group.bench_function(BenchmarkId::new("rand_chacha", size), |b| {
            b.iter(|| rng.fill_bytes(&mut out));
        });
    }
    group.finish();
}

criterion_group!(benches, seal, open, fill);
criterion_main!(benches);
