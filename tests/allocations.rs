//! What allocates nothing: batches in memory that is used again, keys in the caller's memory, keys of a stocked pool.
//!
//! Method: a global allocator counts for each thread and for the whole process. Every call is made a few times until
//! its memory is there; then the least that one of several calls took is looked at, since once a second some call
//! renews a seed or a wrapping state. Tests run one after another, so that the process-wide counter is theirs alone.
#![expect(unsafe_code, reason = "a global allocator")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use keymill::{
    AadSource, CreateKey, DataKeyBatch, DataKeyBuffers, Engine, GenerateDataKeyRequest, KeyHandle,
    KeyPool, KeyPoolConfig, NoAad, Operation, SameAad, Scheme, limits,
};

static EVERYWHERE: AtomicUsize = AtomicUsize::new(0);
/// Bytes of the largest allocation.
static LARGEST: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static HERE: Cell<usize> = const { Cell::new(0) };
}

struct Counter;

#[global_allocator]
static COUNTER: Counter = Counter;

// SAFETY: every call goes to the system's allocator, with its own arguments.
unsafe impl GlobalAlloc for Counter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        EVERYWHERE.fetch_add(1, Relaxed);
        LARGEST.fetch_max(layout.size(), Relaxed);
        // A thread that is ending has no counter any more.
        let _ = HERE.try_with(|here| here.set(here.get() + 1));
        // SAFETY: the caller's contract is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is the system's.
        unsafe { System.dealloc(place, layout) }
    }
    // `realloc` and `alloc_zeroed` stay the default ones, which go through `alloc`.
}

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Allocations of this thread while `work` runs.
fn here<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let before = HERE.get();
    let done = work();
    (HERE.get() - before, done)
}

/// The fewest allocations of this thread in one of several calls, of which the first ones do not count.
fn least_here(mut call: impl FnMut()) -> usize {
    (0..3).for_each(|_| call());
    (0..5).map(|_| here(&mut call).0).min().unwrap()
}

/// As [`least_here`], on all threads.
fn least_everywhere(mut call: impl FnMut()) -> usize {
    let mut count = || {
        let before = EVERYWHERE.load(Relaxed);
        call();
        EVERYWHERE.load(Relaxed) - before
    };
    for _ in 0..5 {
        count();
    }
    (0..10).map(|_| count()).min().unwrap()
}

const OPERATIONS: [Operation; 4] = [
    Operation::GenerateDataKey,
    Operation::GenerateDataKeyWithoutPlaintext,
    Operation::AdvanceGenerateDataKey,
    Operation::AdvanceGenerateDataKeyWithoutPlaintext,
];

/// A key of each scheme, as `alias/derived` and `alias/direct`; the latter has its lease.
fn with_keys(engine: Engine) -> (Engine, [(&'static str, KeyHandle); 2]) {
    let keys = [("alias/derived", Scheme::Derived), ("alias/direct", Scheme::Direct)];
    let keys = keys.map(|(alias, scheme)| {
        let (alias_of_key, scheme) = (Some(alias.to_owned()), Some(scheme));
        let key = CreateKey { alias: alias_of_key, scheme, ..CreateKey::default() };
        engine.create_key(&key).unwrap();
        let handle = engine.key(alias).unwrap();
        // Leases double from call to call: after these there are wraps for all that is measured.
        for _ in 0..16 {
            engine.generate_data_keys(&handle, 1, 2000, NoAad).unwrap();
        }
        (alias, handle)
    });
    (engine, keys)
}

#[test]
fn the_counter_counts() {
    let _alone = alone();
    let (count, kept) = here(|| (Box::new(1), vec![0; 100]));
    assert_eq!(count, 2);
    drop(kept);
}

#[test]
fn a_batch_of_one_key_in_its_own_memory_allocates_nothing() {
    let _alone = alone();
    let (engine, keys) = with_keys(Engine::in_memory().unwrap());
    let each: Vec<_> = (0..4096u32).map(u32::to_be_bytes).collect();
    let sources: [&dyn AadSource; 3] = [&NoAad, &SameAad(b"one for all"), &each];
    for (alias, key) in &keys {
        for operation in OPERATIONS {
            for count in [1, 16, 31, 32, 300, 4096] {
                for (nth, aads) in sources.iter().enumerate() {
                    let mut batch = DataKeyBatch::new();
                    let least = least_here(|| {
                        engine
                            .generate_data_keys_into(&mut batch, operation, key, 32, count, *aads)
                            .unwrap();
                    });
                    assert_eq!(least, 0, "{alias}, {operation:?}, {count} items, source {nth}");
                    assert_eq!((batch.len(), batch.errors().len()), (count, 0));
                }
            }
        }
    }
}

#[test]
fn a_batch_of_requests_in_its_own_memory_allocates_nothing() {
    let _alone = alone();
    let (engine, keys) = with_keys(Engine::in_memory().unwrap());
    let aads: Vec<_> = (0..4096u32).map(u32::to_be_bytes).collect();
    for (alias, _) in &keys {
        let requests: Vec<_> =
            aads.iter().map(|aad| GenerateDataKeyRequest::new(alias, 32).aad(aad)).collect();
        for operation in OPERATIONS {
            for count in [16, 4096] {
                let mut batch = DataKeyBatch::new();
                let least = least_here(|| {
                    engine
                        .generate_data_key_batch_into(&mut batch, operation, &requests[..count])
                        .unwrap();
                });
                assert_eq!(least, 0, "{alias}, {operation:?}, {count} items");
            }
        }
    }
}

/// What threads cost is theirs, whatever the number of items.
#[test]
fn a_batch_that_fans_out_allocates_nothing_for_a_key() {
    let _alone = alone();
    for threads in [2, 4] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let builder = Engine::builder().thread_pool(Arc::new(pool));
        let (engine, keys) = with_keys(builder.in_memory().unwrap());
        for operation in [OPERATIONS[0], OPERATIONS[3]] {
            let counts = [65_536, 4 * 65_536].map(|count| {
                let mut batch = DataKeyBatch::new();
                least_everywhere(|| {
                    let key = &keys[0].1;
                    engine
                        .generate_data_keys_into(&mut batch, operation, key, 32, count, NoAad)
                        .unwrap();
                })
            });
            for (count, items) in counts.iter().zip([65_536, 4 * 65_536]) {
                let most = 16 * threads;
                assert!(*count <= most, "{count} allocations, {items} items, {threads} threads");
            }
        }
    }
}

#[test]
fn a_single_key_takes_the_two_allocations_of_its_results_and_none_in_the_callers_memory() {
    let _alone = alone();
    let (engine, keys) = with_keys(Engine::in_memory().unwrap());
    for (alias, key) in &keys {
        let request = GenerateDataKeyRequest::new(alias, 32).aad(b"one");
        let singles: [(&str, usize, &dyn Fn() -> keymill::DataKey); 4] = [
            ("raw", 2, &|| engine.generate_data_key(&request).unwrap()),
            ("advance", 2, &|| engine.advance_generate_data_key(&request).unwrap()),
            ("raw, wiped", 1, &|| engine.generate_data_key_without_plaintext(&request).unwrap()),
            ("advance, wiped", 1, &|| {
                engine.advance_generate_data_key_without_plaintext(&request).unwrap()
            }),
        ];
        for (what, most, single) in singles {
            let least = least_here(|| drop(single()));
            assert!(least <= most, "{alias}, {what}: {least} allocations");
        }
        for operation in OPERATIONS {
            let (mut plaintext, mut iv) = ([0; 32], [0; limits::IV_LEN]);
            let mut blob = [0; limits::BLOB_LEN_MAX];
            let least = least_here(|| {
                let buffers = DataKeyBuffers {
                    plaintext: &mut plaintext,
                    iv: &mut iv,
                    ciphertext_blob: &mut blob,
                };
                engine.generate_data_key_into(key, operation, b"one", buffers).unwrap();
            });
            assert_eq!(least, 0, "{alias}, {operation:?}");
        }
    }
}

#[test]
fn a_key_of_a_stocked_pool_takes_no_allocation() {
    let _alone = alone();
    let (engine, keys) = with_keys(Engine::in_memory().unwrap());
    for (alias, key) in &keys {
        for operation in OPERATIONS {
            let config = KeyPoolConfig::new(operation, 32).capacity(64);
            let pool = KeyPool::new(&engine, key, config).unwrap();
            let end = Instant::now() + Duration::from_secs(20);
            while pool.metrics().depth < 64 {
                assert!(Instant::now() < end, "the pool was not filled");
                thread::sleep(Duration::from_millis(5));
            }
            let mut taken = Vec::with_capacity(64);
            // Not the last ones, so that nobody is slower than the pool: it is stocked throughout.
            let (count, ()) = here(|| taken.extend((0..48).map(|_| pool.take().unwrap())));
            assert_eq!(pool.metrics().misses, 0);
            assert_eq!(count, 0, "{alias}, {operation:?}");
        }
    }
}

#[test]
fn batches_that_are_dropped_serve_the_next_ones() {
    let _alone = alone();
    let (engine, keys) = with_keys(Engine::in_memory().unwrap());
    let items = 4096;
    let mut call = || drop(engine.generate_data_keys(&keys[0].1, 1024, items, NoAad).unwrap());
    (0..3).for_each(|_| call());
    let waiting = engine.recycled_bytes();
    assert!(waiting >= items * (2 * 1024 + limits::IV_LEN), "{waiting} bytes wait");
    LARGEST.store(0, Relaxed);
    let least = least_here(&mut call);
    let largest = LARGEST.load(Relaxed);
    assert!(least <= 20, "{least} allocations");
    // The smallest column, that of the IVs, has 48 KiB.
    assert!(largest < items * limits::IV_LEN, "an allocation of {largest} bytes");
    assert_eq!(engine.recycled_bytes(), waiting);
}

#[test]
fn owned_views_cost_one_small_allocation_each() {
    let _alone = alone();
    let (engine, keys) = with_keys(Engine::in_memory().unwrap());
    let batch = engine.generate_data_keys(&keys[0].1, 32, 1000, NoAad).unwrap();
    let mut views = Vec::with_capacity(1000);
    let (count, ()) = here(|| views.extend(batch.iter().map(|key| key.unwrap().to_data_key())));
    // And the shared form of the blobs, once a batch.
    assert!(count <= 1000 + 2, "{count} allocations for {} views", views.len());
}
