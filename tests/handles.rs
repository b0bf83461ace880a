//! Key handles: a key found once, followed from then on.
//!
//! Method: a handle is made, then its key is rotated, disabled, scheduled for deletion, deleted, or its alias is
//! pointed elsewhere, by this engine or by another one on the same file; every call that takes a handle has to see it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use keymill::{
    CreateKey, DataKeyBatch, DataKeyBuffers, DueWork, Engine, Error, ErrorKind, KeyHandle, KeyPool,
    KeyPoolConfig, KeyVersionId, NoAad, Operation, RootKey, Scheme, limits,
};

const OPERATIONS: [Operation; 4] = [
    Operation::GenerateDataKey,
    Operation::GenerateDataKeyWithoutPlaintext,
    Operation::AdvanceGenerateDataKey,
    Operation::AdvanceGenerateDataKeyWithoutPlaintext,
];

fn named(alias: &str, scheme: Scheme) -> CreateKey {
    CreateKey { alias: Some(alias.into()), scheme: Some(scheme), ..CreateKey::default() }
}

fn root_key() -> RootKey {
    RootKey::from_bytes(&[5; 32]).unwrap()
}

fn is_raw(operation: Operation) -> bool {
    matches!(operation, Operation::GenerateDataKey | Operation::GenerateDataKeyWithoutPlaintext)
}

/// One key by every call that takes a handle and an operation: the version that each wrapped under.
fn by_every_call(
    engine: &Engine,
    key: &KeyHandle,
    operation: Operation,
) -> Vec<Result<KeyVersionId, Error>> {
    let mut all = Vec::new();
    let first = |batch: &DataKeyBatch| batch.get(0).unwrap().key_version_id();
    let mut batch = DataKeyBatch::new();
    let made = engine.generate_data_keys_into(&mut batch, operation, key, 32, 40, NoAad);
    all.push(made.map(|()| first(&batch)));
    all.push(match operation {
        Operation::GenerateDataKey => {
            engine.generate_data_keys(key, 32, 1, NoAad).map(|batch| first(&batch))
        }
        _ => engine.generate_data_keys_into(&mut batch, operation, key, 32, 1, NoAad).map(|()| {
            assert_eq!(batch.len(), 1);
            first(&batch)
        }),
    });
    if operation == Operation::AdvanceGenerateDataKey {
        let made = engine.advance_generate_data_keys(key, 32, 3, NoAad);
        all.push(made.map(|batch| first(&batch)));
    }
    let (mut plaintext, mut iv) = ([1; 32], [0; limits::IV_LEN]);
    let mut blob = [0; 32 + 79];
    let buffers =
        DataKeyBuffers { plaintext: &mut plaintext, iv: &mut iv, ciphertext_blob: &mut blob };
    let written = engine.generate_data_key_into(key, operation, b"", buffers);
    if written.is_err() {
        assert_eq!(plaintext, [0; 32], "a key is left of a failed call");
    }
    all.push(written.map(|written| written.key_version_id));
    let stream = engine.stream_data_keys(key, operation, 32, 5, NoAad);
    all.push(stream.and_then(|mut stream| {
        let window = stream.next().expect("five keys were asked for");
        window.map(|batch| first(&batch))
    }));
    let pool = KeyPool::new(engine, key, KeyPoolConfig::new(operation, 32));
    all.push(pool.and_then(|pool| pool.take()).map(|key| key.key_version_id()));
    all
}

fn assert_refused(engine: &Engine, key: &KeyHandle, kind: ErrorKind) {
    for operation in OPERATIONS {
        for (nth, made) in by_every_call(engine, key, operation).into_iter().enumerate() {
            let error = made.expect_err("the key refuses");
            assert_eq!(error.kind(), kind, "{operation:?}, call {nth}: {error}");
        }
    }
}

fn assert_wraps_under(engine: &Engine, key: &KeyHandle, raw: KeyVersionId, advance: KeyVersionId) {
    for operation in OPERATIONS {
        let version = if is_raw(operation) { raw } else { advance };
        for (nth, made) in by_every_call(engine, key, operation).into_iter().enumerate() {
            assert_eq!(made.unwrap(), version, "{operation:?}, call {nth}");
        }
    }
}

#[test]
fn a_handle_follows_rotation_state_and_deletion() {
    for scheme in [Scheme::Derived, Scheme::Direct] {
        let days = Arc::new(AtomicU64::new(1000));
        let clock = Arc::clone(&days);
        let now = move || {
            let seconds = clock.load(Ordering::Relaxed) * 86_400;
            SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
        };
        let builder = Engine::builder().clock(now).due_work(DueWork::OnRequest);
        let engine = builder.in_memory().unwrap();
        engine.create_key(&named("alias/a", scheme)).unwrap();
        let key = engine.key("alias/a").unwrap();
        assert_eq!(key.key_id(), engine.describe_key("alias/a").unwrap().key_id);
        let id = key.key_id();
        let initial = engine.describe_key("alias/a").unwrap().initial_version().key_version_id;
        assert_wraps_under(&engine, &key, initial, initial);
        for _ in 0..3 {
            let rotated = engine.rotate_key("alias/a").unwrap();
            let primary = rotated.primary_version().key_version_id;
            assert_ne!(primary, initial);
            assert_wraps_under(&engine, &key, initial, primary);
        }
        let primary = engine.describe_key("alias/a").unwrap().primary_version().key_version_id;
        engine.disable_key("alias/a").unwrap();
        assert_refused(&engine, &key, ErrorKind::Disabled);
        // A handle can be made of a key in any state.
        assert_refused(&engine, &engine.key("alias/a").unwrap(), ErrorKind::Disabled);
        engine.enable_key("alias/a").unwrap();
        assert_wraps_under(&engine, &key, initial, primary);
        engine.schedule_key_deletion("alias/a", 7).unwrap();
        assert_refused(&engine, &key, ErrorKind::PendingDeletion);
        engine.cancel_key_deletion("alias/a").unwrap();
        engine.enable_key("alias/a").unwrap();
        assert_wraps_under(&engine, &key, initial, primary);
        engine.schedule_key_deletion("alias/a", 7).unwrap();
        days.store(1008, Ordering::Relaxed);
        assert_eq!(engine.run_due().unwrap().deleted, [id]);
        assert_refused(&engine, &key, ErrorKind::KeyNotFound);
        assert_eq!(engine.key("alias/a").unwrap_err().kind(), ErrorKind::KeyNotFound);
        assert_eq!(key.key_id(), id, "a handle names its key for ever");
        // A namesake is another key.
        engine.create_key(&named("alias/a", scheme)).unwrap();
        assert_refused(&engine, &key, ErrorKind::KeyNotFound);
    }
}

#[test]
fn an_alias_that_moves_leaves_its_handles_behind() {
    let engine = Engine::in_memory().unwrap();
    let [a, b] = ["alias/a", "alias/b"]
        .map(|alias| engine.create_key(&named(alias, Scheme::Derived)).unwrap().key_id);
    let key = engine.key("alias/a").unwrap();
    engine.update_alias("alias/a", "alias/b").unwrap();
    assert_eq!(engine.key("alias/a").unwrap().key_id(), b);
    let made = engine.generate_data_keys(&key, 16, 2, NoAad).unwrap();
    assert_eq!((made.get(1).unwrap().key_id(), key.key_id()), (a, a));
    engine.delete_alias("alias/a").unwrap();
    assert_eq!(engine.key("alias/a").unwrap_err().kind(), ErrorKind::KeyNotFound);
    let made = engine.generate_data_keys(&key, 16, 2, NoAad).unwrap();
    assert_eq!(made.get(1).unwrap().key_id(), a);
}

#[test]
fn a_handle_is_worth_nothing_to_another_engine() {
    let home = tempfile::tempdir().unwrap();
    let store = home.path().join("keys.db");
    let engine = Engine::create(&store, &root_key()).unwrap();
    engine.create_key(&named("alias/a", Scheme::Derived)).unwrap();
    let key = engine.key("alias/a").unwrap();
    // Not even to one on the same store, which has the same key.
    let other = Engine::open(&store, &root_key()).unwrap();
    assert_eq!(other.key("alias/a").unwrap().key_id(), key.key_id());
    assert_refused(&other, &key, ErrorKind::InvalidParameter);
    assert_refused(&engine, &other.key("alias/a").unwrap(), ErrorKind::InvalidParameter);
    // Clones are the same engine.
    let version = engine.describe_key("alias/a").unwrap().initial_version().key_version_id;
    assert_wraps_under(&engine.clone(), &key.clone(), version, version);
}

#[test]
fn a_handle_may_outlive_its_engine() {
    let home = tempfile::tempdir().unwrap();
    let store = home.path().join("keys.db");
    let engine = Engine::create(&store, &root_key()).unwrap();
    engine.create_key(&named("alias/a", Scheme::Direct)).unwrap();
    let key = engine.key("alias/a").unwrap();
    // A pool and a stream are clones of the engine, and work on as long as they live.
    let config = KeyPoolConfig::new(Operation::AdvanceGenerateDataKey, 32).capacity(10);
    let pool = KeyPool::new(&engine, &key, config).unwrap();
    let advance = Operation::AdvanceGenerateDataKey;
    let stream = engine.stream_data_keys(&key, advance, 32, 100_000, NoAad).unwrap();
    drop(engine);
    let streamed: usize = stream.map(|window| window.unwrap().len()).sum();
    assert_eq!(streamed, 100_000);
    for _ in 0..50 {
        assert_eq!(pool.take().unwrap().key_id(), key.key_id());
    }
    assert_eq!(pool.key().key_id(), key.key_id());
    drop(pool);
    assert!(format!("{key:?}").contains(key.key_id().as_str()));
    let again = Engine::open(&store, &root_key()).unwrap();
    assert_refused(&again, &key, ErrorKind::InvalidParameter);
    drop((key.clone(), key));
    let version = again.describe_key("alias/a").unwrap().initial_version().key_version_id;
    assert_wraps_under(&again, &again.key("alias/a").unwrap(), version, version);
}

/// Asks until `seen` says yes. A second is promised; a slow machine gets more.
fn until(what: &str, mut seen: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !seen() {
        assert!(Instant::now() < end, "{what} was not seen");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_another_engine_does_to_the_key_is_seen_through_the_handle() {
    let home = tempfile::tempdir().unwrap();
    let store = home.path().join("keys.db");
    let here = Engine::create(&store, &root_key()).unwrap();
    here.create_key(&named("alias/a", Scheme::Derived)).unwrap();
    let key = here.key("alias/a").unwrap();
    let there = Engine::open(&store, &root_key()).unwrap();
    let initial = there.describe_key("alias/a").unwrap().initial_version().key_version_id;
    let make = || {
        let batch = here.advance_generate_data_keys(&key, 32, 1, NoAad)?;
        Ok::<_, Error>(batch.get(0).unwrap().key_version_id())
    };
    let refused = |kind| make().is_err_and(|error| error.kind() == kind);
    let rotated = there.rotate_key("alias/a").unwrap().primary_version().key_version_id;
    until("the rotation", || make().unwrap() == rotated);
    assert_wraps_under(&here, &key, initial, rotated);
    there.disable_key("alias/a").unwrap();
    until("the disabling", || refused(ErrorKind::Disabled));
    there.enable_key("alias/a").unwrap();
    until("the enabling", || make().is_ok());
    there.schedule_key_deletion("alias/a", 7).unwrap();
    until("the pending deletion", || refused(ErrorKind::PendingDeletion));
    // An engine that is told to, eight days later, executes the deletion.
    let later = SystemTime::now() + Duration::from_secs(8 * 86_400);
    let engine = Engine::builder().clock(move || later).open(&store, &root_key()).unwrap();
    assert_eq!(engine.run_due().unwrap().deleted.len(), 1);
    drop(engine);
    until("the deletion", || refused(ErrorKind::KeyNotFound));
    assert_refused(&here, &key, ErrorKind::KeyNotFound);
    // A key that another engine made is found at once.
    let made = there.create_key(&named("alias/new", Scheme::Derived)).unwrap();
    assert_eq!(here.key("alias/new").unwrap().key_id(), made.key_id);
    assert_eq!(here.key(made.key_id.as_str()).unwrap().key_id(), made.key_id);
}
