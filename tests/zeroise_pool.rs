//! No freed block of the heap holds a data key of a pool, or of a batch that was made anew.
//!
//! Method: as in `zeroise.rs`: a global allocator looks through every block that is freed for secrets that were
//! registered before, and keeps them masked, so as not to find itself. Keys of a stock that nobody took are known from
//! a twin: with one seed, two engines make the same keys. Controls free a secret on purpose and have to be caught.
#![expect(unsafe_code, reason = "a global allocator")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use keymill::{
    CreateKey, DataKeyBatch, DecryptRequest, Engine, KeyHandle, KeyPool, KeyPoolConfig, NoAad,
    Operation,
};

const MASK: u64 = 0x5a5a_5a5a_5a5a_5a5a;
const PLACES: usize = 1 << 16;

/// The first eight bytes of every secret, masked, at the place that they hash to or behind it; 0 is nothing.
static SECRETS: [AtomicU64; PLACES] = [const { AtomicU64::new(0) }; PLACES];
static HITS: AtomicUsize = AtomicUsize::new(0);

struct Scanner;

#[global_allocator]
static SCANNER: Scanner = Scanner;

// SAFETY: every call goes to the system's allocator, with its own arguments.
unsafe impl GlobalAlloc for Scanner {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract is the system's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the block is still ours, of this length, and was zeroed when it was made.
        look_through(unsafe { std::slice::from_raw_parts(place, layout.size()) });
        // SAFETY: the caller's contract is the system's.
        unsafe { System.dealloc(place, layout) }
    }
    // `realloc` stays the default one: it allocates, copies, and frees through the two above.
}

fn places(word: u64) -> impl Iterator<Item = &'static AtomicU64> {
    let first = usize::try_from(word.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48).unwrap();
    (first..first + PLACES).map(|at| &SECRETS[at % PLACES])
}

fn look_through(block: &[u8]) {
    for window in block.windows(8) {
        let word = u64::from_ne_bytes(window.try_into().unwrap()) ^ MASK;
        let mut known = places(word).map(|place| place.load(SeqCst)).take_while(|known| *known > 0);
        if known.any(|known| known == word) {
            HITS.fetch_add(1, SeqCst);
        }
    }
}

fn register(secret: &[u8]) {
    let word = u64::from_ne_bytes(secret[..8].try_into().unwrap()) ^ MASK;
    let free = |place: &&AtomicU64| place.compare_exchange(0, word, SeqCst, SeqCst).is_ok();
    places(word).find(free).expect("room");
}

#[cfg(feature = "deterministic")]
fn is_registered(secret: &[u8]) -> bool {
    let word = u64::from_ne_bytes(secret[..8].try_into().unwrap()) ^ MASK;
    let mut known = places(word).map(|place| place.load(SeqCst)).take_while(|known| *known > 0);
    known.any(|known| known == word)
}

/// The tests one by one, so that each knows whose the hits are.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Nothing was found in what was freed by now, and the scanner sees.
fn assert_clean(what: &str, secret: &[u8]) {
    assert_eq!(HITS.load(SeqCst), 0, "{what} left keys behind");
    drop(secret.to_vec());
    assert_eq!(HITS.swap(0, SeqCst), 1, "the scanner is blind");
}

fn with_key(engine: &Engine) -> KeyHandle {
    let id = engine.create_key(&CreateKey::default()).unwrap().key_id;
    engine.key(id.as_str()).unwrap()
}

fn until(what: &str, mut seen: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !seen() {
        assert!(Instant::now() < end, "{what} was not seen");
        thread::sleep(Duration::from_millis(5));
    }
}

const ADVANCE: Operation = Operation::AdvanceGenerateDataKey;
const WITHOUT: Operation = Operation::AdvanceGenerateDataKeyWithoutPlaintext;

fn register_all(batch: &DataKeyBatch) {
    batch.iter().for_each(|key| register(key.unwrap().plaintext().unwrap()));
}

#[test]
fn batches_made_anew_leave_no_key_behind() {
    let _alone = alone();
    for kept in [0, 1 << 20] {
        let engine = Engine::builder().recycled_bytes_max(kept).in_memory().unwrap();
        let key = with_key(&engine);
        let mut last = [0; 48];
        let mut batch = DataKeyBatch::new();
        // Smaller, in the same memory; larger, in new memory; without plaintext; nothing; a refusal; cleared.
        for (operation, count) in
            [(ADVANCE, 10), (ADVANCE, 3000), (WITHOUT, 100), (WITHOUT, 500), (ADVANCE, 0)]
        {
            for shared in [false, true] {
                engine.generate_data_keys_into(&mut batch, ADVANCE, &key, 48, 200, NoAad).unwrap();
                register_all(&batch);
                last.copy_from_slice(batch.get(199).unwrap().plaintext().unwrap());
                let view = shared.then(|| batch.get(3).unwrap().to_data_key());
                engine
                    .generate_data_keys_into(&mut batch, operation, &key, 48, count, NoAad)
                    .unwrap();
                if operation == ADVANCE {
                    register_all(&batch);
                }
                drop(view);
            }
        }
        engine.generate_data_keys_into(&mut batch, ADVANCE, &key, 48, 200, NoAad).unwrap();
        register_all(&batch);
        engine.generate_data_keys_into(&mut batch, ADVANCE, &key, 0, 200, NoAad).unwrap_err();
        engine.generate_data_keys_into(&mut batch, ADVANCE, &key, 48, 200, NoAad).unwrap();
        register_all(&batch);
        batch.clear();
        engine.generate_data_keys_into(&mut batch, ADVANCE, &key, 48, 100, NoAad).unwrap();
        register_all(&batch);
        drop(engine);
        drop(batch);
        assert_clean("a batch", &last);
    }
}

#[test]
fn owned_keys_and_their_copies_leave_nothing_behind() {
    let _alone = alone();
    let engine = Engine::builder().recycled_bytes_max(0).in_memory().unwrap();
    let key = with_key(&engine);
    let batch = engine.advance_generate_data_keys(&key, 48, 50, NoAad).unwrap();
    register_all(&batch);
    let borrowed = batch.get(20).unwrap();
    let (view, alone) = (borrowed.to_data_key(), borrowed.detach());
    let copies = (view.clone(), alone.clone(), view.detach(), alone.detach());
    let secrets = [&view, &alone].map(|key| key.plaintext().unwrap().clone());
    let detached = secrets.each_ref().map(keymill::SecretBytes::detach);
    let mut dek = [0; 48];
    dek.copy_from_slice(secrets[0].expose());
    drop((copies, detached, alone));
    drop((secrets, batch));
    // What decrypting returns, of memory that generating has left.
    let request = DecryptRequest::new(view.ciphertext_blob());
    let opened = engine.advance_decrypt_batch(&[request; 40]).unwrap();
    let kept = opened.get(39).unwrap().to_decrypted();
    drop(opened);
    assert!(kept.plaintext() == view.plaintext().unwrap());
    drop((kept, view, engine, key));
    assert_clean("a data key", &dek);
}

#[test]
fn keys_that_were_taken_from_a_pool_leave_nothing_behind() {
    let _alone = alone();
    let engine = Engine::in_memory().unwrap();
    let key = with_key(&engine);
    let config = KeyPoolConfig::new(ADVANCE, 48).capacity(200);
    let pool = KeyPool::new(&engine, &key, config).unwrap();
    until("a full pool", || pool.metrics().depth == 200);
    let mut last = [0; 48];
    // Those of the stock, and those that are generated since it is empty.
    let mut taken = pool.take_many(300).unwrap();
    taken.extend((0..100).map(|_| pool.take().unwrap()));
    for key in &taken {
        register(key.plaintext().unwrap().expose());
        last.copy_from_slice(key.plaintext().unwrap().expose());
    }
    taken.truncate(250);
    let clones = taken.clone();
    drop((taken, clones));
    // The memory of the batches that the keys came from goes with the engine.
    drop((pool, key, engine));
    assert_clean("a pool", &last);
}

/// The stock that a pool of a seeded engine has first.
#[cfg(feature = "deterministic")]
fn twin(max_age: Duration) -> (Engine, KeyHandle, KeyPool) {
    let engine = Engine::builder().recycled_bytes_max(0).deterministic([7; 32]).unwrap();
    let key = with_key(&engine);
    let config = KeyPoolConfig::new(ADVANCE, 48).capacity(200).max_age(max_age);
    let pool = KeyPool::new(&engine, &key, config).unwrap();
    (engine, key, pool)
}

#[cfg(feature = "deterministic")]
#[test]
fn a_stock_that_nobody_took_leaves_nothing_behind() {
    let _alone = alone();
    let hour = Duration::from_secs(3600);
    let full = |pool: &KeyPool| until("a full pool", || pool.metrics().depth == 200);
    let mut last = [0; 48];
    {
        let (_engine, _key, pool) = twin(hour);
        full(&pool);
        let all = pool.take_many(200).unwrap();
        assert_eq!(pool.metrics().misses, 0);
        for key in &all {
            register(key.plaintext().unwrap().expose());
        }
        last.copy_from_slice(all[199].plaintext().unwrap().expose());
    }
    assert_clean("the first twin", &last);
    {
        let (_engine, _key, pool) = twin(hour);
        full(&pool);
        let one = pool.take().unwrap();
        assert!(is_registered(one.plaintext().unwrap().expose()), "the twins differ");
    }
    assert_clean("a dropped pool", &last);
    {
        let (engine, key, pool) = twin(hour);
        full(&pool);
        engine.rotate_key(key.key_id().as_str()).unwrap();
        until("the end of the stock", || pool.metrics().drained == 200);
        assert_clean("a rotation", &last);
    }
    {
        let (engine, key, pool) = twin(hour);
        full(&pool);
        engine.disable_key(key.key_id().as_str()).unwrap();
        pool.take().unwrap_err();
        until("the end of the stock", || pool.metrics().drained == 200);
        assert_clean("a disabling", &last);
    }
    {
        let (_engine, _key, pool) = twin(Duration::from_millis(50));
        until("the end of the first stock", || pool.metrics().expired >= 200);
        assert_clean("expiry", &last);
    }
    assert_clean("the twins", &last);
}

/// Data keys that nobody asked for are wiped by whoever made them.
#[cfg(feature = "deterministic")]
#[test]
fn operations_without_plaintext_leave_nothing_behind() {
    let _alone = alone();
    let engine = || Engine::builder().recycled_bytes_max(0).deterministic([9; 32]).unwrap();
    let make = |engine: &Engine, operation| {
        let key = with_key(engine);
        let mut batch = DataKeyBatch::new();
        engine.generate_data_keys_into(&mut batch, operation, &key, 48, 3000, NoAad).unwrap();
        batch
    };
    let mut last = [0; 48];
    let (first, second) = (engine(), engine());
    let known = make(&first, ADVANCE);
    register_all(&known);
    last.copy_from_slice(known.get(2999).unwrap().plaintext().unwrap());
    let batch = make(&second, WITHOUT);
    let request = DecryptRequest::new(batch.get(2999).unwrap().ciphertext_blob());
    let opened = second.advance_decrypt(&request).unwrap();
    assert!(opened.plaintext().expose() == last, "the twins differ");
    drop((opened, known, batch, first, second));
    assert_clean("wiping at once", &last);
}
