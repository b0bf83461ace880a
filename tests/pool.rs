//! The pool of data keys ahead of need: stock and fall-through, limits, its numbers, and no stale key ever.
//!
//! Method: pools are filled, emptied by one taker or many, and met by everything that can happen to their KEK. After a
//! rotation, a disabling or a deletion the very next take has to know. What is promised "within a second" is waited for
//! with a generous deadline. Tests run one after another, so that a pool's thread can be told by its name.
#![cfg(target_os = "linux")]

use std::{
    collections::HashSet,
    fs,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use keymill::{
    CreateKey, DataKey, DecryptRequest, DueWork, Engine, ErrorKind, KeyHandle, KeyPool,
    KeyPoolConfig, KeyPoolMetrics, Operation, RootKey, Scheme, limits,
};

const OPERATIONS: [Operation; 4] = [
    Operation::GenerateDataKey,
    Operation::GenerateDataKeyWithoutPlaintext,
    Operation::AdvanceGenerateDataKey,
    Operation::AdvanceGenerateDataKeyWithoutPlaintext,
];

const ADVANCE: Operation = Operation::AdvanceGenerateDataKey;

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn new_key(engine: &Engine, scheme: Scheme) -> KeyHandle {
    let key = CreateKey { scheme: Some(scheme), ..CreateKey::default() };
    let id = engine.create_key(&key).unwrap().key_id;
    engine.key(id.as_str()).unwrap()
}

fn engine_with_key() -> (Engine, KeyHandle) {
    let engine = Engine::in_memory().unwrap();
    let key = new_key(&engine, Scheme::Derived);
    (engine, key)
}

fn until(what: &str, mut seen: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !seen() {
        assert!(Instant::now() < end, "{what} was not seen");
        thread::sleep(Duration::from_millis(5));
    }
}

fn until_full(pool: &KeyPool) {
    until("a full pool", || {
        let metrics = pool.metrics();
        metrics.depth == metrics.capacity
    });
}

/// The numbers once the thread is at rest, when every take was a hit or a miss.
fn until_all_are_counted(pool: &KeyPool, takes: u64) -> KeyPoolMetrics {
    let sum = |metrics: &KeyPoolMetrics| metrics.hits + metrics.misses;
    until("rest", || sum(&pool.metrics()) == takes);
    thread::sleep(limits::KEY_POOL_TICK);
    let metrics = pool.metrics();
    assert_eq!(sum(&metrics), takes, "{metrics:?}");
    metrics
}

/// Opens keys of a pool with this AAD, and returns their plaintexts.
fn open(engine: &Engine, keys: &[DataKey], aad: &[u8]) -> Vec<Vec<u8>> {
    let ids: Vec<_> = keys.iter().map(DataKey::key_id).collect();
    let opening: Vec<_> = (keys.iter().zip(&ids))
        .map(|(key, id)| {
            DecryptRequest::new(key.ciphertext_blob()).key_id(id.as_str()).iv(key.iv()).aad(aad)
        })
        .collect();
    let opened = engine.advance_decrypt_batch(&opening).unwrap();
    let plaintexts = opened.iter().zip(keys).map(|(opened, key)| {
        let opened = opened.unwrap();
        assert_eq!(opened.key_version_id(), key.key_version_id());
        let same = |plaintext: &keymill::SecretBytes| plaintext.expose() == opened.plaintext();
        assert!(key.plaintext().is_none_or(same));
        opened.plaintext().to_vec()
    });
    plaintexts.collect()
}

#[test]
fn a_pool_gives_what_it_has_and_generates_what_it_lacks() {
    let _alone = alone();
    for scheme in [Scheme::Derived, Scheme::Direct] {
        for operation in OPERATIONS {
            let engine = Engine::in_memory().unwrap();
            let key = new_key(&engine, scheme);
            let config = KeyPoolConfig::new(operation, 40).aad(b"pool").capacity(100);
            let pool = KeyPool::new(&engine, &key, config).unwrap();
            until_full(&pool);
            let mut keys: Vec<_> = (0..50).map(|_| pool.take().unwrap()).collect();
            let metrics = pool.metrics();
            assert_eq!((metrics.hits, metrics.misses, metrics.depth), (50, 0, 50));
            assert_eq!((metrics.refills, metrics.refill_failures), (1, 0));
            assert!(metrics.last_error.is_none() && metrics.refill_time > Duration::ZERO);

            assert!(pool.take_many(0).unwrap().is_empty());
            keys.extend(pool.take_many(1).unwrap());
            keys.extend(pool.take_many(1000).unwrap());
            assert_eq!(keys.len(), 1051);
            // By now the thread refills as it can; nobody waits for it.
            keys.extend((0..3000).map(|_| pool.take().unwrap()));
            let metrics = until_all_are_counted(&pool, 4051);
            assert!(metrics.misses >= 901 && metrics.hits >= 100, "{metrics:?}");
            assert_eq!((metrics.expired, metrics.drained), (0, 0));
            let few = keys.iter().all(|key| key.plaintext().is_some());
            assert_eq!(few, operation.returns_plaintext());
            let plaintexts = open(&engine, &keys, b"pool");
            assert!(plaintexts.iter().all(|plaintext| plaintext.len() == 40));
            assert_eq!(plaintexts.iter().collect::<HashSet<_>>().len(), 4051, "a key twice");
        }
    }
}

#[test]
fn a_new_pool_does_not_wait_for_its_stock() {
    let _alone = alone();
    let (engine, key) = engine_with_key();
    for capacity in [1, 2, 1 << 20] {
        let config = KeyPoolConfig::new(ADVANCE, 32).capacity(capacity);
        let pool = KeyPool::new(&engine, &key, config).unwrap();
        let keys: Vec<_> = (0..500).map(|_| pool.take().unwrap()).collect();
        assert_eq!(pool.key().key_id(), key.key_id());
        drop(pool);
        assert_eq!(open(&engine, &keys, b"").len(), 500);
    }
}

#[test]
fn what_is_wrong_with_a_configuration_is_said_clearly() {
    let _alone = alone();
    let (engine, key) = engine_with_key();
    let (_other, stranger) = engine_with_key();
    let good = || KeyPoolConfig::new(ADVANCE, 32);
    let long = vec![0; limits::AAD_LEN_MAX + 1];
    let most = limits::KEY_POOL_CAPACITY_MAX;
    for (key, config, says) in [
        (&key, KeyPoolConfig::new(ADVANCE, 0), "NumberOfBytes 0"),
        (&key, KeyPoolConfig::new(ADVANCE, 1025), "NumberOfBytes 1025"),
        (&key, good().aad(&long), "8193"),
        (&key, good().capacity(0), "capacity 0"),
        (&key, good().capacity(most + 1), "capacity 1048577"),
        (&key, good().capacity(usize::MAX), "capacity"),
        (&key, good().capacity(10).low_watermark(11), "low watermark 11"),
        (&key, good().max_age(Duration::ZERO), "maximum age"),
        (&stranger, good(), "another engine"),
    ] {
        let error = KeyPool::new(&engine, key, config).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidParameter);
        assert!(error.message().contains(says), "{error}");
    }
    for config in [
        good().aad(&long[1..]).capacity(1).low_watermark(1),
        good().capacity(10).low_watermark(0),
        good().max_age(Duration::from_nanos(1)),
        good().max_age(Duration::MAX),
        KeyPoolConfig::new(ADVANCE, 1024),
    ] {
        let pool = KeyPool::new(&engine, &key, config).unwrap();
        pool.take().unwrap();
    }
    let pool = KeyPool::new(&engine, &key, good()).unwrap();
    let error = pool.take_many(limits::BATCH_ITEMS_MAX + 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitExceeded);
}

#[test]
fn keys_of_many_takers_are_all_different() {
    let _alone = alone();
    for scheme in [Scheme::Derived, Scheme::Direct] {
        let engine = Engine::in_memory().unwrap();
        let key = new_key(&engine, scheme);
        let config = KeyPoolConfig::new(ADVANCE, 32).capacity(700);
        let pool = KeyPool::new(&engine, &key, config).unwrap();
        // On a machine that is busy the takers may be through before its thread has a turn.
        until_full(&pool);
        let all = thread::scope(|scope| {
            let takers: Vec<_> = (0..8)
                .map(|number| {
                    let pool = &pool;
                    scope.spawn(move || {
                        let mut taken = Vec::new();
                        for turn in 0..1000 {
                            match (turn + number) % 10 {
                                0 => taken.extend(pool.take_many(11).unwrap()),
                                _ => taken.push(pool.take().unwrap()),
                            }
                        }
                        taken
                    })
                })
                .collect();
            takers.into_iter().flat_map(|taker| taker.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(all.len(), 16_000);
        let plaintexts = open(&engine, &all, b"");
        assert_eq!(plaintexts.iter().collect::<HashSet<_>>().len(), 16_000, "a key twice");
        let ids: HashSet<_> = all.iter().map(DataKey::request_id).collect();
        assert_eq!(ids.len(), 16_000, "a request id twice");
        let metrics = until_all_are_counted(&pool, 16_000);
        assert!(metrics.hits > 0);
    }
}

/// Takers that run while `change` happens again and again; each says what it found by `check`.
fn amid_takers(pool: &KeyPool, check: impl Fn(&KeyPool) + Sync, change: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(SeqCst) {
                    check(pool);
                }
            });
        }
        // Also if it panics, or the takers would run for ever.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(change));
        stop.store(true, SeqCst);
        done.unwrap_or_else(|why| std::panic::resume_unwind(why));
    });
}

#[test]
fn no_take_after_a_rotation_gives_a_key_of_before() {
    let _alone = alone();
    let (engine, key) = engine_with_key();
    let id = key.key_id();
    let pool = KeyPool::new(&engine, &key, KeyPoolConfig::new(ADVANCE, 32)).unwrap();
    let versions = Mutex::new(Vec::new());
    let newest = AtomicUsize::new(0);
    versions.lock().unwrap().push(pool.take().unwrap().key_version_id());
    let check = |pool: &KeyPool| {
        let at_least = newest.load(SeqCst);
        let version = pool.take().unwrap().key_version_id();
        let known = versions.lock().unwrap().iter().position(|known| *known == version);
        assert!(known.is_none_or(|number| number >= at_least), "a stale key");
    };
    amid_takers(&pool, check, || {
        for round in 0..150 {
            if round % 3 == 0 {
                until_full_or_low(&pool);
            }
            let rotated = engine.rotate_key(id.as_str()).unwrap();
            let new = rotated.primary_version().key_version_id;
            assert_eq!(pool.take().unwrap().key_version_id(), new, "the very next take");
            assert!(pool.take_many(20).unwrap().iter().all(|key| key.key_version_id() == new));
            let mut versions = versions.lock().unwrap();
            versions.push(new);
            newest.store(versions.len() - 1, SeqCst);
        }
    });
    assert!(pool.metrics().drained > 0, "{:?}", pool.metrics());
    // A raw pool goes on with the initial version.
    let config = KeyPoolConfig::new(Operation::GenerateDataKey, 32);
    let raw = KeyPool::new(&engine, &key, config).unwrap();
    until_full(&raw);
    let initial = engine.describe_key(id.as_str()).unwrap().initial_version().key_version_id;
    engine.rotate_key(id.as_str()).unwrap();
    assert!(raw.take_many(2000).unwrap().iter().all(|key| key.key_version_id() == initial));
}

/// Gives the thread time for some stock, however fast the takers are.
fn until_full_or_low(pool: &KeyPool) {
    until("stock", || pool.metrics().depth > 0);
}

#[test]
fn a_disabled_or_deleted_key_has_no_data_keys_left() {
    let _alone = alone();
    let now = Arc::new(AtomicUsize::new(1000));
    let clock = Arc::clone(&now);
    let builder = Engine::builder().due_work(DueWork::OnRequest).clock(move || {
        SystemTime::UNIX_EPOCH + Duration::from_secs(86_400 * clock.load(SeqCst) as u64)
    });
    let engine = builder.in_memory().unwrap();
    for operation in OPERATIONS {
        let key = new_key(&engine, Scheme::Derived);
        let id = key.key_id();
        let pool = KeyPool::new(&engine, &key, KeyPoolConfig::new(operation, 32)).unwrap();
        // Odd while the key is disabled.
        let epoch = AtomicUsize::new(0);
        let check = |pool: &KeyPool| {
            let before = epoch.load(SeqCst);
            let taken = pool.take();
            if before % 2 == 1 && epoch.load(SeqCst) == before {
                let error = taken.expect_err("the key is disabled");
                assert!(matches!(error.kind(), ErrorKind::Disabled | ErrorKind::PendingDeletion));
            }
        };
        amid_takers(&pool, check, || {
            for round in 0..10 {
                until("stock", || pool.metrics().depth > 0);
                let pending = round % 5 == 4;
                if pending {
                    engine.schedule_key_deletion(id.as_str(), 7).unwrap();
                } else {
                    engine.disable_key(id.as_str()).unwrap();
                }
                epoch.fetch_add(1, SeqCst);
                let kind = if pending { ErrorKind::PendingDeletion } else { ErrorKind::Disabled };
                assert_eq!(pool.take().expect_err("the very next take").kind(), kind);
                assert_eq!(pool.take_many(2).expect_err("and many").kind(), kind);
                epoch.fetch_add(1, SeqCst);
                if pending {
                    engine.cancel_key_deletion(id.as_str()).unwrap();
                }
                engine.enable_key(id.as_str()).unwrap();
                pool.take().expect("the key is enabled");
            }
        });
        until("stock", || pool.metrics().depth > 0);
        engine.schedule_key_deletion(id.as_str(), 7).unwrap();
        now.fetch_add(8, SeqCst);
        assert_eq!(engine.run_due().unwrap().deleted, [id]);
        assert_eq!(pool.take().unwrap_err().kind(), ErrorKind::KeyNotFound);
        until("the end of the stock", || pool.metrics().depth == 0);
    }
}

/// Keys that were made in the middle of a change wait among fresh ones: they have to go, too.
#[test]
fn a_rotation_amid_a_refill_leaves_no_stale_key_waiting() {
    let _alone = alone();
    let (engine, key) = engine_with_key();
    let id = key.key_id();
    let capacity = 200_000;
    let config = KeyPoolConfig::new(ADVANCE, 32).capacity(capacity);
    let pool = KeyPool::new(&engine, &key, config).unwrap();
    until("a part of the stock", || pool.metrics().depth > 0);
    let stock = pool.metrics().depth;
    let new = engine.rotate_key(id.as_str()).unwrap().primary_version().key_version_id;
    assert!(stock < capacity, "the stock was complete before the rotation");
    let numbers = || {
        let metrics = pool.metrics();
        (metrics.depth, metrics.drained, metrics.refills)
    };
    until("the end of the stale keys, and rest", || {
        let before = numbers();
        thread::sleep(2 * limits::KEY_POOL_TICK);
        before.1 >= stock as u64 && before == numbers()
    });
    let before = pool.metrics();
    assert_eq!(before.misses, 0);
    let taken = pool.take_many(before.depth).unwrap();
    assert!(taken.iter().all(|key| key.key_version_id() == new));
    assert_eq!(pool.metrics().misses, 0, "a stale key was in the way");
}

#[test]
fn what_another_engine_does_to_the_key_is_seen() {
    let _alone = alone();
    let home = tempfile::tempdir().unwrap();
    let store = home.path().join("keys.db");
    let root = RootKey::from_bytes(&[8; 32]).unwrap();
    let here = Engine::create(&store, &root).unwrap();
    let key = new_key(&here, Scheme::Derived);
    let id = key.key_id();
    let there = Engine::open(&store, &root).unwrap();
    let pool = KeyPool::new(&here, &key, KeyPoolConfig::new(ADVANCE, 32)).unwrap();
    until_full(&pool);
    for _ in 0..3 {
        let new = there.rotate_key(id.as_str()).unwrap().primary_version().key_version_id;
        until("the rotation", || pool.take().unwrap().key_version_id() == new);
        // Once it is seen there is no way back.
        assert!(pool.take_many(3000).unwrap().iter().all(|key| key.key_version_id() == new));
        until_full(&pool);
    }
    there.disable_key(id.as_str()).unwrap();
    until("the disabling", || pool.take().is_err_and(|error| error.kind() == ErrorKind::Disabled));
    assert!((0..100).all(|_| pool.take().is_err()));
    until("the end of the stock", || pool.metrics().depth == 0);
    there.enable_key(id.as_str()).unwrap();
    until_full(&pool);
    pool.take().unwrap();
    assert_eq!(pool.metrics().last_error.map(|error| error.kind()), None);
}

#[test]
fn keys_expire_and_others_take_their_place() {
    let _alone = alone();
    let (engine, key) = engine_with_key();
    let config = KeyPoolConfig::new(ADVANCE, 32).capacity(64).max_age(Duration::from_millis(60));
    let pool = KeyPool::new(&engine, &key, config).unwrap();
    until("two generations of expired keys", || pool.metrics().expired >= 128);
    until_full(&pool);
    assert_eq!((pool.metrics().hits, pool.metrics().drained), (0, 0));
    drop(pool);

    // With wraps for one stock alone, an expired key cannot be replaced, and so can be told.
    let spent = limits::WRAPS_PER_VERSION_MAX - 20;
    let engine = Engine::builder().initial_spent(spent).in_memory().unwrap();
    let key = new_key(&engine, Scheme::Direct);
    let config = KeyPoolConfig::new(ADVANCE, 32).capacity(20).max_age(Duration::from_millis(300));
    let pool = KeyPool::new(&engine, &key, config).unwrap();
    until("all wraps in stock", || {
        let metrics = pool.metrics();
        metrics.depth as u64 + metrics.expired == 20
    });
    thread::sleep(Duration::from_millis(330));
    for _ in 0..20 {
        assert_eq!(pool.take().unwrap_err().kind(), ErrorKind::LimitExceeded);
    }
    until("the end of the stock", || pool.metrics().expired == 20);
    let metrics = pool.metrics();
    assert_eq!((metrics.depth, metrics.hits, metrics.misses), (0, 0, 20), "{metrics:?}");
    let error = || pool.metrics().last_error.map(|error| error.kind());
    until("the failed refill", || error() == Some(ErrorKind::LimitExceeded));
}

#[test]
fn a_pool_that_fails_leaves_others_alone_and_recovers() {
    let _alone = alone();
    let engine = Engine::in_memory().unwrap();
    let (bad, good) = (new_key(&engine, Scheme::Derived), new_key(&engine, Scheme::Derived));
    let config = || KeyPoolConfig::new(ADVANCE, 32).capacity(200).low_watermark(200);
    engine.disable_key(bad.key_id().as_str()).unwrap();
    // A pool can be made of a key in any state.
    let failing = KeyPool::new(&engine, &bad, config()).unwrap();
    let other = KeyPool::new(&engine, &good, config()).unwrap();
    for _ in 0..2 {
        until_full(&other);
        until("a failed refill", || failing.metrics().refill_failures > 0);
        let metrics = failing.metrics();
        assert_eq!(metrics.last_error.map(|error| error.kind()), Some(ErrorKind::Disabled));
        assert_eq!((metrics.depth, metrics.hits), (0, metrics.hits));
        assert_eq!(failing.take().unwrap_err().kind(), ErrorKind::Disabled);
        let misses = other.metrics().misses;
        (0..100).for_each(|_| drop(other.take().unwrap()));
        assert_eq!(other.metrics().misses, misses);
        assert_eq!(other.metrics().refill_failures, 0);

        engine.enable_key(bad.key_id().as_str()).unwrap();
        until_full(&failing);
        until("the end of the error", || failing.metrics().last_error.is_none());
        assert_eq!(failing.take().unwrap().key_id(), bad.key_id());
        let failures = failing.metrics().refill_failures;
        engine.disable_key(bad.key_id().as_str()).unwrap();
        until("the next failure", || failing.metrics().refill_failures > failures);
    }
}

/// Threads of this process that fill pools.
fn pool_threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok);
    let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.trim_end() == "keymill-pool").count()
}

#[test]
fn a_pool_that_is_dropped_ends_its_thread() {
    let _alone = alone();
    let (engine, key) = engine_with_key();
    // What earlier tests waited for may still be listed for a moment.
    until("the end of all threads", || pool_threads() == 0);
    let bad = new_key(&engine, Scheme::Derived);
    engine.disable_key(bad.key_id().as_str()).unwrap();
    for capacity in [1, 1000, 1 << 20] {
        for (key, wait) in [(&key, false), (&key, true), (&bad, true)] {
            let config = KeyPoolConfig::new(ADVANCE, 32).capacity(capacity);
            let pool = Arc::new(KeyPool::new(&engine, key, config).unwrap());
            // It gives itself its name.
            until("the thread", || pool_threads() == 1);
            if wait {
                until("some work", || {
                    let metrics = pool.metrics();
                    metrics.refills + metrics.refill_failures > 0
                });
            }
            let second = Arc::clone(&pool);
            drop(pool);
            assert!(second.take().is_ok() || key.key_id() == bad.key_id());
            drop(second);
            until("the end of the thread", || pool_threads() == 0);
        }
    }
}
