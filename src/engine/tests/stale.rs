//! Stores that cannot be read, or do not answer.
//!
//! Method: a store in memory that plays one in a file, whose reads fail or hang when told to, and a steady clock that
//! tests turn. The engine's threads run as ever.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    batch::result::DataKeyBatch,
    clients::{Client, ClientId},
    cpu::Tier,
    engine::{DataKeyBuffers, Engine},
    error::{Error, ErrorKind, Result},
    keys::{Alias, KeyHandle, KeyId, KeyRecord, KeyVersionId, alias::AliasChange},
    request::{
        CreateKey, DecryptRequest, EncryptRequest, GenerateDataKeyRequest, Operation, aads::NoAad,
    },
    rng::Rng,
    store::{
        ClientChange, Grant, KeyChange, KeyStore, LeaseRequest, MemoryStore, NewKey, StoreImage,
    },
};

/// How reads end.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Answers,
    Fails(ErrorKind),
    Hangs,
}

#[derive(Clone)]
struct Moody(Arc<(MemoryStore, Mutex<Mood>, Condvar)>);

impl Moody {
    fn set(&self, mood: Mood) {
        *self.0.1.lock().unwrap() = mood;
        self.0.2.notify_all();
    }

    fn answer(&self) -> Result<()> {
        let mut mood = self.0.1.lock().unwrap();
        while *mood == Mood::Hangs {
            mood = self.0.2.wait(mood).unwrap();
        }
        match *mood {
            Mood::Fails(kind) => Err(Error::new(kind, "It is in a mood.")),
            _ => Ok(()),
        }
    }
}

impl KeyStore for Moody {
    fn load(&self) -> Result<StoreImage> {
        self.answer()?;
        self.0.0.load()
    }

    fn changes(&self) -> Result<u64> {
        self.answer()?;
        self.0.0.changes()
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn create(&self, key: &NewKey) -> Result<()> {
        self.0.0.create(key)
    }

    fn change(
        &self,
        key: &KeyId,
        decide: &mut dyn FnMut(&KeyRecord) -> Result<KeyChange>,
    ) -> Result<()> {
        self.0.0.change(key, decide)
    }

    fn change_alias(&self, alias: &Alias, change: AliasChange) -> Result<()> {
        self.0.0.change_alias(alias, change)
    }

    fn create_client(&self, client: &Client) -> Result<()> {
        self.0.0.create_client(client)
    }

    fn change_client(
        &self,
        client: &ClientId,
        decide: &mut dyn FnMut(&Client) -> Result<ClientChange>,
    ) -> Result<()> {
        self.0.0.change_client(client, decide)
    }

    fn lease(&self, version: &KeyVersionId, request: LeaseRequest) -> Result<Grant> {
        self.0.0.lease(version, request)
    }

    fn give_back(&self, version: &KeyVersionId, unused: u64) -> Result<()> {
        self.0.0.give_back(version, unused)
    }

    fn describe(&self) -> String {
        "moody".to_owned()
    }
}

/// An engine with `alias/a`, its store and its steady clock.
fn set_up() -> (Engine, Moody, Arc<AtomicU64>) {
    let parts = (MemoryStore::new(), Mutex::new(Mood::Answers), Condvar::new());
    let store = Moody(Arc::new(parts));
    let clock = Arc::new(AtomicU64::new(1_000_000));
    let (tier, now) = (Tier::detect().unwrap(), Arc::clone(&clock));
    let builder = Engine::builder().monotonic(move || now.load(Ordering::SeqCst));
    let engine = builder.start(Box::new(store.clone()), Rng::Os(tier), tier).unwrap();
    let alias = Some("alias/a".to_owned());
    engine.create_key(&CreateKey { alias, ..CreateKey::default() }).unwrap();
    (engine, store, clock)
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        thread::sleep(Duration::from_millis(5));
    }
}

const REQUEST: GenerateDataKeyRequest<'static> = GenerateDataKeyRequest::new("alias/a", 32);

/// Every way in, each with the error it met.
fn every_operation(
    engine: &Engine,
    key: &KeyHandle,
    blob: &[u8],
) -> Vec<(&'static str, Option<Error>)> {
    let decrypt = DecryptRequest::new(blob);
    let mut plaintext = [0; 32];
    let mut written = [0; 200];
    let mut iv = [0; 12];
    let buffers =
        DataKeyBuffers { plaintext: &mut plaintext, iv: &mut iv, ciphertext_blob: &mut written };
    let found = engine.key("alias/a");
    let mut all = vec![
        ("key", found.err()),
        ("single", engine.generate_data_key(&REQUEST).err()),
        ("advance", engine.advance_generate_data_key_without_plaintext(&REQUEST).err()),
        ("batch", engine.generate_data_key_batch(&[REQUEST; 3]).err()),
        ("encrypt", engine.encrypt(&EncryptRequest::new("alias/a", b"text")).err()),
        ("decrypt", engine.advance_decrypt(&decrypt).err()),
        ("decrypt batch", engine.advance_decrypt_batch(&[decrypt; 3]).err()),
        ("random", engine.generate_random(&mut [0; 16]).err()),
    ];
    let advance = Operation::AdvanceGenerateDataKey;
    let into = engine.generate_data_key_into(key, advance, b"", buffers);
    all.push(("into", into.err()));
    all
}

#[test]
fn a_store_that_cannot_be_read_is_gone_on_with_for_a_bounded_time() {
    let (engine, store, clock) = set_up();
    let key = engine.key("alias/a").unwrap();
    let made = engine.advance_generate_data_key(&REQUEST).unwrap();
    for kind in [ErrorKind::StoreUnavailable, ErrorKind::StoreCorrupt] {
        store.set(Mood::Fails(kind));
        // Told at the first failed look, and gone on with.
        wait_until("a failed look", || engine.store_health().failure.is_some());
        let health = engine.store_health();
        assert!(!health.is_refusing && health.failing_since.is_some());
        assert_eq!(health.is_grave, kind == ErrorKind::StoreCorrupt);
        clock.fetch_add(59_000, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(500));
        for (way, error) in every_operation(&engine, &key, made.ciphertext_blob()) {
            assert!(error.is_none(), "{way}: {error:?}");
        }
        clock.fetch_add(2_000, Ordering::SeqCst);
        let is_refused = || engine.generate_data_key(&REQUEST).is_err();
        wait_until("the refusal", is_refused);
        for (way, error) in every_operation(&engine, &key, made.ciphertext_blob()) {
            let error = error.unwrap_or_else(|| panic!("{way} was not refused"));
            assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{way}");
            let message = error.message();
            assert!(message.contains("It is in a mood.") && message.contains("since"), "{message}");
        }
        for result in [
            engine.generate_data_keys(&key, 32, 10, NoAad).map(drop),
            engine
                .stream_data_keys(&key, Operation::GenerateDataKey, 32, 10, NoAad)
                .unwrap()
                .next()
                .unwrap()
                .map(drop),
            engine
                .clone()
                .generate_data_key_batch_into(
                    &mut DataKeyBatch::default(),
                    Operation::GenerateDataKey,
                    &[REQUEST],
                )
                .map(drop),
        ] {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::StoreUnavailable);
        }
        assert!(engine.store_health().is_refusing);
        // Until it can be read again, and then all goes on by itself.
        store.set(Mood::Answers);
        wait_until("the recovery", || engine.generate_data_key(&REQUEST).is_ok());
        for (way, error) in every_operation(&engine, &key, made.ciphertext_blob()) {
            assert!(error.is_none(), "{way}: {error:?}");
        }
        let health = engine.store_health();
        assert!(health.failure.is_none() && !health.is_refusing);
    }
}

#[test]
fn a_look_that_hangs_is_a_look_that_failed() {
    let (engine, store, clock) = set_up();
    engine.generate_data_key(&REQUEST).unwrap();
    store.set(Mood::Hangs);
    // The thread that looks is inside by now, or soon.
    thread::sleep(Duration::from_secs(1));
    clock.fetch_add(6_000, Ordering::SeqCst);
    wait_until("the word of it", || engine.store_health().failure.is_some());
    engine.generate_data_key(&REQUEST).unwrap();
    clock.fetch_add(60_000, Ordering::SeqCst);
    wait_until("the refusal", || engine.generate_data_key(&REQUEST).is_err());
    let error = engine.generate_data_key(&REQUEST).unwrap_err();
    assert!(error.message().contains("has not ended"), "{error}");
    store.set(Mood::Answers);
    wait_until("the recovery", || engine.generate_data_key(&REQUEST).is_ok());
    // Nor does the end of the engine wait for it.
    store.set(Mood::Hangs);
    thread::sleep(Duration::from_secs(1));
    clock.fetch_add(6_000, Ordering::SeqCst);
    drop(engine);
    store.set(Mood::Answers);
}

#[test]
fn without_threads_the_callers_look() {
    let (engine, store, clock) = set_up();
    let process = engine.process();
    process.watching.end(&process.looks);
    assert!(!process.watching.is_watched());
    // What another engine changes is seen by the next operation that comes half a second later.
    engine.generate_data_key(&REQUEST).unwrap();
    let id = engine.key("alias/a").unwrap().key_id();
    let disable = |record: &KeyRecord| {
        let mut changed = record.clone();
        changed.disable()?;
        Ok(KeyChange::Save(changed, None))
    };
    store.change(&id, &mut { disable }).unwrap();
    clock.fetch_add(500, Ordering::SeqCst);
    let error = engine.generate_data_key(&REQUEST).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Disabled);
    engine.enable_key("alias/a").unwrap();
    // A store that cannot be read is gone on with for a while only.
    store.set(Mood::Fails(ErrorKind::StoreUnavailable));
    for _ in 0..59 {
        clock.fetch_add(1_000, Ordering::SeqCst);
        engine.generate_data_key(&REQUEST).unwrap();
    }
    clock.fetch_add(2_000, Ordering::SeqCst);
    let error = engine.generate_data_key(&REQUEST).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
    store.set(Mood::Answers);
    engine.generate_data_key(&REQUEST).unwrap();
}
