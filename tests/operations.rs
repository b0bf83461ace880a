//! The semantics of the operations, through the public API: versions, rotation, states, due work, bounds, and what
//! decryption refuses.
//!
//! Method: engines in memory and on files, with an injected clock; every rule of the KMS that the documentation of an
//! operation names is held here.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use keymill::{
    CreateKey, DecryptRequest, DueWork, Engine, ErrorKind, GenerateDataKeyRequest, ImportKey,
    KeySpec, KeyState, RootKey, RotationPeriod, Scheme,
};

const DAY: u64 = 86_400;

/// A clock that tests turn.
#[derive(Clone, Default)]
struct Clock(Arc<AtomicU64>);

impl Clock {
    fn at_day(day: u64) -> Self {
        Self(Arc::new(AtomicU64::new(day * DAY)))
    }

    fn turn_to_day(&self, day: u64) {
        self.0.store(day * DAY, Ordering::Relaxed);
    }

    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.0.load(Ordering::Relaxed))
    }
}

fn engine_at(clock: &Clock) -> Engine {
    let clock = clock.clone();
    Engine::builder().clock(move || clock.now()).in_memory().unwrap()
}

fn days(days: u64) -> Option<RotationPeriod> {
    Some(RotationPeriod::new(Duration::from_secs(days * DAY)).unwrap())
}

fn named(alias: &str) -> CreateKey {
    CreateKey { alias: Some(alias.into()), ..CreateKey::default() }
}

fn direct(alias: &str) -> CreateKey {
    CreateKey { scheme: Some(Scheme::Direct), ..named(alias) }
}

const REQUEST: GenerateDataKeyRequest<'static> = GenerateDataKeyRequest::new("alias/a", 32);

#[test]
fn after_a_rotation_generate_keeps_the_initial_version_and_advance_takes_the_new_one() {
    for create in [named("alias/a"), direct("alias/a")] {
        let engine = Engine::in_memory().unwrap();
        engine.create_key(&create).unwrap();
        let mut made = Vec::new();
        for _ in 0..4 {
            for _ in 0..3 {
                made.push((false, engine.generate_data_key(&REQUEST).unwrap()));
                made.push((true, engine.advance_generate_data_key(&REQUEST).unwrap()));
            }
            engine.rotate_key("alias/a").unwrap();
        }
        let key = engine.describe_key("alias/a").unwrap();
        assert_eq!(key.versions.len(), 5);
        let raw = engine.generate_data_key(&REQUEST).unwrap();
        assert_eq!(raw.key_version_id(), key.initial_version().key_version_id);
        let advanced = engine.advance_generate_data_key(&REQUEST).unwrap();
        assert_eq!(advanced.key_version_id(), key.primary_version().key_version_id);
        for (describes_itself, made) in &made {
            let request = DecryptRequest::new(made.ciphertext_blob());
            let opened = if *describes_itself {
                engine.advance_decrypt(&request)
            } else {
                engine.decrypt(&request.key_id("alias/a").iv(made.iv()))
            };
            let opened = opened.unwrap();
            assert_eq!(Some(opened.plaintext()), made.plaintext());
            assert_eq!(opened.key_version_id(), made.key_version_id());
        }
    }
}

#[test]
fn due_rotations_and_deletions_happen_at_their_time_and_not_before() {
    let clock = Clock::at_day(1000);
    let engine = engine_at(&clock);
    engine.create_key(&CreateKey { rotation_period: days(30), ..named("alias/a") }).unwrap();
    engine.create_key(&named("alias/b")).unwrap();
    engine.schedule_key_deletion("alias/b", 30).unwrap();
    let b = engine.describe_key("alias/b").unwrap().key_id;

    clock.turn_to_day(1029);
    let report = engine.run_due().unwrap();
    assert!(report.rotated.is_empty() && report.deleted.is_empty());

    clock.turn_to_day(1030);
    let report = engine.run_due().unwrap();
    assert_eq!((report.rotated.len(), report.deleted), (1, vec![b]));
    assert_eq!(engine.describe_key("alias/a").unwrap().versions.len(), 2);
    for name in ["alias/b", b.as_str()] {
        assert_eq!(engine.describe_key(name).unwrap_err().kind(), ErrorKind::KeyNotFound);
        assert_eq!(engine.cancel_key_deletion(name).unwrap_err().kind(), ErrorKind::KeyNotFound);
    }
    // Once, counted from when it happened.
    assert!(engine.run_due().unwrap().rotated.is_empty());
    clock.turn_to_day(1061);
    assert_eq!(engine.run_due().unwrap().rotated.len(), 1);
}

#[test]
fn what_becomes_due_while_an_engine_lives_happens_by_itself() {
    let clock = Clock::at_day(1000);
    let engine = engine_at(&clock);
    engine.create_key(&CreateKey { rotation_period: days(30), ..named("alias/a") }).unwrap();
    engine.create_key(&named("alias/b")).unwrap();
    engine.schedule_key_deletion("alias/b", 30).unwrap();
    clock.turn_to_day(1030);
    let done = || engine.describe_key("alias/a").unwrap().versions.len() == 2;
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(std::time::Instant::now() < deadline, "nothing happened");
        std::thread::sleep(Duration::from_millis(20));
    }
    // A deletion never follows from a clock that jumped.
    assert!(engine.describe_key("alias/b").is_ok());
    assert_eq!(engine.take_due_events().len(), 1);
    assert_eq!(engine.run_due().unwrap().deleted.len(), 1);
}

#[test]
fn what_was_due_while_no_engine_ran_happens_when_one_opens() {
    let home = tempfile::tempdir().unwrap();
    let root = RootKey::from_bytes(&[5; 32]).unwrap();
    let (clock, path) = (Clock::at_day(1000), home.path().join("keys.db"));
    let open = |clock: &Clock| {
        let clock = clock.clone();
        Engine::builder().clock(move || clock.now())
    };
    let engine = open(&clock).create(&path, &root).unwrap();
    engine.create_key(&CreateKey { rotation_period: days(7), ..named("alias/a") }).unwrap();
    engine.create_key(&named("alias/b")).unwrap();
    engine.schedule_key_deletion("alias/b", 7).unwrap();
    drop(engine);
    clock.turn_to_day(1007);
    let engine = open(&clock).open(&path, &root).unwrap();
    assert_eq!(engine.describe_key("alias/a").unwrap().versions.len(), 2);
    assert_eq!(engine.take_due_events().len(), 1);
    // Opening deletes nothing, whatever the clock says.
    assert!(engine.describe_key("alias/b").is_ok());
    assert_eq!(engine.run_due().unwrap().deleted.len(), 1);
    assert_eq!(engine.describe_key("alias/b").unwrap_err().kind(), ErrorKind::KeyNotFound);
}

#[test]
fn due_work_waits_for_the_request_where_it_is_told_to() {
    let home = tempfile::tempdir().unwrap();
    let root = RootKey::from_bytes(&[5; 32]).unwrap();
    let (clock, path) = (Clock::at_day(1000), home.path().join("keys.db"));
    let builder = |clock: &Clock| {
        let clock = clock.clone();
        Engine::builder().clock(move || clock.now()).due_work(DueWork::OnRequest)
    };
    let engine = builder(&clock).create(&path, &root).unwrap();
    engine.create_key(&CreateKey { rotation_period: days(7), ..named("alias/a") }).unwrap();
    drop(engine);
    clock.turn_to_day(1007);
    let engine = builder(&clock).open(&path, &root).unwrap();
    assert_eq!(engine.describe_key("alias/a").unwrap().versions.len(), 1);
    assert_eq!(engine.run_due().unwrap().rotated.len(), 1);
}

#[test]
fn a_disabled_key_suspends_its_rotation() {
    let clock = Clock::at_day(1000);
    let engine = engine_at(&clock);
    engine.create_key(&CreateKey { rotation_period: days(7), ..named("alias/a") }).unwrap();
    engine.disable_key("alias/a").unwrap();
    clock.turn_to_day(1100);
    assert!(engine.run_due().unwrap().rotated.is_empty());
    engine.enable_key("alias/a").unwrap();
    assert_eq!(engine.run_due().unwrap().rotated.len(), 1);
}

#[test]
fn shortening_the_period_into_the_past_rotates_at_once() {
    let clock = Clock::at_day(1000);
    let engine = engine_at(&clock);
    engine.create_key(&CreateKey { rotation_period: days(300), ..named("alias/a") }).unwrap();
    clock.turn_to_day(1100);
    assert_eq!(engine.set_rotation("alias/a", days(200)).unwrap().versions.len(), 1);
    assert_eq!(engine.set_rotation("alias/a", days(90)).unwrap().versions.len(), 2);
    assert_eq!(engine.set_rotation("alias/a", None).unwrap().rotation_period, None);
}

#[test]
fn states_refuse_what_the_kms_says_they_refuse() {
    let engine = Engine::in_memory().unwrap();
    engine.create_key(&named("alias/a")).unwrap();
    let made = engine.advance_generate_data_key(&REQUEST).unwrap();
    let open = DecryptRequest::new(made.ciphertext_blob());
    let kind =
        |result: keymill::Result<_>| result.map(|_: keymill::KeyMetadata| ()).unwrap_err().kind();

    assert_eq!(kind(engine.cancel_key_deletion("alias/a")), ErrorKind::StateModifiedFailed);
    engine.disable_key("alias/a").unwrap();
    engine.disable_key("alias/a").unwrap();
    assert_eq!(engine.generate_data_key(&REQUEST).unwrap_err().kind(), ErrorKind::Disabled);
    assert_eq!(engine.advance_decrypt(&open).unwrap_err().kind(), ErrorKind::Disabled);
    assert_eq!(kind(engine.rotate_key("alias/a")), ErrorKind::Disabled);

    engine.enable_key("alias/a").unwrap();
    engine.advance_decrypt(&open).unwrap();
    for wrong in [0, 6, 367] {
        let refused = engine.schedule_key_deletion("alias/a", wrong);
        assert_eq!(kind(refused), ErrorKind::InvalidParameter);
    }
    engine.schedule_key_deletion("alias/a", 366).unwrap();
    assert_eq!(engine.generate_data_key(&REQUEST).unwrap_err().kind(), ErrorKind::PendingDeletion);
    assert_eq!(engine.advance_decrypt(&open).unwrap_err().kind(), ErrorKind::PendingDeletion);
    for refused in [
        engine.enable_key("alias/a"),
        engine.disable_key("alias/a"),
        engine.schedule_key_deletion("alias/a", 7),
    ] {
        assert_eq!(kind(refused), ErrorKind::StateModifiedFailed);
    }
    let alias = engine.create_alias("alias/x", "alias/a").unwrap_err();
    assert_eq!(alias.kind(), ErrorKind::StateModifiedFailed);
    assert_eq!(engine.cancel_key_deletion("alias/a").unwrap().state, KeyState::Enabled);
    engine.advance_decrypt(&open).unwrap();
}

#[test]
fn aliases_lead_to_keys_and_move() {
    let engine = Engine::in_memory().unwrap();
    let a = engine.create_key(&named("alias/a")).unwrap().key_id;
    let b = engine.create_key(&CreateKey::default()).unwrap().key_id;
    let taken = engine.create_alias("alias/a", b.as_str()).unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::AliasAlreadyExists);
    assert_eq!(
        engine.create_key(&named("alias/a")).unwrap_err().kind(),
        ErrorKind::AliasAlreadyExists
    );
    engine.create_alias("alias/b", "alias/a").unwrap();
    engine.update_alias("alias/a", b.as_str()).unwrap();
    assert_eq!(engine.generate_data_key(&REQUEST).unwrap().key_id(), b);
    let listed: Vec<_> = engine.list_aliases().unwrap();
    let listed: Vec<_> = listed.iter().map(|(alias, key)| (alias.as_str(), *key)).collect();
    assert_eq!(listed, [("alias/a", b), ("alias/b", a)]);
    engine.delete_alias("alias/a").unwrap();
    assert_eq!(engine.generate_data_key(&REQUEST).unwrap_err().kind(), ErrorKind::KeyNotFound);
    for error in [engine.delete_alias("alias/a"), engine.update_alias("alias/a", b.as_str())] {
        assert_eq!(error.unwrap_err().kind(), ErrorKind::AliasNotFound);
    }
    let missing = engine.create_alias("alias/c", "alias/nobody").unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::KeyNotFound);
}

#[test]
fn imported_keys_have_their_rules() {
    let engine = Engine::in_memory().unwrap();
    for len in [0, 15, 17, 31, 33, 64] {
        let error = engine.import_key(&ImportKey::new(&vec![1; len])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidKeyMaterial, "{len}");
        assert!(error.message().contains(&len.to_string()), "{error}");
    }
    for (len, spec, scheme) in [
        (16, KeySpec::Aes128, Scheme::Direct),
        (24, KeySpec::Aes192, Scheme::Direct),
        (32, KeySpec::Aes256, Scheme::Derived),
    ] {
        let material = vec![u8::try_from(len).unwrap(); len];
        let key = engine.import_key(&ImportKey::new(&material)).unwrap();
        assert_eq!((key.spec, key.scheme), (spec, scheme));
        let id = key.key_id;
        let error = engine.rotate_key(id.as_str()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnsupportedOperation);
        let error = engine.set_rotation(id.as_str(), days(30)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnsupportedOperation);
        let again = ImportKey { scheme: Some(Scheme::Direct), ..ImportKey::new(&material) };
        let error = engine.import_key(&again).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidKeyMaterial);
    }
    for spec in [KeySpec::Aes128, KeySpec::Aes192] {
        let wish = CreateKey { spec, scheme: Some(Scheme::Derived), ..CreateKey::default() };
        assert_eq!(engine.create_key(&wish).unwrap_err().kind(), ErrorKind::InvalidParameter);
    }
}

const LAST_THREE: u64 = (1 << 32) - 3;

#[test]
fn a_direct_version_gives_its_last_three_wraps_and_no_more() {
    for lease_max in [0, 1, 1 << 20] {
        let engine =
            Engine::builder().initial_spent(LAST_THREE).lease_max(lease_max).in_memory().unwrap();
        engine.create_key(&direct("alias/a")).unwrap();
        engine.create_key(&direct("alias/b")).unwrap();
        let batch = engine.generate_data_key_batch(&[REQUEST; 8]).unwrap();
        let good: Vec<_> = batch.iter().map(|key| key.is_ok()).collect();
        assert_eq!(good, [true, true, true, false, false, false, false, false]);
        assert_eq!(batch.errors()[0].kind(), ErrorKind::LimitExceeded);

        let single = GenerateDataKeyRequest::new("alias/b", 16);
        for nth in 0..8 {
            let made = engine.generate_data_key(&single);
            assert_eq!(made.is_ok(), nth < 3, "{nth}");
        }
        let refused = engine.advance_generate_data_key(&single).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::LimitExceeded);
        assert_eq!(engine.describe_key("alias/b").unwrap().versions[0].wraps_granted, 1 << 32);
    }
}

#[test]
fn a_batch_that_is_refused_for_its_size_spends_no_wraps() {
    let engine = Engine::builder().lease_max(0).in_memory().unwrap();
    engine.create_key(&direct("alias/a")).unwrap();
    let large = vec![GenerateDataKeyRequest::new("alias/a", 1024); 600_000];
    let error = engine.generate_data_key_batch(&large).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitExceeded);
    assert_eq!(engine.describe_key("alias/a").unwrap().versions[0].wraps_granted, 0);
}

#[test]
fn an_advance_operation_goes_on_with_a_new_version_when_a_rotating_key_is_spent() {
    let engine = Engine::builder().initial_spent(LAST_THREE).in_memory().unwrap();
    for alias in ["alias/a", "alias/b"] {
        engine.create_key(&CreateKey { rotation_period: days(30), ..direct(alias) }).unwrap();
    }
    // New versions begin with three wraps as well, so a batch of five needs exactly one more version.
    let batch = engine.advance_generate_data_key_batch(&[REQUEST; 3]).unwrap();
    assert!(batch.errors().is_empty());
    let spent = batch.get(0).unwrap().key_version_id();
    let next = engine.advance_generate_data_key(&REQUEST).unwrap();
    assert_ne!(next.key_version_id(), spent);
    for nth in 0..12 {
        let request = GenerateDataKeyRequest::new("alias/b", 16);
        assert!(engine.advance_generate_data_key(&request).is_ok(), "{nth}");
    }
    assert!(engine.describe_key("alias/b").unwrap().versions.len() >= 4);
    // A batch that no version can serve alone is served by a new one as far as that goes, in request order.
    let batch = engine.advance_generate_data_key_batch(&[REQUEST; 8]).unwrap();
    let good: Vec<_> = batch.iter().map(|key| key.is_ok()).collect();
    assert_eq!(good, [true, true, true, false, false, false, false, false]);
    // The initial version does not recover for those who insist on it.
    let initial = GenerateDataKeyRequest::new("alias/b", 16);
    let made = (0..8).filter(|_| engine.generate_data_key(&initial).is_ok()).count();
    assert!(made < 3, "{made}");
    assert_eq!(engine.generate_data_key(&initial).unwrap_err().kind(), ErrorKind::LimitExceeded);
}

#[test]
fn a_rotating_key_gets_a_new_version_at_half_its_bound() {
    let engine = Engine::builder().initial_spent((1 << 31) - 2).lease_max(0).in_memory().unwrap();
    engine.create_key(&CreateKey { rotation_period: days(30), ..direct("alias/a") }).unwrap();
    let versions = || engine.describe_key("alias/a").unwrap().versions.len();
    engine.generate_data_key(&REQUEST).unwrap();
    assert_eq!(versions(), 1);
    engine.generate_data_key(&REQUEST).unwrap();
    assert_eq!(versions(), 2);
    engine.generate_data_key(&REQUEST).unwrap();
    assert_eq!(versions(), 2);
}

#[test]
fn using_the_initial_version_of_a_rotating_key_is_counted() {
    let engine = Engine::in_memory().unwrap();
    engine.create_key(&CreateKey { rotation_period: days(30), ..named("alias/a") }).unwrap();
    engine.generate_data_key(&REQUEST).unwrap();
    engine.generate_data_key_batch(&[REQUEST; 5]).unwrap();
    engine.advance_generate_data_key_batch(&[REQUEST; 5]).unwrap();
    assert_eq!(engine.initial_version_uses(), 6);
}

fn as_raw<'a>(alias: &'a str, blob: &'a [u8], iv: &'a [u8]) -> DecryptRequest<'a> {
    DecryptRequest::new(blob).key_id(alias).iv(iv).aad(b"right")
}

/// Every way in which a blob, an AAD or an IV can be wrong is one error, message included.
#[test]
fn cryptographic_failures_cannot_be_told_apart() {
    let engine = Engine::in_memory().unwrap();
    engine.create_key(&named("alias/a")).unwrap();
    engine.create_key(&direct("alias/d")).unwrap();
    let reference = "InternalFailure: Internal Failure.";
    for alias in ["alias/a", "alias/d"] {
        let request = GenerateDataKeyRequest::new(alias, 16).aad(b"right");
        let raw = engine.generate_data_key(&request).unwrap();
        let advanced = engine.advance_generate_data_key(&request).unwrap();
        let refused = |request: &DecryptRequest<'_>, what: &str| {
            let singles = [engine.advance_decrypt(request), engine.decrypt(request)];
            let batch = engine.advance_decrypt_batch(std::slice::from_ref(request)).unwrap();
            for error in [singles[0].as_ref().unwrap_err(), batch.get(0).unwrap_err()] {
                assert_eq!(error.to_string(), reference, "{alias} {what}");
                assert_eq!(error.http_status(), 500);
            }
        };
        let blob: Vec<u8> = raw.ciphertext_blob().to_vec();
        for len in 0..blob.len() {
            refused(&as_raw(alias, &blob[..len], raw.iv()), "raw, cut");
        }
        let long: Vec<u8> = blob.iter().copied().chain([0]).collect();
        refused(&as_raw(alias, &long, raw.iv()), "raw, longer");
        refused(&as_raw(alias, &vec![7; 5000], raw.iv()), "raw, far too long");
        for bit in 0..8 * blob.len() {
            let mut flipped = blob.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            refused(&as_raw(alias, &flipped, raw.iv()), "raw, flipped");
        }
        for bit in 0..96 {
            let mut iv = raw.iv().to_vec();
            iv[bit / 8] ^= 1 << (bit % 8);
            refused(&as_raw(alias, &blob, &iv), "iv, flipped");
        }
        refused(&as_raw(alias, &blob, raw.iv()).aad(b"wrong"), "raw, aad");
        refused(&as_raw(alias, &blob, raw.iv()).aad(b""), "raw, no aad");

        let blob: Vec<u8> = advanced.ciphertext_blob().to_vec();
        for len in 0..blob.len() {
            refused(&DecryptRequest::new(&blob[..len]).aad(b"right"), "advanced, cut");
            refused(&as_raw(alias, &blob[..len], advanced.iv()), "advanced with everything, cut");
        }
        for bit in 0..8 * blob.len() {
            let mut flipped = blob.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            refused(&DecryptRequest::new(&flipped).aad(b"right"), "advanced, flipped");
        }
        refused(&DecryptRequest::new(&blob).aad(b"wrong"), "advanced, aad");
    }
}

#[test]
fn parameters_of_decrypt_have_their_own_errors() {
    let engine = Engine::in_memory().unwrap();
    let a = engine.create_key(&named("alias/a")).unwrap().key_id;
    engine.create_key(&named("alias/b")).unwrap();
    let raw = engine.generate_data_key(&REQUEST).unwrap();
    let advanced = engine.advance_generate_data_key(&REQUEST).unwrap();
    let good = DecryptRequest::new(raw.ciphertext_blob()).key_id("alias/a").iv(raw.iv());
    let kind = |result: keymill::Result<keymill::Decrypted>| result.unwrap_err().kind();

    use ErrorKind::*;
    for len in [0, 11, 13, 16] {
        assert_eq!(kind(engine.decrypt(&good.iv(&[0; 16][..len]))), InvalidParameter, "{len}");
    }
    assert_eq!(kind(engine.decrypt(&DecryptRequest { iv: None, ..good })), InvalidParameter);
    assert_eq!(kind(engine.decrypt(&DecryptRequest { key_id: None, ..good })), InvalidParameter);
    let other = DecryptRequest { algorithm: Some("AES_CBC"), ..good };
    assert_eq!(kind(engine.decrypt(&other)), InvalidParameter);
    for name in ["AES_GCM", ""] {
        engine.decrypt(&DecryptRequest { algorithm: Some(name), ..good }).unwrap();
    }
    assert_eq!(kind(engine.decrypt(&good.key_id("alias/no"))), KeyNotFound);
    assert_eq!(kind(engine.decrypt(&good.key_id("alias/b"))), DecryptFailed);
    let long = vec![0; 8193];
    assert_eq!(kind(engine.decrypt(&good.aad(&long))), InvalidParameter);

    // The migration header stands in for the key id, in `decrypt` alone.
    let version = engine.describe_key("alias/a").unwrap().versions[0].key_version_id;
    let by_version =
        DecryptRequest { key_id: None, key_version_id: Some(version.as_str()), ..good };
    engine.decrypt(&by_version).unwrap();
    let unknown = format!("{}-0000000000", a);
    let unknown = DecryptRequest { key_version_id: Some(&unknown), ..by_version };
    assert_eq!(kind(engine.decrypt(&unknown)), KeyNotFound);

    // A self-describing blob ignores IV and algorithm, and refuses another key's id.
    let described = DecryptRequest::new(advanced.ciphertext_blob());
    let noisy = DecryptRequest { algorithm: Some("AES_CBC"), ..described.iv(b"short") };
    engine.advance_decrypt(&noisy.key_id("alias/a")).unwrap();
    assert_eq!(kind(engine.advance_decrypt(&described.key_id("alias/b"))), InvalidParameter);
    assert_eq!(kind(engine.advance_decrypt(&described.key_id("alias/no"))), KeyNotFound);
    // So it does when it is cut behind the id of its version: there is no second reading as a raw one.
    for len in 39..advanced.ciphertext_blob().len() {
        let cut = DecryptRequest::new(&advanced.ciphertext_blob()[..len]);
        let noisy = DecryptRequest { algorithm: Some("AES_CBC"), ..cut.iv(b"short") };
        for request in [cut, cut.key_id("alias/a"), noisy, noisy.key_id("alias/a")] {
            assert_eq!(kind(engine.advance_decrypt(&request)), DecryptFailed, "{len}");
        }
        assert_eq!(kind(engine.advance_decrypt(&cut.key_id("alias/b"))), InvalidParameter, "{len}");
    }
    // And `decrypt` reads it as raw.
    let raw_read = described.key_id("alias/a").iv(advanced.iv());
    assert_eq!(kind(engine.decrypt(&raw_read)), DecryptFailed);
}

#[test]
fn a_failed_item_of_a_decrypting_batch_leaves_its_neighbours_alone() {
    let engine = Engine::in_memory().unwrap();
    engine.create_key(&named("alias/a")).unwrap();
    engine.create_key(&direct("alias/d")).unwrap();
    let requests: Vec<_> = (0..600)
        .map(|i| {
            let alias = if i % 2 == 0 { "alias/a" } else { "alias/d" };
            GenerateDataKeyRequest::new(alias, 1 + i % 40)
        })
        .collect();
    let batch = engine.advance_generate_data_key_batch(&requests).unwrap();
    let mut blobs: Vec<_> =
        batch.iter().map(|key| key.unwrap().ciphertext_blob().to_vec()).collect();
    for (i, blob) in blobs.iter_mut().enumerate().filter(|(i, _)| i % 7 == 3) {
        let at = 51 + i % (blob.len() - 51);
        blob[at] ^= 0x10;
    }
    let opening: Vec<_> = blobs.iter().map(|blob| DecryptRequest::new(blob)).collect();
    let opened = engine.advance_decrypt_batch(&opening).unwrap();
    for (i, (opened, made)) in opened.iter().zip(batch.iter()).enumerate() {
        match opened {
            Ok(opened) => assert_eq!(opened.plaintext(), made.unwrap().plaintext().unwrap()),
            Err(error) => {
                assert_eq!((error.kind(), error.index()), (ErrorKind::DecryptFailed, Some(i)))
            }
        }
        assert_eq!(opened.is_err(), i % 7 == 3, "{i}");
    }
}
